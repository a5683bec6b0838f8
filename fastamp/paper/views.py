"""Which experiments a results folder shows, and their tables in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastamp.data import DATASETS
from fastamp.paper.commands import read_commands
from fastamp.paper.plan import METHODS, Experiment
from fastamp.paper.published import PublishedCell
from fastamp.paper.statistics import Cell, Paired, adjusted, by_cell, paired, summary
from fastamp.training.recipes import RECIPES

Run = Mapping[str, Any]  # a line of results.jsonl

OTHER = "other"
MISSING = "–"
NOT_AT_HAND = "not at hand"
UNEVEN = "†"
TOO_FEW = "‡"
LEAST = "least_test_error"
LEAST_LABEL = "least (selected on test)"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class View:
    """An experiment, and those of its runs that are done.

    Attributes:
        name: of the experiment; "other" holds runs outside every experiment's extent.
        experiment: its extent is that of the plan and what else was asked for.
        runs: what `statistics.finished` gave.
    """

    name: str
    experiment: Experiment
    runs: tuple[Run, ...]

    def present(self, field: str) -> list[Any]:
        """The values of a field of `Cell` that any run has, in the plan's order."""
        there = {run[field] for run in self.runs}
        return [value for value in getattr(self.experiment, f"{field}s") if value in there]

    def label(self, method: str) -> str:
        """The name of a method in this table."""
        return self.experiment.labels.get(method) or method_label(method)

    def ordered(self) -> list[Cell]:
        """The extent's cells of which any run is done, by data set, model, ratio and method."""
        there = by_cell(self.runs)
        cells = (
            Cell(dataset, model, method, ratio)
            for dataset in self.present("dataset")
            for model in self.present("model")
            for ratio in self.present("ratio")
            for method in self.present("method")
        )
        return [cell for cell in cells if cell in there]


@dataclass(frozen=True)
class Comparison:
    """A method against its baseline at one place of a table."""

    method: Cell
    baseline: Cell
    paired: Paired
    q: float


def views(runs: Sequence[Run], settings: Mapping[str, Any], experiments: Mapping[str, Experiment]) -> list[View]:
    """The experiments to show.

    They are those that `settings["commands"]` made; each has the runs within its extent, to which what its commands
    asked for is added. If no command is known, they are those with runs that no other shows. Runs that are left over
    are shown together.

    Args:
        runs: what `statistics.finished` gave.
        settings: of the folder.
        experiments: by name.
    """
    commands = read_commands(settings.get("commands", ()), experiments)
    extents = {
        name: _extended(experiment, [command.extent for command in commands if command.experiment == name])
        for name, experiment in experiments.items()
        if not commands or any(command.experiment == name for command in commands)
    }
    held = {name: [run for run in runs if _holds(extent, run)] for name, extent in extents.items()}
    if not commands:
        keys = {name: {run["key"] for run in those} for name, those in held.items()}
        order = list(keys)
        for name in order:
            # One of several that hold the same runs stays: the first in the plan's order.
            if any(
                keys[name] < keys[other] or (keys[name] == keys[other] and order.index(other) < order.index(name))
                for other in order
            ):
                del held[name]
    found = [View(name, extents[name], tuple(those)) for name, those in held.items() if those]
    shown = {run["key"] for view in found for run in view.runs}
    rest = {(run["dataset"], run["model"], run["method"]) for run in runs if run["key"] not in shown}
    if rest:
        # With the runs at other ratios, for a curve over the ratios to be whole.
        those = tuple(run for run in runs if (run["dataset"], run["model"], run["method"]) in rest)
        comparisons = dict.fromkeys(pair for experiment in experiments.values() for pair in experiment.comparisons)
        empty = Experiment("Runs outside the extent of the experiments", (), (), (), (), comparisons=tuple(comparisons))
        columns = "ratio" if len({run["ratio"] for run in those}) > 1 else "dataset"
        there = {f"{field}s": tuple(run[field] for run in those) for field in _KNOWN}
        found.append(View(OTHER, replace(_extended(empty, [there]), columns=columns), those))
    return found


# What there is of a field of `Cell`, in the order of tables.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "dataset": DATASETS,
    "model": tuple(RECIPES),
    "method": tuple(METHODS),
    "ratio": (),
}


def _holds(experiment: Experiment, run: Run) -> bool:
    return all(run[field] in getattr(experiment, f"{field}s") for field in _KNOWN)


def _extended(experiment: Experiment, extents: Sequence[Mapping[str, Sequence[Any]]]) -> Experiment:
    """The experiment with more names behind its own, in the order of their registries."""

    def both(field: str) -> tuple[Any, ...]:
        own, known = getattr(experiment, f"{field}s"), _KNOWN[field]
        more = {value for extent in extents for value in extent.get(f"{field}s", ())} - {*own}
        return (*own, *(value for value in known if value in more), *sorted(more - {*known}))

    return replace(
        experiment,
        datasets=both("dataset"),
        models=both("model"),
        methods=both("method"),
        ratios=tuple(sorted(both("ratio"))),
    )


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
    by_ratio = view.experiment.columns == "ratio"
    ours = metric == "test_error"
    values = by_cell(view.runs, metric)
    least = by_cell(view.runs, LEAST) if ours and not by_ratio else {}
    several = len(view.present("ratio")) > 1
    columns: list[Any] = view.present("ratio" if by_ratio else "dataset")
    printed = {c.cell: error for c, error in (published or {}).items() if c.experiment == view.name} if ours else {}
    most = max(len(seeds) for seeds in values.values())

    header = ["Data set"] if by_ratio else ["Training data"] if several else []
    header += ["Model", "Method"]
    left = len(header)
    for column in columns:
        label = ratio_label(column) if by_ratio else column
        header += [label, *([f"{label}, {LEAST_LABEL}"] if least else []), *([f"{label}, paper"] if printed else [])]
    if ours and not printed:
        header.append("paper")

    rows = []
    for outer in view.present("dataset" if by_ratio else "ratio"):
        for model in view.present("model"):
            for method in view.present("method"):
                cells = [Cell(outer, model, method, c) if by_ratio else Cell(c, model, method, outer) for c in columns]
                counts = {len(values[c]) for c in cells if c in values}
                if not counts:
                    continue
                row = [outer] if by_ratio else [ratio_label(outer)] if several else []
                row += [model_label(model), view.label(method) + (f" {UNEVEN}" if counts != {most} else "")]
                for c in cells:
                    row += [_cell(of[c].values()) if c in of else MISSING for of in (values, least) if of]
                    if printed:
                        row.append(f"{printed[c]:.2f}" if c in printed else MISSING)
                rows.append([*row, NOT_AT_HAND] if ours and not printed else row)
    return markdown(header, rows, left)


def _cell(errors: Iterable[float]) -> str:
    found = summary(list(errors))
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
        for place in dict.fromkeys(replace(c, method="") for c in view.ordered()):
            for method, baseline in view.experiment.comparisons:
                sides = replace(place, method=method), replace(place, method=baseline)
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
