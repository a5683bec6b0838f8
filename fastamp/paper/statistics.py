"""What the runs of a table come to: means, paired differences, intervals and p-values, by scipy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from fastamp.paper.plan import Cell

CONFIDENCE = 0.95
ENOUGH_PAIRS = 6  # the fewest that can differ at p < 0.05: 2 / 2^5 = 0.0625, 2 / 2^6 = 0.031
# Errors are 100 k / n. Differences and bounds are rounded to so many decimals: otherwise 10.4 - 10.2 and 0.2 have two
# ranks, and a bound that is zero but for a rounding error leaves zero out.
_DECIMALS = 9
_RESAMPLES = 9999
_EXACT = 13


@dataclass(frozen=True)
class Summary:
    """Errors of a cell, in percent: number of seeds, mean, and sample standard deviation (None for one seed)."""

    n: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class Paired:
    """A method against a baseline, over the seeds that both have."""

    n: int  # number of such seeds
    unequal: int  # of them those at which the two differ; the others do not count in the test
    difference: float  # mean of method - baseline, in points of percent; below zero the method is better
    interval: tuple[float, float] | None  # bootstrap interval of `difference` at `CONFIDENCE`; None for one pair
    p: float  # of the Wilcoxon signed-rank test, two-sided; 1 where no pair differs
    # (m_baseline - m_method) / m_baseline in percent, of the means over these seeds; None for a baseline without errors
    improvement: float | None

    @property
    def reading(self) -> str:
        """One of "better", "worse", "within noise" (the interval holds zero), and "one seed" (there is none)."""
        if self.interval is None:
            return "one seed"
        low, high = self.interval
        return "better" if high < 0 else "worse" if low > 0 else "within noise"

    @property
    def enough(self) -> bool:
        """Whether p could be below 0.05 at all."""
        return self.unequal >= ENOUGH_PAIRS


def finished(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs that are done, sorted by cell and seed, of what `results.read` gives."""
    done = (record for record in records if record["status"] == "done")
    return sorted(done, key=lambda r: (r["dataset"], r["model"], r["method"], r["ratio"], r["seed"]))


def by_cell(runs: Iterable[Mapping[str, Any]], metric: str = "test_error") -> dict[Cell, dict[int, float]]:
    """A metric of runs that are done, a field of `TrainResult`, by cell and seed."""
    values: dict[Cell, dict[int, float]] = {}
    for run in runs:
        cell = Cell(*(run[field.name] for field in fields(Cell)))
        values.setdefault(cell, {})[run["seed"]] = run["result"][metric]
    return values


def distances(
    runs: Iterable[Mapping[str, Any]], dataset: str, model: str, ratio: float, level: str
) -> dict[str, dict[Any, dict[int, float]]]:
    """How far test errors are apart over training, |a - b| by step, in points, at one place and level.

    Returns:
        by seed "AMP" and the "placebo" against Mixup; and as "seeds" any two seeds of Mixup. What was not run is not
        there.
    """
    errors: dict[str, dict[int, dict[int, float]]] = {}
    for run in runs:
        if (run["dataset"], run["model"], run["ratio"]) == (dataset, model, ratio):
            by_step = {record["step"]: record["test_error"] for record in run["history"]}
            errors.setdefault(run["method"], {})[run["seed"]] = by_step
    mixup, amp, placebo = (errors.get(f"{level}-{kind}", {}) for kind in ("mixup", "amp", "amp@placebo"))

    def apart(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
        return {step: round(abs(one[step] - other[step]), _DECIMALS) for step in one if step in other}

    found: dict[str, dict[Any, dict[int, float]]] = {
        "AMP": {seed: apart(amp[seed], mixup[seed]) for seed in amp if seed in mixup},
        "placebo": {seed: apart(placebo[seed], mixup[seed]) for seed in placebo if seed in mixup},
        "seeds": {(a, b): apart(mixup[a], mixup[b]) for a, b in combinations(mixup, 2)},
    }
    return {name: curves for name, curves in found.items() if curves}


def summary(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of at least one value."""
    return Summary(len(values), float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Bootstrap interval of the mean at `CONFIDENCE`, the same at every call; None for fewer than two values.

    Bias-corrected and accelerated (Efron, 1987); where that is not defined, by percentiles. For few values it is too
    narrow: over n draws of Gaussian noise about zero it leaves zero out in 50%, 27%, 17%, 9% and 7% of cases for
    n = 2, 3, 5, 10 and 20 (2000 simulations each).
    """
    if len(values) < 2:
        return None
    if len(set(values)) == 1:
        return values[0], values[0]
    for method in ("BCa", "percentile"):
        found = stats.bootstrap(
            (np.asarray(values),),
            np.mean,
            n_resamples=_RESAMPLES,
            confidence_level=CONFIDENCE,
            method=method,
            rng=np.random.default_rng(0),
        ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return round(float(found.low), _DECIMALS), round(float(found.high), _DECIMALS)


def signed_rank_p(differences: Sequence[float]) -> float:
    """Two-sided p of the Wilcoxon signed-rank test; 1 where all differences are zero.

    Zeros are dropped, as Wilcoxon does. For up to `_EXACT` others p is exact, ties or not: the signed ranks under all
    signs. For more it is `scipy.stats.wilcoxon`'s, which is exact up to 50 without ties, and then approximates.
    """
    unequal = np.array([difference for difference in differences if difference != 0])
    if not unequal.size:
        return 1.0
    if not 2 <= unequal.size <= _EXACT:
        return float(stats.wilcoxon(unequal).pvalue)
    # wilcoxon does the same for ties, in a loop that takes a hundred times as long.
    signed_ranks = np.sign(unequal) * stats.rankdata(np.abs(unequal))
    test = stats.permutation_test(
        (signed_ranks,), np.sum, permutation_type="samples", vectorized=True, n_resamples=2**_EXACT
    )
    return float(test.pvalue)


def paired(method: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """Compares the errors of two cells, by seed; None where they have no seed in common."""
    seeds = sorted(method.keys() & baseline.keys())
    if not seeds:
        return None
    differences = [round(method[seed] - baseline[seed], _DECIMALS) for seed in seeds]
    of_baseline = float(np.mean([baseline[seed] for seed in seeds]))
    difference = float(np.mean(differences))
    return Paired(
        n=len(seeds),
        unequal=sum(d != 0 for d in differences),
        difference=difference,
        interval=interval(differences),
        p=signed_rank_p(differences),
        improvement=-100 * difference / of_baseline if of_baseline else None,
    )


def adjusted(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number: false discovery rate by Benjamini and Hochberg (1995).

    It holds for comparisons that are independent or positively dependent.
    """
    return [float(q) for q in stats.false_discovery_control(p_values, method="bh")] if p_values else []
