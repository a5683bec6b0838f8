"""Triton operations as PyTorch sees them: autograd functions in eager mode, registered operators under torch.compile.

Eager mode goes past the dispatcher, whose cost is of the order of the kernels' own at small shapes; a compiled
graph needs operators that it can trace by their shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastamp import closed_form, kernels
from fastamp.kernels import RowPolicy
from fastamp.mixing import MixStats
from fastamp.policy import Policy


def row_policy(policy: Policy, dtype: torch.dtype) -> RowPolicy:
    """What the kernels are compiled for."""
    tie_abs, tie_rel = policy.tie_bounds(dtype)
    return RowPolicy(
        mode=policy.mode,
        bce=policy.loss == "softmax_bce",
        grad_clip=policy.grad_clip,
        clamp=policy.clamp,
        ignore_index=policy.ignore_index,
        label_smoothing=policy.label_smoothing,
        tie_abs=tie_abs,
        tie_rel=tie_rel,
    )


def amp_cross_entropy(
    logits: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    policy: Policy,
    reduction: str,
    num_items: float | Tensor | None,
    grad_divisor: Tensor | None,
    *,
    return_stats: bool,
) -> tuple[Tensor, MixStats | None]:
    """`fastamp.functional.amp_cross_entropy` on Triton, for checked arguments and B >= 1."""
    if isinstance(num_items, Tensor) and reduction == "mean":
        # The kernels take the divisor from the host; one that lives on the device is applied to the sum.
        loss, stats = amp_cross_entropy(
            logits,
            target,
            lam,
            partner,
            weight,
            policy,
            "sum",
            None,
            grad_divisor,
            return_stats=return_stats,
        )
        return loss / num_items, stats
    divisor = None if reduction == "none" else 1.0 if reduction == "sum" else float(num_items or 0)
    compiled_for = row_policy(policy, lam.dtype)
    if torch.compiler.is_compiling():
        rows, loss = _operator(
            logits, target, lam, partner, weight, grad_divisor, *compiled_for, policy.step_size, divisor
        )[:2]
        loss = rows[kernels.LOSS] if divisor is None else loss
        rows = rows.detach()
    else:
        loss, rows = _AmpCrossEntropy.apply(
            logits, target, lam, partner, weight, grad_divisor, compiled_for, policy.step_size, divisor
        )
    if not return_stats:
        return loss, None
    fields = (kernels.LAM_ADV, kernels.GRAD, kernels.DELTA)
    return loss, MixStats(lam, *(rows[field] for field in fields), rows[kernels.MASK] > 0)


class _AmpCrossEntropy(torch.autograd.Function):
    """The eager path. The gradient of the forward launch is handed out once, scaled in place by the first backward;
    a later one computes it anew, so that nobody's gradient is ever written to."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        lam: Tensor,
        partner: Tensor,
        weight: Tensor | None,
        grad_divisor: Tensor | None,
        policy: RowPolicy,
        step_size: float,
        divisor: float | None,
    ) -> tuple[Tensor, Tensor]:
        out = kernels.amp_cross_entropy_forward(
            logits,
            target,
            lam,
            partner,
            weight,
            grad_divisor,
            policy=policy,
            step_size=step_size,
            divisor=divisor,
            want_grad=ctx.needs_input_grad[0],
        )
        ctx.save_for_backward(logits, target, lam, partner, weight, out.rows, out.divisor)
        ctx.policy, ctx.dlogits, ctx.assumed = policy, out.dlogits, out.assumed
        ctx.mark_non_differentiable(out.rows)
        return (out.rows[kernels.LOSS].clone() if out.loss is None else out.loss), out.rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lam, partner, weight, rows, divisor = ctx.saved_tensors
        dlogits, ctx.dlogits = ctx.dlogits, None
        if dlogits is not None:
            dlogits = kernels.rescale_(dlogits, grad_loss, divisor, ctx.assumed)
        else:
            dlogits = kernels.amp_cross_entropy_backward(
                logits, target, lam, partner, weight, rows, divisor, grad_loss, policy=ctx.policy
            )
        return (dlogits, *[None] * 8)


@torch.library.custom_op("fastamp::amp_cross_entropy", mutates_args=())
def _operator(
    logits: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    grad_divisor: Tensor | None,
    mode: str,
    bce: bool,
    grad_clip: float | None,
    clamp: bool,
    ignore_index: int,
    label_smoothing: float,
    tie_abs: float,
    tie_rel: float,
    step_size: float,
    divisor: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    policy = RowPolicy(mode, bce, grad_clip, clamp, ignore_index, label_smoothing, tie_abs, tie_rel)
    out = kernels.amp_cross_entropy_forward(
        logits,
        target,
        lam,
        partner,
        weight,
        grad_divisor,
        policy=policy,
        step_size=step_size,
        divisor=divisor,
        want_grad=False,
    )
    if out.loss is None or out.divisor is None:
        return out.rows, lam.new_ones(()), lam.new_ones(())
    return out.rows, out.loss, out.divisor


@_operator.register_fake
def _(logits: Tensor, target: Tensor, lam: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    bce = rest[4]
    return lam.new_empty(kernels.row_fields(bce), len(lam)), lam.new_empty(()), lam.new_empty(())


@torch.library.custom_op("fastamp::amp_cross_entropy_backward", mutates_args=())
def _operator_backward(
    logits: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    rows: Tensor,
    divisor: Tensor | None,
    upstream: Tensor,
    mode: str,
    bce: bool,
    grad_clip: float | None,
    clamp: bool,
    ignore_index: int,
    label_smoothing: float,
    tie_abs: float,
    tie_rel: float,
) -> Tensor:
    policy = RowPolicy(mode, bce, grad_clip, clamp, ignore_index, label_smoothing, tie_abs, tie_rel)
    return kernels.amp_cross_entropy_backward(
        logits, target, lam, partner, weight, rows, divisor, upstream, policy=policy
    )


@_operator_backward.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    rows, _, divisor = output
    ctx.save_for_backward(*inputs[:5], rows, divisor)
    ctx.policy, ctx.reduces = inputs[6:14], inputs[15] is not None


def _operator_gradient(ctx: Any, grad_rows: Tensor, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *saved, divisor = ctx.saved_tensors
    upstream = grad_loss if ctx.reduces else grad_rows[kernels.LOSS]
    dlogits = _operator_backward(*saved, divisor if ctx.reduces else None, upstream, *ctx.policy)
    return (dlogits, *[None] * 15)


_operator.register_autograd(_operator_gradient, setup_context=_keep_for_backward)
