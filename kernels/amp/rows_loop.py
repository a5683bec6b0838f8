"""The scalars of rows too long for registers, by a loop over tiles; the gradient follows in rows_grad.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    BP_TOP,
    LSE_OTHERS,
    SUM_BO,
    TOP,
    bce_share,
    bce_terms,
    load_logits,
    log1p_any,
    row_shift,
    scaled_grad,
    step_lam,
    store_field,
    store_scalars,
    takes_adversarial,
    target_tile,
    tile_index,
)
from .tiles import cross_entropy_loop, loop_lse, mixed_tile


@triton.jit
def bce_scan(
    logits_ptr,
    target_ptr,
    weight_ptr,
    row,
    other,
    shift_a,
    shift_b,
    lam,
    lam_at,
    C,
    stride_zm,
    stride_zn,
    policy: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """softmax_bce of one row at `lam_at`: loss, the scalars of g, ⟨g, d⟩ and the divisor share (12-16)."""
    top_x = tl.full((), float("-inf"), lam.dtype)
    top = tl.full((), 0, tl.int32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x, _ = mixed_tile(logits_ptr, row, other, shift_a, shift_b, lam_at, cols, C, stride_zm, stride_zn)
        tile_top = tl.max(x, 0)
        top = tl.where(tile_top > top_x, start + tl.argmax(x, 0), top)
        top_x = tl.maximum(top_x, tile_top)
    second, log_others = loop_lse(
        logits_ptr, row, other, shift_a, shift_b, lam_at, top, C, stride_zm, stride_zn, BLOCK_C
    )
    lse_others = tl.where(second == float("-inf"), second, second + log_others)
    lse = top_x + log1p_any(tl.exp(lse_others - top_x))
    zeros = tl.zeros((BLOCK_C,), lam.dtype)
    losses = zeros
    a_sum = zeros
    bo_sum = zeros
    bp_top_sum = zeros
    ad = zeros
    pd = zeros
    pbd = zeros
    share_d = zeros
    share = tl.full((), 0.0, lam.dtype)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x, d = mixed_tile(logits_ptr, row, other, shift_a, shift_b, lam_at, cols, C, stride_zm, stride_zn)
        on, off, share = target_tile(target_ptr, weight_ptr, lam, row, other, cols, C, policy)
        is_top = cols == top
        a, b, bo, p, terms = bce_terms(x, on, off, is_top, lse, lse_others)
        losses += terms
        a_sum += a
        bo_sum += bo
        bp_top_sum += tl.where(is_top, b * p, 0.0)
        ad += a * d
        pd += p * d
        pbd += p * (b + bo) * d
        share_d += bce_share(x, is_top, lse_others) * d
    sum_a = tl.sum(a_sum, 0)
    sum_bo = tl.sum(bo_sum, 0)
    bp_top = tl.sum(bp_top_sum, 0)
    g_d = tl.sum(ad, 0) + (sum_bo - sum_a) * tl.sum(pd, 0)
    g_d += bp_top * tl.sum(share_d, 0) - tl.sum(pbd, 0)
    return tl.sum(losses, 0), top.to(lam.dtype), lse, lse_others, sum_a, sum_bo, bp_top, g_d, share


@triton.jit
def _amp_rows_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    weight_ptr,  # (C,) class weights or None
    grad_divisor_ptr,  # () divisor of ∇λ or None
    rows_ptr,  # (fields, B) compute dtype
    B,
    C,
    stride_zm: tl.int64,
    stride_zn,  # 1 mostly, and then compiled in: with a type beside it, it would not be
    step_size: tl.float64,
    policy: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All scalars of one row, its loss among them; the gradient follows in `_amp_rows_grad_kernel`."""
    row, first, ok = tile_index(tl.program_id(0), 0, B, 1, BLOCK_C)
    other = tl.load(partner_ptr + row)
    lam = tl.load(lam_ptr + row)
    # A value of the size of the row's logits is all that the shift has to be: the first tile has one.
    shift_a = row_shift(load_logits(logits_ptr, row, first, C, stride_zm, stride_zn, lam.dtype))
    shift_b = row_shift(load_logits(logits_ptr, other, first, C, stride_zm, stride_zn, lam.dtype))
    if policy.bce:
        loss, top, lse, lse_others, total, sum_bo, bp_top, g_d, share = bce_scan(
            logits_ptr, target_ptr, weight_ptr, row, other, shift_a, shift_b, lam, lam,
            C, stride_zm, stride_zn, policy, BLOCK_C,
        )  # fmt: skip
        grad = scaled_grad(g_d, grad_divisor_ptr)
        lam_adv = step_lam(lam, grad, step_size, policy)
        delta = tl.full((), 0.0, lam.dtype)
        takes = takes_adversarial(loss, delta, policy)
        if policy.mode != "mixup":
            loss_adv, top_adv, lse_adv, lse_others_adv, total_adv, sum_bo_adv, bp_top_adv, _, _ = bce_scan(
                logits_ptr, target_ptr, weight_ptr, row, other, shift_a, shift_b, lam, lam_adv,
                C, stride_zm, stride_zn, policy, BLOCK_C,
            )  # fmt: skip
            delta = loss_adv - loss
            takes = takes_adversarial(loss, delta, policy)
            loss = tl.where(takes, loss_adv, loss)
            top = tl.where(takes, top_adv, top)
            lse = tl.where(takes, lse_adv, lse)
            lse_others = tl.where(takes, lse_others_adv, lse_others)
            total = tl.where(takes, total_adv, total)
            sum_bo = tl.where(takes, sum_bo_adv, sum_bo)
            bp_top = tl.where(takes, bp_top_adv, bp_top)
        lam_sel = tl.where(takes, lam_adv, lam)
        store_field(rows_ptr, TOP, row, B, top, ok)
        store_field(rows_ptr, LSE_OTHERS, row, B, lse_others, ok)
        store_field(rows_ptr, SUM_BO, row, B, sum_bo, ok)
        store_field(rows_ptr, BP_TOP, row, B, bp_top, ok)
    else:
        loss, share, lam_sel, lam_adv, grad, delta, takes, lse, total = cross_entropy_loop(
            logits_ptr, target_ptr, weight_ptr, grad_divisor_ptr, row, other, shift_a, shift_b, lam,
            C, stride_zm, stride_zn, step_size, policy, BLOCK_C,
        )  # fmt: skip
    store_scalars(rows_ptr, row, B, ok, loss, share, lam_sel, lam_adv, grad, delta, takes, shift_a, shift_b, lse, total)
