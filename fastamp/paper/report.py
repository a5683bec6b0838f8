"""The report of a results folder: tables in Markdown, and plots."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from fastamp.paper import plots, views
from fastamp.paper.display import duration
from fastamp.paper.plan import METHODS, PLACEBO_LABEL, Cell, Request
from fastamp.paper.published import CITATION, STEPS, WIDTHS, PublishedCell, read_published
from fastamp.paper.results import Results
from fastamp.paper.statistics import ENOUGH_PAIRS, distances, finished, paired
from fastamp.paper.views import Comparison, Line, View, method_label, model_label, ratio_label, reading

FILE = "report.md"
CROSS_VALIDATED = ("subj", "mr")
SAME = (
    "+MaxOp and AMP are one run where what follows the mixed sentences is affine, as in a CNN: the loss is convex in "
    "λ, a step along its slope cannot lower it, and MinOp has nothing to reject. They train the same, bit for bit; the "
    "paper prints two numbers."
)


def write(folder: str | os.PathLike[str], results: Results, published: Sequence[PublishedCell] | None = None) -> Path:
    """Writes report.md and its plots into a folder that is there, and returns report.md's path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    path = Path(folder) / FILE
    path.write_text(render(results, published, path.parent), encoding="utf-8")
    return path


def render(results: Results, published: Sequence[PublishedCell] | None = None, folder: Path | None = None) -> str:
    """The report in Markdown: the same for the same records in any order; with plots where there is a folder.

    Args:
        results: what `results.read` gives.
        published: what `published.read_published` gives; the paper's cells without it.
        folder: where plots go.
    """
    published = read_published() if published is None else published
    runs = finished(results.records)
    failed = sorted((record["key"], record["error"]) for record in results.records if record["status"] == "failed")
    shown = views.views(runs, results.specification["requests"])
    compared = views.compare(shown)
    blocks = ["# Results"]
    if shown:
        blocks.append(_answer(shown, compared, published))
    for i, view in enumerate(shown):
        held = next((other for other in shown[:i] if _keys(view) <= _keys(other)), None)
        blocks += _section(view, compared[view.name], published, held)
        if folder is not None:
            images = plots.draw(view, compared[view.name], published, folder, tables=held is None)
            blocks += [f"![{file}]({file})\n\n{caption}" for file, caption in images]
    if shown:
        blocks += ["## How to read the tables", _notes(runs)]
    header = _header(runs, len(failed), results.specification)
    blocks += ["## How it was run", "\n".join(f"- {line}" for line in header)]
    if failed:
        blocks += ["## Failed runs", "\n".join(f"- `{key}`: {error}" for key, error in failed)]
    return "\n\n".join(blocks) + "\n"


def _answer(
    shown: Sequence[View], compared: Mapping[str, Sequence[Comparison]], published: Sequence[PublishedCell]
) -> str:
    """What comes of AMP as the paper has it against Mixup, and of the paper's largest gains."""
    every = {(c.method, c.baseline): c for view in shown for c in compared[view.name]}
    found = [c for sides, c in every.items() if _is_claimed(*sides)]
    lines = [
        f"{_where(c.method)}: {method_label(c.method.method)} against {method_label(c.baseline.method)} "
        f"{views.difference(c.paired)} points, n = {c.paired.n}, q = {c.q:.3f}: {reading(c)}. The paper's: "
        f"{views.printed_difference(c, published)}."
        for c in found
    ]
    tally = Counter(reading(c).replace("**", "") for c in found)
    counts = ", ".join(f"{n} {words}" for words, n in sorted(tally.items())) or "none was run"
    blocks = [f"AMP against Mixup, test error at the step of least dev error: {counts}."]
    gaps = dict.fromkeys(text for view in shown for text in _chaos(view))
    blocks += ["\n".join(f"- {line}" for line in those) for those in (lines, gaps) if those]
    for table in ("table2", "table3"):
        most = max((c for c in published if c.experiment == table), key=lambda c: c.improvement or 0.0, default=None)
        if most is not None and most.improvement:
            run = any(c.method == most.cell for c in found)
            blocks.append(
                f"The largest gain that the paper prints in its Table {table[-1]}, {most.improvement:g}% of Mixup's "
                f"error ({_where(most.cell)}, {method_label(most.cell.method)}), "
                f"{'is among these' if run else 'was not run here, and nothing here bears on it'}. ({CITATION})"
            )
    return "\n\n".join(blocks)


def _where(cell: Cell) -> str:
    return f"{cell.dataset}, {model_label(cell.model)}, {ratio_label(cell.ratio)}"


def _is_claimed(method: Cell, baseline: Cell) -> bool:
    """Whether the two are AMP and Mixup of one level and one α, AMP at the paper's ε."""
    plain = METHODS.get(method.method)
    own = {} if plain is None else {**plain.fields}
    return (
        own.keys() <= {"method", "alpha"}
        and baseline.method == method.method.replace("-amp", "-mixup") != method.method
    )


def _chaos(view: View) -> list[str]:
    """How far AMP goes from Mixup over training, beside the placebo and another seed."""
    names = {"AMP": "AMP and Mixup with the same seed", "placebo": f"the {PLACEBO_LABEL} and Mixup"}
    lines = []
    for place, (level, what) in product(view.places(), (("sent", "sentences"), ("word", "words"))):
        found = distances(view.runs, *place, level)
        over, late = (
            {name: {key: _mean_from(share, c) for key, c in curves.items()} for name, curves in found.items()}
            for share in (0.0, 0.75)
        )
        if "AMP" not in over:
            continue
        apart = (f"{names.get(name, 'two seeds of Mixup')} {mean(of.values()):.2f}" for name, of in over.items())
        more, later = (paired(of["AMP"], of.get("placebo", {})) for of in (over, late))
        beyond = (
            "No placebo was run."
            if more is None or later is None
            else f"AMP's less the placebo's: {views.difference(more)}, n = {more.n}; "
            f"over the last quarter {views.difference(later)}."
        )
        lines.append(
            f"{_where(Cell(place[0], place[1], '', place[2]))}, {what}: mean distance of test errors over training, in "
            f"points: {', '.join(apart)}. {beyond}"
        )
    return lines


def _mean_from(share: float, curve: Mapping[int, float]) -> float:
    """Mean of a curve by step, of its steps behind that share of the last."""
    return mean(value for step, value in curve.items() if step > share * max(curve))


def _header(runs: Sequence[Line], failed: int, specification: Mapping[str, Any]) -> list[str]:
    spent = duration(sum(run["seconds"] for run in runs))
    machines = (
        f"{m['device']}, torch {m['torch']}, fastamp {m['fastamp']}, threads {m['threads']}"
        for m in (run["machine"] for run in runs)
    )
    lines = [
        f"Runs: {len(runs)} done, {failed} failed; {spent} of runs, side by side or not, of what was interrupted "
        "the last part",
        *(f"Machine: {line}" for line in _tally(machines)),
        *(f"Length: {line}" for line in _tally(f"{run['result']['steps']} steps" for run in runs)),
        *_coverage(runs),
        *_differences(runs),
    ]
    for name in ("eval_every", "overrides", "data"):
        if specification[name] not in (None, {}):
            lines.append(f"{name}: `{json.dumps(specification[name], ensure_ascii=False, sort_keys=True)}`")
    done = {run["key"] for run in runs}
    for request in specification["requests"]:
        asked = Request(**request).runs(specification["overrides"])
        missing = sum(run.key not in done for run in asked)
        extent = "; ".join(
            ", ".join(ratio_label(value) if field == "ratios" else value for value in request[field])
            for field in ("datasets", "models", "methods", "ratios")
        )
        seeds = ", ".join(map(str, request["seeds"]))
        unfinished = f". **Unfinished: {missing} of {len(asked)} runs are missing.**" if missing else ""
        lines.append(f"Asked for: {request['experiment']}: {extent}; seeds {seeds}{unfinished}")
    return lines


def _differences(runs: Sequence[Line]) -> list[str]:
    """Where runs are not the paper's, beside what the overrides say."""
    found: Counter[str] = Counter()
    for run in runs:
        model, result = run["config"]["model"], run["result"]
        if result["steps"] != STEPS:
            found[f"{result['steps']} steps, the paper {STEPS}"] += 1
        if result["embedding_dim"] != WIDTHS[model]:
            what = "an encoder of width" if model == "bert" else "word vectors of width"
            found[f"{model_label(run['model'])}: {what} {result['embedding_dim']}, the paper {WIDTHS[model]}"] += 1
    return [f"Not the paper's: {text} ({n} runs)" for text, n in sorted(found.items())]


def _coverage(runs: Iterable[Line]) -> list[str]:
    """How much of each data set the pre-trained vectors cover, over its runs that have some."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        if run["result"]["types_covered"] is not None:
            shares = run["result"]["types_covered"], run["result"]["tokens_covered"]
            found.setdefault(run["dataset"], []).append(shares)
    return [
        f"Pre-trained vectors cover, of {dataset}: "
        + " and ".join(
            f"{_range(values, decimals)}% of its {what}"
            for values, decimals, what in zip(zip(*shares, strict=True), (1, 2), ("words", "tokens"), strict=True)
        )
        for dataset, shares in sorted(found.items())
    ]


def _range(values: Sequence[float], decimals: int) -> str:
    return " to ".join(dict.fromkeys(f"{value:.{decimals}f}" for value in (min(values), max(values))))


def _tally(values: Iterable[str]) -> list[str]:
    """The different values, with their number of runs where there are several."""
    counts = Counter(values)
    return [value + (f" ({n} runs)" if len(counts) > 1 else "") for value, n in sorted(counts.items())]


def _notes(runs: Sequence[Line]) -> str:
    notes = [
        "Errors are percentages of misclassified test sentences: lower is better. They are those of the model at the "
        "step of least dev error.",
        "`a ± s (n)`: mean and sample standard deviation over n seeds. s is the noise of one run, not of the mean. A "
        "seed decides initial weights, order, dropout and mixing, and dev data and subsets where they are drawn.",
        "The paper's: its mean ± standard deviation over 10 seeds, as printed, of the same data set, backbone, method "
        "and share, whatever table prints it. How our runs differ from its own is said below.",
        f"`{views.NOT_PRINTED}`: the paper has no such cell. `{views.NOT_RUN}`: it has, and we have no run.",
        "dev data: the error on them at the step that they select, the least of the run. Least (selected on test): the "
        "published code's metric, the least test error over all evaluations of a run; it selects the model by the test "
        "data and so is too low.",
        "Trained on + dev: numbers of sentences that are trained on, and of those that select the step. No sentence is "
        "both. A share is of each class of all training sentences, dev included, rounded down, at least one; at 100% "
        "the dev data are taken out of it.",
        "Difference: mean over those seeds of the method's error minus the other's, in points of percent, with a 95% "
        "bootstrap interval (BCa). Below zero the method is better. Relative improvement is of the same seeds' means.",
        "Reading: **better** or **worse** where the interval leaves out zero and q is below 0.05; a hint where the "
        f"interval alone does; else within noise. Nothing is read of fewer than {ENOUGH_PAIRS} seeds, nor where it "
        "leaves out zero and fewer than that differ. It is too narrow for few seeds: where nothing acts it leaves out "
        "zero in 27%, 17%, 14% and 9% of comparisons at n = 3, 5, 6 and 10 (by simulation).",
        f"{views.TOO_FEW}: with fewer than {ENOUGH_PAIRS} seeds that differ, p cannot be below 0.05.",
        "p: Wilcoxon's signed-rank test, two-sided, of that comparison alone; 1 where no seed differs. q: p adjusted "
        "for the number of different comparisons in this report, whatever tables they stand in (false discovery rate, "
        "Benjamini and Hochberg).",
        "Intervals and p are over seeds on the one test set. They do not contain its own sampling error: another test "
        "set of its size would give other errors and differences.",
    ]
    folds = sorted({run["dataset"] for run in runs if run["dataset"] in CROSS_VALIDATED}, key=CROSS_VALIDATED.index)
    if folds:
        fixed = all(run["config"].get("fold") is not None for run in runs if run["dataset"] in CROSS_VALIDATED)
        notes.append(
            f"{' and '.join(folds)}: sets for ten-fold cross-validation. "
            + (
                "Every run tests on the fold that its settings name."
                if fixed
                else "A seed is a fold as well (seed mod 10): s holds the folds' differences, the comparisons do not. "
                "Folds share training sentences, so seeds are not independent, and intervals and p too confident."
            )
        )
    return "\n".join(f"- {note}" for note in notes)


def _keys(view: View) -> set[str]:
    return {run["key"] for run in view.runs}


def _section(
    view: View, found: Sequence[Comparison], published: Sequence[PublishedCell], held: View | None
) -> list[str]:
    """A view's tables, once: where another holds all of its runs they are there."""
    blocks = [f"## {view.name}: {view.experiment.title}"]
    if held is not None:
        return [*blocks, f"Its runs are in the tables of {held.name}."]
    absent = [
        f"{field} {', '.join(f'{value:g}' if field == 'ratio' else value for value in missing)}"
        for field in ("dataset", "model", "method", "ratio")
        if (missing := [v for v in getattr(view.experiment, f"{field}s") if v not in view.present(field)])
    ]
    if absent:
        blocks.append(f"Not run: {'; '.join(absent)}.")
    blocks.append(views.error_table(view, published))
    if any(view.same(model, method) != method for model in view.present("model") for method in view.experiment.methods):
        blocks.append(SAME)
    if found:
        blocks += ["### Comparisons", views.comparison_table(view, found, published)]
    return blocks
