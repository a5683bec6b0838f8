"""From hidden rows (B, D) through the last linear layer to the loss."""

import pytest
import torch
from support import measure_step, shapes_of, steps

from fastamp import AMPLoss, functional
from fastamp.benchmarking import STEP_SIZE, Contender, Workload, contenders, disagreement

# B, D, C: where logits (B, C) are the largest tensors of a training step. The second takes a GPU.
MANY_CLASSES = ((512, 128, 32_000), (8192, 2048, 128_256))
CHECKED_ROWS, CHECKED_CHUNK = 64, 30


@steps("hidden")
def test_linear_amp_cross_entropy(measure, benchmark, device, shape, dtype, contender, direction):
    measure_step(measure, benchmark, device, "hidden", shape, dtype, contender, direction)


def in_chunks(chunk_rows: int) -> Contender:
    """`linear_amp_cross_entropy` that many rows at a time."""
    criterion = AMPLoss(step_size=STEP_SIZE)

    def loss(head, x, y, mix):
        lam, partner = criterion.sample(len(x), device=x.device) if mix is None else mix
        parameters = (head.weight, head.bias)
        return functional.linear_amp_cross_entropy(
            x, *parameters, y, lam, partner, step_size=STEP_SIZE, chunk_rows=chunk_rows
        )

    return Contender(f"chunks of {chunk_rows}", "amp", loss, takes="hidden")


@pytest.mark.parametrize("whose", ["126", "254", "510", "1022", "AMPLoss", "cross-entropy"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", shapes_of(MANY_CLASSES))
def test_linear_amp_cross_entropy_of_many_classes(measure, benchmark, device, shape, dtype, whose):
    batch, width, classes = shape
    if device.type == "cpu" and shape != MANY_CLASSES[0]:
        pytest.skip("takes a GPU")
    if whose.isdigit() and int(whose) >= batch:
        pytest.skip("that would be the whole batch")
    benchmark.group = f"({batch}, {width}) -> {classes}, {dtype}"
    named = {one.name: one for one in contenders("hidden", compiled=False)}
    # The definition holds many (B, C) tensors in float64: it is held to fewer rows.
    small = Workload((CHECKED_ROWS, width, classes), dtype, "hidden", device)
    contender = in_chunks(CHECKED_CHUNK) if whose.isdigit() else named[whose]
    reason = disagreement(small.bind(contender), contender.mode)
    assert reason is None, f"{contender.name} is not timed: {reason}"
    runner = Workload(shape, dtype, "hidden", device).bind(in_chunks(int(whose)) if whose.isdigit() else contender)
    measure(lambda _: runner.backward(0, runner.forward(0)))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        runner.backward(0, runner.forward(0))
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
