"""What the host does for an eager call on the Triton backend: kernels launched and operators run, counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")
pytest.importorskip("rich")

BENCH = Path(__file__).parents[1] / "bench"
DRAW = "_draw_partner_kernel"
SINGLE = [DRAW, "_amp_few_classes_kernel", "_rescale_kernel"]
WHOLE = [DRAW, "_amp_cross_entropy_kernel", "_amp_total_kernel", "_rescale_kernel"]
KERNELS = {
    (50, 6, "AMPLoss"): SINGLE,
    (50, 6, "AMPLoss, matching"): SINGLE,
    (50, 6, "linear_amp_cross_entropy"): [DRAW, "_linear_amp_cross_entropy_kernel", "_amp_total_kernel"],
    (256, 1000, "AMPLoss"): WHOLE,
    (256, 1000, "AMPLoss, matching"): WHOLE,
    (64, 32000, "AMPLoss"): [DRAW, "_amp_rows_kernel", "_amp_total_kernel", "_inverse_kernel", "_amp_rows_grad_kernel"],
    (64, 32000, "AMPLoss, matching"): [DRAW, "_amp_rows_kernel", "_amp_total_kernel", "_rescale_kernel"],
}
FREE = ("empty", "new_empty", "empty_like")  # memory, but no launch


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Kernels and operators by shape and step, from one run of the program."""
    file = tmp_path_factory.mktemp("host") / "host.json"
    command = [sys.executable, str(BENCH / "host_overhead.py"), "--json", str(file), "--rounds", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return {(row["shape"][0], row["shape"][2], row["step"]): row for row in json.loads(file.read_text())["rows"]}


def launching(row):
    return [name for name in row["operators"] if name.split(".")[0] not in FREE]


@pytest.mark.parametrize("step", KERNELS, ids=str)
def test_a_step_launches_these_kernels_and_no_other(counted, step):
    assert counted[step]["kernels"] == KERNELS[step]


@pytest.mark.parametrize("shape", [(50, 6), (24, 2), (256, 1000)])
@pytest.mark.parametrize("step", ["AMPLoss", "AMPLoss, matching"])
def test_nothing_else_runs_but_one_draw_of_numbers_and_autograds_one(counted, shape, step):
    row = counted[(*shape, step)]
    assert launching(row) == ["rand.default", "ones_like.default"]
    assert len(row["kernels"]) + 1 <= 5


@pytest.mark.parametrize("shape", [(50, 6), (24, 2), (256, 1000), (64, 32000)])
@pytest.mark.parametrize("step", ["AMPLoss", "AMPLoss, matching"])
def test_a_step_launches_less_than_plain_mixup_does(counted, shape, step):
    """Where Mixup is eager, and each of its operators a launch."""
    ours = counted[(*shape, step)]
    launches = len(ours["kernels"]) + len(launching(ours))
    plain = min(len(launching(counted[(*shape, name)])) for name in ("Mixup, two terms", "Mixup, soft targets"))
    assert launches <= plain / 2
    assert launches <= len(launching(counted[(*shape, "AMP autograd")])) / 5


def test_the_count_tells_what_is_launched_twice(counted):
    """The program counts what it is given, and not what it expects."""
    row = counted[(50, 6, "AMP autograd")]
    assert row["kernels"] == []
    assert row["operators"].count("_log_softmax.default") == 4
    assert row["us"] is None
    assert counted[(50, 6, "AMPLoss")]["us"] > 0
