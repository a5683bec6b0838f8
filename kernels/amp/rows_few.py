"""Rows of a few classes, many to a program and one to a lane, whatever they hold (1-11)."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    LN2,
    LOG2E,
    ROW_FIELDS,
    Problem,
    Role,
    expm1_unit,
    load_logits,
    log1p_any,
    mixed_logits,
    partners,
    reciprocal,
    row_shift,
    scaled_grad,
    step_lam,
    store_role,
    takes_adversarial,
    target_tile,
)


@triton.jit
def cross_entropy_at(x, on):
    """Cross-entropy of rows in units of log 2, their softmax, and its normalisation (2, 3)."""
    top = tl.max(x, 0)
    x = x - top
    p = tl.exp2(x)
    sum_exp = tl.sum(p, 0)
    log_sum = tl.log(sum_exp) * LOG2E
    loss = tl.sum(tl.where(on != 0, on * (log_sum - x), 0.0), 0) * LN2
    return loss, p * (1.0 / sum_exp), top + log_sum


@triton.jit
def loss_change(p, on, total, u, far):
    """δ per row from the change u of its logits (26); `far`, the difference of the losses, where some |u| > 1."""
    u_near = tl.where(u > 1.0, 1.0, tl.where(u < -1.0, -1.0, u))  # comparisons keep NaN
    near = total * log1p_any(tl.sum(p * expm1_unit(u_near), 0)) - tl.sum(on * u, 0)
    return tl.where(tl.max(tl.abs(u), 0) <= 1.0, near, far)


@triton.jit
def cross_entropy_role(problem, x, d, on, share, lam, shift_a, shift_b, policy: tl.constexpr):
    """The role of rows whose mixed logits x, and d, are known in units of log 2; and the tile of g at λ* (1-9)."""
    total = tl.sum(on, 0)
    loss, p, lse = cross_entropy_at(x, on)
    grad = scaled_grad(tl.sum((total * p - on) * d, 0) * LN2, problem.grad_divisor_ptr)
    lam_adv = step_lam(lam, grad, problem.step_size, policy)
    delta = tl.full(lam.shape, 0.0, lam.dtype)
    takes = takes_adversarial(loss, delta, policy)
    if policy.mode != "mixup":
        step = (lam_adv - lam) * d
        loss_adv, p_adv, lse_adv = cross_entropy_at(x + step, on)
        if policy.keeps_all:
            delta = (total * (lse_adv - lse) - tl.sum(on * step, 0)) * LN2
        else:
            delta = loss_change(p, on, total, step * LN2, loss_adv - loss)
            loss_adv = loss + delta
        takes = takes_adversarial(loss, delta, policy)
        loss = tl.where(takes, loss_adv, loss)
        p = tl.where(takes, p_adv, p)
        lse = tl.where(takes, lse_adv, lse)
    lam_sel = tl.where(takes, lam_adv, lam)
    role = Role(
        loss,
        share,
        lam_sel,
        lam_adv,
        grad,
        delta,
        takes,
        shift_a,
        shift_b,
        lse,
        total,
        tl.full(lam.shape, False, tl.int1),
    )
    return role, total * p - on


@triton.jit
def _role(problem, a, b, shift_a, shift_b, row, other, cols, policy: tl.constexpr):
    lam = tl.load(problem.lam_ptr + row)
    x, d = mixed_logits(a, b, shift_a, shift_b, lam)
    on, share = target_tile(problem, lam, row, other, cols, policy)
    return cross_entropy_role(problem, x, d, on, share, lam, shift_a, shift_b, policy)


@triton.jit
def _amp_few_classes_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    inverse_ptr,  # (B,) int64 with inverse[partner[r]] = r; None: it is partner, or looked for
    weight_ptr,  # (C,) class weights or None
    grad_divisor_ptr,  # () divisor of ∇λ or None
    dlogits_ptr,  # (B, C) contiguous, the complete gradient, or None
    rows_ptr,  # (fields, B) compute dtype
    loss_ptr,  # () reduced loss, written where one program holds the batch; else None
    divisor_ptr,  # () what it was divided by; None with loss_ptr
    B,
    C,
    stride_zm: tl.int64,
    stride_zn,
    step_size: tl.float64,
    divisor: tl.float64,  # of the gradient; 0 stands for the kept mass (one program only)
    policy: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Loss and complete gradient of BLOCK_B rows."""
    problem = Problem(logits_ptr, stride_zm, stride_zn, target_ptr, weight_ptr, lam_ptr, grad_divisor_ptr, C, step_size)
    index = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    ok = index < B
    row = tl.where(ok, index, B - 1)  # a row too many repeats the last one, and is not written
    # Times one that the compiler does not know: it would lay neighbouring columns over the lanes of a warp, and sums
    # over a row would be as many shuffles as it has rows.
    cols = tl.arange(0, BLOCK_C)[:, None] * tl.minimum(B, 1)
    other, source = partners(partner_ptr, inverse_ptr if dlogits_ptr is not None else partner_ptr, row, B, policy)
    a = load_logits(problem, row, cols)
    b = load_logits(problem, other, cols)
    c = b
    if policy.pairing != "matching":
        c = load_logits(problem, source, cols)
    shift_a = row_shift(a)
    shift_b = row_shift(b)
    role, g = _role(problem, a, b, shift_a, shift_b, row, other, cols, policy)
    store_role(rows_ptr, row, B, ok, role, ROW_FIELDS)
    scale = tl.full((), divisor, a.dtype)
    if loss_ptr is not None:
        mass = tl.sum(tl.where(ok, role.share, 0.0), 0)
        scale = tl.where(scale == 0.0, mass, scale)
        tl.store(loss_ptr, tl.sum(tl.where(ok, role.loss, 0.0), 0) / scale)
        tl.store(divisor_ptr, scale)
    if dlogits_ptr is not None:
        role_source, g_source = _role(problem, c, a, row_shift(c), shift_a, source, row, cols, policy)
        dz = reciprocal(scale) * (role.lam * g + (1.0 - role_source.lam) * g_source)
        tl.store(dlogits_ptr + row * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=ok & (cols < C))
