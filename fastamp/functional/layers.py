"""The paper's operations one by one, for a step at any layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastamp import closed_form
from fastamp import hidden as hidden_ops
from fastamp.checks import (
    check_class_weight,
    check_device,
    check_float_rows,
    check_logits,
    check_mix,
    check_partner,
    check_target,
)
from fastamp.policy import checked_policy
from fastamp.steps import labels_facts


def mix(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """Mix every row with its partner: m_r = λ_r h_r + (1-λ_r) h_π(r) (RandOp, Eq. 10).

    Args:
        hidden: (B, ...) float16/bfloat16/float32/float64.
        lam: (B,) floating point in [0, 1], or outside it for a λ' that left the interval.
        partner: (B,) int64, a permutation of 0..B-1.

    Returns:
        (B, ...) of hidden's dtype and memory format (channels_last stays what it is), differentiable to hidden, with λ
        a constant; float16 and bfloat16 are mixed in float32 and rounded once. An infinity in either row gives what
        arithmetic gives, mostly NaN.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; integer `hidden` among them.
    """
    check_float_rows("hidden", hidden)
    _check_rows("lam", lam, hidden)
    check_partner(partner, len(hidden), hidden.device)
    return hidden_ops.mixed(hidden, lam, partner)


def embedding_mix(
    ids: Tensor, table: Tensor, lam: Tensor, partner: Tensor, *, padding_idx: int | None = None
) -> Tensor:
    """Mix the word embeddings of every row with its partner's (WordAMP, Eq. 10), without either being written down.

    m_rt = λ_r E[ids_rt] + (1-λ_r) E[ids_π(r)t], as `mix(F.embedding(ids, table, padding_idx), lam, partner)`.

    Args:
        ids: (B, T) int64 in 0..V-1.
        table: (V, D) float16/bfloat16/float32/float64, the weight of an nn.Embedding.
        lam: (B,) floating point in [0, 1], or outside it for a λ' that left the interval.
        partner: (B,) int64, a permutation of 0..B-1.
        padding_idx: as in nn.Embedding: the gradient of this row of the table is zero. A negative one counts from
            the end.

    Returns:
        (B, T, D) of the table's dtype, differentiable to the table, with λ a constant. The table's gradient is dense,
        and summed in float32 (float64 for float64) in a fixed order.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; on the CPU also ids out of range. On a GPU an id out
            of range stops the kernel by a device-side assertion.
    """
    check_float_rows("table", table, dims=2)
    size = len(table)
    _check_ids(ids, size, table.device)
    _check_rows("lam", lam, ids)
    check_partner(partner, len(ids), table.device)
    if padding_idx is not None:
        if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
            raise TypeError(f"padding_idx must be an int or None, got {padding_idx!r}")
        if not -size <= padding_idx < size:
            raise ValueError(f"padding_idx must lie in {-size}..{size - 1} for a table of {size}, got {padding_idx}")
        padding_idx %= size
    return hidden_ops.embedding_mixed(ids, table, lam, partner, padding_idx)


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


def select_cross_entropy(
    logits: Tensor,
    logits_adv: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    *,
    weight: Tensor | None = None,
    loss: str = "cross_entropy",
    tie_tol: float | str = "auto",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mode: str = "amp",
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of the rows mixed at λ and at λ', and the larger of the two (Eq. 13, 18-21), in one pass.

    ℓ_r = λ_r CE(logits_r, y_r) + (1-λ_r) CE(logits_r, y_π(r)), and ℓ'_r with the same λ_r of logits_adv;
    δ_r = ℓ'_r - ℓ_r, ℓ'_r kept where δ_r > 0 or a tie. Where no logit moved by more than 1, δ is computed from the
    change of the logits, without the cancellation that a difference of losses has.

    Args:
        logits: (B, C) float16/bfloat16/float32/float64, any strides, of the rows mixed at λ.
        logits_adv: (B, C) of the rows mixed at λ', of the same dtype.
        target: (B,) int64 class indices or (B, C) floating-point probabilities, of the unmixed rows.
        lam: (B,) λ, floating point in [0, 1].
        partner: (B,) int64, a permutation of 0..B-1.
        weight: (C,) class weights, as nn.CrossEntropyLoss has them.
        loss: "cross_entropy" or "softmax_bce".
        tie_tol: "auto" (4 ulp of the loss in the logits' dtype), or an absolute tolerance; 0.0 is Eq. 21 to the
            letter.
        ignore_index: a class index whose side of the mixture contributes nothing.
        label_smoothing: in [0, 1].
        mode: "amp"; "maxop" always keeps ℓ', "mixup" always ℓ.

    Returns:
        The selected losses (B,), float32 (float64 for float64 logits), differentiable once, to whichever logits each
        row's loss was taken from; δ (B,) and the mask (B,) of rows that took ℓ', detached.

    Raises:
        TypeError, ValueError: wrong options, dtypes, shapes or devices; on the CPU also labels out of range and λ
            outside [0, 1]. On a GPU a label out of range stops the kernel by a device-side assertion.
    """
    policy = checked_policy(
        mode=mode, loss=loss, tie_tol=tie_tol, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    check_logits("logits", logits)
    check_float_rows("logits_adv", logits_adv, dims=2)
    if logits_adv.shape != logits.shape or logits_adv.dtype != logits.dtype:
        raise ValueError(
            f"logits_adv must have logits' shape {tuple(logits.shape)} and dtype {logits.dtype}, "
            f"got {tuple(logits_adv.shape)} of {logits_adv.dtype}"
        )
    check_device("logits_adv", logits_adv, logits.device)
    check_target(target, logits)
    check_mix(lam, partner, len(logits), logits.device)
    check_class_weight(weight, logits.shape[1], logits.device)
    return hidden_ops.selected_loss(
        logits,
        logits_adv,
        target,
        lam.detach().to(closed_form.compute_dtype(logits.dtype)),
        partner,
        weight,
        policy,
        policy.tie_bounds(logits.dtype),
        all_kept=labels_facts(target, logits.shape[1], policy),
    )


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


def _check_ids(ids: object, size: int, device: torch.device) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"ids must be (B, T), got shape {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"ids is on {ids.device}, the table is on {device}; they must be together")
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= size:
        raise ValueError(f"ids must lie in 0..{size - 1}, the rows of table, got values from {int(low)} to {int(high)}")
