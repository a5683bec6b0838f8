"""Several processes on gloo: DistributedDataParallel, FSDP2, and what each rank draws."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KINDS = ["draws", "ddp", "ddp-unused", "ddp-static", "ddp-loop", "fsdp"]
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.xdist_group("processes"),  # one worker: the checks share a run
]


@pytest.fixture(scope="module")
def run() -> subprocess.CompletedProcess[str]:
    """All checks in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = str(Path(__file__).with_name("distributed_steps.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, program, *KINDS], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "draws"])
def test_gradients_of_two_processes_are_those_of_one_on_the_joined_batch(run, kind):
    """Though there are two forwards before one backward."""
    assert run.stdout.count(f"{kind}: as one process") == 2, run.stderr[-4000:]


def test_every_rank_draws_its_own_lambda_from_one_seed(run):
    assert run.stdout.count("draws: different on every rank") == 2, run.stderr[-4000:]
    assert run.returncode == 0, run.stderr[-4000:]
