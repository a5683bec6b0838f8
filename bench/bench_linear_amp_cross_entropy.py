"""From hidden rows (B, D) through the last linear layer to the loss."""

import pytest
from support import measure_step, shapes_of, steps

from fastamp.benchmarking import Contender, LinearHead, Workload, contenders, disagreement, timing

# B, D, C: where logits (B, C) are the largest tensors of a training step. The second takes a GPU.
MANY_CLASSES = ((512, 128, 32_000), (8192, 2048, 128_256))


@steps("hidden")
def test_linear_amp_cross_entropy(measure, benchmark, device, shape, dtype, contender, direction):
    measure_step(measure, benchmark, device, "hidden", shape, dtype, contender, direction)


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
    contender = Contender(f"chunks of {whose}", "amp", LinearHead(int(whose))) if whose.isdigit() else named[whose]
    work = Workload(shape, dtype, "hidden", device)
    runner = work.bind(contender)
    reason = disagreement(runner, contender.mode)
    assert reason is None, f"{contender.name} is not timed: {reason}"
    work.truths.clear()
    measure(lambda _: runner.backward(0, runner.forward(0)))
    benchmark.extra_info["peak_bytes"] = timing.peak_memory(runner)
