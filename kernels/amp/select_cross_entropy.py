"""Losses of the rows mixed at λ and at λ' from two sets of logits, the choice between them, and both gradients.

What stands between the mixture and the logits may be any network, so the loss is no function of λ that a kernel could
know: the change of the loss is taken from the change of the logits (25-27).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Config, cdiv, select_config
from .launch import on_device_of
from .rows import (
    ASSERTING,
    expm1_unit,
    gains,
    load_logits,
    log1p_any,
    row_sum,
    target_tile,
    tile_index,
    tile_mask,
)
from .rows_registers import cross_entropy_at, loss_change
from .tuning import batch_class, tuned


@triton.jit
def _logit_change(x, x_adv):
    """The change u = x' - x, and the same within [-1, 1]; 0 where a class is -inf in both (25)."""
    u = tl.where((x == float("-inf")) & (x_adv == float("-inf")), 0.0, x_adv - x)
    return u, tl.where(u > 1.0, 1.0, tl.where(u < -1.0, -1.0, u))  # comparisons keep NaN


@triton.jit
def _chosen(loss, loss_adv, delta, tie_abs, tie_rel, policy: tl.constexpr):
    """The selected loss of each row, and which rows take ℓ(λ') (9)."""
    if policy.mode == "mixup":
        takes = tl.full(delta.shape, False, tl.int1)
    elif policy.mode == "maxop":
        takes = tl.full(delta.shape, True, tl.int1)
    else:
        takes = gains(loss, delta, tie_abs, tie_rel)
    return tl.where(takes, loss_adv, loss), takes


@triton.jit
def _select_kernel(
    logits_ptr,  # (B, C) at λ, any strides
    logits_adv_ptr,  # (B, C) at λ', any strides, or None
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype: the labels' coefficients
    partner_ptr,  # (B,) int64
    weight_ptr,  # (C,) class weights or None
    loss_ptr,  # (B,) out, compute dtype
    delta_ptr,  # (B,) out, compute dtype
    mask_ptr,  # (B,) out, int8
    grad_ptr,  # (B, C) out, contiguous, compute dtype
    grad_adv_ptr,  # (B, C) out, contiguous, compute dtype; None with logits_adv_ptr
    B,
    C,
    stride_zm: tl.int64,
    stride_zn,  # without a type, as stride_an: 1 is then compiled in
    stride_am: tl.int64,
    stride_an,
    tie_abs: tl.float64,
    tie_rel: tl.float64,
    policy: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All of BLOCK_B rows, with their whole width in registers (2, 3, 25-27)."""
    row, cols, ok = tile_index(tl.program_id(0), 0, B, BLOCK_B, BLOCK_C)
    mask = tile_mask(ok, cols, C, BLOCK_B)
    lam = tl.load(lam_ptr + row)
    on, _ = target_tile(target_ptr, weight_ptr, lam, row, tl.load(partner_ptr + row), cols, C, policy)
    x = load_logits(logits_ptr, row, cols, C, stride_zm, stride_zn, lam.dtype)
    total = row_sum(on)
    loss, p = cross_entropy_at(x, on)
    g = total * p - on
    tl.store(grad_ptr + row * C + cols, g, mask=mask)
    delta = tl.full(lam.shape, 0.0, lam.dtype)
    takes = delta > 0
    if logits_adv_ptr is not None:
        x_adv = load_logits(logits_adv_ptr, row, cols, C, stride_am, stride_an, lam.dtype)
        loss_adv, p_adv = cross_entropy_at(x_adv, on)
        g = total * p_adv - on
        u, _ = _logit_change(x, x_adv)
        delta = loss_change(p, on, total, u, loss_adv - loss)
        tl.store(grad_adv_ptr + row * C + cols, g, mask=mask)
        loss, takes = _chosen(loss, loss_adv, delta, tie_abs, tie_rel, policy)
    tl.store(loss_ptr + row, loss, mask=ok)
    tl.store(delta_ptr + row, delta, mask=ok)
    tl.store(mask_ptr + row, takes.to(tl.int8), mask=ok)


@triton.jit
def _scan(sums, top, x):
    """One tile more in an online sum of exponentials: the sums, and the maximum that they are relative to."""
    new_top = tl.maximum(top, tl.max(x, 0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    return sums * tl.exp(top - base) + tl.exp(x - base), new_top


@triton.jit
def _cross_entropy_loop(
    logits_ptr,
    logits_adv_ptr,
    target_ptr,
    weight_ptr,
    grad_ptr,
    grad_adv_ptr,
    row,
    other,
    lam,
    C,
    stride_zm,
    stride_zn,
    stride_am,
    stride_an,
    policy: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ℓ(λ), ℓ(λ') and δ of one row; a pass for the sums of exponentials, one for the rest and the gradients."""
    zeros = tl.zeros((BLOCK_C,), lam.dtype)
    top = tl.full((), float("-inf"), lam.dtype)
    top_adv = top
    sums = zeros
    sums_adv = zeros
    on_sum = zeros
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        on, _ = target_tile(target_ptr, weight_ptr, lam, row, other, cols, C, policy)
        on_sum += on
        x = load_logits(logits_ptr, row, cols, C, stride_zm, stride_zn, lam.dtype)
        sums, top = _scan(sums, top, x)
        if logits_adv_ptr is not None:
            x_adv = load_logits(logits_adv_ptr, row, cols, C, stride_am, stride_an, lam.dtype)
            sums_adv, top_adv = _scan(sums_adv, top_adv, x_adv)
    total = tl.sum(on_sum, 0)
    log_sum = tl.log(tl.sum(sums, 0))
    log_sum_adv = tl.log(tl.sum(sums_adv, 0))
    losses = zeros
    losses_adv = zeros
    changes = zeros
    on_u = zeros
    u_max = zeros
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        on, _ = target_tile(target_ptr, weight_ptr, lam, row, other, cols, C, policy)
        x = load_logits(logits_ptr, row, cols, C, stride_zm, stride_zn, lam.dtype)
        # Relative to the maximum first: a large common offset costs no digits.
        logp = (x - top) - log_sum
        p = tl.exp(logp)
        losses -= tl.where(on != 0, on * logp, 0.0)
        tl.store(grad_ptr + row * C + cols, total * p - on, mask=cols < C)
        if logits_adv_ptr is not None:
            x_adv = load_logits(logits_adv_ptr, row, cols, C, stride_am, stride_an, lam.dtype)
            logp = (x_adv - top_adv) - log_sum_adv
            losses_adv -= tl.where(on != 0, on * logp, 0.0)
            tl.store(grad_adv_ptr + row * C + cols, total * tl.exp(logp) - on, mask=cols < C)
            u, u_near = _logit_change(x, x_adv)
            changes += p * expm1_unit(u_near)
            on_u += on * u
            u_max = tl.maximum(u_max, tl.abs(u))
    loss = tl.sum(losses, 0)
    loss_adv = tl.sum(losses_adv, 0)
    near = total * log1p_any(tl.sum(changes, 0)) - tl.sum(on_u, 0)
    delta = tl.where(tl.max(u_max, 0) <= 1.0, near, loss_adv - loss)
    return loss, loss_adv, delta


@triton.jit
def _select_rows_kernel(
    logits_ptr,  # (B, C) at λ, any strides
    logits_adv_ptr,  # (B, C) at λ', any strides, or None
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype: the labels' coefficients
    partner_ptr,  # (B,) int64
    weight_ptr,  # (C,) class weights or None
    loss_ptr,  # (B,) out, compute dtype
    delta_ptr,  # (B,) out, compute dtype
    mask_ptr,  # (B,) out, int8
    grad_ptr,  # (B, C) out, contiguous, compute dtype
    grad_adv_ptr,  # (B, C) out, contiguous, compute dtype; None with logits_adv_ptr
    C,
    stride_zm: tl.int64,
    stride_zn,  # without a type, as stride_an: 1 is then compiled in
    stride_am: tl.int64,
    stride_an,
    tie_abs: tl.float64,
    tie_rel: tl.float64,
    policy: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The same for one row of any width, by loops over tiles."""
    row = tl.program_id(0).to(tl.int64)
    other = tl.load(partner_ptr + row)
    lam = tl.load(lam_ptr + row)
    loss, loss_adv, delta = _cross_entropy_loop(
        logits_ptr, logits_adv_ptr, target_ptr, weight_ptr, grad_ptr, grad_adv_ptr, row, other, lam,
        C, stride_zm, stride_zn, stride_am, stride_an, policy, BLOCK_C,
    )  # fmt: skip
    if logits_adv_ptr is None:
        delta = tl.full((), 0.0, lam.dtype)
        takes = delta > 0
    else:
        loss, takes = _chosen(loss, loss_adv, delta, tie_abs, tie_rel, policy)
    tl.store(loss_ptr + row, loss)
    tl.store(delta_ptr + row, delta)
    tl.store(mask_ptr + row, takes.to(tl.int8))


class Selection(NamedTuple):
    """What `select_cross_entropy_forward` leaves."""

    loss: Tensor  # (B,) the selected losses
    delta: Tensor  # (B,) ℓ(λ') - ℓ(λ), 0 without logits_adv
    mask: Tensor  # (B,) bool
    grad: Tensor  # (B, C) compute dtype, ∂ℓ_r/∂logits_r at λ
    grad_adv: Tensor | None  # (B, C) the same at λ'; None without logits_adv


def select_cross_entropy_forward(
    logits: Tensor, logits_adv: Tensor | None, mixture: Any, policy: Any, tie_abs: float, tie_rel: float
) -> Selection:
    """Losses at λ and, if given, at λ', the choice between them, and the gradients of both.

    Args:
        logits: (B, C), B >= 1, any strides.
        logits_adv: (B, C), any strides and dtype, or None.
        mixture: target (B,) int64 or (B, C), λ (B,) compute dtype, partner (B,), class weight (C,) or None.
        policy: what to compile for: mode, ignore_index and label_smoothing.
        tie_abs: a row takes λ' where δ >= -(tie_abs + tie_rel·max(1, |ℓ|)), or δ > 0 where both are 0.
        tie_rel: see there.
    """
    target, lam, partner, weight = mixture
    batch, classes = logits.shape
    lam = lam.contiguous()
    loss, delta = torch.empty_like(lam), torch.empty_like(lam)
    mask = torch.empty(batch, dtype=torch.int8, device=lam.device)
    grad = torch.empty(batch, classes, dtype=lam.dtype, device=lam.device)
    grad_adv = None if logits_adv is None else torch.empty_like(grad)
    tensors = (
        logits,
        logits_adv,
        target.contiguous(),
        lam,
        partner.contiguous(),
        None if weight is None else weight.contiguous(),
        loss,
        delta,
        mask,
        grad,
        grad_adv,
    )
    scalars = (*logits.stride(), *(logits if logits_adv is None else logits_adv).stride(), tie_abs, tie_rel)

    def launch(config: Config) -> Selection:
        options = {"policy": policy, "BLOCK_C": config.block_c, "num_warps": config.num_warps, **ASSERTING}
        if config.in_registers:
            grid = (cdiv(batch, config.block_b),)
            _select_kernel[grid](*tensors, batch, classes, *scalars, BLOCK_B=config.block_b, **options)
        else:
            _select_rows_kernel[(batch,)](*tensors, classes, *scalars, **options)
        return Selection(loss, delta, mask.view(torch.bool), grad, grad_adv)

    config = select_config(classes, lam.element_size())
    free = ("block_b" if config.in_registers else "block_c", "num_warps")
    with on_device_of(logits):
        return tuned(
            "_select_kernel",
            lambda: (
                logits.dtype,
                target.dtype,
                weight is not None,
                policy.mangle(),
                batch_class(batch),
                f"C={classes}",
                logits.device,
            ),
            config,
            free,
            launch,
        )
