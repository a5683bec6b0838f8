"""AMP as functions of tensors: no state, no random numbers.

`amp_cross_entropy` and `linear_amp_cross_entropy` are whole steps; `mix`, `lambda_grad`, `remix` and `select_loss`
are the paper's operations one by one, for a step of your own at any layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastamp import closed_form
from fastamp import hidden as hidden_ops
from fastamp.checks import (
    check_class_vector,
    check_device,
    check_float_rows,
    check_logits,
    check_mix,
    check_num_items,
    check_partner,
    check_target,
)
from fastamp.mixing import MixStats
from fastamp.policy import check_choice, checked_policy
from fastamp.steps import amp_cross_entropy_step, host_facts, linear_step

__all__ = ["amp_cross_entropy", "lambda_grad", "linear_amp_cross_entropy", "mix", "remix", "select_loss"]


def mix(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """Mix every row with its partner: m_r = λ_r h_r + (1-λ_r) h_π(r) (RandOp, Eq. 10).

    Args:
        hidden: (B, ...) float16/bfloat16/float32/float64.
        lam: (B,) floating point in [0, 1], or outside it for a λ' that left the interval.
        partner: (B,) int64, a permutation of 0..B-1.

    Returns:
        (B, ...) of hidden's dtype, differentiable to hidden, with λ a constant; float16 and bfloat16 are mixed in
        float32 and rounded once. An infinity in either row gives what arithmetic gives, mostly NaN.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; integer `hidden` among them.
    """
    check_float_rows("hidden", hidden)
    _check_rows("lam", lam, hidden)
    check_partner(partner, len(hidden), hidden.device)
    return hidden_ops.mixed(hidden, lam, partner)


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
    _check_like_hidden(grad_mixed, hidden)
    check_partner(partner, len(hidden), hidden.device)
    return hidden_ops.lambda_grad(grad_mixed, hidden, partner)


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
    check_float_rows("hidden", hidden)
    _check_rows("lam", lam, hidden)
    _check_like_hidden(grad_mixed, hidden)
    check_partner(partner, len(hidden), hidden.device)
    lam = lam.detach().to(closed_form.compute_dtype(hidden.dtype))
    _, lam_adv, mixed = hidden_ops.remixed(hidden, grad_mixed, lam, partner, policy, 1.0)
    return lam_adv, mixed


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
    check_target(target, logits)
    check_mix(lam, partner, len(logits), logits.device)
    check_class_vector("weight", weight, logits.shape[1], logits.device)
    check_num_items(num_items)
    facts = host_facts(logits, target, policy)
    loss, stats = amp_cross_entropy_step(
        logits, target, lam, partner, weight, policy, reduction, num_items, facts, return_stats=return_stats
    )
    return (loss, stats) if return_stats and stats is not None else loss


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
        Differentiable once, to hidden, linear_weight and linear_bias. Small heads, and any with an activation or a
        dropout mask, are computed in float32 throughout; a large affine head is one matrix product in hidden's dtype.

    Raises:
        TypeError, ValueError: as in `amp_cross_entropy`.
    """
    policy = checked_policy(**options)
    check_choice("reduction", reduction)
    check_float_rows("hidden", hidden, dims=2)
    check_float_rows("linear_weight", linear_weight, dims=2)
    if not len(linear_weight):
        raise ValueError(f"linear_weight must have at least one class, got shape {tuple(linear_weight.shape)}")
    if linear_weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"linear_weight must be (C, {hidden.shape[1]}) for hidden {tuple(hidden.shape)}, "
            f"got {tuple(linear_weight.shape)}"
        )
    if linear_weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"linear_weight must have hidden's dtype {hidden.dtype} outside torch.autocast, got {linear_weight.dtype}"
        )
    classes = linear_weight.shape[0]
    check_device("linear_weight", linear_weight, hidden.device)
    check_class_vector("linear_bias", linear_bias, classes, hidden.device)
    check_target(target, hidden.new_empty(()).expand(len(hidden), classes))
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

    loss, stats = linear_step(
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
        return_stats=return_stats,
    )
    return (loss, stats) if return_stats and stats is not None else loss


def _check_rows(name: str, value: object, hidden: Tensor) -> None:
    check_float_rows(name, value, dims=1)
    assert isinstance(value, Tensor)
    if len(value) != len(hidden):
        raise ValueError(f"{name} must have shape ({len(hidden)},), one a row, got {tuple(value.shape)}")
    check_device(name, value, hidden.device)


def _check_like_hidden(grad_mixed: object, hidden: Tensor) -> None:
    check_float_rows("grad_mixed", grad_mixed)
    assert isinstance(grad_mixed, Tensor)
    if grad_mixed.shape != hidden.shape:
        raise ValueError(f"grad_mixed must have hidden's shape {tuple(hidden.shape)}, got {tuple(grad_mixed.shape)}")
    check_device("grad_mixed", grad_mixed, hidden.device)
