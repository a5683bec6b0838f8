"""Rows too long for registers, by a loop over tiles: one pass for the scalars, one more for a pair's gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .losses import log1p_any
from .rows import (
    LN2,
    LOG2E,
    ROW_FIELDS,
    Problem,
    Role,
    is_tame,
    load_finite,
    reciprocal,
    scaled,
    scaled_grad,
    step_lam,
    store_role,
    takes_adversarial,
    target_tile,
)
from .rows_careful import careful_role, careful_row_grad
from .rows_registers import holds, is_sound, minus_target, softmax_factor, sparse_targets


class Sums(NamedTuple):
    """Of one role, a part in each element: Σ 2^x d^k over classes, and of a dense target S, ⟨t, b⟩ and ⟨t, d⟩."""

    s0: Any
    s1: Any
    s2: Any
    s3: Any
    on: Any
    on_b: Any
    on_d: Any
    share: Any


@triton.jit
def _no_sums(lam, BLOCK_C: tl.constexpr):
    zeros = tl.zeros((BLOCK_C,), lam.dtype)
    return Sums(zeros, zeros, zeros, zeros, zeros, zeros, zeros, tl.full((), 0.0, lam.dtype))


@triton.jit
def _with_tile(sums, problem, b, d, row, other, lam, cols, policy: tl.constexpr, SPARSE: tl.constexpr):
    """The sums with one tile more; those for k = 2, 3 are what δ and the loss at λ' will be taken from (8a)."""
    e = tl.exp2(b + lam * d)
    ed = e * d
    s2, s3 = sums.s2, sums.s3
    if policy.mode != "mixup":
        ed2 = ed * d
        s2, s3 = s2 + ed2, s3 + ed2 * d
    on, on_b, on_d, share = sums.on, sums.on_b, sums.on_d, sums.share
    if not SPARSE:
        tile, share = target_tile(problem, lam, row, other, cols, policy)
        on, on_b, on_d = on + tile, on_b + tile * b, on_d + tile * d
    return Sums(sums.s0 + e, sums.s1 + ed, s2, s3, on, on_b, on_d, share)


@triton.jit
def _role(sums, problem, d_top, shift_a, shift_b, row, other, lam, policy: tl.constexpr, SPARSE: tl.constexpr):
    """The role of one row from its sums, `easy` where they decide it; and the target's `Labels`, if it has them."""
    sum_exp = tl.sum(sums.s0, 0)
    if SPARSE:
        labels, total, on_b, on_d = sparse_targets(problem, row, other, lam, shift_a, shift_b, policy)
        share = total
    else:
        labels = 0.0
        total = tl.sum(sums.on, 0)
        on_b = tl.sum(sums.on_b, 0)
        on_d = tl.sum(sums.on_d, 0)
        share = sums.share
    log_sum = tl.log(sum_exp)
    mean_d = tl.sum(sums.s1, 0) / sum_exp
    easy = is_sound(sum_exp) & (tl.abs(mean_d) < float("inf"))
    loss = total * log_sum - (on_b + lam * on_d) * LN2
    grad = scaled_grad((total * mean_d - on_d) * LN2, problem.grad_divisor_ptr)
    lam_adv = step_lam(lam, grad, problem.step_size, policy)
    delta = tl.full((), 0.0, lam.dtype)
    takes = takes_adversarial(loss, delta, policy)
    if policy.mode != "mixup":
        step = (lam_adv - lam) * LN2
        moment = tl.sum(sums.s2, 0) / sum_exp
        # The fourth moment is at most the second times the largest d²: what is left out is below 2⁻²⁵.
        reach = tl.abs(step) * d_top
        easy = easy & (reach <= 0.25) & (reach * reach * step * step * moment <= 7.2e-7)
        moment += step * 0.3333333333333333 * (tl.sum(sums.s3, 0) / sum_exp)
        change = log1p_any(step * (mean_d + step * 0.5 * moment))
        delta = total * change - step * on_d
        takes = takes_adversarial(loss, delta, policy)
        loss = tl.where(takes, loss + delta, loss)
        log_sum = tl.where(takes, log_sum + change, log_sum)
    easy = easy & (tl.abs(loss) < float("inf"))
    lam_sel = tl.where(takes, lam_adv, lam)
    role = Role(loss, share, lam_sel, lam_adv, grad, delta, takes, shift_a, shift_b, log_sum * LOG2E, total, easy)
    return role, labels


@triton.jit
def _amp_rows_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    inverse_ptr,  # None: here for the arguments to be those of `_amp_cross_entropy_kernel`
    weight_ptr,  # (C,) class weights or None
    grad_divisor_ptr,  # () divisor of ∇λ or None
    dlogits_ptr,  # (B, C) contiguous, the complete gradient of pairs; None: it follows in `_amp_rows_grad_kernel`
    rows_ptr,  # (fields, B) compute dtype
    B,
    C,
    stride_zm: tl.int64,
    stride_zn,  # usually 1, and then compiled in: with a type beside it, it would not be
    step_size: tl.float64,
    divisor: tl.float64,  # of the gradient
    policy: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C and of the stride of rows
    BLOCK_C: tl.constexpr,
    BLOCK_CAREFUL: tl.constexpr,
):
    """All scalars of one row (1-9). For a pair, the program of the smaller row does both, and both gradients (10, 11).

    The second pass finds the rows in the cache where those of all running programs fit there.
    """
    # Which tells the compiler so, for loads of 16 bytes.
    C = C // ALIGN * ALIGN
    stride_zm = stride_zm // ALIGN * ALIGN
    problem = Problem(logits_ptr, stride_zm, stride_zn, target_ptr, weight_ptr, lam_ptr, grad_divisor_ptr, C, step_size)
    sparse: tl.constexpr = target_ptr.dtype.element_ty == tl.int64 and policy.label_smoothing == 0
    pairs: tl.constexpr = policy.pairing == "matching"
    row = tl.program_id(0).to(tl.int64)
    other = tl.load(partner_ptr + row)
    if pairs:
        tl.device_assert(tl.load(partner_ptr + other) == row, "partner is not its own inverse")
    if not pairs or other >= row:
        first = tl.arange(0, BLOCK_C)
        lam = tl.load(lam_ptr + row)
        lam_other = tl.load(lam_ptr + other)
        # A value of the size of the row's logits is all that the shift has to be: the first tile has one.
        top = tl.max(load_finite(problem, row, first), 0)
        top_other = tl.max(load_finite(problem, other, first), 0)
        shift = top * LOG2E
        shift_other = top_other * LOG2E
        sums = _no_sums(lam, BLOCK_C)
        sums_other = sums
        d_max = sums.s0
        for start in range(0, C, BLOCK_C):
            cols = start + first
            a = scaled(load_finite(problem, row, cols), shift)
            b = scaled(load_finite(problem, other, cols), shift_other)
            d = a - b
            d_max = tl.maximum(d_max, tl.abs(d))
            sums = _with_tile(sums, problem, b, d, row, other, lam, cols, policy, sparse)
            if pairs:
                sums_other = _with_tile(sums_other, problem, a, -d, other, row, lam_other, cols, policy, sparse)
        d_top = tl.max(d_max, 0)
        role, on = _role(sums, problem, d_top, shift, shift_other, row, other, lam, policy, sparse)
        # Doubles would need a pass at λ', for which there are the careful loops.
        easy = role.easy & is_tame(problem, top) & is_tame(problem, top_other) & (lam.dtype != tl.float64)
        if not pairs:
            if not easy:
                role = careful_role(problem, row, other, policy, BLOCK_CAREFUL)
            store_role(rows_ptr, row, B, True, role, ROW_FIELDS)
        else:
            role_other, on_other = _role(
                sums_other, problem, d_top, shift_other, shift, other, row, lam_other, policy, sparse
            )
            scale = reciprocal(tl.full((), divisor, lam.dtype))
            if easy & role_other.easy:
                store_role(rows_ptr, row, B, True, role, ROW_FIELDS)
                store_role(rows_ptr, other, B, True, role_other, ROW_FIELDS)
                if dlogits_ptr is not None:
                    own = scale * role.lam
                    own_rest = scale - own
                    theirs = scale * role_other.lam
                    theirs_rest = scale - theirs
                    slope = softmax_factor(role)
                    slope_other = softmax_factor(role_other)
                    for start in range(0, C, BLOCK_C):
                        cols = start + first
                        a = scaled(load_finite(problem, row, cols), shift)
                        b = scaled(load_finite(problem, other, cols), shift_other)
                        d = a - b
                        e = tl.exp2(b + role.lam * d)
                        e_other = tl.exp2(a - role_other.lam * d)
                        dz = (own * slope) * e + (theirs_rest * slope_other) * e_other
                        dz_other = (own_rest * slope) * e + (theirs * slope_other) * e_other
                        hit = True
                        if sparse:
                            hit = holds(on.a, start, BLOCK_C) | holds(on.b, start, BLOCK_C)
                        if hit:
                            t, t_other = on, on_other
                            if not sparse:
                                t, _ = target_tile(problem, lam, row, other, cols, policy)
                                t_other, _ = target_tile(problem, lam_other, other, row, cols, policy)
                            dz = minus_target(dz, t, t_other, own, theirs_rest, cols, True, sparse)
                            dz_other = minus_target(dz_other, t_other, t, theirs, own_rest, cols, True, sparse)
                        tl.store(dlogits_ptr + row * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=cols < C)
                        at = dlogits_ptr + other * C + cols
                        tl.store(at, dz_other.to(dlogits_ptr.dtype.element_ty), mask=cols < C)
            else:
                role = careful_role(problem, row, other, policy, BLOCK_CAREFUL)
                role_other = careful_role(problem, other, row, policy, BLOCK_CAREFUL)
                store_role(rows_ptr, row, B, True, role, ROW_FIELDS)
                store_role(rows_ptr, other, B, True, role_other, ROW_FIELDS)
                if dlogits_ptr is not None:
                    careful_row_grad(
                        problem, dlogits_ptr, row, other, other, role, role_other, scale, policy, BLOCK_CAREFUL
                    )
                    careful_row_grad(
                        problem, dlogits_ptr, other, row, row, role_other, role, scale, policy, BLOCK_CAREFUL
                    )
