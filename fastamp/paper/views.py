"""Which experiments a results folder shows, and their tables in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from fastamp.data import DATASETS
from fastamp.paper.plan import EXPERIMENTS, METHODS, Cell, Experiment, same_method
from fastamp.paper.published import PublishedCell, printed
from fastamp.paper.statistics import ENOUGH_PAIRS, Paired, adjusted, by_cell, paired, summary
from fastamp.training.recipes import RECIPES

Line = Mapping[str, Any]  # of results.jsonl

NOT_RUN = "not run"
NOT_PRINTED = "not printed"
TOO_FEW = "‡"
# Metrics beside the test error at the step of least dev error: fields of `TrainResult`, and what a table calls them.
LAST, DEV = "final_test_error", "best_dev_error"
BESIDE = {LAST: "last step", DEV: "dev data", "least_test_error": "least (selected on test)"}
SIGNIFICANT = 0.05
_SIZE = "Trained on + dev"

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

    def label(self, method: str, model: str = "") -> str:
        """The name of a method in this table; with a backbone, of all that are one run there."""
        names = [other for other in self.experiment.methods if model and self.same(model, other) == method]
        return " = ".join(self.experiment.labels.get(name) or method_label(name) for name in names or [method])

    def same(self, model: str, method: str) -> str:
        """The method itself where it was run with a backbone, else what `same_method` has for it."""
        run = any((run["model"], run["method"]) == (model, method) for run in self.runs)
        return method if run or model not in RECIPES else same_method(model, method)

    def places(self) -> list[tuple[str, str, float]]:
        """Data set, backbone and share of the training data of all that was run, in the plan's order."""
        there = {(run["dataset"], run["model"], run["ratio"]) for run in self.runs}
        return [place for place in product(*(self.present(f) for f in ("dataset", "model", "ratio"))) if place in there]


@dataclass(frozen=True)
class Comparison:
    """A method against its baseline at one place of a table."""

    method: Cell
    baseline: Cell
    paired: Paired
    beside: Mapping[str, Paired]  # of other metrics
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


def error_table(view: View, published: Sequence[PublishedCell]) -> str:
    """A row for every cell that was run, or is printed where others were run: ours, the paper's, and other metrics."""
    values = {metric: by_cell(view.runs, metric) for metric in ("test_error", *BESIDE)}
    sizes: dict[Cell, list[Any]] = {}
    for run in view.runs:
        cell = Cell(run["dataset"], run["model"], run["method"], run["ratio"])
        sizes.setdefault(cell, []).append((run["result"]["train_size"], run["result"]["dev_size"]))
    rows = []
    for dataset, model, ratio in view.places():
        methods = dict.fromkeys(view.same(model, method) for method in view.experiment.methods)
        for cell in (Cell(dataset, model, method, ratio) for method in methods):
            papers, ours = printed(cell, published), values["test_error"].get(cell)
            if ours is None and not papers:
                continue
            size = ", ".join(f"{train} + {dev}" for train, dev in sorted(set(sizes.get(cell, []))))
            rows.append(
                [
                    *(dataset, model_label(model), ratio_label(ratio), view.label(cell.method, model)),
                    _errors(ours),
                    _prints(cell, papers),
                    *(_errors(values[metric].get(cell)) for metric in BESIDE),
                    size or NOT_RUN,
                ]
            )
    header = ["Data set", "Model", "Share", "Method", "Test error", "The paper's"]
    return markdown([*header, *(f"At {name}" if m == LAST else name for m, name in BESIDE.items()), _SIZE], rows, 4)


def _prints(cell: Cell, papers: Iterable[PublishedCell]) -> str:
    """The paper's numbers of a cell; several where its tables differ, or name one method twice."""
    tables: dict[str, list[str]] = {}
    for c in papers:
        name = "" if c.cell.method == cell.method else f" ({method_label(c.cell.method)})"
        tables.setdefault(f"{c.text}{name}", []).append(c.experiment.removeprefix("table"))
    if cell.method == "nonlinear-mixup" and tables:
        return f"{next(iter(tables))}, cited from Guo 2020"
    several = len(tables) > 1
    found = (
        f"{text}, Table {' and '.join(dict.fromkeys(where))}" if several else text for text, where in tables.items()
    )
    return "; ".join(found) or NOT_PRINTED


def _errors(by_seed: Mapping[int, float] | None) -> str:
    if by_seed is None:
        return NOT_RUN
    found = summary(list(by_seed.values()))
    return f"{found.mean:.2f} ({found.n})" if found.std is None else f"{found.mean:.2f} ± {found.std:.2f} ({found.n})"


def compare(shown: Iterable[View]) -> dict[str, list[Comparison]]:
    """The comparisons of every view, by its name, at every place where both sides have a seed in common.

    Views share cells. A comparison that several have is one, and p is adjusted for the number of different ones.
    """
    by_view: dict[str, list[tuple[Cell, Cell]]] = {}
    pairs: dict[tuple[Cell, Cell], tuple[Paired, dict[str, Paired]]] = {}
    for view in shown:
        values = {metric: by_cell(view.runs, metric) for metric in ("test_error", LAST, DEV)}
        by_view[view.name] = []
        for dataset, model, ratio in view.places():
            for methods in view.experiment.comparisons:
                one, other = (Cell(dataset, model, view.same(model, method), ratio) for method in methods)
                if one == other or (one, other) in by_view[view.name]:
                    continue
                found = {m: paired(of.get(one, {}), of.get(other, {})) for m, of in values.items()}
                beside = {metric: pair for metric, pair in found.items() if pair is not None}
                if beside:
                    pairs[one, other] = beside.pop("test_error"), beside
                    by_view[view.name].append((one, other))
    q_values = dict(zip(pairs, adjusted([pair.p for pair, _ in pairs.values()]), strict=True))
    return {
        name: [Comparison(*sides, *pairs[sides], q_values[sides]) for sides in those] for name, those in by_view.items()
    }


def comparison_table(view: View, found: Sequence[Comparison], published: Sequence[PublishedCell]) -> str:
    """The view's comparisons, each with its reading, and how many have which."""
    columns: dict[str, Callable[[Comparison], str]] = {
        "Data set": lambda c: c.method.dataset,
        "Model": lambda c: model_label(c.method.model),
        "Share": lambda c: ratio_label(c.method.ratio),
        "Method": lambda c: view.label(c.method.method, c.method.model),
        "against": lambda c: view.label(c.baseline.method, c.method.model),
        "Reading": lambda c: reading(c),
        "Difference, points [95%]": lambda c: difference(c.paired),
        "Relative": lambda c: "" if c.paired.improvement is None else f"{_signed(c.paired.improvement, 1)}%",
        "The paper's": lambda c: printed_difference(c, published),
        "p": lambda c: _p(c.paired.p) + ("" if c.paired.enough else f" {TOO_FEW}"),
        "q": lambda c: _p(c.q),
        "n": lambda c: f"{c.paired.n}" + (f", {c.paired.unequal} differ" if c.paired.unequal < c.paired.n else ""),
        "At last step": lambda c: difference(c.beside[LAST]),
        "dev data": lambda c: difference(c.beside[DEV]),
    }
    rows = [[show(c) for show in columns.values()] for c in found]
    counts = Counter(reading(c).replace("**", "") for c in found)
    tally = ", ".join(f"{n} {words}" for words, n in sorted(counts.items()))
    below = sum(c.q < SIGNIFICANT for c in found)
    return (
        f"{markdown(list(columns), rows, list(columns).index('Reading') + 1)}\n\n"
        f"Comparisons: {tally}; of all {len(found)}, {below} with q < {SIGNIFICANT}."
    )


def printed_difference(comparison: Comparison, published: Sequence[PublishedCell]) -> str:
    """The same difference of the paper's means, in points, and the relative improvement where it prints one."""
    found: dict[str, str] = {}
    for c in printed(comparison.method, published):
        for b in printed(comparison.baseline, published):
            if c.experiment == b.experiment:
                points = _signed(c.error - b.error, 1)
                relative = "" if c.improvement is None else f" ({_signed(c.improvement, 1)}%)"
                name = "" if c.cell.method == comparison.method.method else f" ({method_label(c.cell.method)})"
                found[points] = found.get(points) or relative + name
    return "; ".join(points + relative for points, relative in found.items()) or NOT_PRINTED


def reading(comparison: Comparison) -> str:
    """In bold what q bears out; nothing where the seeds are too few to say, for which the interval is too narrow."""
    pair = comparison.paired
    told_apart = pair.reading in ("better", "worse")
    if pair.unequal and (pair.n < ENOUGH_PAIRS or (told_apart and not pair.enough)):
        return "too few seeds"
    if not told_apart:
        return pair.reading
    return f"**{pair.reading}**" if comparison.q < SIGNIFICANT else f"a hint: {pair.reading}"


def difference(pair: Paired) -> str:
    """Mean and interval, in points."""
    if pair.interval is None:
        return _signed(pair.difference)
    return f"{_signed(pair.difference)} [{_signed(pair.interval[0])}, {_signed(pair.interval[1])}]"


def _signed(number: float, decimals: int = 2) -> str:
    return f"{round(number, decimals) + 0.0:+.{decimals}f}"  # + 0.0: no minus before a zero


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
