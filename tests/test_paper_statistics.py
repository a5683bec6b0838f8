"""Statistics of runs: numbers known by hand, degenerate samples, and what is refused."""

import math
from types import SimpleNamespace

import pytest

pytest.importorskip("scipy")

from fastamp.paper import statistics
from fastamp.paper.plan import Cell
from fastamp.paper.statistics import Summary, adjusted, by_cell, finished, interval, paired, signed_rank_p, summary


def line(method: str = "none", seed: int = 0, percent: float = 10.0, **fields) -> dict:
    run = {"dataset": "trec", "model": "cnn-rand", "method": method, "ratio": 1.0, "seed": seed, "status": "done"}
    return {**run, "result": {"test_error": percent, "least_test_error": percent - 1}, **fields}


def test_mean_and_sample_deviation():
    found = summary([10.0, 11.0, 12.0, 15.0])
    assert (found.n, found.mean) == (4, 12.0)
    assert found.std == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3))
    assert summary([10.0]) == Summary(1, 10.0, None)
    assert interval([10.0]) is None


def test_paired_difference_and_relative_improvement_by_hand():
    pair = paired({0: 9.0, 1: 10.0, 2: 8.0}, {0: 10.0, 1: 12.0, 2: 8.0})
    assert (pair.n, pair.unequal, pair.difference) == (3, 2, -1.0)
    assert pair.improvement == pytest.approx(100 * (10 - 9) / 10)
    low, high = pair.interval
    assert -2 <= low < -1 < high <= 0
    # Only seeds of both sides are compared.
    pair = paired({0: 9.0, 1: 9.0, 7: 50.0}, {0: 10.0, 1: 10.0, 8: 90.0})
    assert (pair.n, pair.difference, pair.improvement) == (2, -1.0, 10.0)
    assert paired({0: 9.0}, {1: 9.0}) is None
    assert paired({0: 1.0}, {0: 0.0}).improvement is None


@pytest.mark.parametrize(
    ("differences", "reading"),
    [
        ([-1.0, -0.9, -0.8] * 2, "better"),
        ([1.0, 0.9, 0.8] * 2, "worse"),
        ([1.0, -1.0] * 4, "within noise"),
        ([0.0] * 5, "within noise"),
        ([-1.0], "one seed"),
    ],
)
def test_reading_follows_the_interval(differences, reading):
    baseline = {seed: 10.0 + seed for seed in range(len(differences))}
    pair = paired({seed: baseline[seed] + d for seed, d in enumerate(differences)}, baseline)
    assert pair.reading == reading
    if len(set(differences)) == 1:  # no width, or for one seed no interval
        assert (pair.interval, pair.p) == (None if len(differences) == 1 else (0, 0), 1.0)


def test_a_constant_difference_has_an_interval_of_no_width():
    pair = paired({seed: seed + 10.2 for seed in range(6)}, {seed: seed + 10.4 for seed in range(6)})
    assert (pair.interval, pair.reading) == ((-0.2, -0.2), "better")


@pytest.mark.parametrize(
    ("differences", "patterns", "seeds"),
    [
        # Ranks of 1, -2, 3, 4, 5: the negative ones sum to 2; 3 of 32 patterns reach at most 2 ({}, {1}, {2}).
        ([1.0, -2.0, 3.0, 4.0, 5.0], 3, 5),
        # Five equal signs of tied differences: the most extreme 2 of 32 patterns.
        ([0.2, 0.2, 0.2, 0.6, 0.2], 1, 5),
        # Zeros are dropped: ranks 1, 2, -3, 4, of which {}, {1}, {2}, {3}, {1, 2} of 16 reach at most 3.
        ([0.0, 1.0, 2.0, -3.0, 4.0], 5, 4),
    ],
)
def test_wilcoxon_is_exact_by_hand(differences, patterns, seeds):
    assert signed_rank_p(differences) == pytest.approx(2 * patterns / 2**seeds)


@pytest.mark.parametrize(
    ("n", "ties"), [(1, False), (4, False), (13, False), (14, False), (20, False), (7, True), (14, True), (20, True)]
)
def test_wilcoxon_is_scipys(n, ties):
    differences = [(-1.0) ** (i * i // 3) * ((i % 4 if ties else i) + 1) for i in range(n)]
    assert signed_rank_p(differences) == pytest.approx(statistics.stats.wilcoxon(differences).pvalue)


@pytest.mark.parametrize(("n", "enough"), [(5, False), (6, True)])
def test_fewer_than_six_pairs_cannot_have_a_small_p(n, enough):
    pair = paired({seed: 0.0 for seed in range(n)}, {seed: 1.0 + seed for seed in range(n)})
    assert pair.p == pytest.approx(2 / 2**n)
    assert pair.enough == enough == (pair.p < 0.05)


def test_seeds_that_do_not_differ_do_not_count_towards_enough():
    baseline = {seed: 10.0 + seed for seed in range(8)}
    pair = paired({**baseline, **{seed: 0.0 for seed in range(5)}}, baseline)
    assert (pair.n, pair.unequal, pair.enough) == (8, 5, False)


def test_rounding_of_differences_does_not_break_ties():
    # In float64 10.4 - 10.2, 8.2 - 8.0 and 0.6 - 0.4 are three numbers; as errors they are one.
    baseline = {0: 10.2, 1: 8.0, 2: 0.4, 3: 7.0}
    method = {0: 10.4, 1: 8.2, 2: 0.6, 3: 6.8}
    pair = paired(method, baseline)
    # All four ranks are 2.5: the one negative sum of 2.5 is reached by 1 + 4 of 16 patterns.
    assert pair.p == pytest.approx(2 * 5 / 16)


def test_bootstrap_is_the_same_at_every_call():
    values = [0.3, -1.2, 0.8, -0.1, 0.5, -0.4]
    assert interval(values) == interval(values)
    low, high = interval(values)
    assert min(values) <= low < sum(values) / len(values) < high <= max(values)


def test_percentiles_where_bca_is_not_defined(monkeypatch):
    bootstrap = statistics.stats.bootstrap

    def undefined(*args, method, **options):
        found = bootstrap(*args, method="percentile", **options)
        return SimpleNamespace(confidence_interval=SimpleNamespace(low=math.nan, high=1)) if method == "BCa" else found

    monkeypatch.setattr(statistics.stats, "bootstrap", undefined)
    assert interval([1.0, 2.0]) == (1.0, 2.0)


def test_bound_of_zero_is_not_moved_by_rounding():
    # The mean of 0.1, 0.2 and -0.3 is 1e-17 or so in float64, and 0 as errors.
    low, high = interval([0.1, 0.2, -0.3] * 2)
    assert low == round(low, 9)
    assert high == round(high, 9)


def test_adjusted_p_values_by_hand():
    # Benjamini and Hochberg: p_(i) m / i, made monotone from the largest down.
    assert adjusted([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert adjusted([]) == []


def test_runs_by_cell_and_seed():
    records = [line(seed=1, percent=12.0), line(seed=0, percent=11.0), line("sent-amp", percent=9.0)]
    runs = finished([*records, line(seed=2, status="failed")])
    assert by_cell(runs) == {
        Cell("trec", "cnn-rand", "none"): {0: 11.0, 1: 12.0},
        Cell("trec", "cnn-rand", "sent-amp"): {0: 9.0},
    }
    assert by_cell(runs, "least_test_error")[Cell("trec", "cnn-rand", "sent-amp")] == {0: 8.0}
