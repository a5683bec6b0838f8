"""Every launch beside its neighbours, fewer and more warps, smaller and larger tiles: what the compiler makes of them.

Why a launch is what it is, as far as that can be told without a GPU. FASTAMP_AUTOTUNE=1 times the same neighbours.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from typing import Any

import triton

from fastamp.codegen.case import Case
from fastamp.codegen.cases import GROUPS_OF_CASES
from fastamp.codegen.compiling import compile_case
from fastamp.kernels.tuning import neighbours

NAME = "launches"
TARGET = "sm_90"
PREFACE = """# Launches and their neighbours

Written by `{command}` with triton {triton} for {target}; no GPU was needed or used.

A launch is the rows and columns of a program's tile and its warps. The first column is the frozen one of
`kernels/amp/config.py`; beside it stand its neighbours: half and twice the warps and, where the tile of a loop is free
to choose, half and twice the columns. A cell holds registers, theoretical occupancy in percent, and bytes of the widest
load; **spills** are accesses to local memory. What is chosen spills on none of five architectures
([codegen.md](codegen.md)), keeps loads as wide as its tile allows, and of those has the most warps on a multiprocessor,
or fewer where more of a row in a thread saves reductions across warps. Which of the neighbours is the fastest only a
GPU can say: `FASTAMP_AUTOTUNE=1` asks it.
"""
Row = dict[str, Any]


def variations(case: Case) -> Iterator[Case]:
    """The case, and the same with every neighbour of its launch that a program can have."""
    fields = getattr(case.launch, "_fields", ())
    if "num_warps" not in fields:  # a size alone, which nothing is known to be better than
        yield case
        return
    tile = next((name for name in ("BLOCK_C", "BLOCK_N", "BLOCK_D") if name in case.constants), None)
    loops = "in_registers" in fields and not case.launch.in_registers and case.launch.block_b == 1 and tile is not None
    for launch in neighbours(case.launch, ("block_c", "num_warps") if loops else ("num_warps",)):
        constants = dict(case.constants)
        if loops and tile is not None:
            constants[tile] = launch.block_c
        yield case._replace(launch=launch, num_warps=launch.num_warps, constants=constants)


def compile_group(group: str, target: str) -> list[Row]:
    """Rows of all variations of a group's cases; a launch that a program cannot have is left out."""
    rows = []
    for case in GROUPS_OF_CASES[group]():
        for place, varied in enumerate(variations(case)):
            row = compile_case(varied, target)
            kept = ("kernel", "case", "launch", "warps", "registers", "occupancy", "spills", "load_width")
            rows.append({name: row[name] for name in kept} | {"chosen": place == 0})
    return rows


def collect(target: str, groups: Sequence[str], *, jobs: int, listener: Callable[[str], None]) -> list[Row]:
    """All rows, in the order of the groups.

    Args:
        target: a name in TARGETS.
        groups: names in GROUPS_OF_CASES.
        jobs: processes.
        listener: hears of every group that is done.
    """
    found: dict[str, list[Row]] = {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        work = {pool.submit(compile_group, group, target): group for group in groups}
        for done in as_completed(work):
            found[work[done]] = done.result()
            listener(f"{work[done]}: {len(done.result())} launches")
    return [row for group in groups for row in found[group]]


def write(rows: Sequence[Row], target: str, command: str, folder: Path) -> Path:
    """Write launches.json and launches.md; give the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps({"command": command, "triton": triton.__version__, "target": target}, indent=1)
    (folder / f"{NAME}.json").write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    path = folder / f"{NAME}.md"
    path.write_text(markdown(rows, target, command))
    return path


def markdown(rows: Sequence[Row], target: str, command: str) -> str:
    """A table a kernel, a line a case."""
    lines = [PREFACE.format(command=command, triton=triton.__version__, target=target)]
    for kernel, members in groupby(sorted(rows, key=lambda row: row["kernel"]), lambda row: row["kernel"]):
        lines += [f"## {kernel}", "", "| case | launch | neighbours |", "|---|---|---|"]
        for case, launches in groupby(members, lambda row: row["case"]):
            first, *others = launches
            beside = "; ".join(f"{_shape(row)}: {_cell(row)}" for row in others)
            lines.append(f"| {case} | {_shape(first)}: {_cell(first)} | {beside} |")
        lines.append("")
    return "\n".join(lines)


def _shape(row: Row) -> str:
    values = [part.partition("=")[2] for part in row["launch"].partition("(")[2].rstrip(")").split(", ")]
    numbers = [value for value in values if value.isdigit()][:-1]
    return f"({', '.join(numbers)}) {row['warps']} warps" if numbers else row["launch"]


def _cell(row: Row) -> str:
    spills = f", **spills {row['spills']}**" if row["spills"] else ""
    return f"{row['registers']}, {100 * row['occupancy']:.0f}%, {row['load_width']} B{spills}"
