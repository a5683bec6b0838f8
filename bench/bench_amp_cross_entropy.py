"""The loss alone, on logits (B, C): fastamp.AMPLoss, plain Mixup and plain cross-entropy."""

from support import measure_step, steps


@steps("logits")
def test_amp_cross_entropy(measure, benchmark, device, shape, dtype, contender, direction):
    measure_step(measure, benchmark, device, "logits", shape, dtype, contender, direction)
