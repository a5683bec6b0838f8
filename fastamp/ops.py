"""Triton operations as PyTorch sees them: autograd functions in eager mode, registered operators under torch.compile.

Eager mode goes past the dispatcher, whose cost is of the order of the kernels' own at small shapes; a compiled
graph needs operators that it can trace by their shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastamp.kernels as kernels
from fastamp import closed_form
from fastamp.autograd import once_differentiable
from fastamp.kernels import RowPolicy
from fastamp.mixing import MixStats
from fastamp.policy import Policy


def row_policy(policy: Policy, dtype: torch.dtype, *, never_rejects: bool = False) -> RowPolicy:
    """What the kernels are compiled for; `never_rejects` promises that every row takes λ'."""
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
        never_rejects=never_rejects,
        matched=policy.pairing == "matching",
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
    never_rejects: bool,
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
            never_rejects=never_rejects,
            return_stats=return_stats,
        )
        return loss / num_items.to(loss.dtype), stats
    divisor = None if reduction == "none" else 1.0 if reduction == "sum" else float(num_items or 0)
    compiled_for = row_policy(policy, lam.dtype, never_rejects=never_rejects)
    if torch.compiler.is_compiling():
        rows, loss = _operator(
            logits,
            target,
            lam,
            partner,
            weight,
            grad_divisor,
            *compiled_for,
            policy.step_size,
            divisor,
        )[:2]
        loss = rows[kernels.LOSS] if divisor is None else loss
        rows = rows.detach()
    else:
        loss, rows = _AmpCrossEntropy.apply(
            logits,
            target,
            lam,
            partner,
            weight,
            grad_divisor,
            compiled_for,
            policy.step_size,
            divisor,
            logits.requires_grad and torch.is_grad_enabled(),
        )
    return loss, _stats(rows, lam) if return_stats else None


class _AmpCrossEntropy(torch.autograd.Function):
    """The eager path. The gradient of the forward launch is handed out once, scaled in place by the first backward;
    a later one computes it anew, so that nobody's gradient is ever written to.
    """

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
        need_grad: bool,
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
            want_grad=need_grad,
        )
        ctx.save_for_backward(logits, target, lam, partner, weight, out.rows, out.divisor)
        ctx.policy, ctx.dlogits, ctx.assumed = policy, out.dlogits, out.assumed
        ctx.mark_non_differentiable(out.rows)
        ctx.set_materialize_grads(False)  # a zero gradient of what has none would be a launch
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
        return (dlogits, *[None] * 9)


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
    never_rejects: bool,
    matched: bool,
    step_size: float,
    divisor: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    policy = RowPolicy(
        mode, bce, grad_clip, clamp, ignore_index, label_smoothing, tie_abs, tie_rel, never_rejects, matched
    )
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
    return lam.new_empty(kernels.row_fields(bce), lam.shape[0]), lam.new_empty(()), lam.new_empty(())


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
    never_rejects: bool,
    matched: bool,
) -> Tensor:
    policy = RowPolicy(
        mode, bce, grad_clip, clamp, ignore_index, label_smoothing, tie_abs, tie_rel, never_rejects, matched
    )
    return kernels.amp_cross_entropy_backward(
        logits, target, lam, partner, weight, rows, divisor, upstream, policy=policy
    )


@_operator_backward.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    rows, _, divisor = output
    ctx.save_for_backward(*inputs[:5], rows, divisor)
    ctx.policy, ctx.reduces = inputs[6:16], inputs[17] is not None


def _operator_gradient(ctx: Any, grad_rows: Tensor, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *saved, divisor = ctx.saved_tensors
    upstream = grad_loss if ctx.reduces else grad_rows[kernels.LOSS]
    dlogits = _operator_backward(*saved, divisor if ctx.reduces else None, upstream, *ctx.policy)
    return (dlogits, *[None] * 17)


_operator.register_autograd(_operator_gradient, setup_context=_keep_for_backward)


def linear_head_fits(hidden: Tensor, linear_weight: Tensor, policy: Policy) -> bool:
    """Whether a head of this size is one launch; it also has to be eager: under torch.compile it is composed."""
    classes, depth = linear_weight.shape
    itemsize = closed_form.compute_dtype(hidden.dtype).itemsize
    bce = policy.loss == "softmax_bce"
    fits = kernels.linear_head_config(max(1, len(hidden)), classes, depth, itemsize, bce=bce) is not None
    return fits and len(hidden) > 0 and not torch.compiler.is_compiling()


def linear_amp_cross_entropy(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    relu: bool,
    keep: Tensor | None,
    weight: Tensor | None,
    policy: Policy,
    reduction: str,
    num_items: float | Tensor | None,
    grad_divisor: Tensor | None,
    *,
    never_rejects: bool,
    return_stats: bool,
) -> tuple[Tensor, MixStats | None]:
    """`fastamp.functional.linear_amp_cross_entropy` on Triton, for checked arguments and a head that fits."""
    on_device = num_items if isinstance(num_items, Tensor) and reduction == "mean" else None
    if on_device is not None:
        reduction = "sum"
    divisor = None if reduction == "none" else 1.0 if reduction == "sum" else float(num_items or 0)
    loss, rows = _LinearAmpCrossEntropy.apply(
        hidden,
        linear_weight,
        linear_bias,
        target,
        lam,
        partner,
        keep,
        weight,
        grad_divisor,
        row_policy(policy, lam.dtype, never_rejects=never_rejects),
        relu,
        policy.step_size,
        divisor,
    )
    loss = loss if on_device is None else loss / on_device.to(loss.dtype)
    return loss, _stats(rows, lam) if return_stats else None


class _LinearAmpCrossEntropy(torch.autograd.Function):
    """Gradients for a reduced loss leave with the forward launch, and are scaled out of place."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        lam: Tensor,
        partner: Tensor,
        keep: Tensor | None,
        weight: Tensor | None,
        grad_divisor: Tensor | None,
        policy: RowPolicy,
        relu: bool,
        step_size: float,
        divisor: float | None,
    ) -> tuple[Tensor, Tensor]:
        tensors = (hidden, linear_weight, linear_bias, target, lam, partner, keep, weight, grad_divisor)
        options: dict[str, Any] = {"policy": policy, "relu": relu, "step_size": step_size}
        reduces = divisor is not None
        out = kernels.launch_linear_head(
            *tensors,
            **options,
            divisor=divisor,
            upstream=None,
            want_rows=True,
            want_grad=reduces and any(ctx.needs_input_grad),
        )
        assert out.rows is not None
        if out.dhidden is None:
            ctx.save_for_backward(*tensors)
        else:
            ctx.save_for_backward(out.dhidden, out.dweight, out.dbias, out.factor)
        ctx.options, ctx.reduces = options, out.dhidden is not None
        ctx.dtypes = hidden.dtype, linear_weight.dtype, None if linear_bias is None else linear_bias.dtype
        ctx.mark_non_differentiable(out.rows)
        ctx.set_materialize_grads(False)  # a zero gradient of what has none would be a launch
        return (out.rows[kernels.LOSS].clone() if out.loss is None else out.loss), out.rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.reduces:
            dhidden, dweight, dbias, factor = ctx.saved_tensors
            factor = factor * grad_loss
            grads = [dhidden * factor, *torch._foreach_mul([dweight, dbias], factor)]
        else:
            out = kernels.launch_linear_head(
                *ctx.saved_tensors,
                **ctx.options,
                divisor=None,
                upstream=grad_loss,
                want_rows=False,
                want_grad=True,
            )
            grads = [out.dhidden, out.dweight, out.dbias]
        needed = zip(ctx.needs_input_grad, grads, ctx.dtypes, strict=False)
        return (*[grad.to(dtype) if need else None for need, grad, dtype in needed], *[None] * 10)


def _stats(rows: Tensor, lam: Tensor) -> MixStats:
    """The statistics in a kernel's buffer; the mask costs a launch, so it is made on request only."""
    return MixStats(lam, rows[kernels.LAM_ADV], rows[kernels.GRAD], rows[kernels.DELTA], rows[kernels.MASK] > 0)
