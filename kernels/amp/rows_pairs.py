"""Both rows of a pair at once, where partner is its own inverse: every row is read once at a time, and written once.

Without that promise a program needs a third row, the one whose partner its own is, which another program needs as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import load_logits, mixed_logits, row_shift, store_scalars, target_tile
from .tiles import add_tile, cross_entropy_scalars, label_terms


@triton.jit
def _amp_pairs_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64, its own inverse
    weight_ptr,  # (C,) class weights or None
    grad_divisor_ptr,  # () divisor of ∇λ or None
    dlogits_ptr,  # (B, C) contiguous, the complete gradient, or None
    rows_ptr,  # (fields, B) compute dtype
    B,
    C,
    stride_zm: tl.int64,
    stride_zn,  # usually 1, and then compiled in: with a type beside it, it would not be
    step_size: tl.float64,
    divisor: tl.float64,  # of the gradient
    policy: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Cross-entropy of a pair of rows too long for registers: one pass for all scalars, one for both gradients (1-11).

    The program of the smaller row does both; the other has nothing to do. The second pass finds the rows in the cache
    where those of all running programs fit there.
    """
    row = tl.program_id(0).to(tl.int64)
    other = tl.load(partner_ptr + row)
    tl.device_assert(tl.load(partner_ptr + other) == row, "partner is not its own inverse")
    if other >= row:
        lam = tl.load(lam_ptr + row)
        lam_other = tl.load(lam_ptr + other)
        first = tl.arange(0, BLOCK_C)
        shift = row_shift(load_logits(logits_ptr, row, first, C, stride_zm, stride_zn, lam.dtype))
        shift_other = row_shift(load_logits(logits_ptr, other, first, C, stride_zm, stride_zn, lam.dtype))
        top = tl.full((), float("-inf"), lam.dtype)
        top_other = top
        zeros = tl.zeros((BLOCK_C,), lam.dtype)
        s0 = zeros
        s1 = zeros
        s2 = zeros
        s3 = zeros
        s4 = zeros
        o0 = zeros
        o1 = zeros
        o2 = zeros
        o3 = zeros
        o4 = zeros
        d_max = zeros
        on_sum = zeros
        on_d = zeros
        on_x = zeros
        on_sum_other = zeros
        on_d_other = zeros
        on_x_other = zeros
        share = tl.full((), 0.0, lam.dtype)
        share_other = share
        sparse: tl.constexpr = target_ptr.dtype.element_ty == tl.int64 and policy.label_smoothing == 0
        for start in range(0, C, BLOCK_C):
            cols = start + first
            a = load_logits(logits_ptr, row, cols, C, stride_zm, stride_zn, lam.dtype)
            b = load_logits(logits_ptr, other, cols, C, stride_zm, stride_zn, lam.dtype)
            x, d = mixed_logits(a, b, shift, shift_other, lam)
            top, s0, s1, s2, s3, s4 = add_tile(x, d, top, s0, s1, s2, s3, s4, policy)
            d_max = tl.maximum(d_max, tl.abs(d))
            y, e = mixed_logits(b, a, shift_other, shift, lam_other)
            top_other, o0, o1, o2, o3, o4 = add_tile(y, e, top_other, o0, o1, o2, o3, o4, policy)
            if not sparse:
                on, share = target_tile(target_ptr, weight_ptr, lam, row, other, cols, C, policy)
                on_sum += on
                on_d += on * d
                on_x += tl.where(on != 0, on * x, 0.0)
                on, share_other = target_tile(target_ptr, weight_ptr, lam_other, other, row, cols, C, policy)
                on_sum_other += on
                on_d_other += on * e
                on_x_other += tl.where(on != 0, on * y, 0.0)
        if sparse:
            total, target_x, target_d, share = label_terms(
                logits_ptr, target_ptr, weight_ptr, row, other, shift, shift_other, lam,
                C, stride_zm, stride_zn, policy,
            )  # fmt: skip
            total_other, target_x_other, target_d_other, share_other = label_terms(
                logits_ptr, target_ptr, weight_ptr, other, row, shift_other, shift, lam_other,
                C, stride_zm, stride_zn, policy,
            )  # fmt: skip
        else:
            total = tl.sum(on_sum, 0)
            target_x = tl.sum(on_x, 0)
            target_d = tl.sum(on_d, 0)
            total_other = tl.sum(on_sum_other, 0)
            target_x_other = tl.sum(on_x_other, 0)
            target_d_other = tl.sum(on_d_other, 0)
        d_top = tl.max(d_max, 0)
        loss, lam_sel, lam_adv, grad, delta, takes, lse = cross_entropy_scalars(
            logits_ptr, grad_divisor_ptr, row, other, shift, shift_other, lam, top, s0, s1, s2, s3, s4, d_top,
            total, target_x, target_d, C, stride_zm, stride_zn, step_size, policy, BLOCK_C,
        )  # fmt: skip
        store_scalars(
            rows_ptr, row, B, True, loss, share, lam_sel, lam_adv, grad, delta, takes, shift, shift_other, lse, total
        )
        loss, lam_sel_other, lam_adv, grad, delta, takes, lse_other = cross_entropy_scalars(
            logits_ptr, grad_divisor_ptr, other, row, shift_other, shift, lam_other, top_other, o0, o1, o2, o3, o4,
            d_top, total_other, target_x_other, target_d_other, C, stride_zm, stride_zn, step_size, policy, BLOCK_C,
        )  # fmt: skip
        store_scalars(
            rows_ptr, other, B, True, loss, share_other, lam_sel_other, lam_adv, grad, delta, takes,
            shift_other, shift, lse_other, total_other,
        )  # fmt: skip
        if dlogits_ptr is not None:
            scale = 1.0 / tl.full((), divisor, lam.dtype)
            for start in range(0, C, BLOCK_C):
                cols = start + first
                a = load_logits(logits_ptr, row, cols, C, stride_zm, stride_zn, lam.dtype)
                b = load_logits(logits_ptr, other, cols, C, stride_zm, stride_zn, lam.dtype)
                x, _ = mixed_logits(a, b, shift, shift_other, lam_sel)
                on, _ = target_tile(target_ptr, weight_ptr, lam, row, other, cols, C, policy)
                g = scale * (total * tl.exp(x - lse) - on)
                x, _ = mixed_logits(b, a, shift_other, shift, lam_sel_other)
                on, _ = target_tile(target_ptr, weight_ptr, lam_other, other, row, cols, C, policy)
                g_other = scale * (total_other * tl.exp(x - lse_other) - on)
                dz = lam_sel * g + (1.0 - lam_sel_other) * g_other
                tl.store(dlogits_ptr + row * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=cols < C)
                dz = lam_sel_other * g_other + (1.0 - lam_sel) * g
                tl.store(dlogits_ptr + other * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=cols < C)
