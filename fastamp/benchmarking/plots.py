"""Results as bars in a PNG."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from fastamp.benchmarking.report import Results, Row


def draw(results: Results, path: Path) -> bool:
    """Draws the ratios of what `run` gave as bars into a PNG; False, and nothing, where there are none.

    A panel for every dtype and clock, a group for every workload; not those of logits, if there are others.
    """
    rows = [row for row in results["rows"] if row["ratio"] is not None]
    rows = [row for row in rows if row["input"] != "logits"] or rows
    if not rows:
        return False
    panels: dict[str, list[Row]] = {}
    present: dict[str, dict[str, None]] = {}  # who is at which workload, for those that are not to leave no gap
    for row in rows:
        panels.setdefault(f"{row['dtype']}, {row['clock']}", []).append(row)
        present.setdefault(row["workload"], {}).setdefault(row["contender"])
    workloads, names = list(present), list(dict.fromkeys(row["contender"] for row in rows))
    width = 0.8 / len(names)
    figure = Figure(figsize=(5 + 5 * len(panels), 2 + 0.17 * len(names) * len(workloads)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, of_panel) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            ratios = {row["workload"]: row["ratio"]["both"]["q50"] for row in of_panel if row["contender"] == name}
            places = {at: list(present[at]).index(name) - (len(present[at]) - 1) / 2 for at in ratios}
            at = [workloads.index(workload) + place * width for workload, place in places.items()]
            bars = panel.barh(at, list(ratios.values()), 0.9 * width, label=name, color=colormaps["tab20"](i))
            panel.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        panel.set_yticks(range(len(workloads)), workloads)
        panel.margins(x=0.1, y=0.01)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(title)
    axes[0].invert_yaxis()
    bases = sorted({row["ratio_to"] for row in rows})
    over = "plain Mixup's" if all("Mixup" in base for base in bases) else " or ".join(f"{base}'s" for base in bases)
    figure.supxlabel(f"time of a step over {over}, forward and backward (median of per-round ratios)", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    torch, threads = results["versions"]["torch"], results["threads"]
    figure.suptitle(f"{results['device']['name']}, torch {torch}, threads {threads}")
    figure.savefig(path, dpi=130)
    return True
