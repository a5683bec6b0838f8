"""`python -m bench.codegen.check`: does the Triton at hand compile every kernel?

Triton is part of what a user installs, and its language changes. Another one than the installed is put first:

    pip install --no-deps --target DIR triton==3.5.1
    PYTHONPATH=DIR python -m bench.codegen.check
"""

from __future__ import annotations

import os

# Before anything imports a kernel.
os.environ.pop("TRITON_INTERPRET", None)

import sys
from collections.abc import Iterator

import click
import triton
from triton.compiler.errors import CompilationError

from .case import Case
from .cases import GROUPS_OF_CASES
from .compiling import compiled

CHECKED = ("sm_90", "gfx942")


def one_of_each() -> Iterator[Case]:
    """The smallest case of every kernel, and of every specialisation that it is written for."""
    found: dict[object, Case] = {}
    for make in GROUPS_OF_CASES.values():
        for case in make():
            policy = case.constants.get("policy")
            parts = None if policy is None else (policy.keeps_all, policy.pairing)
            best = found.setdefault((case.kernel, parts), case)
            if case.elements < best.elements:
                found[case.kernel, parts] = case
    yield from found.values()


@click.command()
def main() -> None:
    """Compile one case of every kernel for two GPUs, none of which need be here."""
    failed = count = 0
    for case in one_of_each():
        for target in CHECKED:
            count += 1
            try:
                compiled(case, target)
            except CompilationError as error:
                failed += 1
                click.echo(f"{case.kernel.__name__} [{case.name}] for {target}: {error}")
    click.echo(f"triton {triton.__version__}: {count - failed} of {count} compiled")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(prog_name="python -m bench.codegen.check")
