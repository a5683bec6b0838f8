"""AMP as functions of tensors: no state, no random numbers.

`amp_cross_entropy` and `linear_amp_cross_entropy` are whole steps; `mix`, `lambda_grad`, `remix` and `select_loss`
are the paper's operations one by one, for a step of your own at any layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastamp import closed_form
from fastamp.backend import uses_triton
from fastamp.checks import (
    check_class_vector,
    check_device,
    check_float_rows,
    check_logits,
    check_mix,
    check_partner,
    check_target,
    labels_all_kept,
)
from fastamp.mixing import MixStats
from fastamp.policy import Policy, check_choice, check_number, checked_policy

__all__ = ["amp_cross_entropy", "lambda_grad", "linear_amp_cross_entropy", "mix", "remix", "select_loss"]


def mix(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """Mix every row with its partner: m_r = λ_r h_r + (1-λ_r) h_π(r) (RandOp, Eq. 10).

    Args:
        hidden: (B, ...) float16/bfloat16/float32/float64.
        lam: (B,) floating point in [0, 1], or outside it for a λ' that left the interval.
        partner: (B,) int64, a permutation of 0..B-1.

    Returns:
        (B, ...) of hidden's dtype; float16 and bfloat16 are mixed in float32 and rounded once.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; integer `hidden` among them.
    """
    check_float_rows("hidden", hidden)
    _check_rows("lam", lam, hidden)
    check_partner(partner, len(hidden), hidden.device)
    other, coefficient = _rows_for(hidden, partner, lam)
    return (other + coefficient * (hidden.to(other.dtype) - other)).to(hidden.dtype)


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
    check_float_rows("hidden", hidden)
    check_float_rows("grad_mixed", grad_mixed)
    if grad_mixed.shape != hidden.shape:
        raise ValueError(f"grad_mixed must have hidden's shape {tuple(hidden.shape)}, got {tuple(grad_mixed.shape)}")
    check_device("grad_mixed", grad_mixed, hidden.device)
    check_partner(partner, len(hidden), hidden.device)
    with torch.no_grad():
        dtype = closed_form.compute_dtype(hidden.dtype)
        wide = hidden.to(dtype)
        return (grad_mixed.to(dtype) * (wide - wide[partner])).flatten(1).sum(1)


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
    policy = checked_policy(step_size=step_size, grad_clip=grad_clip, clamp=clamp)
    _check_rows("lam", lam, hidden)
    grad = lambda_grad(grad_mixed, hidden, partner)
    lam_adv = closed_form.step_lam(lam.detach().to(grad.dtype), grad, policy)
    return lam_adv, mix(hidden, lam_adv, partner)


def select_loss(loss: Tensor, loss_adv: Tensor, *, tie_tol: float | str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Keep ℓ' where ℓ' - ℓ > 0, else ℓ (MinOp, Eq. 18-21); a difference below the tie tolerance takes ℓ'.

    Args:
        loss: (B,) ℓ, the losses at λ.
        loss_adv: (B,) ℓ', the losses at λ'.
        tie_tol: "auto" (4 ulp of the loss in its dtype), or an absolute tolerance; 0.0 is Eq. 21 to the letter.

    Returns:
        The selected losses (B,), differentiable; δ = ℓ' - ℓ (B,) and the mask (B,) of rows that took ℓ', detached.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices.
    """
    policy = checked_policy(tie_tol=tie_tol)
    check_float_rows("loss", loss, dims=1)
    check_float_rows("loss_adv", loss_adv, dims=1)
    if loss_adv.shape != loss.shape:
        raise ValueError(f"loss_adv must have loss's shape {tuple(loss.shape)}, got {tuple(loss_adv.shape)}")
    check_device("loss_adv", loss_adv, loss.device)
    delta = (loss_adv - loss).detach()
    mask = closed_form.select(loss.detach(), delta, policy)
    return torch.where(mask, loss_adv, loss), delta, mask


def amp_cross_entropy(
    logits: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    return_stats: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, MixStats]:
    """AMP on the logits of unmixed rows (SentAMP): mixing commutes with the affine layer that made them.

    With z(λ) = λ z_r + (1-λ) z_π(r) and t_r = λ_r y_r + (1-λ_r) y_π(r):
    ℓ_r = CE(z_r(λ*_r), t_r), λ*_r = λ_r or λ'_r = λ_r + ε·clip(∂ℓ_r/∂λ) by the paper's Eq. 10-21.
    One pass, closed forms, the complete gradient to the unmixed logits; a class that is -inf in either row of a
    pair is excluded from it.

    Args:
        logits: (B, C) float16/bfloat16/float32/float64, any strides.
        target: (B,) int64 class indices, or (B, C) floating-point probabilities.
        lam: (B,) floating point in [0, 1].
        partner: (B,) int64, a permutation of 0..B-1.
        weight: (C,) class weights, as nn.CrossEntropyLoss has them.
        reduction: "mean" (divides by Σ_r λ_r w(y_r) + (1-λ_r) w(y_π(r)) over kept sides; by B for probabilities),
            "sum" or "none".
        num_items: replaces the divisor of the mean; a number or a 0-d tensor.
        return_stats: also return a `MixStats`.
        **options: mode, loss, step_size, grad_clip, grad_scale, clamp, tie_tol, ignore_index, label_smoothing,
            as `fastamp.AMPLoss` documents them.

    Returns:
        The loss, () or (B,), float32 (float64 for float64 logits); with return_stats a tuple (loss, MixStats).
        Differentiable once, to the logits.

    Raises:
        TypeError, ValueError: wrong options, dtypes, shapes or devices; on the CPU also labels out of range, λ
            outside [0, 1] and a partner that is no permutation. On a GPU a label out of range stops the kernel
            by a device-side assertion; λ and partner are taken as they are.
    """
    policy = checked_policy(**options)
    check_choice("reduction", reduction)
    check_logits("logits", logits)
    check_target(target, *logits.shape, logits.device)
    check_mix(lam, partner, len(logits), logits.device)
    check_class_vector("weight", weight, logits.shape[1], logits.device)
    check_num_items(num_items)
    facts = host_facts(logits, target, policy)
    loss, stats = amp_cross_entropy_step(
        logits, target, lam, partner, weight, policy, reduction, num_items, facts, return_stats=return_stats
    )
    return (loss, stats) if return_stats else loss


def amp_cross_entropy_step(
    logits: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    policy: Policy,
    reduction: str,
    num_items: float | Tensor | None,
    facts: HostFacts,
    *,
    return_stats: bool,
) -> tuple[Tensor, MixStats | None]:
    """`amp_cross_entropy` for arguments that have been checked; the statistics where they are asked for, or free."""
    lam = lam.detach().to(closed_form.compute_dtype(logits.dtype))
    if uses_triton(logits) and len(logits):
        from fastamp import ops

        _, grad_divisor = divisors(target, lam, partner, weight, policy, "none", num_items, facts.all_kept)
        return ops.amp_cross_entropy(
            logits,
            target,
            lam,
            partner,
            weight,
            policy,
            reduction,
            num_items,
            None if policy.grad_scale == "row" else torch.as_tensor(grad_divisor).to(lam),
            return_stats=return_stats,
        )
    divisor, grad_divisor = divisors(target, lam, partner, weight, policy, reduction, num_items, facts.all_kept)
    loss, lam_adv, grad, delta, mask = _AmpCrossEntropy.apply(
        logits, target, lam, partner, weight, divisor, grad_divisor, policy, reduction, *facts
    )
    return loss, MixStats(lam, lam_adv, grad, delta, mask)


class _AmpCrossEntropy(torch.autograd.Function):
    """The closed forms, with g kept for backward; nothing saved is ever written to."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        lam: Tensor,
        partner: Tensor,
        weight: Tensor | None,
        divisor: Tensor | float,
        grad_divisor: Tensor | float,
        policy: Policy,
        reduction: str,
        all_kept: bool,
        spread: float | None,
    ) -> tuple[Tensor, ...]:
        rows = closed_form.amp_rows(
            logits,
            target,
            lam,
            partner,
            weight,
            policy,
            grad_divisor,
            need_grad=ctx.needs_input_grad[0],
            all_kept=all_kept,
            spread=spread,
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(rows.grad_mixed, rows.lam, partner, *_if_tensor(divisor))
            ctx.divisor, ctx.dtype = divisor if isinstance(divisor, float) else None, logits.dtype
        ctx.mark_non_differentiable(rows.lam_adv, rows.grad, rows.delta, rows.mask)
        return _reduced(rows.loss, reduction, divisor), rows.lam_adv, rows.grad, rows.delta, rows.mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_mixed, lam, partner, *divisor = ctx.saved_tensors
        upstream = _upstream(grad_loss, *divisor or (ctx.divisor,))
        grad = closed_form.scatter_roles(grad_mixed, lam, partner, upstream)
        return (grad.to(ctx.dtype), *[None] * 10)


def linear_amp_cross_entropy(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    *,
    activation: str | None = None,
    dropout_mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    return_stats: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, MixStats]:
    """AMP on the hidden rows before a linear classifier, mixed before its activation and dropout.

    logits_r(λ) = W (k_r ∘ act(λ h_r + (1-λ) h_π(r))) + b, and from there as `amp_cross_entropy`;
    ∇λ_r = ⟨∂ℓ_r/∂m_r, h_r - h_π(r)⟩. Both passes of a row share its dropout mask k_r.

    Args:
        hidden: (B, D) float16/bfloat16/float32/float64.
        linear_weight: (C, D) W.
        linear_bias: (C,) b, or None.
        target: (B,) int64 class indices, or (B, C) floating-point probabilities.
        lam: (B,) floating point in [0, 1].
        partner: (B,) int64, a permutation of 0..B-1.
        activation: None or "relu".
        dropout_mask: (B, D) k: 0 where dropped, 1/(1-p) where kept, as F.dropout(torch.ones(B, D), p) makes it.
        weight: (C,) class weights.
        reduction: as in `amp_cross_entropy`; num_items, return_stats and the options too.
        num_items: replaces the divisor of the mean.
        return_stats: also return a `MixStats`.
        **options: as in `amp_cross_entropy`.

    Returns:
        The loss, () or (B,), float32 (float64 for float64 hidden); with return_stats a tuple (loss, MixStats).
        Differentiable once, to hidden, linear_weight and linear_bias.

    Raises:
        TypeError, ValueError: as in `amp_cross_entropy`.
    """
    policy = checked_policy(**options)
    check_choice("reduction", reduction)
    check_float_rows("hidden", hidden, dims=2)
    check_logits("linear_weight", linear_weight.mT if isinstance(linear_weight, Tensor) else linear_weight)
    if linear_weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"linear_weight must be (C, {hidden.shape[1]}) for hidden {tuple(hidden.shape)}, "
            f"got {tuple(linear_weight.shape)}"
        )
    classes = linear_weight.shape[0]
    check_device("linear_weight", linear_weight, hidden.device)
    check_class_vector("linear_bias", linear_bias, classes, hidden.device)
    check_target(target, len(hidden), classes, hidden.device)
    check_mix(lam, partner, len(hidden), hidden.device)
    check_class_vector("weight", weight, classes, hidden.device)
    check_num_items(num_items)
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu'; got {activation!r}")
    if dropout_mask is not None:
        check_float_rows("dropout_mask", dropout_mask)
        if dropout_mask.shape != hidden.shape:
            raise ValueError(
                f"dropout_mask must have hidden's shape {tuple(hidden.shape)}, got {tuple(dropout_mask.shape)}"
            )
        check_device("dropout_mask", dropout_mask, hidden.device)

    loss, stats = _linear_step(
        hidden,
        linear_weight,
        linear_bias,
        target,
        lam,
        partner,
        activation == "relu",
        dropout_mask,
        weight,
        policy,
        reduction,
        num_items,
    )
    return (loss, stats) if return_stats else loss


def _linear_step(
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
) -> tuple[Tensor, MixStats]:
    if uses_triton(hidden):
        from fastamp import ops

        if ops.linear_head_fits(hidden, linear_weight):
            lam = lam.detach().to(closed_form.compute_dtype(hidden.dtype))
            return ops.linear_amp_cross_entropy(
                hidden,
                linear_weight,
                linear_bias,
                target,
                lam,
                partner,
                relu,
                keep,
                weight,
                policy,
                reduction,
                num_items,
            )
    if not relu and keep is None:
        # Affine: mix the logits instead of the hidden rows.
        logits = F.linear(hidden, linear_weight, linear_bias)
        facts = host_facts(logits, target, policy)
        return amp_cross_entropy_step(logits, target, lam, partner, weight, policy, reduction, num_items, facts, return_stats=return_stats)
    lam = lam.detach().to(closed_form.compute_dtype(hidden.dtype))
    on_host = target.device.type == "cpu" and not torch.compiler.is_compiling()
    all_kept = target.is_floating_point() or (
        on_host and labels_all_kept(target, len(linear_weight), policy.ignore_index)
    )
    divisor, grad_divisor = divisors(target, lam, partner, weight, policy, reduction, num_items, all_kept)
    loss, lam_adv, grad, delta, mask = _LinearAmpCrossEntropy.apply(
        hidden,
        linear_weight,
        linear_bias,
        target,
        lam,
        partner,
        relu,
        keep,
        weight,
        divisor,
        grad_divisor,
        policy,
        reduction,
        all_kept,
    )
    return loss, MixStats(lam, lam_adv, grad, delta, mask)


class _LinearAmpCrossEntropy(torch.autograd.Function):
    """`closed_form.linear_amp_rows`, with the selected pass kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        lam: Tensor,
        partner: Tensor,
        relu: bool,
        keep: Tensor | None,
        weight: Tensor | None,
        divisor: Tensor | float,
        grad_divisor: Tensor | float,
        policy: Policy,
        reduction: str,
        all_kept: bool,
    ) -> tuple[Tensor, ...]:
        dtype = lam.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            rows, head_input, grad_m = closed_form.linear_amp_rows(
                hidden.to(dtype),
                linear_weight.to(dtype),
                None if linear_bias is None else linear_bias.to(dtype),
                target,
                lam,
                partner,
                weight,
                policy,
                grad_divisor,
                relu=relu,
                keep=None if keep is None else keep.to(dtype),
                all_kept=all_kept,
            )
        ctx.save_for_backward(rows.grad_mixed, grad_m, head_input, rows.lam, partner, *_if_tensor(divisor))
        ctx.divisor = divisor if isinstance(divisor, float) else None
        ctx.dtypes = hidden.dtype, linear_weight.dtype, None if linear_bias is None else linear_bias.dtype
        ctx.mark_non_differentiable(rows.lam_adv, rows.grad, rows.delta, rows.mask)
        return _reduced(rows.loss, reduction, divisor), rows.lam_adv, rows.grad, rows.delta, rows.mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        g, grad_m, head_input, lam, partner, *divisor = ctx.saved_tensors
        upstream = _upstream(grad_loss, *divisor or (ctx.divisor,))
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_hidden = grad_weight = grad_bias = None
        with torch.autocast(g.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_hidden = closed_form.scatter_roles(grad_m, lam, partner, upstream).to(hidden_dtype)
            weighted = g * (upstream[:, None] if upstream.dim() else upstream)
            if ctx.needs_input_grad[1]:
                grad_weight = (weighted.mT @ head_input).to(weight_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = weighted.sum(0).to(bias_dtype)
        return (grad_hidden, grad_weight, grad_bias, *[None] * 11)


def check_num_items(num_items: object) -> None:
    """`num_items` is None, a positive number or a 0-d tensor."""
    if isinstance(num_items, Tensor):
        if num_items.dim():
            raise ValueError(f"num_items must be a number or a 0-d tensor, got shape {tuple(num_items.shape)}")
    elif num_items is not None:
        check_number("num_items", num_items, low=0.0, open_low=True, also="None")


class HostFacts(NamedTuple):
    """What the host knows of the values in CPU tensors, at no cost worth naming."""

    all_kept: bool  # no label equals ignore_index
    spread: float | None  # the largest max - min of a row of logits


def host_facts(logits: Tensor, target: Tensor, policy: Policy) -> HostFacts:
    """Look at CPU tensors (elsewhere that would synchronise); ValueError for a label out of range."""
    all_kept = target.is_floating_point()
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return HostFacts(all_kept, None)
    all_kept = all_kept or labels_all_kept(target, logits.shape[1], policy.ignore_index)
    if not len(logits):
        return HostFacts(all_kept, None)
    low, high = torch.aminmax(logits.detach(), dim=1)
    return HostFacts(all_kept, float((high - low).amax()))


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
        mean = num_items if isinstance(num_items, Tensor) else float(num_items)
    elif all_kept and (weight is None or target.is_floating_point()):
        mean = float(len(lam))
    else:
        mean = closed_form.row_mass(target, lam, partner, weight, policy.ignore_index).sum()
    return (mean if reduction == "mean" else 1.0), (mean if policy.grad_scale == "mean" else 1.0)


def _reduced(loss: Tensor, reduction: str, divisor: Tensor | float) -> Tensor:
    return loss if reduction == "none" else loss.sum() / divisor


def _upstream(grad_loss: Tensor, divisor: Tensor | float) -> Tensor:
    if isinstance(divisor, float):
        return grad_loss / divisor
    # Nothing kept: the mean is 0/0, and its gradient 0, as nn.CrossEntropyLoss has it.
    return torch.where(divisor == 0, torch.zeros_like(grad_loss), grad_loss / divisor)


def _if_tensor(value: Tensor | float) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else ()


def _rows_for(hidden: Tensor, partner: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    dtype = closed_form.compute_dtype(hidden.dtype)
    return hidden[partner].to(dtype), lam.to(dtype).view(-1, *[1] * (hidden.dim() - 1))


def _check_rows(name: str, value: object, hidden: Tensor) -> None:
    check_float_rows(name, value, dims=1)
    assert isinstance(value, Tensor)
    if len(value) != len(hidden):
        raise ValueError(f"{name} must have shape ({len(hidden)},), one a row, got {tuple(value.shape)}")
    check_device(name, value, hidden.device)

