"""`python -m bench.codegen`: the report, or a part of it."""

from __future__ import annotations

import os

# Before anything imports a kernel, here and in the processes that are started.
os.environ.pop("TRITON_INTERPRET", None)

import shlex
import sys
from pathlib import Path

import click

from . import TARGETS
from .cases import GROUPS_OF_CASES
from .report import collect, report, write


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where the files go.")
@click.option("--target", "targets", multiple=True, type=click.Choice(list(TARGETS)), help="Only this one; repeatable.")
@click.option("--group", "groups", multiple=True, type=click.Choice(list(GROUPS_OF_CASES)), help="Only these kernels.")
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count() or 1, show_default=True, help="Processes.")
def main(out: Path, targets: tuple[str, ...], groups: tuple[str, ...], jobs: int) -> None:
    """Compile every kernel for five GPU architectures, none of which need be here.

    Writes OUT/codegen.json and OUT/codegen.md: registers, spills, shared memory, theoretical occupancy, widths of loads
    and stores, bytes an element beside the floor, instructions an element by pipe, what bounds them, and predicted
    times. A part of it is for a folder of its own: the files are replaced.
    """
    rows = collect(targets or tuple(TARGETS), groups or tuple(GROUPS_OF_CASES), jobs=jobs)
    path = write(report(rows, command=shlex.join(["python", "-m", "bench.codegen", *sys.argv[1:]])), out)
    spilling = sum(row["spills"] > 0 for row in rows)
    click.echo(f"{len(rows)} kernels, {spilling} of them spilling; {path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main(prog_name="python -m bench.codegen")
