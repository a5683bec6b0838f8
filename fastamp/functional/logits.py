"""Whole steps on logits, and on the hidden rows before a linear head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastamp.autograd import refuse_torch_func
from fastamp.checks import (
    check_class_vector,
    check_class_weight,
    check_device,
    check_float_rows,
    check_head_dtypes,
    check_logits,
    checked_mix,
    checked_num_items,
    checked_target,
)
from fastamp.mixing import MixStats
from fastamp.policy import check_choice, checked_policy
from fastamp.steps import amp_cross_entropy_step, host_facts, linear_step


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
        target: (B,) int64 or uint8 class indices, or (B, C) floating-point probabilities.
        lam: (B,) floating point in [0, 1], or () for all rows alike.
        partner: (B,) int64, a permutation of 0..B-1.
        weight: (C,) class weights, as nn.CrossEntropyLoss has them.
        reduction: "mean" (divides by Σ_r λ_r w(y_r) + (1-λ_r) w(y_π(r)) over kept sides; by B for probabilities),
            "sum" or "none".
        num_items: replaces the divisor of the mean; a number or a 0-d tensor.
        return_stats: also return a `MixStats`.
        **options: mode, loss, step_size, grad_clip, grad_scale, clamp, tie_tol, ignore_index, label_smoothing,
            as `fastamp.AMPLoss` documents them; pairing="matching" promises that partner is its own inverse.

    Returns:
        The loss, () or (B,), float32 (float64 for float64 logits); with return_stats a tuple (loss, MixStats).
        Differentiable once, to the logits.

    Raises:
        TypeError, ValueError: wrong options, dtypes, shapes or devices; on the CPU also labels out of range, λ
            outside [0, 1] and a partner that is no permutation. On a GPU a label out of range stops the kernel
            by a device-side assertion; λ and partner are taken as they are.
        NotImplementedError: inside a transform of torch.func.
    """
    refuse_torch_func("amp_cross_entropy")
    policy = checked_policy(**options)
    check_choice("reduction", reduction)
    check_logits("logits", logits)
    target = checked_target(target, logits)
    lam = checked_mix(lam, partner, len(logits), logits.device, pairing=policy.pairing)
    check_class_weight(weight, logits.shape[1], logits.device)
    num_items = checked_num_items(num_items, logits.device)
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
    chunk_rows: int | None = None,
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
        target: (B,) int64 or uint8 class indices, or (B, C) floating-point probabilities.
        lam: (B,) floating point in [0, 1], or () for all rows alike.
        partner: (B,) int64, a permutation of 0..B-1.
        activation: None or "relu".
        dropout_mask: (B, D) k: 0 where dropped, 1/(1-p) where kept, as F.dropout(torch.ones(B, D), p) makes it.
        weight: (C,) class weights.
        reduction: as in `amp_cross_entropy`; num_items, return_stats and the options too.
        num_items: replaces the divisor of the mean.
        chunk_rows: how many rows' logits are computed at a time, so that neither (B, C) logits nor their gradient are
            ever held; at least 1, and 2 more where partners lie outside. None computes all at once, unless chunks,
            which have to sum the wanted gradients in float32, save 256 MiB at the peak: then at most a quarter of the
            rows, fewer where that suits the memory (outside torch.compile only: a number breaks the graph). Not with
            an activation or a dropout mask, after which logits cannot be mixed; these hold (B, C) whatever C is.
        return_stats: also return a `MixStats`.
        **options: as in `amp_cross_entropy`.

    Returns:
        The loss, () or (B,), float32 (float64 for float64 hidden); with return_stats a tuple (loss, MixStats).
        Differentiable once, to hidden, linear_weight and linear_bias. Small heads, and any with an activation or a
        dropout mask, are computed in float32 throughout; a large affine head is one matrix product in hidden's dtype.
        In chunks all products are in hidden's dtype (or autocast's), and gradients are summed over chunks in float32
        (float64 for float64). Those of a mean or sum are made in the forward pass, and kept in that dtype until
        backward; for "none", and for products in float16, whose gradients have to see the loss scale before they are
        rounded, backward computes the logits again.

    Raises:
        TypeError, ValueError: as in `amp_cross_entropy`; chunk_rows that is no int, or less than 1.
        NotImplementedError: chunk_rows together with an activation or a dropout mask; a transform of torch.func.
    """
    refuse_torch_func("linear_amp_cross_entropy")
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
    classes = linear_weight.shape[0]
    check_device("linear_weight", linear_weight, hidden.device)
    check_class_vector("linear_bias", linear_bias, classes, hidden.device)
    check_head_dtypes(hidden, linear_weight, linear_bias)
    target = checked_target(target, hidden.new_empty(()).expand(len(hidden), classes))
    lam = checked_mix(lam, partner, len(hidden), hidden.device, pairing=policy.pairing)
    check_class_weight(weight, classes, hidden.device)
    num_items = checked_num_items(num_items, hidden.device)
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu'; got {activation!r}")
    if dropout_mask is not None:
        check_float_rows("dropout_mask", dropout_mask)
        if dropout_mask.shape != hidden.shape:
            raise ValueError(
                f"dropout_mask must have hidden's shape {tuple(hidden.shape)}, got {tuple(dropout_mask.shape)}"
            )
        check_device("dropout_mask", dropout_mask, hidden.device)
    if chunk_rows is not None:
        _check_chunk_rows(chunk_rows, mixes_logits=activation is None and dropout_mask is None)

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
        chunk_rows=chunk_rows,
        return_stats=return_stats,
    )
    return (loss, stats) if return_stats and stats is not None else loss


def _check_chunk_rows(chunk_rows: object, *, mixes_logits: bool) -> None:
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
        raise TypeError(f"chunk_rows must be an int >= 1 or None, got {chunk_rows!r}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be an int >= 1 or None, got {chunk_rows}")
    if not mixes_logits:
        raise NotImplementedError(
            "chunk_rows takes neither an activation nor a dropout_mask: mixing does not commute with them; "
            "leave chunk_rows out, or mix behind them"
        )
