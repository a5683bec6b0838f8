"""The report of a results folder: tables in Markdown, and plots."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from fastamp.paper import plots, views
from fastamp.paper.display import duration
from fastamp.paper.plan import Request
from fastamp.paper.published import CITATION, LOW_RESOURCE_REDUCTION_UP_TO, REDUCTION_UP_TO, PublishedCell
from fastamp.paper.results import Results
from fastamp.paper.statistics import ENOUGH_PAIRS, by_cell, finished, paired
from fastamp.paper.views import Comparison, Line, View, method_label, model_label, ratio_label, reading

FILE = "report.md"
CROSS_VALIDATED = ("subj", "mr")


def write(
    folder: str | os.PathLike[str], results: Results, published: Mapping[PublishedCell, float] | None = None
) -> Path:
    """Writes report.md and its plots into a folder that is there, and returns report.md's path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    path = Path(folder) / FILE
    path.write_text(render(results, published, path.parent), encoding="utf-8")
    return path


def render(results: Results, published: Mapping[PublishedCell, float] | None = None, folder: Path | None = None) -> str:
    """The report in Markdown: the same for the same records in any order; with plots where there is a folder.

    Args:
        results: what `results.read` gives.
        published: the paper's cells, from `published.read_published`.
        folder: where plots go.
    """
    runs = finished(results.records)
    failed = sorted((record["key"], record["error"]) for record in results.records if record["status"] == "failed")
    shown = views.views(runs, results.specification["requests"])
    compared = views.compare(shown)
    blocks = ["# Results", "\n".join(f"- {line}" for line in _header(runs, len(failed), results.specification))]
    if shown:
        blocks += ["## The paper's claims", _claims(runs), "## How to read the tables", _notes(runs)]
    for view in shown:
        blocks += _section(view, compared[view.name], published)
        if folder is not None:
            images = plots.draw(view, compared[view.name], folder)
            blocks += [f"![{file}]({file})\n\n{caption}" for file, caption in images]
    if failed:
        blocks += ["## Failed runs", "\n".join(f"- `{key}`: {error}" for key, error in failed)]
    return "\n\n".join(blocks) + "\n"


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
    ]
    for name in ("eval_every", "overrides", "data"):
        if specification[name] not in (None, {}):
            lines.append(f"{name}: `{json.dumps(specification[name], ensure_ascii=False, sort_keys=True)}`")
    done = {run["key"] for run in runs}
    for request in specification["requests"]:
        asked = Request(**request).runs()
        missing = sum(run.key not in done for run in asked)
        extent = "; ".join(
            ", ".join(ratio_label(value) if field == "ratios" else value for value in request[field])
            for field in ("datasets", "models", "methods", "ratios")
        )
        seeds = ", ".join(map(str, request["seeds"]))
        unfinished = f". **Unfinished: {missing} of {len(asked)} runs are missing.**" if missing else ""
        lines.append(f"Asked for: {request['experiment']}: {extent}; seeds {seeds}{unfinished}")
    return lines


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


def _claims(runs: Sequence[Line]) -> str:
    """The abstract's claims, and the same numbers here."""
    values = by_cell(runs)
    found = [
        (place, pair)
        for place in values
        if place.method in ("word-amp", "sent-amp")
        and (pair := paired(values[place], values.get(replace(place, method=place.method.replace("amp", "mixup")), {})))
        and pair.improvement is not None
    ]
    text = (
        f"The abstract states that AMP reduces the error rate over Mixup variants by up to {REDUCTION_UP_TO}%, and in "
        f"low-resource conditions by up to {LOW_RESOURCE_REDUCTION_UP_TO}% ({CITATION})."
    )
    if not found:
        return f"{text} No runs here compare AMP with Mixup of the same level."
    improvements = [pair.improvement or 0.0 for _, pair in found]
    place, best = found[improvements.index(max(improvements))]
    where = (
        f"{place.dataset}, {model_label(place.model)}, {ratio_label(place.ratio)} of the training data, "
        f"{method_label(place.method)}"
    )
    beyond = Counter(pair.reading for _, pair in found if pair.clear)
    return (
        f"{text} Comparisons of AMP with Mixup of the same level here: {len(found)}. Their largest relative "
        f"improvement is {max(improvements):+.1f}% ({where}, n = {best.n}; {reading(best)}), the median "
        f"{median(improvements):+.1f}%. Clear readings: {beyond['better']} better, {beyond['worse']} worse. "
        "The largest of several noisy numbers tends to be above zero even where nothing acts."
    )


def _notes(runs: Sequence[Line]) -> str:
    notes = [
        "Errors are percentages of misclassified test sentences: lower is better. They are those of the model at the "
        "step of least dev error.",
        "`a ± s (n)`: mean and sample standard deviation over n seeds. s is the noise of one run, not of the mean. A "
        "seed decides initial weights, order, dropout and mixing, and dev data and subsets where they are drawn.",
        f"`{views.LEAST_LABEL}`: the published code's metric, the least test error over all evaluations of a run. It "
        "selects the model by the test data and so is too low; not to be set against other work's test errors.",
        f"`{views.MISSING}`: no run. {views.UNEVEN}: a row without the table's largest number of seeds in every cell; "
        "compare it in the comparisons only, which take the seeds that both sides have.",
        "Difference: mean over those seeds of the method's error minus the other's, in points of percent, with a 95% "
        "bootstrap interval (BCa). Below zero the method is better. Relative improvement is of the same seeds' means.",
        "Reading: **better** or **worse** where the interval leaves out zero and p is below 0.05; a hint where the "
        "interval alone does; else within noise. The interval is too narrow for few seeds: where nothing acts it "
        "leaves out zero in 27%, 17%, 14% and 9% of comparisons at n = 3, 5, 6 and 10 (by simulation). For a whole "
        "table believe q.",
        f"{views.TOO_FEW}: with fewer than {ENOUGH_PAIRS} seeds that differ, p cannot be below 0.05.",
        "p: Wilcoxon's signed-rank test, two-sided, of that comparison alone; 1 where no seed differs. q: p adjusted "
        "for the number of different comparisons in this report, whatever tables they stand in (false discovery rate, "
        "Benjamini and Hochberg).",
        "Intervals and p are over seeds on the one test set. They do not contain its own sampling error: another test "
        "set of its size would give other errors and differences.",
    ]
    if any(run["ratio"] < 1 for run in runs):
        notes.append(
            "A share of the training data is of the training sentences only: the dev data that select the step are not "
            "reduced."
        )
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


def _section(view: View, found: Sequence[Comparison], published: Mapping[PublishedCell, float] | None) -> list[str]:
    blocks = [f"## {view.name}: {view.experiment.title}"]
    absent = [
        f"{field} {', '.join(f'{value:g}' if field == 'ratio' else value for value in missing)}"
        for field in ("dataset", "model", "method", "ratio")
        if (missing := [v for v in getattr(view.experiment, f"{field}s") if v not in view.present(field)])
    ]
    if absent:
        blocks.append(f"Not run: {'; '.join(absent)}.")
    blocks += ["Test error at the step of least dev error, mean ± std (n):", views.error_table(view, published)]
    if found:
        blocks += ["### Comparisons", views.comparison_table(view, found)]
    if view.experiment.columns == "ratio":
        blocks += [f"### Test error, {views.LEAST_LABEL}", views.error_table(view, metric=views.LEAST)]
    return blocks
