"""The larger of two losses, row by row (MinOp)."""

import pytest
import torch
from support import checked_inputs

from fastamp import functional


@pytest.mark.parametrize("whose", ["fastamp", "PyTorch"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [50, 4096])
def test_select_loss(measure, benchmark, device, batch, dtype, whose):
    x = checked_inputs("select_loss", (batch,), dtype, device)
    loss, loss_adv = x["loss"].requires_grad_(), x["loss_adv"].requires_grad_()
    benchmark.group = f"select_loss {batch} {dtype}"

    def run(_):
        if whose == "fastamp":
            chosen = functional.select_loss(loss, loss_adv)[0]
        else:
            chosen = torch.where(loss_adv - loss > 0, loss_adv, loss)
        return torch.autograd.grad(chosen.sum(), (loss, loss_adv))

    measure(run)
