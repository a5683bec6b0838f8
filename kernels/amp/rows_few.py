"""Tiles of whole rows, whatever they hold, by either cross-entropy (1-11, 30-34); few classes, one row to a lane."""

from __future__ import annotations

import triton
import triton.language as tl

from .losses import loss_at, loss_change
from .rows import (
    LN2,
    ROW_FIELDS,
    Problem,
    Role,
    load_logits,
    mixed_logits,
    partners,
    reciprocal,
    row_shift,
    scaled_grad,
    step_lam,
    store_role,
    takes_adversarial,
    target_masses,
)


@triton.jit
def role_at(problem, x, d, on, total, share, lam, shift_a, shift_b, policy: tl.constexpr):
    """The role of rows whose mixed logits x, and d, are known in units of log 2; and the tile of g at λ* (1-9)."""
    loss, p, lse = loss_at(x, on, total, policy)
    grad = scaled_grad(tl.sum((total * p - on) * d, 0) * LN2, problem.grad_divisor_ptr)
    lam_adv = step_lam(lam, grad, problem.step_size, policy)
    delta = tl.full(lam.shape, 0.0, lam.dtype)
    takes = takes_adversarial(loss, delta, policy)
    if policy.mode != "mixup":
        step = (lam_adv - lam) * d
        loss_adv, p_adv, lse_adv = loss_at(x + step, on, total, policy)
        if policy.keeps_all and policy.loss == "binary_cross_entropy":
            delta = loss_adv - loss
        elif policy.keeps_all:
            delta = (total * (lse_adv - lse) - tl.sum(on * step, 0)) * LN2
        else:
            delta = loss_change(p, on, total, step * LN2, loss_adv - loss, policy)
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
        tl.sum(on, 0),
        tl.full(lam.shape, False, tl.int1),
    )
    return role, total * p - on


@triton.jit
def _role(problem, a, b, shift_a, shift_b, row, other, cols, policy: tl.constexpr):
    lam = tl.load(problem.lam_ptr + row)
    x, d = mixed_logits(a, b, shift_a, shift_b, lam)
    on, total, share = target_masses(problem, lam, row, other, cols, policy)
    return role_at(problem, x, d, on, total, share, lam, shift_a, shift_b, policy)


@triton.jit
def _amp_few_classes_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    inverse_ptr,  # (B,) int64 with inverse[partner[r]] = r; None: it is partner, or looked for
    weight_ptr,  # class weights or None: see `Problem`
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
    shift_a = row_shift(a, policy)
    shift_b = row_shift(b, policy)
    role, g = _role(problem, a, b, shift_a, shift_b, row, other, cols, policy)
    store_role(rows_ptr, row, B, ok, role, ROW_FIELDS)
    scale = tl.full((), divisor, a.dtype)
    if loss_ptr is not None:
        mass = tl.sum(tl.where(ok, role.share, 0.0), 0)
        scale = tl.where(scale == 0.0, mass, scale)
        tl.store(loss_ptr, tl.sum(tl.where(ok, role.loss, 0.0), 0) / scale)
        tl.store(divisor_ptr, scale)
    if dlogits_ptr is not None:
        role_source, g_source = _role(problem, c, a, row_shift(c, policy), shift_a, source, row, cols, policy)
        dz = reciprocal(scale) * (role.lam * g + (1.0 - role_source.lam) * g_source)
        tl.store(dlogits_ptr + row * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=ok & (cols < C))
