"""Results as tables."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape

from fastamp.tables import print_table

SHORT = {"forward": "fwd", "backward": "bwd", "both": "both", "step": "step"}
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
    if "fits" in results:
        _print_growth(results["fits"], console)
    else:
        for label, group in groupby(results["rows"], workload_label):
            _print_rows(label, list(group), console)
        if device["type"] == "cpu":
            console.print("ops: operators dispatched in a step, not counted where it is compiled", highlight=False)
    for note in results["notes"]:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    for refused in results["refused"]:
        line = f"refused, not timed: {refused['contender']} at {refused['workload']}: {refused['reason']}"
        console.print(escape(line), highlight=False, soft_wrap=True)


def _print_rows(label: str, rows: list[dict[str, Any]], console: Console) -> None:
    on_gpu, by_bytes = "kernel_launches" in rows[0], "bytes" in rows[0]
    directions = tuple(rows[0]["ms"])
    in_ms = min(row["ms"]["both"]["q50"] for row in rows) >= LONG_MS
    base = rows[0]["ratio_to"]
    versus = "xMixup" if base is None or "Mixup" in base else "ratio"
    headings = ["median ms" if in_ms else "median µs", *(SHORT[name] for name in directions), versus]
    headings += [*(["GB/s", "%copy"] if by_bytes else []), "launches" if on_gpu else "ops", "peak MB", "x"]
    lines = []
    for row in rows:
        ms, ratio = row["ms"], None if row["ratio"] is None else row["ratio"]["both"]
        cells = [f"{ms[name]['q50'] * (1 if in_ms else 1e3):.1f}" for name in directions]
        if ratio is None:
            cells.append("")
        else:
            spread = "" if by_bytes else f" {ratio['q25']:.2f}-{ratio['q75']:.2f}"
            cells.append(f"{ratio['q50']:.2f}{spread}")
        if by_bytes:
            cells += [f"{row['gb_s']:.3g}", f"{row['percent_of_copy']:.1f}"]
        issued = row["kernel_launches" if on_gpu else "operators"]
        cells += ["" if issued is None else str(issued), f"{row['peak_memory_bytes'] / 1e6:.3g}"]
        memory = row.get("peak_memory_ratio")
        cells.append("" if memory is None else f"{memory:.2f}")
        star = " *" if row["contender"] == row["ratio_to"] else ""
        lines.append((row["contender"] + star, *cells))
    captions = [] if by_bytes or base is None else [f"{versus}: the median, and q25-q75"]
    if "step" in directions:
        captions.append("step: with the optimizer's")
    if base is not None:
        captions.append(
            "* the faster plain Mixup of its kind: ratios are to it" if versus == "xMixup" else "* ratios are to it"
        )
    if by_bytes:
        captions.append(f"bytes: {rows[0]['moves']} of {rows[0]['dtype']}, {rows[0]['bytes']:,}")
    print_table(console, headings, lines, title=label, caption="; ".join(captions))


def _print_growth(fits: list[dict[str, Any]], console: Console) -> None:
    """A table for every size that varies, of milliseconds by size, and the exponents."""
    for title, group in groupby(fits, growth_label):
        of = list(group)
        print_table(
            console,
            [of[0]["varies"], *(fit["contender"] for fit in of)],
            [
                *(
                    [size, *(f"{fit['ms'][size]:.3f}" if size in fit["ms"] else "" for fit in of)]
                    for size in of[0]["ms"]
                ),
                ["exponent", *(exponent(fit) for fit in of)],
            ],
            names=0,
            title=f"{title}: median ms",
            caption=f"exponent: of a power law through {of[0]['from']} to {of[0]['to']}",
        )


def growth_label(fit: dict[str, Any]) -> str:
    """What grows in what, in one line."""
    return f"growth in {fit['varies']}, {fit['input']}, {fit['dtype']}, {fit['clock']}"


def exponent(fit: dict[str, Any]) -> str:
    """Of a fit, as shown."""
    return "" if fit["exponent"] is None else f"{fit['exponent']:.2f}"
