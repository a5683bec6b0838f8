"""What is aimed at and claimed, held against the files of results: the verdicts that readme.py draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

Results = dict[str, Any]
Row = dict[str, Any]
PAPER = ("(50, 300) -> 6", "(50, 1024) -> 2", "(24, 768) -> 5", "(24, 768) -> 2")
PAPER_LOGITS = ("logits (50, 6)", "logits (50, 2)", "logits (24, 5)", "logits (24, 2)")
FUSED = ("torch fused linear, no mixing", "Liger fused linear, no mixing")
LARGE_HEAD = ("(8192, 2048) -> 128256",)


@dataclass(frozen=True)
class Value:
    """One measured value, and what it is held to.

    Attributes:
        where: of what row.
        value: measured.
        bound: the most that it may be, or the least.
    """

    where: str
    value: float
    bound: float


@dataclass(frozen=True)
class Target:
    """One claim.

    Attributes:
        claim: in words.
        suite: whose results say whether it holds.
        values: what these say of it; none where they have nothing to say.
        device: "cpu" or "cuda" where it is of one of them.
        at_least: the bound is the least.
    """

    claim: str
    suite: str
    values: Callable[[Results], Iterator[Value]]
    device: str | None = None
    at_least: bool = False

    def verdict(self, results: Results) -> str | None:
        """Whether it holds, and by what row it is nearest to not holding; None if nothing was measured."""
        if results["suite"] != self.suite or self.device not in (None, results["device"]["type"]):
            return None
        values = list(self.values(results))
        if not values:
            return None

        def excess(one: Value) -> float:
            return (one.bound / one.value if self.at_least else one.value / one.bound) - 1

        worst = max(values, key=excess)
        misses = sum(excess(one) > 0 for one in values)
        said = "holds" if not misses else f"**misses by {100 * excess(worst):.0f}%**, {misses} of {len(values)}"
        return f"{said}: {worst.value:.3g} against {worst.bound:.3g} at {worst.where}"


def _places(results: Results) -> Iterator[tuple[str, dict[str, Row]]]:
    for key, group in groupby(results["rows"], lambda row: (row["workload"], row["dtype"], row["clock"])):
        yield ", ".join(key), {row["contender"]: row for row in group}


def _to(row: Row, base: Row) -> float:
    return float(row["ms"]["both"]["q50"] / base["ms"]["both"]["q50"])


def to_mixup(
    contender: str, bound: float, *, workloads: tuple[str, ...] = (), title: str = "", clock: str | None = None
) -> Callable[[Results], Iterator[Value]]:
    """The ratio of a contender to its plain Mixup, in some workloads or in those that begin with a title."""

    def values(results: Results) -> Iterator[Value]:
        for row in results["rows"]:
            if row["contender"] != contender or row["ratio"] is None or clock not in (None, row["clock"]):
                continue
            if row["workload"] in workloads if workloads else row["workload"].startswith(title):
                where = ", ".join(row[name] for name in ("workload", "dtype", "clock"))
                yield Value(where, row["ratio"]["both"]["q50"], bound)

    return values


def between(
    contender: str,
    others: tuple[str, ...],
    bound: float,
    *,
    workloads: tuple[str, ...] = (),
    clock: str | None = None,
    field: str = "time",
) -> Callable[[Results], Iterator[Value]]:
    """Time or peak memory of a contender over that of the fastest of others in the same place.

    Ratios to cross-entropy and to AMP by autograd are those within rounds where a file has them.
    """

    def values(results: Results) -> Iterator[Value]:
        for where, rows in _places(results):
            there = [rows[name] for name in others if name in rows]
            row = rows.get(contender)
            if row is None or not there or (workloads and row["workload"] not in workloads):
                continue
            if clock not in (None, row["clock"]):
                continue
            base = min(there, key=lambda one: one["ms"]["both"]["q50"])
            kept = {"cross-entropy": "ratio_to_cross_entropy", "AMP autograd": "ratio_to_naive"}.get(base["contender"])
            if field == "memory":
                yield Value(where, row["peak_memory_bytes"] / base["peak_memory_bytes"], bound)
            else:
                yield Value(where, row[kept]["q50"] if kept in row else _to(row, base), bound)

    return values


def speedup(results: Results) -> Iterator[Value]:
    """How many times faster AMPLoss is than AMP by autograd, eagerly."""
    for one in between("AMPLoss", ("AMP autograd",), 1.0, workloads=PAPER, clock="eager")(results):
        yield Value(one.where, 1 / one.value, 20.0)


def share_of_copy(contender: str, least_classes: int, dtypes: tuple[str, ...]) -> Callable[[Results], Iterator[Value]]:
    """Percent of the copy's bandwidth in replays on logits of so many classes."""

    def values(results: Results) -> Iterator[Value]:
        for row in results["rows"]:
            wide = row["input"] == "logits" and row["shape"]["C"] >= least_classes
            if wide and row["contender"] == contender and row["clock"] == "graph" and row["dtype"] in dtypes:
                yield Value(f"{row['workload']}, {row['dtype']}, graph", row["percent_of_copy"], 90.0)

    return values


def operations_of_copy(results: Results) -> Iterator[Value]:
    """Percent of the copy's bandwidth of replayed mix and remix."""
    for row in results["rows"]:
        if row["contender"] == "fastamp" and row["clock"] == "graph" and row["mode"] in ("mix", "remix"):
            yield Value(f"{row['workload']}, {row['dtype']}, graph", row["percent_of_copy"], 90.0)


def growth(results: Results) -> Iterator[Value]:
    """Exponents of AMPLoss, at most 0.1 above the lesser of the two plain Mixups'."""
    kind = ("varies", "input", "dtype", "clock")
    for key, group in groupby(results["fits"], lambda fit: tuple(fit[name] for name in kind)):
        found: dict[str, list[float]] = {}
        for fit in group:
            if fit["exponent"] is not None:
                found.setdefault("AMPLoss" if fit["contender"] == "AMPLoss" else "Mixup", []).append(fit["exponent"])
        if len(found) == 2:
            yield Value(", ".join(key), found["AMPLoss"][0], min(found["Mixup"]) + 0.1)


def of_memory(bound: float) -> Callable[[Results], Iterator[Value]]:
    """Peak memory of a step at a layer over its plain Mixup's."""

    def values(results: Results) -> Iterator[Value]:
        for row in results["rows"]:
            if row["contender"] == "AMPLoss.step" and "peak_memory_ratio" in row:
                where = ", ".join(row[name] for name in ("workload", "dtype", "clock"))
                yield Value(where, row["peak_memory_ratio"], bound)

    return values


_LINEAR = "linear_amp_cross_entropy"
TARGETS = (
    Target("AMPLoss from hidden rows in the paper's shapes: at most 1.2 times plain eager Mixup", "head",
           to_mixup("AMPLoss", 1.2, workloads=PAPER), "cpu"),
    Target("the loss alone, on the paper's logits: at most 1.2 times plain eager Mixup", "head",
           to_mixup("AMPLoss", 1.2, workloads=PAPER_LOGITS), "cpu"),
    Target("AMPLoss compiled, from hidden rows in the paper's shapes: at most plain eager Mixup", "head",
           to_mixup("AMPLoss, compiled", 1.0, workloads=PAPER), "cpu"),
    Target("AMPLoss compiled, the loss alone: at most plain eager Mixup", "head",
           to_mixup("AMPLoss, compiled", 1.0, workloads=PAPER_LOGITS), "cpu"),
    Target("AMPLoss takes less time than AMP autograd", "head", between("AMPLoss", ("AMP autograd",), 1.0)),
    Target("AMPLoss compiled takes less time than AMP torch.func compiled", "head",
           between("AMPLoss, compiled", ("AMP torch.func, compiled",), 1.0)),
    Target("AMPLoss takes no more memory than AMP autograd", "head",
           between("AMPLoss", ("AMP autograd",), 1.0, field="memory")),
    Target("AMPLoss takes no more memory than AMP autograd, many classes", "vocabulary",
           between("AMPLoss", ("AMP autograd",), 1.0, field="memory")),
    Target("SentAMP, eager, in the paper's shapes: at least 20 times faster than AMP autograd", "head", speedup,
           "cuda", at_least=True),
    Target("and not slower than plain eager Mixup", "head",
           to_mixup("AMPLoss", 1.0, workloads=PAPER, clock="eager"), "cuda"),
    Target("replayed, at most 1.2 times cross-entropy's own replay", "head",
           between("AMPLoss", ("cross-entropy",), 1.2, workloads=PAPER, clock="graph"), "cuda"),
    Target("on logits of 32000 classes or more in bf16: at least 90% of a copy", "head",
           share_of_copy("AMPLoss", 32000, ("bf16",)), "cuda", at_least=True),
    Target("and so with matchings, whose rows are read once for both mixtures", "head",
           share_of_copy("AMPLoss, matching", 32000, ("bf16",)), "cuda", at_least=True),
    Target("at BERT's words: at most 1.8 times plain Mixup", "layers", to_mixup("AMPLoss.step", 1.8, title="BERT")),
    Target("at TextCNN's words: at most 1.35 times plain Mixup", "layers",
           to_mixup("AMPLoss.step", 1.35, title="TextCNN")),
    Target("replayed, at most 1.3 times", "layers",
           to_mixup("AMPLoss.step", 1.3, title="TextCNN", clock="graph"), "cuda"),
    Target("a step at a layer: at most 1.15 times plain Mixup's memory", "layers", of_memory(1.15)),
    Target("mix and remix, replayed: at least 90% of a copy", "rows", operations_of_copy, "cuda", at_least=True),
    Target("exponents of growth: at most 0.1 above plain Mixup's", "scaling", growth),
    Target("(8192, 2048, 128256): at most 1.15 times the fastest fused linear cross-entropy", "vocabulary",
           between(_LINEAR, FUSED, 1.15, workloads=LARGE_HEAD), "cuda"),
    Target("and no more memory than it", "vocabulary",
           between(_LINEAR, FUSED, 1.0, workloads=LARGE_HEAD, field="memory"), "cuda"),
    Target("and at most a tenth of the memory of AMP autograd", "vocabulary",
           between(_LINEAR, ("AMP autograd",), 0.1, workloads=LARGE_HEAD, field="memory"), "cuda"),
)  # fmt: skip
