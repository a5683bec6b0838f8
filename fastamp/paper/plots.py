"""Plots of a results folder, by matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastamp.paper.statistics import Cell, by_cell, interval, summary
from fastamp.paper.views import Comparison, Run, View, model_label, ratio_label
from fastamp.training.curves import SENTENCES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
_LEAST_WIDTH = 4.5  # inches, for the words below the panels
# Okabe and Ito's colours, which the colour-blind can tell apart, without their yellow; then again with another line.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_READING_COLOURS = {"better": "#0072B2", "worse": "#D55E00", "within noise": "0.55", "one seed": "0.55"}
_LINES = ("-", "--", ":", "-.")

Image = tuple[str, str]  # file name, caption
Points = Mapping[float, Sequence[float]]  # the seeds' values at every x


def draw(view: View, found: Sequence[Comparison], folder: Path) -> list[Image]:
    """Draws all that a view's runs give, as PNG files.

    Args:
        view: an experiment with at least one run.
        found: its comparisons.
        folder: where to.

    Returns:
        file names in `folder`, and captions.

    Raises:
        ImportError: matplotlib is not installed.
    """
    images = [_draw_ratios(view, folder) if view.experiment.columns == "ratio" else _draw_errors(view, folder)]
    if any(comparison.paired.interval is not None for comparison in found):
        images.append(_draw_differences(view, found, folder))
    if view.experiment.columns == "ratio":
        return images  # the others are of one share of the data
    for dataset in view.present("dataset"):
        for model in view.present("model"):
            runs = [run for run in view.runs if (run["dataset"], run["model"]) == (dataset, model)]
            runs = [run for run in runs if run["ratio"] == max(other["ratio"] for other in runs)]
            for name, plot in (("curves", _draw_curves), ("policy", _draw_policy)):
                image = plot(view, runs, folder / f"{view.name}-{name}-{dataset}-{model}.png")
                images += [] if image is None else [image]
    return images


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib") from error
    return Figure(figsize=(max(width, _LEAST_WIDTH), height), layout="constrained")


def _looks(view: View, methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, line and label of each method."""
    return {
        method: {
            "color": _COLOURS[i % len(_COLOURS)],
            # AMP's line is broken, for Mixup's to show where they coincide.
            "linestyle": _LINES[(i // len(_COLOURS) + ("-amp" in method)) % len(_LINES)],
            "label": view.label(method),
        }
        for i, method in enumerate(methods)
    }


def _draw_errors(view: View, folder: Path) -> Image:
    """A panel for every data set and backbone, a line for every method."""
    values, methods = by_cell(view.runs), view.present("method")
    places = [(ratio, model) for ratio in view.present("ratio") for model in view.present("model")]
    datasets = view.present("dataset")
    longest = max(len(view.label(method)) for method in methods)
    figure = _figure(0.075 * longest + 2.6 * len(datasets), len(places) * (0.7 + 0.23 * len(methods)) + 0.6)
    panels = figure.subplots(len(places), len(datasets), squeeze=False, sharey=True)
    for (ratio, model), row in zip(places, panels, strict=True):
        for dataset, panel in zip(datasets, row, strict=True):
            for y, method in enumerate(methods):
                errors = list(values.get(Cell(dataset, model, method, ratio), {}).values())
                if errors:
                    _error_line(panel, y, errors)
            share = "" if ratio == 1 else f", {ratio_label(ratio)}"
            panel.set_title(f"{dataset}, {model_label(model)}{share}", fontsize=9)
            panel.set_yticks(range(len(methods)), [view.label(method) for method in methods], fontsize=8)
            panel.tick_params(axis="x", labelsize=8)
            panel.grid(axis="x", color="0.9")
            panel.set_axisbelow(True)
    panels[0][0].set_ylim(len(methods) - 0.5, -0.5)
    figure.supxlabel("test error at the step of least dev error, %", fontsize=9)
    path = folder / f"{view.name}-errors.png"
    figure.savefig(path, dpi=DPI)
    return path.name, (
        "Test error by method: seeds (dots), their mean and its 95% bootstrap interval (bars). Bars that overlap do "
        "not say that two methods are alike: the comparisons take out what seeds have in common."
    )


def _error_line(panel: Axes, y: int, errors: Sequence[float]) -> None:
    """A cell: seeds below the line, mean and interval on it."""
    panel.plot(errors, [y + 0.25] * len(errors), "o", color="0.45", markersize=3, alpha=0.6, markeredgewidth=0)
    mean, bounds = summary(errors).mean, interval(errors)
    if bounds is not None:
        panel.plot(bounds, [y, y], color=_COLOURS[1], linewidth=2, solid_capstyle="butt")
    panel.plot([mean], [y], "D", color=_COLOURS[1], markersize=4)


def _draw_differences(view: View, found: Sequence[Comparison], folder: Path) -> Image:
    """The paired differences: a panel for every place of the table, a line for every comparison."""
    pairs = list(dict.fromkeys((c.method.method, c.baseline.method) for c in found))
    labels = [f"{view.label(method)} against {view.label(baseline)}" for method, baseline in pairs]
    by_ratio = view.experiment.columns == "ratio"
    columns = list(dict.fromkeys(c.method.ratio if by_ratio else c.method.dataset for c in found))
    lines = list(dict.fromkeys((c.method.dataset if by_ratio else c.method.ratio, c.method.model) for c in found))
    width = 0.075 * max(map(len, labels)) + (1.5 if by_ratio else 2.6) * len(columns)
    figure = _figure(width, len(lines) * (0.7 + 0.2 * len(pairs)) + 0.6)
    panels = figure.subplots(len(lines), len(columns), squeeze=False, sharey=True, sharex="row" if by_ratio else False)
    for comparison in found:
        place, pair = comparison.method, comparison.paired
        row = lines.index((place.dataset if by_ratio else place.ratio, place.model))
        panel = panels[row][columns.index(place.ratio if by_ratio else place.dataset)]
        y = pairs.index((place.method, comparison.baseline.method))
        colour = _READING_COLOURS[pair.reading]
        if pair.interval is not None:
            panel.plot(pair.interval, [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        panel.plot([pair.difference], [y], "D", color=colour, markersize=4, fillstyle="full" if pair.clear else "none")
        share = "" if place.ratio == 1 else f", {ratio_label(place.ratio)}"
        panel.set_title(f"{place.dataset}, {model_label(place.model)}{share}", fontsize=7 if by_ratio else 9)
    for panel in panels.flat:
        panel.axvline(0, color="0.2", linewidth=0.8)
        panel.set_yticks(range(len(pairs)), labels, fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
    panels[0][0].set_ylim(len(pairs) - 0.5, -0.5)
    figure.supxlabel("difference of test errors, points; left of zero is better", fontsize=9)
    path = folder / f"{view.name}-differences.png"
    figure.savefig(path, dpi=DPI)
    return path.name, (
        "The comparisons: paired difference and its 95% bootstrap interval, in blue better, in orange worse, in grey "
        "within noise. Hollow: a hint only, the signed-rank test sees nothing at 5%."
    )


def _draw_ratios(view: View, folder: Path) -> Image:
    """Error against the share of the training data, a panel for every data set and backbone."""
    values, looks = by_cell(view.runs), _looks(view, view.present("method"))
    models, datasets = view.present("model"), view.present("dataset")
    figure = _figure(1.5 + 4.2 * len(datasets), 0.6 + 3.2 * len(models) + 0.2 * len(looks) / 3)
    panels = figure.subplots(len(models), len(datasets), squeeze=False)
    for model, row in zip(models, panels, strict=True):
        for dataset, panel in zip(datasets, row, strict=True):
            for i, (method, look) in enumerate(looks.items()):
                found = {
                    ratio: list(values[c].values())
                    for ratio in view.present("ratio")
                    if (c := Cell(dataset, model, method, ratio)) in values
                }
                # Side by side, for the bars of methods at the same share not to hide each other.
                aside = 1.02 ** (i - (len(looks) - 1) / 2)
                means = [summary(errors).mean for errors in found.values()]
                panel.plot([ratio * aside for ratio in found], means, marker="o", markersize=3.5, linewidth=1.2, **look)
                for ratio, errors in found.items():
                    if (bounds := interval(errors)) is not None:
                        panel.plot([ratio * aside] * 2, bounds, color=look["color"], linewidth=1, solid_capstyle="butt")
            panel.set_xscale("log")
            ratios = view.present("ratio")
            panel.set_xticks(ratios, [ratio_label(ratio) for ratio in ratios], fontsize=8, rotation=60)
            panel.minorticks_off()
            panel.set_title(f"{dataset}, {model_label(model)}", fontsize=9)
            panel.grid(color="0.92")
            panel.set_axisbelow(True)
    figure.supxlabel("share of the training data", fontsize=9)
    figure.supylabel("test error, %", fontsize=9)
    _legend(figure, panels.flat, columns=3)
    path = folder / f"{view.name}-ratios.png"
    figure.savefig(path, dpi=DPI)
    return path.name, "Test error against the share of the training data: mean over seeds, 95% bootstrap interval."


def _draw_curves(view: View, runs: Sequence[Run], path: Path) -> Image | None:
    """Figure 2: loss against λ for two pairs and over the test set, where words and where sentences are mixed."""
    runs = [run for run in runs if run["curves"]]
    levels = [level for level in ("word", "sentence") if any(level in run["curves"] for run in runs)]
    if not levels:
        return None
    columns: dict[str, Callable[[Mapping[str, Any]], Sequence[float]]] = {
        "a random pair": lambda curves: curves["pairs"][0],
        "another random pair": lambda curves: curves["pairs"][1],
        "mean over test sentences": lambda curves: curves["mean"],
    }
    looks = _looks(view, _methods(view, runs))
    figure = _figure(10.5, 0.9 + 2.9 * len(levels) + 0.2 * len(looks) / 3)
    panels = figure.subplots(len(levels), len(columns), squeeze=False, sharex=True)
    for level, row in zip(levels, panels, strict=True):
        for (title, values), panel in zip(columns.items(), row, strict=True):
            for method, look in looks.items():
                points: dict[float, list[float]] = {}
                for run in runs:
                    if run["method"] == method and level in run["curves"]:
                        for lam, loss in zip(run["curves"]["lam"], values(run["curves"][level]), strict=True):
                            points.setdefault(lam, []).append(loss)
                _band(panel, points, look)
            panel.set_title(f"{level}s mixed: {title}", fontsize=9)
            panel.grid(color="0.92")
            panel.set_axisbelow(True)
    figure.supxlabel("λ, the share of the first sentence", fontsize=9)
    figure.supylabel("loss against the mixed label, nats", fontsize=9)
    _legend(figure, panels.flat, columns=3)
    figure.savefig(path, dpi=DPI)
    return (
        path.name,
        f"Loss against λ, {_place(runs)}, of the model of least dev error: two random pairs of test sentences, and the "
        f"mean over random pairs of at most {SENTENCES}. Mean over seeds, band ± one standard deviation.",
    )


def _draw_policy(view: View, runs: Sequence[Run], path: Path) -> Image | None:
    """The policy over training: share of rows at λ', and size of the gradient in λ."""
    runs = [run for run in runs if any("mix/grad_abs" in record for record in run["history"])]
    levels = {"word": "words mixed", "sent": "sentences mixed"}
    of_level = {level: [m for m in _methods(view, runs) if m.startswith(level)] for level in levels}
    of_level = {level: methods for level, methods in of_level.items() if methods}
    if not of_level:
        return None
    crowded = any(len(methods) > len(_COLOURS) for methods in of_level.values())
    columns = {"mix/mask": "rows that take λ', %", "mix/grad_abs": "mean |∂ℓ/∂λ|, nats"}
    longest = max(len(view.label(method)) for methods in of_level.values() for method in methods)
    most = max(map(len, of_level.values()))
    figure = _figure(8.5 + 0.06 * longest, 0.6 + max(2.4, 0.4 + 0.17 * most) * len(of_level))
    panels = figure.subplots(len(of_level), len(columns), squeeze=False, sharex=True)
    for (level, methods), row in zip(of_level.items(), panels, strict=True):
        for (key, title), panel in zip(columns.items(), row, strict=True):
            for method, look in _looks(view, methods).items():
                points: dict[float, list[float]] = {}
                for run in runs:
                    if run["method"] == method:
                        for record in run["history"]:
                            if key in record:
                                value = record[key] * (100 if key == "mix/mask" else 1)
                                points.setdefault(record["step"], []).append(value)
                _band(panel, points, look, band=not crowded)
            panel.set_title(f"{levels[level]}: {title}", fontsize=9)
            panel.tick_params(labelsize=8)
            panel.grid(color="0.92")
            panel.set_axisbelow(True)
        row[0].set_ylim(-3, 103)
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    figure.supxlabel("step", fontsize=9)
    figure.savefig(path, dpi=DPI)
    band = "" if crowded else ", band ± one standard deviation"
    caption = f"The policy over training, {_place(runs)}: of one batch an evaluation, mean over seeds{band}."
    if any(run["config"].get("preset") == "official" for run in runs):
        caption += (
            " Of methods as in the published code ℓ is the batch's mean of another loss, and |∂ℓ/∂λ| no number to "
            "compare."
        )
    return path.name, caption


def _methods(view: View, runs: Iterable[Run]) -> list[str]:
    there = {run["method"] for run in runs}
    return [method for method in view.present("method") if method in there]


def _place(runs: Sequence[Run]) -> str:
    ratio = "" if runs[0]["ratio"] == 1 else f", {ratio_label(runs[0]['ratio'])} of the training data"
    return f"{runs[0]['dataset']}, {model_label(runs[0]['model'])}{ratio}"


def _band(panel: Axes, points: Points, look: Mapping[str, Any], *, band: bool = True) -> None:
    """The mean at every x, and in the band one sample standard deviation to both sides, none for single values."""
    if not points:
        return
    xs = sorted(points)
    found = [summary(points[x]) for x in xs]
    means, stds = np.array([s.mean for s in found]), np.array([s.std or 0.0 for s in found])
    panel.plot(xs, means, linewidth=1.3, **look)
    if band:
        panel.fill_between(xs, means - stds, means + stds, color=look["color"], alpha=0.12, linewidth=0)


def _legend(figure: Figure, panels: Iterable[Axes], columns: int) -> None:
    """One legend for all panels, above them."""
    entries = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
