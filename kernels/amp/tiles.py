"""The sums of a row, tile by tile, and what of cross-entropy follows from them."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    expm1_near,
    label_mass,
    load_logits,
    log1p_any,
    mixed_logits,
    scaled_grad,
    step_lam,
    takes_adversarial,
    target_tile,
)


@triton.jit
def mixed_logits_tile(logits_ptr, row, other, shift_a, shift_b, lam_at, cols, C, stride_zm, stride_zn):
    """X at `lam_at` and d of one tile of one row."""
    a = load_logits(logits_ptr, row, cols, C, stride_zm, stride_zn, lam_at.dtype)
    b = load_logits(logits_ptr, other, cols, C, stride_zm, stride_zn, lam_at.dtype)
    return mixed_logits(a, b, shift_a, shift_b, lam_at)


@triton.jit
def loop_lse(
    logits_ptr,
    row,
    other,
    shift_a,
    shift_b,
    lam_at,
    C,
    stride_zm,
    stride_zn,
    BLOCK_C: tl.constexpr,
):
    """Online log-sum-exp at `lam_at`: the maximum, and the log of the sum relative to it."""
    top = tl.full((), float("-inf"), lam_at.dtype)
    sums = tl.zeros((BLOCK_C,), lam_at.dtype)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x, _ = mixed_logits_tile(logits_ptr, row, other, shift_a, shift_b, lam_at, cols, C, stride_zm, stride_zn)
        new_top = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        sums = sums * tl.exp(top - base) + tl.exp(x - base)
        top = new_top
    return top, tl.log(tl.sum(sums, 0))


@triton.jit
def _label_term(logits_ptr, weight_ptr, row, other, shift_a, shift_b, lam, label, mass, C, stride_zm, stride_zn):
    """Target mass on one label, and what it adds to ⟨t, x⟩ and ⟨t, d⟩: from the two logits alone."""
    known = (mass != 0) & (label >= 0) & (label < C)
    at = tl.where(known, label, 0)
    a = load_logits(logits_ptr, row, at, C, stride_zm, stride_zn, lam.dtype)
    b = load_logits(logits_ptr, other, at, C, stride_zm, stride_zn, lam.dtype)
    x, d = mixed_logits(a, b, shift_a, shift_b, lam)
    on = tl.where(known, mass, 0.0)
    if weight_ptr is not None:
        on *= tl.load(weight_ptr + at).to(lam.dtype)
    return on, tl.where(on != 0, on * x, 0.0), tl.where(known, on * d, 0.0)


@triton.jit
def label_terms(
    logits_ptr,
    target_ptr,
    weight_ptr,
    row,
    other,
    shift_a,
    shift_b,
    lam,
    C,
    stride_zm,
    stride_zn,
    policy: tl.constexpr,
):
    """S, ⟨t, x⟩, ⟨t, d⟩ and the row's share of the divisor, of labels without smoothing: no pass over the classes."""
    label_a, label_b, mass_a, mass_b, share = label_mass(target_ptr, weight_ptr, lam, row, other, C, policy)
    on_a, on_xa, on_da = _label_term(
        logits_ptr, weight_ptr, row, other, shift_a, shift_b, lam, label_a, mass_a, C, stride_zm, stride_zn
    )
    on_b, on_xb, on_db = _label_term(
        logits_ptr, weight_ptr, row, other, shift_a, shift_b, lam, label_b, mass_b, C, stride_zm, stride_zn
    )
    return on_a + on_b, on_xa + on_xb, on_da + on_db, share


@triton.jit
def add_tile(x, d, top, s0, s1, s2, s3, s4, policy: tl.constexpr):
    """Σ_c e^(x_c - top) d_c^k, relative to the maximum so far; for k = 2, 3, 4 where δ will be taken from them (8a)."""
    new_top = tl.maximum(top, tl.max(x, 0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp(top - base)
    e = tl.exp(x - base)
    s0 = s0 * shrink + e
    e *= d
    s1 = s1 * shrink + e
    if policy.mode != "mixup" and x.dtype != tl.float64:
        e *= d
        s2 = s2 * shrink + e
        e *= d
        s3 = s3 * shrink + e
        e *= d
        s4 = s4 * shrink + e
    return new_top, s0, s1, s2, s3, s4


@triton.jit
def _lse_change_in_passes(
    logits_ptr,
    row,
    other,
    shift_a,
    shift_b,
    lam,
    lam_adv,
    reach,  # the largest |η d_c|
    top,
    log_sum,
    C,
    stride_zm,
    stride_zn,
    BLOCK_C: tl.constexpr,
):
    """Lse(x') - lse(x) by another pass over both rows (8)."""
    eta = lam_adv - lam
    if reach <= 0.25:
        gain = tl.zeros((BLOCK_C,), lam.dtype)
        for start in range(0, C, BLOCK_C):
            cols = start + tl.arange(0, BLOCK_C)
            x, d = mixed_logits_tile(logits_ptr, row, other, shift_a, shift_b, lam, cols, C, stride_zm, stride_zn)
            gain += tl.exp(x - top - log_sum) * expm1_near(eta * d)
        change = log1p_any(tl.sum(gain, 0))
    else:
        top_adv, log_adv = loop_lse(logits_ptr, row, other, shift_a, shift_b, lam_adv, C, stride_zm, stride_zn, BLOCK_C)
        change = (top_adv - top) + (log_adv - log_sum)
    return change


@triton.jit
def cross_entropy_scalars(
    logits_ptr,
    grad_divisor_ptr,
    row,
    other,
    shift_a,
    shift_b,
    lam,
    top,  # the largest x
    s0,  # Σ e^(x - top) d^k, a part in each element
    s1,
    s2,
    s3,
    s4,
    d_max,  # the largest |d|
    total,  # S
    target_x,  # ⟨t, x⟩
    target_d,  # ⟨t, d⟩
    C,
    stride_zm,
    stride_zn,
    step_size,
    policy: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What follows of a row from its sums (2-9)."""
    sum_exp = tl.sum(s0, 0)
    log_sum = tl.log(sum_exp)
    lse = top + log_sum
    loss = total * lse - target_x
    mean_d = tl.sum(s1, 0) / sum_exp
    grad = scaled_grad(total * mean_d - target_d, grad_divisor_ptr)
    lam_adv = step_lam(lam, grad, step_size, policy)
    delta = tl.full((), 0.0, lam.dtype)
    lse_change = delta
    if policy.mode != "mixup":
        eta = lam_adv - lam
        reach = tl.abs(eta) * d_max
        if lam.dtype != tl.float64:
            if reach <= 0.0625:
                # Σ p expm1(ηd) from moments (8a): the next term is below 2⁻²⁶.
                gain = tl.sum(s3, 0) + eta * 0.25 * tl.sum(s4, 0)
                gain = tl.sum(s2, 0) + eta * 0.3333333333333333 * gain
                gain = eta * (mean_d + eta * 0.5 * (gain / sum_exp))
                lse_change = log1p_any(gain)
            else:
                lse_change = _lse_change_in_passes(
                    logits_ptr, row, other, shift_a, shift_b, lam, lam_adv, reach, top, log_sum,
                    C, stride_zm, stride_zn, BLOCK_C,
                )  # fmt: skip
        else:
            lse_change = _lse_change_in_passes(
                logits_ptr, row, other, shift_a, shift_b, lam, lam_adv, reach, top, log_sum,
                C, stride_zm, stride_zn, BLOCK_C,
            )  # fmt: skip
        delta = total * lse_change - eta * target_d
    takes = takes_adversarial(loss, delta, policy)
    loss = tl.where(takes, loss + delta, loss)
    lse = tl.where(takes, lse + lse_change, lse)
    return loss, tl.where(takes, lam_adv, lam), lam_adv, grad, delta, takes, lse


@triton.jit
def cross_entropy_loop(
    logits_ptr,
    target_ptr,
    weight_ptr,
    grad_divisor_ptr,
    row,
    other,
    shift_a,
    shift_b,
    lam,
    C,
    stride_zm,
    stride_zn,
    step_size,
    policy: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Scalars of one row under cross-entropy, by a single pass unless some |ηd| is large (1-9)."""
    top = tl.full((), float("-inf"), lam.dtype)
    zeros = tl.zeros((BLOCK_C,), lam.dtype)
    s0 = zeros
    s1 = zeros
    s2 = zeros
    s3 = zeros
    s4 = zeros
    on_sum = zeros
    on_d = zeros
    on_x = zeros
    d_max = zeros
    share = tl.full((), 0.0, lam.dtype)
    sparse: tl.constexpr = target_ptr.dtype.element_ty == tl.int64 and policy.label_smoothing == 0
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x, d = mixed_logits_tile(logits_ptr, row, other, shift_a, shift_b, lam, cols, C, stride_zm, stride_zn)
        top, s0, s1, s2, s3, s4 = add_tile(x, d, top, s0, s1, s2, s3, s4, policy)
        d_max = tl.maximum(d_max, tl.abs(d))
        if not sparse:
            on, share = target_tile(target_ptr, weight_ptr, lam, row, other, cols, C, policy)
            on_sum += on
            on_d += on * d
            on_x += tl.where(on != 0, on * x, 0.0)
    if sparse:
        total, target_x, target_d, share = label_terms(
            logits_ptr, target_ptr, weight_ptr, row, other, shift_a, shift_b, lam, C, stride_zm, stride_zn, policy
        )
    else:
        total = tl.sum(on_sum, 0)
        target_x = tl.sum(on_x, 0)
        target_d = tl.sum(on_d, 0)
    loss, lam_sel, lam_adv, grad, delta, takes, lse = cross_entropy_scalars(
        logits_ptr, grad_divisor_ptr, row, other, shift_a, shift_b, lam, top, s0, s1, s2, s3, s4, tl.max(d_max, 0),
        total, target_x, target_d, C, stride_zm, stride_zn, step_size, policy, BLOCK_C,
    )  # fmt: skip
    return loss, share, lam_sel, lam_adv, grad, delta, takes, lse, total
