"""What a loss is divided by, and its gradient with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastamp.checks import all_kept, checked_num_items
from fastamp.mixing import Mixture
from fastamp.policy import Policy, check_choice


class Reduction(NamedTuple):
    """How the losses of a batch become one, or stay many."""

    kind: str  # "mean", "sum" or "none"
    num_items: float | Tensor | None  # replaces the divisor of the mean
    all_kept: bool  # known of the target: nothing in it equals ignore_index

    def mass(self, mixture: Mixture, policy: Policy) -> Tensor | float:
        """The divisor of the mean: num_items, or what is kept of all rows, see `row_mass`."""
        lam, target = mixture.lam, mixture.target
        if self.num_items is not None:
            return self.num_items.to(lam.dtype) if isinstance(self.num_items, Tensor) else float(self.num_items)
        unweighted = mixture.weight is None or target.is_floating_point() or policy.loss == "binary_cross_entropy"
        if self.all_kept and unweighted:
            return float(lam.shape[0])
        return row_mass(mixture, policy).sum()

    def divisors(self, mixture: Mixture, policy: Policy) -> tuple[Tensor | float, Tensor | float]:
        """The divisor of the loss, and the one of ∇λ under grad_scale="mean" (1.0 where unused)."""
        if self.kind != "mean" and policy.grad_scale != "mean":
            return 1.0, 1.0
        mass = self.mass(mixture, policy)
        of_grad = mass if policy.grad_scale == "mean" else 1.0
        if self.kind != "mean":
            return 1.0, of_grad
        # Two tensors: torch.compile refuses one tensor in two places of an autograd.Function.
        return mass, of_grad.clone() if isinstance(of_grad, Tensor) else of_grad

    def on_host(self) -> tuple[float | None, Tensor | None]:
        """The divisor that a kernel takes, 0 for the mass and None for no reduction; and what is left to divide by."""
        if self.kind != "mean":
            return (1.0 if self.kind == "sum" else None), None
        if isinstance(self.num_items, Tensor):
            return 1.0, self.num_items
        return float(self.num_items or 0), None

    def kernel_grad_divisor(self, mixture: Mixture, policy: Policy) -> Tensor | None:
        """The divisor of ∇λ as a 0-d tensor like λ, or None where it is the row's own."""
        if policy.grad_scale == "row":
            return None
        return as_tensor(self.mass(mixture, policy), mixture.lam)


def checked_reduction(
    kind: str, num_items: float | Tensor | None, target: Tensor, classes: int, policy: Policy
) -> Reduction:
    """How the losses of a checked target are reduced; ValueError for a label of a CPU tensor that is out of range."""
    check_choice("reduction", kind)
    num_items = checked_num_items(num_items, target.device)
    return Reduction(kind, num_items, all_kept(target, classes, policy))


def known_to_keep_all(mixture: Mixture, policy: Policy, reduction: Reduction) -> bool:
    """Whether it is known beforehand that every row takes λ': by choice, or by convexity, with rounding as a tie.

    ℓ = S·lse(x) - ⟨t, x⟩ is convex in λ where x is affine in λ and the target's mass S is not negative, and so is
    binary cross-entropy, Σ_c S_c log(1 + exp x_c) - ⟨t, x⟩, whose S_c without weights is 1 whatever t is. Then
    δ >= η∇λ, which is not negative where η has the sign of ∇λ: where that is divided by no negative number.
    """
    if policy.mode != "amp":
        return policy.mode == "maxop"
    if policy.loss == "softmax_bce" or policy.tie_tol is not None:
        return False
    if policy.grad_scale == "mean" and isinstance(reduction.num_items, Tensor):
        return False
    target, weight = mixture.target, mixture.weight
    if policy.loss == "binary_cross_entropy":
        known = weight is None or not target.is_floating_point()
        known = known or (_not_negative(target) and _not_negative(1 - target))
    else:
        known = not target.is_floating_point() or _not_negative(target)
    return known and _not_negative(weight)


def _not_negative(mass: Tensor | None) -> bool:
    """Whether no element is known to be negative: values are looked at on the CPU only."""
    if mass is None or not mass.numel():
        return True
    return mass.device.type == "cpu" and not torch.compiler.is_compiling() and mass.min().item() >= 0


def row_mass(mixture: Mixture, policy: Policy) -> Tensor:
    """(B,) kept, class-weighted mass λ_r w(y_r) + (1-λ_r) w(y_π(r)) of each row; 1 for soft targets.

    With binary cross-entropy the kept share of the row's classes, without weights: as nn.BCEWithLogitsLoss has it.
    """
    target, lam, partner, weight = mixture
    binary = policy.loss == "binary_cross_entropy"
    kept = target != policy.ignore_index
    if target.is_floating_point():
        if not binary:
            return torch.ones_like(lam)
        mass = kept.to(lam.dtype).mean(1)
    else:
        mass = kept.to(lam.dtype)
    if weight is not None and not binary:
        mass = mass * weight.to(lam.dtype)[torch.where(kept, target, 0)]
    return torch.lerp(mass.index_select(0, partner), mass, lam)


def as_tensor(divisor: Tensor | float, lam: Tensor) -> Tensor:
    """A divisor as a 0-d tensor like λ; a number is filled in on the device, for a copy from the host would wait."""
    return divisor.to(lam) if isinstance(divisor, Tensor) else lam.new_full((), divisor)


def reduced(loss: Tensor, kind: str, divisor: Tensor | float) -> Tensor:
    """The losses (B,) as they are, or their sum over the divisor."""
    return loss if kind == "none" else loss.sum() / divisor


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
