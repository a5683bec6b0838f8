"""Results as bars, as a roofline, and as growth.

Drawing takes matplotlib, which `pip install fastamp[plot]` gives; without it there are bars in the terminal.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from fastamp.benchmarking.report import exponent, growth_label

Results = dict[str, Any]
MARKERS = "osD^vP*X"


def draw_all(results: Results, path: Path) -> list[Path]:
    """Draws what there is to draw.

    Args:
        results: what `run` gave.
        path: of the bars, or of the growth; the roofline goes beside it, as <name>-roofline.png.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn: list[tuple[Callable[[Results, Path], None], Path]] = []
    if "fits" in results:
        drawn.append((draw_growth, path))
    elif any(row["ratio"] for row in results["rows"]):
        drawn.append((draw_png, path))
    if "fits" not in results and any("gb_s" in row for row in results["rows"]):
        drawn.append((draw_roofline, path.with_name(f"{path.stem}-roofline.png")))
    for draw, to in drawn:
        draw(results, to)
    return [to for _, to in drawn]


def _drawn(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The rows to draw, by dtype and clock: not those of logits, if there are others."""
    rows = [row for row in results["rows"] if row["ratio"] is not None]
    rows = [row for row in rows if row["input"] != "logits"] or rows
    return _panels(rows)


def _panels(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(f"{row['dtype']}, {row['clock']}", []).append(row)
    return panels


def _title(results: Results) -> str:
    torch, threads = results["versions"]["torch"], results["threads"]
    return f"{results['device']['name']}, torch {torch}, threads {threads}"


def _over(results: Results) -> str:
    """What ratios are to, in words."""
    bases = {row["ratio_to"] for row in results["rows"] if row["ratio_to"] is not None}
    return "plain Mixup's" if all("Mixup" in base for base in bases) else " or ".join(f"{b}'s" for b in sorted(bases))


def draw_png(results: Results, path: Path) -> None:
    """Draws the ratios as bars: a panel for every dtype and clock, a group for every shape.

    Args:
        results: what `run` gave, with at least one ratio.
        path: the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = _drawn(results)
    every = [row for rows in panels.values() for row in rows]
    shapes = list(dict.fromkeys(row["workload"] for row in every))
    names = list(dict.fromkeys(row["contender"] for row in every))
    width = 0.8 / len(names)
    # Who is at which shape, for those that are not to leave no gap.
    present = {shape: list(dict.fromkeys(r["contender"] for r in every if r["workload"] == shape)) for shape in shapes}
    figure = Figure(figsize=(5 + 5 * len(panels), 2 + 0.17 * len(names) * len(shapes)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, rows) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            ratios = {row["workload"]: row["ratio"]["both"]["q50"] for row in rows if row["contender"] == name}
            places = {shape: present[shape].index(name) - (len(present[shape]) - 1) / 2 for shape in ratios}
            at = [shapes.index(shape) + place * width for shape, place in places.items()]
            bars = panel.barh(at, list(ratios.values()), 0.9 * width, label=name, color=colormaps["tab20"](i))
            panel.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        panel.set_yticks(range(len(shapes)), shapes)
        panel.margins(x=0.1, y=0.01)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(title)
    axes[0].invert_yaxis()
    over = f"time of a step over {_over(results)}, forward and backward (median of per-round ratios)"
    figure.supxlabel(over, fontsize=9)
    figure.suptitle(_title(results))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


def draw_roofline(results: Results, path: Path) -> None:
    """Draws achieved GB/s against the bytes that must move: a panel for every dtype and clock, the copy as the roof.

    All that is timed here moves memory more than it computes, so that bytes, and not operations a byte, tell how near
    the roof a shape can come: small ones are held down by the time of the calls.

    Args:
        results: what `run` gave, with at least one row of bytes.
        path: the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = _panels([row for row in results["rows"] if "gb_s" in row])
    names = list(dict.fromkeys(_series(row) for rows in panels.values() for row in rows))
    figure = Figure(figsize=(3 + 4.5 * len(panels), 5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, rows) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            points = sorted((row["bytes"], row["gb_s"]) for row in rows if _series(row) == name)
            if points:
                style = {"marker": MARKERS[i % len(MARKERS)], "color": colormaps["tab20"](i), "linewidth": 0}
                panel.plot(*zip(*points, strict=True), label=name, markersize=6, **style)
        panel.axhline(results["copy_gb_s"], color="black", linewidth=0.8)
        panel.annotate(
            "copy", (0.01, results["copy_gb_s"]), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
        )
        panel.set(xscale="log", yscale="log", title=title, xlabel="bytes that must move")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("those bytes over the median time, GB/s")
    figure.suptitle(_title(results))
    handles = {
        label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


def _series(row: dict[str, Any]) -> str:
    return f"{row['mode']}, {row['contender']}" if row["input"] == "rows" else str(row["contender"])


def draw_growth(results: Results, path: Path) -> None:
    """Draws time against size on logarithmic axes: a panel for every size that varies and every clock.

    Args:
        results: what `run` gave of the suite "scaling".
        path: the PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels = [(title, list(group)) for title, group in groupby(results["fits"], growth_label)]
    columns = len({fit["varies"] for fit in results["fits"]})
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 4.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, (title, fits) in zip(axes, panels, strict=False):
        for fit, marker in zip(fits, MARKERS, strict=False):
            sizes, ms = zip(*((int(size), value) for size, value in fit["ms"].items()), strict=True)
            label = fit["contender"] if fit["exponent"] is None else f"{fit['contender']}: {exponent(fit)}"
            panel.plot(sizes, ms, marker=marker, linewidth=1, label=label)
        panel.axvspan(fits[0]["from"], fits[0]["to"], color="black", alpha=0.06)
        panel.set(xlabel=fits[0]["varies"], title=title)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.legend(title="exponent, fitted in grey", fontsize=8)
    axes[0].set_ylabel("median ms, forward and backward")
    figure.suptitle(_title(results))
    figure.savefig(path, dpi=130)


def draw_terminal(results: Results) -> str:
    """The same bars as text, a block for every dtype, clock and shape, by plotext."""
    import plotext

    blocks = []
    for panel, rows in _drawn(results).items():
        for shape, group in groupby(rows, lambda row: row["workload"]):
            ratios = {row["contender"]: row["ratio"]["both"]["q50"] for row in group}
            figure = plotext.figure
            figure.clear()
            figure.plot_size(80, 2 * len(ratios) + 5)
            figure.title(f"step over {_over(results)}: {shape}, {panel}")
            figure.draw(figure.bar(list(ratios), list(ratios.values()), orientation="horizontal", width=0.5))
            blocks.append(figure.build().string(colorless=True))
    return "\n".join(blocks)
