"""Ahead-of-time compilation of what the launch heuristics can choose, for GPUs that need not be here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx90a", "hip:gfx942")
GROUPS = (
    "rows",
    "rows-fp64 loop loop-fp64 grad grad-fp64 small",
    "head head-fp64",
    "mix remix embedding select select-fp64",
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("groups", GROUPS)
def test_no_kernel_spills_registers_or_loses_its_vector_width(target: str, groups: str) -> None:
    # A process of its own: in this one kernels may have been defined for the interpreter.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("codegen.py")), target, *groups.split()]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert found, "no kernel was compiled"
    spilling = [(case["case"], case["spills"]) for case in found if case["spills"]]
    narrow = [(case["case"], case["widest"]) for case in found if case["narrow"]]
    assert not spilling
    assert not narrow
