"""What shows on CUDA tensors only, on a machine without a GPU: on fake tensors, each check in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest

pytest.importorskip("triton", reason="the package triton is not installed")


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler, to register a device guard for CUDA")
    return fake_cuda.build(compiler, tmp_path_factory.mktemp("guard"))


def passes(guard: Path, check: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, fake_cuda.__file__, str(guard), check]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]


def test_backend_auto_traces_a_whole_graph_on_cuda_with_the_kernels_in_it(guard):
    """What decides the backend has to be traced as well."""
    passes(guard, "auto_traces_whole")


def test_a_forward_pass_on_cuda_makes_and_reads_nothing_on_the_host(guard):
    """15, 45: a host synchronisation, a transfer from the host."""
    passes(guard, "forward_stays_on_the_device")


def test_what_surrounds_the_launches_makes_and_reads_nothing_on_the_host(guard):
    """15, 45: a host synchronisation, a transfer from the host."""
    passes(guard, "launchers_stay_on_the_device")
