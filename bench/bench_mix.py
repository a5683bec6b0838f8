"""Mixing rows (RandOp): reads h once, writes m."""

import pytest
import torch
from support import DIRECTIONS, checked_inputs, operations

from fastamp import functional
from fastamp.benchmarking import plain_mix


@operations
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mix(measure, benchmark, device, shape, dtype, whose, direction):
    x = checked_inputs("mix", shape, dtype, device)
    hidden = x["hidden"].requires_grad_()
    mix = functional.mix if whose == "fastamp" else plain_mix
    lam = x["lam"] if whose == "fastamp" else x["lam"].to(hidden.dtype)
    benchmark.group = f"mix {shape} {dtype} {direction}"

    def forward(_=None):
        return mix(hidden, lam, x["partner"])

    def backward(mixed):
        return torch.autograd.grad(mixed, hidden, x["upstream"])

    one_way = 2 * hidden.numel() * hidden.element_size()
    if direction == "forward":
        measure(forward, moved=one_way)
    elif direction == "backward":
        measure(backward, prepare=forward, moved=one_way)
    else:
        measure(lambda _: backward(forward()), moved=2 * one_way)
