"""Plots of a results folder, by matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastamp.paper.plan import METHODS
from fastamp.paper.published import PublishedCell, printed
from fastamp.paper.statistics import by_cell, distances, interval, summary
from fastamp.paper.views import DEV, SIGNIFICANT, Comparison, Line, View, model_label, ratio_label

DPI = 130
SELECTED = "at the step of least dev error"
_LEAST_WIDTH = 4.5  # inches, for the words below the panels
# Okabe and Ito's colours, which the colour-blind can tell apart, without their yellow; then again with another line.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_READINGS = {
    f"better, q < {SIGNIFICANT}": "#0072B2",
    f"worse, q < {SIGNIFICANT}": "#D55E00",
    f"q at least {SIGNIFICANT}": "0.55",
}
_PAPER = {"color": "#009E73", "marker": "s", "markersize": 4.5, "fillstyle": "none", "linestyle": "none"}

Image = tuple[str, str]  # file name, caption


def draw(
    view: View, found: Sequence[Comparison], published: Sequence[PublishedCell], folder: Path, *, tables: bool = True
) -> list[Image]:
    """Draws what the runs and comparisons of a view give, its tables or not, as PNG and SVG files in a folder.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shares = len(view.present("ratio")) > 1
    images = [(_draw_shares if shares else _draw_errors)(view, found, published, folder)] if tables else []
    if tables and not shares and any(comparison.paired.interval is not None for comparison in found):
        images.append(_draw_differences(view, found, folder))
    for place in view.places():
        runs = [run for run in view.runs if (run["dataset"], run["model"], run["ratio"]) == place]
        for experiment, plot in (("figure2", _draw_curves), ("controls", _draw_distances), ("controls", _draw_step)):
            if view.name == experiment and (image := plot(view, place, runs, folder)) is not None:
                images.append(image)
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


def _saved(figure: Any, runs: Iterable[Line], how: str, path: Path, caption: str) -> Image:
    """Writes a figure under a title that says what its runs have in common and how a step was selected."""
    from matplotlib import rc_context

    runs = list(runs)
    facts = [
        sorted({run["dataset"] for run in runs}),
        [model_label(model) for model in sorted({run["model"] for run in runs})],
        [ratio_label(ratio) for ratio in sorted({run["ratio"] for run in runs}) if ratio != 1],
        [f"{steps} steps" for steps in sorted({run["result"]["steps"] for run in runs})],
    ]
    seeds = [len(seeds) for seeds in by_cell(runs).values()]
    n = " to ".join(dict.fromkeys(map(str, (min(seeds), max(seeds)))))
    shown = [", ".join(fact) if len(fact) < 4 else f"{len(fact)} of them" for fact in facts if fact]
    figure.suptitle(f"{', '.join(shown)}, n = {n}; {how}", fontsize=9)
    figure.savefig(f"{path}.png", dpi=DPI)
    with rc_context({"svg.hashsalt": path.name}):  # the same file from the same runs
        figure.savefig(f"{path}.svg", metadata={"Date": None})
    return f"{path.name}.png", caption


def _named_lines(panels: Any, labels: Sequence[str]) -> None:
    """Names the lines y = 0, 1, ... of all panels, from the top."""
    for panel in panels.flat:
        panel.set_yticks(range(len(labels)), labels, fontsize=8)
        panel.grid(visible=False, axis="y")
    panels[0][0].set_ylim(len(labels) - 0.5, -0.5)


def _grid(view: View, labels: Sequence[str], share: bool | str) -> tuple[Any, dict[tuple[str, str], Any]]:
    """A figure with a line for every label: a panel by data set and backbone, each named."""
    datasets, models = view.present("dataset"), view.present("model")
    width = 0.8 + 0.06 * max(map(len, labels)) + 2.9 * len(datasets)
    figure, panels = _panels(
        width, len(models) * (0.4 + 0.2 * len(labels)) + 1.0, len(models), len(datasets), sharey=True, sharex=share
    )
    named = {
        (d, m): panel for m, row in zip(models, panels, strict=True) for d, panel in zip(datasets, row, strict=True)
    }
    for (dataset, model), panel in named.items():
        if len(named) > 1:
            panel.set_title(f"{dataset}, {model_label(model)}", fontsize=9)
    _named_lines(panels, labels)
    return figure, named


def _draw_errors(view: View, found: Sequence[Comparison], published: Sequence[PublishedCell], folder: Path) -> Image:
    """A panel for every data set and backbone, a line for every method."""
    methods = view.present("method")
    figure, panels = _grid(view, [view.label(method) for method in methods], "col")
    for cell, seeds in by_cell(view.runs).items():
        panel = panels[cell.dataset, cell.model]
        errors, y = list(seeds.values()), methods.index(cell.method)
        panel.plot(errors, [y + 0.25] * len(errors), "o", color="0.45", markersize=3, alpha=0.6, markeredgewidth=0)
        if (bounds := interval(errors)) is not None:
            panel.plot(bounds, [y, y], color=_COLOURS[1], linewidth=2, solid_capstyle="butt", label="95% of the mean")
        panel.plot([summary(errors).mean], [y], "D", color=_COLOURS[1], markersize=4, label="mean")
        for paper in printed(cell, published):
            panel.errorbar(paper.error, y - 0.25, xerr=paper.std, linewidth=1, label="the paper, ± std", **_PAPER)
    _legend(figure, panels.values(), "test error, %")
    return _saved(
        figure,
        view.runs,
        SELECTED,
        folder / f"{view.name}-errors",
        "Test error by method: seeds (dots), their mean and its 95% bootstrap interval, and the paper's mean ± std "
        "(squares). Bars that overlap do not say that two methods are alike: the comparisons take out what seeds have "
        "in common.",
    )


def _coloured(comparison: Comparison) -> dict[str, str]:
    """Colour and label of a comparison, by its q."""
    kind = 2 if comparison.q >= SIGNIFICANT else 0 if comparison.paired.difference < 0 else 1
    label, colour = list(_READINGS.items())[kind]
    return {"color": colour, "label": label}


def _draw_differences(view: View, found: Sequence[Comparison], folder: Path) -> Image:
    """The paired differences: a panel for every data set and backbone, a line for every comparison."""
    pairs = list(dict.fromkeys((c.method.method, c.baseline.method) for c in found))
    figure, panels = _grid(view, [f"{view.label(one)} - {view.label(other)}" for one, other in pairs], share=True)
    for comparison in found:
        panel, pair = panels[comparison.method.dataset, comparison.method.model], comparison.paired
        y, look = pairs.index((comparison.method.method, comparison.baseline.method)), _coloured(comparison)
        if pair.interval is not None:
            panel.plot(pair.interval, [y, y], linewidth=2, solid_capstyle="butt", **look)
        panel.plot([pair.difference], [y], "D", markersize=4, **look)
        panel.plot([comparison.beside[DEV].difference], [y], "|", color="0.2", markersize=7, label="on dev data")
    for panel in panels.values():
        panel.axvline(0, color="0.2", linewidth=0.8)
    _legend(figure, panels.values(), "difference of test errors, points; left of zero is better")
    return _saved(
        figure,
        view.runs,
        SELECTED,
        folder / f"{view.name}-differences",
        "The comparisons: paired difference of test errors and its 95% bootstrap interval; a stroke marks the "
        "difference on dev data.",
    )


def _draw_shares(view: View, found: Sequence[Comparison], published: Sequence[PublishedCell], folder: Path) -> Image:
    """Error, and below it the paired differences, against the number of sentences trained on: a column a place."""
    places = [(d, m) for d in view.present("dataset") for m in view.present("model")]
    figure, panels = _panels(1.0 + 4.4 * len(places), 6.4, 2, len(places), sharex="col", sharey="row")
    sizes = {(run["dataset"], run["model"], run["ratio"]): run["result"]["train_size"] for run in view.runs}
    values, methods = by_cell(view.runs), view.present("method")
    for place, (above, below) in zip(places, panels.T, strict=True):
        for i, method in enumerate(methods):
            cells = [cell for cell in values if (cell.dataset, cell.model, cell.method) == (*place, method)]
            aside = 1.03 ** (i - (len(methods) - 1) / 2)  # for the bars not to hide each other
            x = [sizes[cell.dataset, cell.model, cell.ratio] * aside for cell in cells]
            colour = _COLOURS[i % len(_COLOURS)]
            means = [summary(list(values[cell].values())).mean for cell in cells]
            above.plot(x, means, "o-", color=colour, markersize=3.5, linewidth=1.2, label=view.label(method))
            for at, cell in zip(x, cells, strict=True):
                if (bounds := interval(list(values[cell].values()))) is not None:
                    above.plot([at] * 2, bounds, color=colour, linewidth=1, solid_capstyle="butt")
                for paper in printed(cell, published):
                    kind = {**_PAPER, "color": colour, "label": f"{view.label(method)}, the paper"}
                    above.errorbar(at, paper.error, yerr=paper.std, linewidth=0.7, **kind)
        for comparison in (c for c in found if (c.method.dataset, c.method.model) == place):
            cell, shown = comparison.method, _coloured(comparison)
            at = sizes[cell.dataset, cell.model, cell.ratio]
            if comparison.paired.interval is not None:
                below.plot([at] * 2, comparison.paired.interval, linewidth=2, solid_capstyle="butt", **shown)
            below.plot([at], [comparison.paired.difference], "D", markersize=4, **shown)
        below.axhline(0, color="0.2", linewidth=0.8)
        below.set_xscale("log")
        ticks = sorted({size for (d, m, _), size in sizes.items() if (d, m) == place})
        below.set_xticks(ticks, [str(size) for size in ticks], fontsize=8, rotation=60)
        below.minorticks_off()
        above.set_title(f"{place[0]}, {model_label(place[1])}", fontsize=9)
    panels[0][0].set_ylabel("test error, %", fontsize=9)
    pairs = dict.fromkeys(f"{view.label(c.method.method)} - {view.label(c.baseline.method)}" for c in found)
    panels[1][0].set_ylabel(f"{', '.join(pairs)}, points", fontsize=9)
    _legend(figure, panels.flat, "sentences trained on")
    return _saved(
        figure,
        view.runs,
        SELECTED,
        folder / f"{view.name}-shares",
        "Above: test error against the number of sentences trained on, mean over seeds, its 95% bootstrap interval, "
        "and the paper's mean ± std. Below: the comparisons, paired by seed, with 95% bootstrap intervals.",
    )


def _place(view: View, place: tuple[str, str, float], name: str, folder: Path) -> Path:
    dataset, model, ratio = place
    return folder / "-".join([view.name, name, dataset, model, *([] if ratio == 1 else [f"{ratio:g}"])])


def _draw_curves(view: View, place: tuple[str, str, float], runs: Sequence[Line], folder: Path) -> Image | None:
    """Figure 2: loss against λ over the test set and for two pairs, and below it AMP less Mixup."""
    runs = [run for run in runs if run["curves"]]
    levels = {
        level: shown
        for level, start in (("sentence", "sent-"), ("word", "word-"))
        if len(shown := [m for m in view.present("method") if m.startswith(start)]) > 1
    }
    if not runs or not levels:
        return None
    titles = ("mean over the test set", "one pair", "another pair")
    figure, panels = _panels(10.5, 0.9 + 4.4 * len(levels), 2 * len(levels), len(titles), sharex=True)
    for (level, methods), above, below in zip(levels.items(), panels[::2], panels[1::2], strict=True):
        for column, title in enumerate(titles):
            curves = {
                (run["method"], run["seed"]): [run["curves"][level]["mean"], *run["curves"][level]["pairs"]][column]
                for run in runs
                if level in run["curves"]
            }
            lam = runs[0]["curves"]["lam"]
            for i, method in enumerate(methods):
                found = [curve for (of, _), curve in curves.items() if of == method]
                # AMP's line is broken, for Mixup's to show where they coincide.
                look = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": "--" if "-amp" in method else "-"}
                if found:
                    above[column].plot(lam, np.mean(found, 0), linewidth=1.3, label=view.label(method), **look)
            for method, baseline in view.experiment.comparisons:
                pairs = [
                    np.subtract(curve, curves[baseline, seed])
                    for (of, seed), curve in curves.items()
                    if of == method and method in methods and (baseline, seed) in curves
                ]
                if pairs:
                    label = f"{view.label(method)} - {view.label(baseline)}"
                    below[column].plot(lam, np.mean(pairs, 0), color=_COLOURS[3], linewidth=1.3, label=label)
                    if len(pairs) > 1:
                        low, high = zip(
                            *(interval(values.tolist()) or () for values in np.transpose(pairs)), strict=True
                        )
                        below[column].fill_between(lam, low, high, color=_COLOURS[3], alpha=0.15)
            above[column].set_title(f"{title}, {level}s mixed", fontsize=9)
            below[column].axhline(0, color="0.2", linewidth=0.8)
        above[0].set_ylabel("loss, nats", fontsize=9)
        below[0].set_ylabel("difference, nats", fontsize=9)
    _legend(figure, panels.flat, "λ")
    return _saved(
        figure,
        runs,
        SELECTED,
        _place(view, place, "curves", folder),
        "Loss of mixed test sentences against λ, mean over seeds: the test set with its reversal, which makes the mean "
        "symmetric, and two of these pairs. Below: paired by seed, with a 95% bootstrap interval.",
    )


def _draw_distances(view: View, place: tuple[str, str, float], runs: Sequence[Line], folder: Path) -> Image | None:
    """How far test errors are apart over training: AMP and the placebo from Mixup, and Mixup from itself."""
    levels = {
        title: found
        for level, title in (("sent", "sentences mixed"), ("word", "words mixed"))
        if "AMP" in (found := distances(runs, *place, level))
    }
    if not levels:
        return None
    figure, panels = _panels(1.0 + 4.0 * len(levels), 3.4, 1, len(levels), sharey=True, sharex=True)
    names = {"AMP": "AMP - Mixup, same seed", "placebo": "placebo - Mixup, same seed", "seeds": "Mixup, two seeds"}
    for (title, found), panel in zip(levels.items(), panels.flat, strict=True):
        for name, curves in found.items():
            points: dict[int, list[float]] = {}
            for step, value in (item for curve in curves.values() for item in curve.items()):
                points.setdefault(step, []).append(value)
            means = [summary(points[step]).mean for step in sorted(points)]
            panel.plot(sorted(points), means, linewidth=1.2, color=_COLOURS[[*names].index(name)], label=names[name])
        panel.set_title(title, fontsize=9)
        panel.set_ylim(bottom=0)
    figure.supylabel("mean |difference| of test errors, points", fontsize=9)
    _legend(figure, panels.flat, "step")
    shown = [run for run in runs if run["method"].partition("@")[0].endswith(("-amp", "-mixup"))]
    return _saved(
        figure,
        [run for run in shown if run["method"].partition("@")[2] in ("", "placebo")],
        "no step selected",
        _place(view, place, "distances", folder),
        "How far test errors are apart over training, without regard to which is less: AMP and the placebo, whose step "
        "of λ is a few roundings, from Mixup with the same seed, and two seeds of Mixup from each other.",
    )


def _draw_step(view: View, place: tuple[str, str, float], runs: Sequence[Line], folder: Path) -> Image | None:
    """What the step of λ does, against ε: how far λ moves, and what that adds to the loss."""
    plain = ("method", "step_size")
    held = [run for run in runs if run["method"] in METHODS and {*METHODS[run["method"]].fields} <= {*plain}]
    held = [run for run in held if any("mix/delta" in record for record in run["history"])]
    if len({run["config"]["step_size"] for run in held}) < 3:
        return None  # through two of them goes a line, whatever acts
    figure, panels = _panels(8.5, 3.4, 1, 2, sharex=True)
    columns = (("mix/lam_shift", "mean |λ' - λ|"), ("mix/delta", "mean change of the loss, δ, nats"))
    for (key, title), panel in zip(columns, panels.flat, strict=True):
        for i, level in enumerate(("sent", "word")):
            points: dict[float, list[float]] = {}
            for run in (run for run in held if run["method"].startswith(level)):
                found = [record[key] for record in run["history"] if key in record]
                points.setdefault(run["config"]["step_size"], []).append(float(np.mean(found)))
            if points:
                means = [summary(points[step]).mean for step in sorted(points)]
                label = f"{'sentences' if level == 'sent' else 'words'} mixed"
                panel.plot(sorted(points), means, "o-", markersize=4, linewidth=1, color=_COLOURS[1 + i], label=label)
        panel.set_title(title, fontsize=9)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
    _legend(figure, panels.flat, "ε")
    return _saved(
        figure,
        held,
        "mean over training",
        _place(view, place, "step", folder),
        "What the step does: how far λ moves, and by how much that changes the loss, of one batch an evaluation.",
    )


def _legend(figure: Any, panels: Iterable[Any], x: str) -> None:
    """One legend for all panels, below them, and what x is, in the lowest."""
    panels = list(panels)
    for panel in panels:
        if panel.get_subplotspec().is_last_row():
            panel.set_xlabel(x, fontsize=9)
    entries = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
