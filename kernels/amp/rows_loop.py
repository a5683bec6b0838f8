"""The scalars of rows too long for registers, by a loop over tiles; the gradient follows in rows_grad.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import load_logits, row_shift, store_scalars, tile_index
from .tiles import cross_entropy_loop


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
    stride_zn,  # usually 1, and then compiled in: with a type beside it, it would not be
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
    loss, share, lam_sel, lam_adv, grad, delta, takes, lse, total = cross_entropy_loop(
        logits_ptr, target_ptr, weight_ptr, grad_divisor_ptr, row, other, shift_a, shift_b, lam,
        C, stride_zm, stride_zn, step_size, policy, BLOCK_C,
    )  # fmt: skip
    store_scalars(rows_ptr, row, B, ok, loss, share, lam_sel, lam_adv, grad, delta, takes, shift_a, shift_b, lse, total)
