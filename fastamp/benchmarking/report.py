"""Results as tables and as bars."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

LONG_MS = 10  # steps of at least so many milliseconds are shown in milliseconds


def workload_label(row: dict[str, Any]) -> str:
    """The workload of a row in one line."""
    return f"{row['workload']}, {row['dtype']}, {row['clock']}"


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """Prints a table for every workload and clock, then who was refused and why.

    Args:
        results: what `run` gave.
        console: where to; the standard output by default.
    """
    console = console or Console()
    device, versions = results["device"], results["versions"]
    checkout = results["checkout"]
    came_from = "no checkout" if checkout is None else checkout["commit"][:12] + " changed" * checkout["changed"]
    facts = ", ".join(f"{name} {value}" for name, value in versions.items() if value is not None)
    console.print(f"{device['name']}; {facts}; {came_from}; threads: {results['threads']}", highlight=False)
    console.print(
        f"{results['rounds']} rounds, every contender once a round; a copy moves {results['copy_gb_s']:.1f} GB/s, "
        "bytes read and written",
        highlight=False,
    )
    for label, group in groupby(results["rows"], workload_label):
        console.print(_table(label, list(group)))
    if device["type"] == "cpu":
        console.print("ops: operators dispatched in a step, not counted where it is compiled", highlight=False)
    for note in results["notes"]:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    for refused in results["refused"]:
        line = f"refused, not timed: {refused['contender']} at {refused['workload']}: {refused['reason']}"
        console.print(escape(line), highlight=False, soft_wrap=True)


def _table(label: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=label, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    on_gpu, by_bytes = "kernel_launches" in rows[0], "bytes" in rows[0]
    in_ms = min(row["ms"]["both"]["q50"] for row in rows) >= LONG_MS
    table.add_column("median ms" if in_ms else "median µs", no_wrap=True)
    headings = ["fwd", "bwd", "both", "xMixup", *(["GB/s", "%copy"] if by_bytes else ["q25-q75"])]
    for heading in [*headings, "launches" if on_gpu else "ops", "peak MB"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        ms, ratio = row["ms"], None if row["ratio"] is None else row["ratio"]["both"]
        cells = [f"{ms[name]['q50'] * (1 if in_ms else 1e3):.1f}" for name in ("forward", "backward", "both")]
        cells.append("" if ratio is None else f"{ratio['q50']:.2f}")
        if by_bytes:
            cells += [f"{row['gb_s']:.3g}", f"{row['percent_of_copy']:.1f}"]
        else:
            cells.append("" if ratio is None else f"{ratio['q25']:.2f}-{ratio['q75']:.2f}")
        issued = row["kernel_launches" if on_gpu else "operators"]
        cells += ["" if issued is None else str(issued), f"{row['peak_memory_bytes'] / 1e6:.3g}"]
        star = " *" if row["contender"] == row["ratio_to"] else ""
        table.add_row(row["contender"] + star, *cells)
    captions = [] if rows[0]["ratio_to"] is None else ["* the faster plain Mixup of its kind: ratios are to it"]
    if by_bytes:
        captions.append(f"bytes: read B·C and write B·C of {rows[0]['dtype']}, {rows[0]['bytes']:,}")
    table.caption = "; ".join(captions)
    return table


def _drawn(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows to draw, by dtype and clock: not those of logits, if there are others."""
    rows = [row for row in results["rows"] if row["ratio"] is not None]
    rows = [row for row in rows if row["input"] != "logits"] or rows
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(f"{row['dtype']}, {row['clock']}", []).append(row)
    return panels


def draw_png(results: dict[str, Any], path: Path) -> None:
    """Draws the ratios as bars: a panel for every dtype and clock, a group for every shape.

    Args:
        results: what `run` gave, with at least one ratio.
        path: the PNG.

    Raises:
        ImportError: matplotlib is not installed; `pip install fastamp[plot]` gives it.
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
    figure.supxlabel("time of a step over plain Mixup's, forward and backward (median of per-round ratios)", fontsize=9)
    torch, threads = results["versions"]["torch"], results["threads"]
    figure.suptitle(f"{results['device']['name']}, torch {torch}, threads {threads}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


def draw_terminal(results: dict[str, Any]) -> str:
    """The same bars as text, a block for every dtype, clock and shape, by plotext."""
    import plotext

    blocks = []
    for panel, rows in _drawn(results).items():
        for shape, group in groupby(rows, lambda row: row["workload"]):
            ratios = {row["contender"]: row["ratio"]["both"]["q50"] for row in group}
            figure = plotext.figure
            figure.clear()
            figure.plot_size(80, 2 * len(ratios) + 5)
            figure.title(f"step over plain Mixup's: {shape}, {panel}")
            figure.draw(figure.bar(list(ratios), list(ratios.values()), orientation="horizontal", width=0.5))
            blocks.append(figure.build().string(colorless=True))
    return "\n".join(blocks)
