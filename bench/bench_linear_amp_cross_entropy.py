"""From hidden rows (B, D) through the last linear layer to the loss."""

from support import measure_step, steps


@steps("hidden")
def test_linear_amp_cross_entropy(measure, benchmark, device, shape, dtype, contender, direction):
    measure_step(measure, benchmark, device, "hidden", shape, dtype, contender, direction)
