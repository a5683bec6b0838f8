"""Which experiments a results folder shows, and their tables in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from fastamp.data import DATASETS
from fastamp.paper.plan import EXPERIMENTS, METHODS, Cell, Experiment
from fastamp.paper.published import PublishedCell
from fastamp.paper.statistics import Paired, adjusted, by_cell, paired, summary
from fastamp.training.recipes import RECIPES

Line = Mapping[str, Any]  # of results.jsonl

MISSING = "–"
NOT_AT_HAND = "not at hand"
UNEVEN = "†"
TOO_FEW = "‡"
LEAST = "least_test_error"
LEAST_LABEL = "least (selected on test)"
SIGNIFICANT = 0.05

# What there is of a field of `Cell`, in the order of tables.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "dataset": DATASETS,
    "model": tuple(RECIPES),
    "method": tuple(METHODS),
    "ratio": (),
}


@dataclass(frozen=True)
class View:
    """An experiment, and those of its runs that are done."""

    name: str
    experiment: Experiment  # its extent is that of the plan and what else was asked for
    runs: tuple[Line, ...]

    def present(self, field: str) -> list[Any]:
        """The values of a field of `Cell` that any run has, in the plan's order."""
        there = {run[field] for run in self.runs}
        return [value for value in getattr(self.experiment, f"{field}s") if value in there]

    def label(self, method: str) -> str:
        """The name of a method in this table."""
        return self.experiment.labels.get(method) or method_label(method)


@dataclass(frozen=True)
class Comparison:
    """A method against its baseline at one place of a table."""

    method: Cell
    baseline: Cell
    paired: Paired
    q: float


def views(runs: Sequence[Line], requests: Sequence[Mapping[str, Any]]) -> list[View]:
    """The experiments that a folder's requests ask for, each with the runs that are done within its extent."""
    found = []
    for name, planned in EXPERIMENTS.items():
        asked = [request for request in requests if request["experiment"] == name]
        experiment = _extended(planned, asked)
        held = (run for run in runs if all(run[field] in getattr(experiment, f"{field}s") for field in _KNOWN))
        if asked and (those := tuple(held)):
            found.append(View(name, experiment, those))
    return found


def _extended(experiment: Experiment, requests: Iterable[Mapping[str, Any]]) -> Experiment:
    """The experiment with more names behind its own, in the order of their registries."""
    extent: dict[str, Any] = {}
    for field, known in _KNOWN.items():
        own = getattr(experiment, f"{field}s")
        more = {value for request in requests for value in request[f"{field}s"]} - {*own}
        extent[f"{field}s"] = (*own, *(value for value in known if value in more), *sorted(more - {*known}))
    return replace(experiment, **{**extent, "ratios": tuple(sorted(extent["ratios"]))})


def model_label(name: str) -> str:
    """The paper's name of a backbone."""
    return RECIPES[name].label if name in RECIPES else name


def method_label(name: str) -> str:
    """The paper's name of a method."""
    return METHODS[name].label if name in METHODS else name


def ratio_label(ratio: float) -> str:
    """A share in percent."""
    return f"{100 * ratio:g}%"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are aligned to the left, the others to the right."""
    rule = [":--"] * left + ["--:"] * (len(header) - left)
    lines = (header, rule, *rows)
    return "\n".join("| " + " | ".join(field.replace("|", r"\|") for field in line) + " |" for line in lines)


def error_table(
    view: View, published: Mapping[PublishedCell, float] | None = None, *, metric: str = "test_error"
) -> str:
    """Mean, standard deviation and number of seeds of every cell, and beside the error what else there is of it.

    That is the published code's metric, but for a table by ratio, which would be too wide; and the paper's cell.

    Args:
        view: what to show; at least one run.
        published: the paper's cells, or None where they are not at hand.
        metric: a field of `TrainResult`; what stands beside the error is left out for others.
    """
    by_ratio, ours = view.experiment.columns == "ratio", metric == "test_error"
    values, least = by_cell(view.runs, metric), by_cell(view.runs, LEAST)
    printed = {c.cell: error for c, error in (published or {}).items() if c.experiment == view.name} if ours else {}
    columns: list[tuple[str, Any, Callable[[Cell], str]]] = []
    for value in view.present("ratio" if by_ratio else "dataset"):
        label = ratio_label(value) if by_ratio else value
        columns.append((label, value, lambda cell: _errors(values.get(cell))))
        if ours and not by_ratio:
            columns.append((f"{label}, {LEAST_LABEL}", value, lambda cell: _errors(least.get(cell))))
        if printed:
            columns.append((f"{label}, paper", value, lambda c: f"{printed[c]:.2f}" if c in printed else MISSING))
    if ours and not printed:
        columns.append(("paper", columns[0][1], lambda cell: NOT_AT_HAND))
    most = max(map(len, values.values()))
    several = len(view.present("ratio")) > 1
    left = [*(["Data set"] if by_ratio else ["Training data"] if several else []), "Model", "Method"]
    rows = []
    for outer in view.present("dataset" if by_ratio else "ratio"):
        first = [outer] if by_ratio else [ratio_label(outer)] if several else []
        for model in view.present("model"):
            for method in view.present("method"):
                cells = [
                    Cell(outer, model, method, v) if by_ratio else Cell(v, model, method, outer) for _, v, _ in columns
                ]
                counts = {len(values[cell]) for cell in cells if cell in values}
                if counts:
                    name = view.label(method) + (f" {UNEVEN}" if counts != {most} else "")
                    shown = (show(cell) for (_, _, show), cell in zip(columns, cells, strict=True))
                    rows.append([*first, model_label(model), name, *shown])
    return markdown([*left, *(label for label, _, _ in columns)], rows, len(left))


def _errors(by_seed: Mapping[int, float] | None) -> str:
    if by_seed is None:
        return MISSING
    found = summary(list(by_seed.values()))
    return f"{found.mean:.2f} ({found.n})" if found.std is None else f"{found.mean:.2f} ± {found.std:.2f} ({found.n})"


def compare(shown: Iterable[View]) -> dict[str, list[Comparison]]:
    """The comparisons of every view, by its name, at every place where both sides have a seed in common.

    Views share cells. A comparison that several have is one, and p is adjusted for the number of different ones.
    """
    by_view: dict[str, list[tuple[Cell, Cell]]] = {}
    pairs: dict[tuple[Cell, Cell], Paired] = {}
    for view in shown:
        values = by_cell(view.runs)
        by_view[view.name] = []
        for dataset, model, ratio in product(*(view.present(field) for field in ("dataset", "model", "ratio"))):
            for methods in view.experiment.comparisons:
                sides = Cell(dataset, model, methods[0], ratio), Cell(dataset, model, methods[1], ratio)
                pair = pairs.get(sides) or paired(*(values.get(side, {}) for side in sides))
                if pair is not None:
                    pairs[sides] = pair
                    by_view[view.name].append(sides)
    q_values = dict(zip(pairs, adjusted([pair.p for pair in pairs.values()]), strict=True))
    return {
        name: [Comparison(*sides, pairs[sides], q_values[sides]) for sides in those] for name, those in by_view.items()
    }


def comparison_table(view: View, found: Sequence[Comparison]) -> str:
    """The view's comparisons, each with its reading, and how many have which."""
    several = len({c.method.ratio for c in found}) > 1
    columns: dict[str, Callable[[Comparison], str]] = {
        "Data set": lambda c: c.method.dataset,
        "Model": lambda c: model_label(c.method.model),
        **({"Training data": lambda c: ratio_label(c.method.ratio)} if several else {}),
        "Method": lambda c: view.label(c.method.method),
        "against": lambda c: view.label(c.baseline.method),
        "Reading": lambda c: reading(c.paired),
        "Difference, points [95%]": lambda c: _difference(c.paired),
        "Relative improvement": lambda c: (
            MISSING if c.paired.improvement is None else f"{_signed(c.paired.improvement, 1)}%"
        ),
        "p": lambda c: _p(c.paired.p) + ("" if c.paired.enough else f" {TOO_FEW}"),
        "q": lambda c: _p(c.q),
        "n": lambda c: f"{c.paired.n}" + (f", {c.paired.unequal} differ" if c.paired.unequal < c.paired.n else ""),
    }
    rows = [[show(c) for show in columns.values()] for c in found]
    counts = Counter(reading(c.paired).replace("**", "") for c in found)
    tally = ", ".join(f"{n} {words}" for words, n in sorted(counts.items()))
    below = sum(c.q < SIGNIFICANT for c in found)
    return (
        f"{markdown(list(columns), rows, list(columns).index('Reading') + 1)}\n\n"
        f"Comparisons: {tally}; of all {len(found)}, {below} with q < {SIGNIFICANT}."
    )


def reading(pair: Paired) -> str:
    """In bold what is not noise; with a caution where the seeds are too few for the interval to say so."""
    if pair.reading not in ("better", "worse"):
        return pair.reading
    return f"**{pair.reading}**" if pair.clear else f"a hint: {pair.reading}"


def _difference(pair: Paired) -> str:
    if pair.interval is None:
        return _signed(pair.difference)
    return f"{_signed(pair.difference)} [{_signed(pair.interval[0])}, {_signed(pair.interval[1])}]"


def _signed(number: float, decimals: int = 2) -> str:
    return f"{round(number, decimals) + 0.0:+.{decimals}f}"  # + 0.0: no minus before a zero


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
