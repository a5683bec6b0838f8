"""Results as tables."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any

from rich.console import Console

from fastamp.tables import print_table

SHORT = {"forward": "fwd", "backward": "bwd", "both": "both", "step": "step"}
LONG_MS = 10  # steps of at least so many milliseconds are shown in milliseconds
Results = dict[str, Any]
Row = dict[str, Any]


def print_results(results: Results, console: Console | None = None) -> None:
    """Prints a table for every workload and clock, then who was refused and why.

    Args:
        results: what `run` gave.
        console: where to; the standard output by default.
    """
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    checkout = results["checkout"]
    came_from = "no checkout" if checkout is None else checkout["commit"][:12] + " changed" * checkout["changed"]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items() if value is not None)
    said = f"{results['device']['name']}; {versions}; {came_from}; threads: {results['threads']}"
    console.print(said, markup=False, highlight=False)
    said = f"{results['rounds']} rounds, every contender once a round; a copy moves {results['copy_gb_s']:.1f} GB/s, "
    console.print(f"{said}bytes read and written", markup=False, highlight=False)
    if "fits" in results:
        for title, fits in groupby(results["fits"], growth_label):
            _print_growth(title, list(fits), console)
    else:
        for label, rows in groupby(results["rows"], workload_label):
            _print_steps(label, list(rows), console)
    for note in results["notes"]:
        say(f"note: {note}")
    for one in results["refused"]:
        say(f"refused, not timed: {one['contender']} at {one['workload']}: {one['reason']}")


def workload_label(row: Row) -> str:
    """The workload of a row in one line."""
    return f"{row['workload']}, {row['dtype']}, {row['clock']}"


def growth_label(fit: Row) -> str:
    """What grows in what, in one line."""
    return f"growth in {fit['varies']}, {fit['input']}, {fit['dtype']}, {fit['clock']}"


def exponent(fit: Row) -> str:
    """A fit's exponent, as shown."""
    return "" if fit["exponent"] is None else f"{fit['exponent']:.2f}"


def _print_steps(label: str, rows: list[Row], console: Console) -> None:
    directions, base, by_bytes = list(rows[0]["ms"]), rows[0]["ratio_to"], "bytes" in rows[0]
    on_gpu = "kernel_launches" in rows[0]
    in_ms = min(row["ms"]["both"]["q50"] for row in rows) >= LONG_MS
    mixups = base is None or "Mixup" in base
    headings = [f"median {'ms' if in_ms else 'µs'}", *(SHORT[name] for name in directions)]
    headings += ["xMixup" if mixups else "ratio", *(["GB/s", "%copy"] * by_bytes), *(["launches"] * on_gpu)]
    body = []
    for row in rows:
        name = row["contender"] + " *" * (row["contender"] == row["ratio_to"])
        cells = [name, *(f"{row['ms'][way]['q50'] * (1 if in_ms else 1e3):.1f}" for way in directions)]
        ratio = row["ratio"] and row["ratio"]["both"]
        spread = f" {ratio['q25']:.2f}-{ratio['q75']:.2f}" if ratio and not by_bytes else ""
        cells.append(f"{ratio['q50']:.2f}{spread}" if ratio else "")
        cells += [f"{row['gb_s']:.3g}", f"{row['percent_of_copy']:.1f}"] if by_bytes else []
        cells += [str(row["kernel_launches"])] if on_gpu else []
        memory = row.get("peak_memory_ratio")
        body.append([*cells, f"{row['peak_memory_bytes'] / 1e6:.3g}", "" if memory is None else f"{memory:.2f}"])
    captions = (
        [] if base is None else [f"* {'the faster plain Mixup of its kind: ratios' if mixups else 'ratios'} are to it"]
    )
    if by_bytes:
        captions.append(f"bytes: {rows[0]['moves']} of {rows[0]['dtype']}, {rows[0]['bytes']:,}")
    if "step" in directions:
        captions.append("step: with the optimizer's")
    print_table(console, [*headings, "peak MB", "x"], body, title=label, caption="; ".join(captions))


def _print_growth(title: str, fits: list[Row], console: Console) -> None:
    """Milliseconds by size, and the exponents."""
    headings = [fits[0]["varies"], *(fit["contender"] for fit in fits)]
    body = [[size, *(f"{fit['ms'][size]:.3f}" for fit in fits)] for size in fits[0]["ms"]]
    caption = f"exponent: of a power law through {fits[0]['from']} to {fits[0]['to']}"
    body.append(["exponent", *map(exponent, fits)])
    print_table(console, headings, body, names=0, title=f"{title}: median ms", caption=caption)
