"""What a loss is divided by, and its gradient with it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastamp import closed_form
from fastamp.policy import Policy


def divisors(
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    policy: Policy,
    reduction: str,
    num_items: float | Tensor | None,
    all_kept: bool,
) -> tuple[Tensor | float, Tensor | float]:
    """The divisor of the loss, and the one of the λ-gradient under grad_scale="mean" (1.0 where unused)."""
    if reduction != "mean" and policy.grad_scale != "mean":
        return 1.0, 1.0
    mean: Tensor | float
    if num_items is not None:
        mean = num_items.to(lam.dtype) if isinstance(num_items, Tensor) else float(num_items)
    elif all_kept and (weight is None or target.is_floating_point()):
        mean = float(lam.shape[0])
    else:
        mean = closed_form.row_mass(target, lam, partner, weight, policy.ignore_index).sum()
    of_grad = mean if policy.grad_scale == "mean" else 1.0
    if reduction != "mean":
        return 1.0, of_grad
    # Two tensors: torch.compile refuses one tensor in two places of an autograd.Function.
    return mean, of_grad.clone() if isinstance(of_grad, Tensor) else of_grad


def kernel_grad_divisor(
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    policy: Policy,
    num_items: float | Tensor | None,
    all_kept: bool,
) -> Tensor | None:
    """The divisor of the λ-gradient as a 0-d tensor like `lam`, or None where it is the row's own."""
    if policy.grad_scale == "row":
        return None
    _, divisor = divisors(target, lam, partner, weight, policy, "none", num_items, all_kept)
    # A number is filled in on the device, for a copy from the host would wait for it.
    return divisor.to(lam) if isinstance(divisor, Tensor) else lam.new_full((), divisor)


def reduced(loss: Tensor, reduction: str, divisor: Tensor | float) -> Tensor:
    """The losses (B,) as they are, or their sum over the divisor."""
    return loss if reduction == "none" else loss.sum() / divisor


def upstream_of(grad_loss: Tensor, divisor: Tensor | float) -> Tensor:
    """The gradient of the losses, or of their sum, from that of what `reduced` made of them."""
    if isinstance(divisor, float):
        return grad_loss / divisor
    # Nothing kept: the mean is 0/0, and its gradient 0, as nn.CrossEntropyLoss has it.
    return torch.where(divisor == 0, torch.zeros_like(grad_loss), grad_loss / divisor)


def if_tensor(value: Tensor | float) -> tuple[Tensor, ...]:
    """What is to be saved for backward as a tensor."""
    return (value,) if isinstance(value, Tensor) else ()


def divided(total: Tensor, divisor: Tensor | float) -> Tensor:
    """A sum over its divisor, for autograd to differentiate."""
    if isinstance(divisor, float):
        return total / divisor
    # Nothing kept: the mean is 0/0, and its gradient 0, as nn.CrossEntropyLoss has it.
    nothing = divisor == 0
    return torch.where(nothing, total.detach() / divisor, total / torch.where(nothing, 1, divisor))
