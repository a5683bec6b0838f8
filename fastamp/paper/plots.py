"""Plots of a results folder, by matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastamp.paper.statistics import by_cell, interval, summary
from fastamp.paper.views import Comparison, Line, View, model_label, ratio_label
from fastamp.training.curves import SENTENCES

DPI = 130
_LEAST_WIDTH = 4.5  # inches, for the words below the panels
# Okabe and Ito's colours, which the colour-blind can tell apart, without their yellow; then again with another line.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_READING_COLOURS = {"better": "#0072B2", "worse": "#D55E00", "within noise": "0.55", "one seed": "0.55"}
_LINES = ("-", "--", ":", "-.")

Image = tuple[str, str]  # file name, caption


def draw(view: View, found: Sequence[Comparison], folder: Path) -> list[Image]:
    """Draws all that the runs and comparisons of a view give, as PNG files in a folder.

    Raises:
        ImportError: matplotlib is not installed.
    """
    by_ratio = view.experiment.columns == "ratio"
    images = [_draw_ratios(view, folder) if by_ratio else _draw_errors(view, folder)]
    if any(comparison.paired.interval is not None for comparison in found):
        images.append(_draw_differences(view, found, folder))
    if by_ratio:
        return images  # the others are of one share of the data
    for dataset in view.present("dataset"):
        for model in view.present("model"):
            runs = [run for run in view.runs if (run["dataset"], run["model"]) == (dataset, model)]
            runs = [run for run in runs if run["ratio"] == max(other["ratio"] for other in runs)]
            for name, plot in (("curves", _draw_curves), ("policy", _draw_policy)):
                image = plot(view, runs, folder / f"{view.name}-{name}-{dataset}-{model}.png")
                images += [] if image is None else [image]
    return images


def _panels(width: float, height: float, rows: int, columns: int, **share: Any) -> tuple[Any, Any]:
    """A figure of panels with a grid: the figure, and (rows, columns) axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width, _LEAST_WIDTH), height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **share)
    for panel in panels.flat:
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8)
    return figure, panels


def _saved(figure: Any, path: Path, caption: str) -> Image:
    figure.savefig(path, dpi=DPI)
    return path.name, caption


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


def _named_lines(panels: Any, labels: Sequence[str]) -> None:
    """Names the lines y = 0, 1, ... of all panels, from the top."""
    for panel in panels.flat:
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        panel.grid(visible=False, axis="y")
    panels[0][0].set_ylim(len(labels) - 0.5, -0.5)


def _title(panel: Any, dataset: str, model: str, ratio: float, size: int = 9) -> None:
    share = "" if ratio == 1 else f", {ratio_label(ratio)}"
    panel.set_title(f"{dataset}, {model_label(model)}{share}", fontsize=size)


def _draw_errors(view: View, folder: Path) -> Image:
    """A panel for every data set and backbone, a line for every method."""
    values, methods, datasets = by_cell(view.runs), view.present("method"), view.present("dataset")
    places = [(ratio, model) for ratio in view.present("ratio") for model in view.present("model")]
    labels = [view.label(method) for method in methods]
    width = 0.075 * max(map(len, labels)) + 2.6 * len(datasets)
    height = len(places) * (0.7 + 0.23 * len(methods)) + 0.6
    figure, panels = _panels(width, height, len(places), len(datasets), sharey=True)
    for cell, seeds in values.items():
        panel = panels[places.index((cell.ratio, cell.model))][datasets.index(cell.dataset)]
        errors, y = list(seeds.values()), methods.index(cell.method)
        panel.plot(errors, [y + 0.25] * len(errors), "o", color="0.45", markersize=3, alpha=0.6, markeredgewidth=0)
        if (bounds := interval(errors)) is not None:
            panel.plot(bounds, [y, y], color=_COLOURS[1], linewidth=2, solid_capstyle="butt")
        panel.plot([summary(errors).mean], [y], "D", color=_COLOURS[1], markersize=4)
    for (ratio, model), row in zip(places, panels, strict=True):
        for dataset, panel in zip(datasets, row, strict=True):
            _title(panel, dataset, model, ratio)
    _named_lines(panels, labels)
    figure.supxlabel("test error at the step of least dev error, %", fontsize=9)
    return _saved(
        figure,
        folder / f"{view.name}-errors.png",
        "Test error by method: seeds (dots), their mean and its 95% bootstrap interval (bars). Bars that overlap do "
        "not say that two methods are alike: the comparisons take out what seeds have in common.",
    )


def _draw_differences(view: View, found: Sequence[Comparison], folder: Path) -> Image:
    """The paired differences: a panel for every place of the table, a line for every comparison."""
    by_ratio = view.experiment.columns == "ratio"
    pairs = list(dict.fromkeys((c.method.method, c.baseline.method) for c in found))
    columns = list(dict.fromkeys(c.method.ratio if by_ratio else c.method.dataset for c in found))
    lines = list(dict.fromkeys((c.method.dataset if by_ratio else c.method.ratio, c.method.model) for c in found))
    labels = [f"{view.label(method)} against {view.label(baseline)}" for method, baseline in pairs]
    width = 0.075 * max(map(len, labels)) + (1.5 if by_ratio else 2.6) * len(columns)
    height = len(lines) * (0.7 + 0.2 * len(pairs)) + 0.6
    share = "row" if by_ratio else False
    figure, panels = _panels(width, height, len(lines), len(columns), sharey=True, sharex=share)
    for comparison in found:
        place, pair = comparison.method, comparison.paired
        row, column = (place.dataset, place.ratio) if by_ratio else (place.ratio, place.dataset)
        panel = panels[lines.index((row, place.model))][columns.index(column)]
        y, colour = pairs.index((place.method, comparison.baseline.method)), _READING_COLOURS[pair.reading]
        if pair.interval is not None:
            panel.plot(pair.interval, [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        panel.plot([pair.difference], [y], "D", color=colour, markersize=4, fillstyle="full" if pair.clear else "none")
        _title(panel, place.dataset, place.model, place.ratio, 7 if by_ratio else 9)
    for panel in panels.flat:
        panel.axvline(0, color="0.2", linewidth=0.8)
    _named_lines(panels, labels)
    figure.supxlabel("difference of test errors, points; left of zero is better", fontsize=9)
    return _saved(
        figure,
        folder / f"{view.name}-differences.png",
        "The comparisons: paired difference and its 95% bootstrap interval, in blue better, in orange worse, in grey "
        "within noise. Hollow: a hint only, the signed-rank test sees nothing at 5%.",
    )


def _draw_ratios(view: View, folder: Path) -> Image:
    """Error against the share of the training data, a panel for every data set and backbone."""
    values, looks = by_cell(view.runs), _looks(view, view.present("method"))
    models, datasets, ratios = view.present("model"), view.present("dataset"), view.present("ratio")
    height = 0.6 + 3.2 * len(models) + 0.2 * len(looks) / 3
    figure, panels = _panels(1.5 + 4.2 * len(datasets), height, len(models), len(datasets))
    for model, row in zip(models, panels, strict=True):
        for dataset, panel in zip(datasets, row, strict=True):
            for i, (method, look) in enumerate(looks.items()):
                found = {
                    cell.ratio: list(seeds.values())
                    for cell, seeds in values.items()
                    if (cell.dataset, cell.model, cell.method) == (dataset, model, method)
                }
                # Side by side, for the bars of methods at the same share not to hide each other.
                aside = 1.02 ** (i - (len(looks) - 1) / 2)
                means = [summary(errors).mean for errors in found.values()]
                panel.plot([ratio * aside for ratio in found], means, marker="o", markersize=3.5, linewidth=1.2, **look)
                for ratio, errors in found.items():
                    if (bounds := interval(errors)) is not None:
                        panel.plot([ratio * aside] * 2, bounds, color=look["color"], linewidth=1, solid_capstyle="butt")
            panel.set_xscale("log")
            panel.set_xticks(ratios, [ratio_label(ratio) for ratio in ratios], fontsize=8, rotation=60)
            panel.minorticks_off()
            _title(panel, dataset, model, 1.0)
    figure.supxlabel("share of the training data", fontsize=9)
    figure.supylabel("test error, %", fontsize=9)
    _legend(figure, panels.flat)
    caption = "Test error against the share of the training data: mean over seeds, 95% bootstrap interval."
    return _saved(figure, folder / f"{view.name}-ratios.png", caption)


def _draw_curves(view: View, runs: Sequence[Line], path: Path) -> Image | None:
    """Figure 2: loss against λ for two pairs and over the test set, where words and where sentences are mixed."""
    runs = [run for run in runs if run["curves"]]
    levels = [level for level in ("word", "sentence") if any(level in run["curves"] for run in runs)]
    if not levels:
        return None
    titles = ("a random pair", "another random pair", "mean over test sentences")
    looks = _looks(view, _methods(view, runs))
    height = 0.9 + 2.9 * len(levels) + 0.2 * len(looks) / 3
    figure, panels = _panels(10.5, height, len(levels), len(titles), sharex=True)
    for level, row in zip(levels, panels, strict=True):
        for column, (title, panel) in enumerate(zip(titles, row, strict=True)):
            for method, look in looks.items():
                points: dict[float, list[float]] = {}
                for run in runs:
                    if run["method"] == method and level in run["curves"]:
                        curve = [*run["curves"][level]["pairs"], run["curves"][level]["mean"]][column]
                        for lam, loss in zip(run["curves"]["lam"], curve, strict=True):
                            points.setdefault(lam, []).append(loss)
                _band(panel, points, look)
            panel.set_title(f"{level}s mixed: {title}", fontsize=9)
    figure.supxlabel("λ, the share of the first sentence", fontsize=9)
    figure.supylabel("loss against the mixed label, nats", fontsize=9)
    _legend(figure, panels.flat)
    return _saved(
        figure,
        path,
        f"Loss against λ, {_place(runs)}, of the model of least dev error: two random pairs of test sentences, and the "
        f"mean over random pairs of at most {SENTENCES}. Mean over seeds, band ± one standard deviation.",
    )


def _draw_policy(view: View, runs: Sequence[Line], path: Path) -> Image | None:
    """The policy over training: share of rows at λ', and size of the gradient in λ."""
    runs = [run for run in runs if any("mix/grad_abs" in record for record in run["history"])]
    levels = {
        title: methods
        for level, title in (("word", "words mixed"), ("sent", "sentences mixed"))
        if (methods := [method for method in _methods(view, runs) if method.startswith(level)])
    }
    if not levels:
        return None
    most = max(map(len, levels.values()))
    crowded = most > len(_COLOURS)
    longest = max(len(view.label(method)) for methods in levels.values() for method in methods)
    height = 0.6 + max(2.4, 0.4 + 0.17 * most) * len(levels)
    figure, panels = _panels(8.5 + 0.06 * longest, height, len(levels), 2, sharex=True)
    columns = (("mix/mask", "rows that take λ', %", 100), ("mix/grad_abs", "mean |∂ℓ/∂λ|, nats", 1))
    for (level, methods), row in zip(levels.items(), panels, strict=True):
        for (key, title, scale), panel in zip(columns, row, strict=True):
            for method, look in _looks(view, methods).items():
                points: dict[float, list[float]] = {}
                for record in (record for run in runs if run["method"] == method for record in run["history"]):
                    if key in record:
                        points.setdefault(record["step"], []).append(scale * record[key])
                _band(panel, points, look, band=not crowded)
            panel.set_title(f"{level}: {title}", fontsize=9)
        row[0].set_ylim(-3, 103)
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)
    figure.supxlabel("step", fontsize=9)
    band = "" if crowded else ", band ± one standard deviation"
    caption = f"The policy over training, {_place(runs)}: of one batch an evaluation, mean over seeds{band}."
    if any(run["config"].get("preset") == "official" for run in runs):
        caption += (
            " In methods as in the published code ℓ is the batch's mean of another loss, and |∂ℓ/∂λ| no number to "
            "compare."
        )
    return _saved(figure, path, caption)


def _methods(view: View, runs: Iterable[Line]) -> list[str]:
    there = {run["method"] for run in runs}
    return [method for method in view.present("method") if method in there]


def _place(runs: Sequence[Line]) -> str:
    ratio = "" if runs[0]["ratio"] == 1 else f", {ratio_label(runs[0]['ratio'])} of the training data"
    return f"{runs[0]['dataset']}, {model_label(runs[0]['model'])}{ratio}"


def _band(panel: Any, points: Mapping[float, Sequence[float]], look: Mapping[str, Any], *, band: bool = True) -> None:
    """The mean at every x, and in the band one sample standard deviation to both sides, none for single values."""
    xs = sorted(points)
    found = [summary(points[x]) for x in xs]
    means, stds = np.array([s.mean for s in found]), np.array([s.std or 0.0 for s in found])
    panel.plot(xs, means, linewidth=1.3, **look)
    if band:
        panel.fill_between(xs, means - stds, means + stds, color=look["color"], alpha=0.12, linewidth=0)


def _legend(figure: Any, panels: Iterable[Any]) -> None:
    """One legend for all panels, above them."""
    entries = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
