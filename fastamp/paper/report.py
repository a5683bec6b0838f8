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

from fastamp.paper.commands import read_commands
from fastamp.paper.display import duration
from fastamp.paper.plan import EXPERIMENTS, Experiment
from fastamp.paper.published import CITATION, LOW_RESOURCE_REDUCTION_UP_TO, REDUCTION_UP_TO, PublishedCell
from fastamp.paper.statistics import ENOUGH_PAIRS, by_cell, finished, paired
from fastamp.paper.views import (
    LEAST,
    LEAST_LABEL,
    MISSING,
    TOO_FEW,
    UNEVEN,
    Comparison,
    Run,
    View,
    compare,
    comparison_table,
    error_table,
    method_label,
    model_label,
    ratio_label,
    reading,
    views,
)

FILE = "report.md"
CROSS_VALIDATED = ("subj", "mr")


def write(
    folder: str | os.PathLike[str],
    records: Iterable[Run],
    settings: Mapping[str, Any],
    *,
    experiments: Mapping[str, Experiment] = EXPERIMENTS,
    published: Mapping[PublishedCell, float] | None = None,
    plots: bool = True,
) -> Path:
    """Writes report.md and its plots into a results folder.

    Args:
        folder: where to; made if there is none.
        records: lines of results.jsonl, in any order.
        settings: settings.json.
        experiments: which there are.
        published: the paper's cells, from `published.read_published`.
        plots: False draws none, and needs no matplotlib.

    Returns:
        the path of report.md.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder, records = Path(folder), list(records)
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, list[tuple[str, str]]] = {}
    if plots:
        from fastamp.paper import plots as plotting

        shown = views(finished(records), settings, experiments)
        compared = compare(shown)
        for view in shown:
            images[view.name] = plotting.draw(view, compared[view.name], folder)
    path = folder / FILE
    text = render(records, settings, experiments=experiments, published=published, images=images)
    path.write_text(text, encoding="utf-8")
    return path


def render(
    records: Iterable[Run],
    settings: Mapping[str, Any],
    *,
    experiments: Mapping[str, Experiment] = EXPERIMENTS,
    published: Mapping[PublishedCell, float] | None = None,
    images: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> str:
    """The report in Markdown: the same for the same records in any order.

    Args:
        records: lines of results.jsonl.
        settings: settings.json.
        experiments: which there are; shown are those that were run.
        published: the paper's cells, to stand beside ours.
        images: (file, caption) of the plots, by experiment.
    """
    records = list(records)
    runs = finished(records)
    failed = sorted((record["key"], record["error"]) for record in records if record["status"] == "failed")
    shown = views(runs, settings, experiments)
    compared = compare(shown)
    blocks = ["# Results", *_header(runs, failed, settings, experiments)]
    if shown:
        blocks += ["## The paper's claims", _claims(runs), "## How to read the tables", _notes(runs)]
    for view in shown:
        blocks += _section(view, compared[view.name], published, (images or {}).get(view.name, ()))
    if failed:
        blocks += ["## Failed runs", "\n".join(f"- `{key}`: {error}" for key, error in failed)]
    return "\n\n".join(blocks) + "\n"


def _header(
    runs: Sequence[Run],
    failed: Sequence[tuple[str, str]],
    settings: Mapping[str, Any],
    experiments: Mapping[str, Experiment],
) -> list[str]:
    spent = duration(sum(run["seconds"] for run in runs))
    lines = [
        f"Runs: {len(runs)} done, {len(failed)} failed; {spent} of runs, side by side or not, of what was interrupted "
        "the last part"
    ]
    if not runs:
        return [lines[0]]
    lines = [f"- {lines[0]}", *(f"- Machine: {line}" for line in _tally(map(_machine, runs)))]
    steps = _tally(f"{run['result']['steps']} steps" for run in runs)
    lines.append(f"- Length: {', '.join(steps)}" + (". **Not the same for all runs.**" if len(steps) > 1 else ""))
    lines += _coverage(runs)
    for name, value in settings.items():
        if name not in ("format", "commands", "steps") and value not in (None, {}, []):
            lines.append(f"- {name}: `{json.dumps(value, ensure_ascii=False, sort_keys=True)}`")
    blocks = ["\n".join(lines)]
    if settings.get("commands"):
        unfinished = _unfinished(runs, settings, experiments)
        some = f" {len(unfinished)} of them unfinished, as marked:" if unfinished else ""
        texts = [command + unfinished.get(command, "") for command in settings["commands"]]
        blocks += [f"Commands:{some}", "\n".join(f"    {text}" for text in texts)]
    return blocks


def _unfinished(
    runs: Iterable[Run], settings: Mapping[str, Any], experiments: Mapping[str, Experiment]
) -> dict[str, str]:
    """A remark on every command of which runs are missing, by its text."""
    done = {run["key"] for run in runs}
    remarks = {}
    for command in read_commands(settings["commands"], experiments):
        asked = command.runs(experiments[command.experiment])
        missing = sum(run.key not in done for run in asked)
        if missing:
            remarks[command.text] = f"  # unfinished: {missing} of {len(asked)} runs missing"
    return remarks


def _coverage(runs: Iterable[Run]) -> list[str]:
    """How much of each data set the pre-trained vectors cover, over its runs that have some."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        if run["result"]["types_covered"] is not None:
            shares = run["result"]["types_covered"], run["result"]["tokens_covered"]
            found.setdefault(run["dataset"], []).append(shares)
    return [
        f"- Pre-trained vectors cover, of {dataset}: "
        + " and ".join(
            f"{_range(values, decimals)}% of its {what}"
            for values, decimals, what in zip(zip(*shares, strict=True), (1, 2), ("words", "tokens"), strict=True)
        )
        for dataset, shares in sorted(found.items())
    ]


def _range(values: Iterable[float], decimals: int) -> str:
    values = list(values)
    return " to ".join(dict.fromkeys(f"{value:.{decimals}f}" for value in (min(values), max(values))))


def _machine(run: Run) -> str:
    machine = run["machine"]
    return f"{machine['device']}, torch {machine['torch']}, fastamp {machine['fastamp']}, threads {machine['threads']}"


def _tally(values: Iterable[str]) -> list[str]:
    """The different values, with their number of runs where there are several."""
    counts = Counter(values)
    return [value + (f" ({n} runs)" if len(counts) > 1 else "") for value, n in sorted(counts.items())]


def _claims(runs: Sequence[Run]) -> str:
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


def _notes(runs: Sequence[Run]) -> str:
    notes = [
        "Errors are percentages of misclassified test sentences: lower is better. They are those of the model at the "
        "step of least dev error.",
        "`a ± s (n)`: mean and sample standard deviation over n seeds. s is the noise of one run, not of the mean. A "
        "seed decides initial weights, order, dropout and mixing, and dev data and subsets where they are drawn.",
        f"`{LEAST_LABEL}`: the published code's metric, the least test error over all evaluations of a run. It selects "
        "the model by the test data and so is too low; not to be set against other work's test errors.",
        f"`{MISSING}`: no run. {UNEVEN}: a row without the table's largest number of seeds in every cell; compare it "
        "in the comparisons only, which take the seeds that both sides have.",
        "Difference: mean over those seeds of the method's error minus the other's, in points of percent, with a 95% "
        "bootstrap interval (BCa). Below zero the method is better. Relative improvement is of the same seeds' means.",
        "Reading: **better** or **worse** where the interval leaves out zero and p is below 0.05; a hint where the "
        "interval alone does; else within noise. The interval is too narrow for few seeds: where nothing acts it "
        "leaves out zero in 27%, 17%, 14% and 9% of comparisons at n = 3, 5, 6 and 10 (by simulation). Of a whole "
        "table believe q.",
        f"{TOO_FEW}: with fewer than {ENOUGH_PAIRS} seeds that differ, p cannot be below 0.05.",
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
                else "A seed is a fold too (seed mod 10): s holds the folds' differences, the comparisons do not. "
                "Folds share training sentences, so seeds are not independent, and intervals and p too confident."
            )
        )
    return "\n".join(f"- {note}" for note in notes)


def _section(
    view: View,
    found: Sequence[Comparison],
    published: Mapping[PublishedCell, float] | None,
    images: Sequence[tuple[str, str]],
) -> list[str]:
    blocks = [f"## {view.name}: {view.experiment.title}"]
    absent = [
        f"{field} {', '.join(f'{value:g}' if field == 'ratio' else value for value in missing)}"
        for field in ("dataset", "model", "method", "ratio")
        if (missing := [v for v in getattr(view.experiment, f"{field}s") if v not in view.present(field)])
    ]
    if absent:
        blocks.append(f"Not run: {'; '.join(absent)}.")
    blocks += ["Test error at the step of least dev error, mean ± std (n):", error_table(view, published)]
    if found:
        blocks += ["### Comparisons", comparison_table(view, found)]
    if view.experiment.columns == "ratio":
        blocks += [f"### Test error, {LEAST_LABEL}", error_table(view, metric=LEAST)]
    blocks += [f"![{file}]({file})\n\n{caption}" for file, caption in images]
    return blocks
