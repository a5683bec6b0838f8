"""The report: all cases for all targets, as JSON and as Markdown, and what has become worse since it was written."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from fastamp.benchmarking import machine

from . import TARGETS
from .budget import DEVICES, MAIN, PIPES, an_element, picoseconds
from .compiling import compile_group

NAME = "codegen"
FORMAT = 3
RERUN = "python -m bench.codegen --out bench/results"
Row = dict[str, Any]
MORE = 1.01  # times the instructions that are recorded
WAYS = {"read": "reads", "written": "writes"}
HEADINGS = ["case", "launch", "read + written", "floor", "x floor", "load, store", "registers", "occupancy %", "spills"]
HEADINGS += ["instructions", "FMA + ALU + MUFU + LSU + rest", "bound"]
COUNTED = "sm_90"  # whose pipes and predicted times are in the tables
PREFACE = """# What the compiler makes of the kernels

Written by `{command}` with {versions}, checkout {checkout}; no GPU was needed or used.

Bytes are per element of the largest matrix: what one program asks for in global memory, counted in the code Triton
compiled, over the elements of its tiles. A row that is read as its own and again as a neighbour's counts every time,
though the second read usually ends in a cache: so this is what is asked for, and a bound on what memory has to deliver.
A loop counts as often as it turns, or once where only the device knows. In a branch the usual side
counts, and behind it, if that is another, the one that moves more: long rows whose step of λ is large are read once
more. The floor is what cannot be avoided: every input element read once, every output element written once. Load and
store are the widest access, in bytes. Numbers separated by slashes are {targets}; occupancy is theoretical, from
registers, warps and shared memory. A kernel that asserts takes more registers on AMD than it would without: it calls a
function that prints.

Instructions are a thread's, per element: counted in SASS, for the NVIDIA targets alone, along the way that programs
usually take, loops times their turns ([how](../codegen/instructions.py)). Those by pipe are the {device}'s, and so is
the bound: memory for the floor's bytes, the issue of instructions, or MUFU. float64 has a pipe of its own, half as
wide, which is not counted apart.

## Predicted times

<!-- --8<-- [start:predicted] -->
Predicted from compiled code for an {device}, not measured: the longest of the times, in µs, that memory takes for the
least bytes, that all instructions take to be issued, and that MUFU takes for its own, if all multiprocessors are busy
and nothing waits. What waits, and the few µs of any launch, come on top.

{predicted}
<!-- --8<-- [end:predicted] -->

While memory moves 4 bytes, a GPU can issue so many instructions, of them MUFU: {budgets}.
"""


def collect(targets: Sequence[str], groups: Sequence[str], *, jobs: int) -> list[Row]:
    """Compile all cases of the groups for the targets; rows in the order of cases, then targets.

    Args:
        targets: names in TARGETS.
        groups: names in GROUPS_OF_CASES.
        jobs: processes.
    """
    parts = [(target, group) for group in groups for target in targets]
    rows: list[Row] = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for (target, group), found in zip(parts, pool.map(compile_group, *zip(*parts, strict=True)), strict=True):
            print(f"{target} {group}: {len(found)} kernels", flush=True)
            rows += found
    return rows


def report(rows: Sequence[Row], *, command: str) -> dict[str, Any]:
    """The rows with where they come from."""
    return {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "versions": machine.versions(),
        "checkout": machine.commit(),
        "rows": list(rows),
    }


def write(results: dict[str, Any], folder: Path) -> Path:
    """Write codegen.json, one row a line, and codegen.md; give the former's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}.json"
    tags = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in results["rows"])
    path.write_text(f'{tags[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    path.with_suffix(".md").write_text(markdown(results))
    return path


def markdown(results: dict[str, Any]) -> str:
    """The report for reading: a table a kernel, a line a case."""
    rows: list[Row] = results["rows"]
    targets = [target for target in TARGETS if any(row["target"] == target for row in rows)]
    checkout = results["checkout"]
    came_from = "none" if checkout is None else checkout["commit"][:12] + " with changes" * checkout["changed"]
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("torch", "triton"))
    lines = [
        PREFACE.format(
            command=results["command"],
            versions=versions,
            checkout=came_from,
            targets=", ".join(targets),
            device=DEVICES[COUNTED].name,
            predicted="\n".join(_predicted([row for row in rows if row["target"] == COUNTED])),
            budgets="; ".join(
                f"{gpu.name} ({gpu.units} x {gpu.ghz} GHz, {gpu.tb_s} TB/s) {gpu.instructions(4, gpu.lanes):.0f}, "
                f"{gpu.instructions(4, gpu.mufu):.1f}"
                for gpu in DEVICES.values()
            ),
        )
    ]
    ordered = sorted(range(len(rows)), key=lambda at: (rows[at]["kernel"], at))
    for kernel, members in groupby((rows[at] for at in ordered), lambda row: row["kernel"]):
        lines += [f"## {kernel}", "", f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
        cases: dict[str, list[Row]] = {}
        for row in members:
            cases.setdefault(row["case"], []).append(row)
        lines += [_line(case, per_target) for case, per_target in cases.items()]
        lines.append("")
    return "\n".join(lines)


def _predicted(rows: list[Row]) -> Iterator[str]:
    yield "| launch, bf16 | shape | instructions, of them MUFU | memory | issue | MUFU | predicted |"
    yield "|---|---|---|---|---|---|---|"
    known = {(row["kernel"], row["case"]): row for row in rows}
    for launch in MAIN:
        row = known.get((launch.kernel, launch.case))
        if row:
            name = f"`{launch.kernel}`" + ", matched" * ("matched" in launch.case)
            count, times = f"{an_element(row):.1f}, {an_element(row, ['mufu']):.1f}", launch.microseconds(row)
            cells = " | ".join(f"{time:.1f}" for time in (*times.values(), max(times.values())))
            yield f"| {name} | {launch.shape} | {count} | {cells} ({max(times, key=times.__getitem__)}) |"


def _line(case: str, rows: list[Row]) -> str:
    first = rows[0]
    read, written, read_at_most, written_at_most = (
        max(row[way] for row in rows) / first["elements"] for way in ("mostly_read", "mostly_written", *WAYS)
    )
    at_most = f", at most {read_at_most:.2f} + {written_at_most:.2f}"
    cells = [
        case,
        _launch(first),
        f"{read:.2f} + {written:.2f}" + at_most * ((read, written) != (read_at_most, written_at_most)),
        f"{first['floor']:g}",
        f"{(read + written) / first['floor']:.2f}",
        _slashed(f"{row['load_width']}, {row['store_width']}" for row in rows),
        "/".join(str(row["registers"]) for row in rows),
        "/".join(f"{100 * row['occupancy']:.0f}" for row in rows),
        _slashed(str(row["spills"]) for row in rows),
    ]
    counted = [row for row in rows if row["instructions"]]
    cells.append("/".join(f"{an_element(row):.0f}" for row in counted))
    for row in counted:
        if row["target"] == COUNTED:
            times = picoseconds(row)
            cells.append(" + ".join(f"{an_element(row, [pipe]):.1f}" for pipe in PIPES))
            cells.append(max(times, key=times.__getitem__))
    return f"| {' | '.join(cells)} |"


def _launch(row: Row) -> str:
    """The configuration without the names of its fields, as (1, 2048), 4 warps."""
    values = [value.split("=")[-1] for value in row["launch"].partition("(")[2].rstrip(")").split(", ")]
    shape = [value for value in values if value.isdigit()][: -1 if "num_warps" in row["launch"] else None]
    return f"({', '.join(shape or [row['launch']])}), {row['warps']} warps"


def _slashed(values: Iterable[str]) -> str:
    """One value where all are the same."""
    every = list(values)
    return every[0] if len(set(every)) == 1 else " / ".join(every)


def problems(rows: Iterable[Row], recorded: dict[str, Any]) -> list[str]:
    """What is wrong with the rows, a line each: spills, narrow loads, or worse than recorded.

    Bytes are always compared. Instructions, widths and numbers of accesses are the compiler's choice as well, so they
    are compared only with what the same version of Triton has made.

    Args:
        rows: of `collect`.
        recorded: a report.
    """
    known = {(row["target"], row["kernel"], row["case"]): row for row in recorded["rows"]}
    same_compiler = recorded["versions"]["triton"] == machine.versions()["triton"]
    lines = []
    for row in rows:
        where = f"{row['target']} {row['kernel']} [{row['case']}]"
        if row["spills"]:
            lines.append(f"{where} spills: {row['spills']} accesses to local memory")
        if row["narrow"]:
            lines.append(f"{where} has lost its vectors: its widest load is of {row['load_width']} bytes")
        was = known.get((row["target"], row["kernel"], row["case"]))
        if was is None:
            lines.append(f"{where} is not recorded; run {RERUN}")
            continue
        lines += [f"{where} {line}" for line in _worse(row, was, same_compiler=same_compiler)]
    return lines


def _worse(row: Row, was: Row, *, same_compiler: bool) -> Iterable[str]:
    for way, verb in WAYS.items():
        for how in ("", "mostly_"):
            now, before = row[how + way] / row["elements"], was[how + way] / was["elements"]
            if now > before * (1 + 1e-9):
                yield f"{how.replace('_', ' ')}{verb} {now:.4g} bytes an element, {before:.4g} before"
    if same_compiler and row["instructions"] and was["instructions"]:
        now, before = an_element(row), an_element(was)
        if now > before * MORE:
            yield f"issues {now:.4g} instructions an element, {before:.4g} before"
    # Another launch has another number of accesses: with other tiles, or more of them a thread.
    if same_compiler and row["launch"] == was["launch"]:
        for what in ("load", "store"):
            if row[f"{what}_width"] < was[f"{what}_width"]:
                yield f"{what}s {row[f'{what}_width']} bytes at most at a time, {was[f'{what}_width']} before"
            if row[f"{what}s"] > was[f"{what}s"]:
                yield f"takes {row[f'{what}s']} {what}s, {was[f'{what}s']} before"
