"""remix: push λ towards higher loss and mix again (MaxOp, Eq. 14-16); lambda_grad: what it is pushed by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastamp.backend import takes_kernels
from fastamp.checks import check_device, check_float_rows, check_partner, checked_lam
from fastamp.mixing import Mix
from fastamp.ops import mix as mix_op
from fastamp.ops.operator import operator
from fastamp.ops.rows import compute_dtype, partner_rows, scaled_grad, step_lam
from fastamp.policy import Policy, check_number, checked_policy
from fastamp.reduction import as_tensor


def lambda_grad(grad_mixed: Tensor, hidden: Tensor, partner: Tensor) -> Tensor:
    """∂ℓ_r/∂λ_r = ⟨∂ℓ_r/∂m_r, h_r - h_π(r)⟩, from the gradient that reached the mixed rows (Eq. 14).

    Args:
        grad_mixed: (B, ...) gradient of the summed row losses to the mixed rows.
        hidden: (B, ...) the unmixed rows, of the same shape.
        partner: (B,) int64, a permutation of 0..B-1.

    Returns:
        (B,) float32 (float64 for float64 `hidden`), detached.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices.
    """
    _check(hidden, partner, grad_mixed)
    return dispatch_grad(grad_mixed, hidden, partner)


def remix(
    hidden: Tensor,
    lam: Tensor,
    partner: Tensor,
    grad_mixed: Tensor,
    *,
    step_size: float = 2e-3,
    grad_clip: float | None = 1.0,
    clamp: bool = False,
) -> tuple[Tensor, Tensor]:
    """Push λ towards higher loss and mix again (MaxOp, Eq. 14-16): λ' = λ + step_size·clip(∇λ).

    Args:
        hidden: (B, ...) the unmixed rows.
        lam: (B,) λ.
        partner: (B,) int64, a permutation of 0..B-1.
        grad_mixed: (B, ...) gradient of the summed row losses to the rows mixed at λ.
        step_size: ε >= 0.
        grad_clip: two-sided bound on ∇λ, or None.
        clamp: keep λ' inside [0, 1].

    Returns:
        λ' (B,), detached, and the rows mixed at λ' (B, ...), differentiable to `hidden`.

    Raises:
        TypeError, ValueError: wrong options, dtypes, shapes or devices.
    """
    policy = checked_policy(grad_clip=grad_clip, clamp=clamp)
    check_number("step_size", step_size, low=0.0)
    _check(hidden, partner, grad_mixed)
    lam = checked_lam(lam, len(hidden), hidden.device)
    mix = Mix(lam.detach().to(compute_dtype(hidden.dtype)), partner)
    _, lam_adv, mixed = dispatch(hidden, grad_mixed, mix, policy, step_size, None)
    return lam_adv, mixed


def _check(hidden: Tensor, partner: Tensor, grad_mixed: Tensor) -> None:
    check_float_rows("hidden", hidden)
    check_float_rows("grad_mixed", grad_mixed)
    if grad_mixed.shape != hidden.shape:
        raise ValueError(f"grad_mixed must have hidden's shape {tuple(hidden.shape)}, got {tuple(grad_mixed.shape)}")
    check_device("grad_mixed", grad_mixed, hidden.device)
    check_partner(partner, len(hidden), hidden.device)


def dispatch_grad(grad_mixed: Tensor, hidden: Tensor, partner: Tensor) -> Tensor:
    """`lambda_grad` for checked arguments."""
    grad_mixed, hidden = grad_mixed.detach(), hidden.detach()
    return (forward_grad if takes_kernels(hidden) else closed_form_grad)(grad_mixed, hidden, partner)


def dispatch(
    hidden: Tensor, grad_mixed: Tensor, mix: Mix, policy: Policy, step_size: float, grad_divisor: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """∇λ (B,), λ' (B,), both detached, and the rows mixed at λ' (B, ...), differentiable to hidden.

    Args:
        hidden: (B, ...) the unmixed rows.
        grad_mixed: (B, ...) gradient of the summed row losses to the rows mixed at λ.
        mix: λ (B,) of the compute dtype, and partners.
        policy: for mode, grad_scale, grad_clip and clamp.
        step_size: ε.
        grad_divisor: divides ∇λ under grad_scale="mean"; 0 makes it zero. None for the row's own.
    """
    if not takes_kernels(hidden):
        grad, lam_adv = closed_form(hidden, grad_mixed, mix, policy, step_size, grad_divisor)
        return grad, lam_adv, mix_op.dispatch(hidden, Mix(lam_adv, mix.partner))
    divisor = None
    if policy.grad_scale == "mean" and grad_divisor is not None:
        divisor = as_tensor(grad_divisor, mix.lam)
    return _Remix.apply(hidden, grad_mixed.detach(), *mix, divisor, policy, step_size)


def closed_form_grad(grad_mixed: Tensor, hidden: Tensor, partner: Tensor) -> Tensor:
    """∇λ of every row, of the compute dtype."""
    dtype = compute_dtype(hidden.dtype)
    wide = hidden.to(dtype)
    return (grad_mixed.to(dtype) * (wide - partner_rows(wide, partner))).unsqueeze(-1).flatten(1).sum(1)


def closed_form(
    hidden: Tensor, grad_mixed: Tensor, mix: Mix, policy: Policy, step_size: float, grad_divisor: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """∇λ and λ' of every row."""
    grad = scaled_grad(dispatch_grad(grad_mixed, hidden, mix.partner), policy, grad_divisor)
    return grad, step_lam(mix.lam, grad, policy, step_size)


class _Remix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, grad_mixed: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad, lam_adv, rows = forward(hidden, grad_mixed, *arguments)
        ctx.mark_non_differentiable(grad, lam_adv)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lam_adv, arguments[1])
        return grad, lam_adv, rows

    @staticmethod
    def backward(ctx: Any, _: Tensor, __: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return mix_op.mix_rows_grad(upstream, *ctx.saved_tensors), *[None] * 6


@operator(
    "fastamp::lambda_grad",
    lambda _, hidden, __: torch.empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype), device=hidden.device),
)
def forward_grad(grad_mixed: Tensor, hidden: Tensor, partner: Tensor) -> Tensor:
    """∇λ of every row, by a kernel."""
    from fastamp import kernels

    return kernels.lambda_grad(grad_mixed, hidden, partner, compute_dtype(hidden.dtype))


def _remix_like(hidden: Tensor, _: Tensor, lam: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastamp import kernels

    rows = kernels.empty_rows(hidden, kernels.memory_order(hidden))
    return torch.empty_like(lam), torch.empty_like(lam), rows


@operator("fastamp::remix", _remix_like)
def forward(
    hidden: Tensor,
    grad_mixed: Tensor,
    lam: Tensor,
    partner: Tensor,
    grad_divisor: Tensor | None,
    policy: Policy,
    step_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """∇λ, λ' and the rows mixed there, by kernels."""
    from fastamp import kernels

    return kernels.remix_forward(hidden, grad_mixed, Mix(lam, partner), policy, step_size, grad_divisor)
