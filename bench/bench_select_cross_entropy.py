"""From the logits at λ and at λ' to the larger loss (MinOp): reads both, and writes both gradients."""

import pytest
import torch
import torch.nn.functional as F
from support import DIRECTIONS, checked, shapes_of

from fastamp import functional
from fastamp.conformance import SelectionCase

# B, C
SHAPES = ((50, 6), (24, 5), (256, 1000), (512, 32_000))


@pytest.mark.parametrize("whose", ["fastamp", "PyTorch"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", shapes_of(SHAPES))
def test_select_cross_entropy(measure, benchmark, device, shape, dtype, whose, direction):
    x = checked(SelectionCase("benchmark", shape=shape), dtype, device)
    leaves = [x[name].requires_grad_() for name in ("logits", "logits_adv")]
    target, lam, partner = x["target"], x["lam"], x["partner"]
    benchmark.group = f"select_cross_entropy {shape} {dtype} {direction}"

    def mixed_loss(logits):
        own, theirs = (F.cross_entropy(logits.float(), y, reduction="none") for y in (target, target[partner]))
        return torch.lerp(theirs, own, lam)

    def forward(_=None):
        if whose == "fastamp":
            return functional.select_cross_entropy(*leaves, target, lam, partner)[0]
        loss, loss_adv = map(mixed_loss, leaves)
        return torch.where(loss_adv > loss, loss_adv, loss)

    def backward(loss):
        return torch.autograd.grad(loss, leaves, x["upstream"])

    logits = leaves[0]
    there = 2 * logits.numel() * (logits.element_size() + lam.element_size())  # logits, and gradients in float32
    back = logits.numel() * (lam.element_size() + 2 * logits.element_size())  # the gradient of the loss that was taken
    if direction == "forward":
        measure(forward, moved=there)
    elif direction == "backward":
        measure(backward, prepare=forward, moved=back)
    else:
        measure(lambda _: backward(forward()), moved=there + back)
