"""One row that holds -inf, +inf or NaN, or whose sums leave the range of numbers: by loops over tiles (1-11)."""

from __future__ import annotations

import triton
import triton.language as tl

from .losses import binary_change, binary_loss, expm1_near, log1p_any
from .rows import (
    LN2,
    LOG2E,
    Role,
    binary_target_tile,
    load_logits,
    mixed_logits,
    row_shift,
    scaled_grad,
    step_lam,
    takes_adversarial,
    target_tile,
)


@triton.jit
def _mixed_tile(problem, row, other, shift_a, shift_b, lam, cols):
    return mixed_logits(load_logits(problem, row, cols), load_logits(problem, other, cols), shift_a, shift_b, lam)


@triton.jit
def _scanned(top, x):
    """The maximum with one tile more, and the factor of what was summed relative to the one before."""
    new_top = tl.maximum(top, tl.max(x, 0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, base, tl.exp2(top - base)


@triton.jit
def _lse_change(problem, row, other, shift_a, shift_b, lam, lam_adv, reach, top, log_sum, BLOCK: tl.constexpr):
    """Lse(x') - lse(x), in units of log 2, by another pass over both rows (8)."""
    step = (lam_adv - lam) * LN2
    if reach <= 0.25:
        gain = tl.zeros((BLOCK,), lam.dtype)
        for start in range(0, problem.C, BLOCK):
            x, d = _mixed_tile(problem, row, other, shift_a, shift_b, lam, start + tl.arange(0, BLOCK))
            gain += tl.exp2(x - top - log_sum) * expm1_near(step * d)
        change = log1p_any(tl.sum(gain, 0)) * LOG2E
    else:
        top_adv = tl.full((), float("-inf"), lam.dtype)
        sums = tl.zeros((BLOCK,), lam.dtype)
        for start in range(0, problem.C, BLOCK):
            x, _ = _mixed_tile(problem, row, other, shift_a, shift_b, lam_adv, start + tl.arange(0, BLOCK))
            top_adv, base, shrink = _scanned(top_adv, x)
            sums = sums * shrink + tl.exp2(x - base)
        change = (top_adv - top) + (tl.log(tl.sum(sums, 0)) * LOG2E - log_sum)
    return change


@triton.jit
def careful_role(problem, row, other, policy: tl.constexpr, BLOCK: tl.constexpr):
    """The role of one row, whatever its logits are; a class that is -inf in either row is excluded (1-9)."""
    lam = tl.load(problem.lam_ptr + row)
    first = tl.arange(0, BLOCK)
    # A value of the size of the row's logits is all that the shift has to be: the first tile has one.
    shift_a = row_shift(load_logits(problem, row, first), policy)
    shift_b = row_shift(load_logits(problem, other, first), policy)
    top = tl.full((), float("-inf"), lam.dtype)
    zeros = tl.zeros((BLOCK,), lam.dtype)
    sums = zeros
    sums_d = zeros
    d_max = zeros
    on_sum = zeros
    on_d = zeros
    on_x = zeros
    share = tl.full((), 0.0, lam.dtype)
    for start in range(0, problem.C, BLOCK):
        cols = start + first
        x, d = _mixed_tile(problem, row, other, shift_a, shift_b, lam, cols)
        top, base, shrink = _scanned(top, x)
        e = tl.exp2(x - base)
        sums = sums * shrink + e
        sums_d = sums_d * shrink + e * d
        d_max = tl.maximum(d_max, tl.abs(d))
        on, share = target_tile(problem, lam, row, other, cols, policy)
        on_sum += on
        on_d += on * d
        on_x += tl.where(on != 0, on * x, 0.0)
    total = tl.sum(on_sum, 0)
    target_d = tl.sum(on_d, 0)
    sum_exp = tl.sum(sums, 0)
    log_sum = tl.log(sum_exp) * LOG2E
    lse = top + log_sum
    loss = (total * lse - tl.sum(on_x, 0)) * LN2
    grad = scaled_grad((total * (tl.sum(sums_d, 0) / sum_exp) - target_d) * LN2, problem.grad_divisor_ptr)
    lam_adv = step_lam(lam, grad, problem.step_size, policy)
    delta = tl.full((), 0.0, lam.dtype)
    takes = takes_adversarial(loss, delta, policy)
    if policy.mode != "mixup":
        eta = lam_adv - lam
        reach = tl.abs(eta) * tl.max(d_max, 0) * LN2
        change = _lse_change(problem, row, other, shift_a, shift_b, lam, lam_adv, reach, top, log_sum, BLOCK)
        delta = (total * change - eta * target_d) * LN2
        takes = takes_adversarial(loss, delta, policy)
        loss = tl.where(takes, loss + delta, loss)
        lse = tl.where(takes, lse + change, lse)
    lam_sel = tl.where(takes, lam_adv, lam)
    return Role(
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


@triton.jit
def careful_binary_role(problem, row, other, policy: tl.constexpr, BLOCK: tl.constexpr):
    """`careful_role` with binary cross-entropy, whose classes do not depend on one another (30-33)."""
    lam = tl.load(problem.lam_ptr + row)
    losses = tl.zeros((BLOCK,), lam.dtype)
    slopes = losses
    shares = losses
    changes = losses
    for start in range(0, problem.C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x, d = _mixed_tile(problem, row, other, 0.0, 0.0, lam, cols)
        on, total, kept = binary_target_tile(problem, lam, row, other, cols, policy)
        tile, p = binary_loss(x, on, total)
        losses += tile
        slopes += (total * p - on) * d
        shares += kept
    loss = tl.sum(losses, 0)
    grad = scaled_grad(tl.sum(slopes, 0) * LN2, problem.grad_divisor_ptr)
    lam_adv = step_lam(lam, grad, problem.step_size, policy)
    if policy.mode != "mixup":
        for start in range(0, problem.C, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x, d = _mixed_tile(problem, row, other, 0.0, 0.0, lam, cols)
            on, total, _ = binary_target_tile(problem, lam, row, other, cols, policy)
            step = (lam_adv - lam) * d
            tile, p = binary_loss(x, on, total)
            tile_adv, _ = binary_loss(x + step, on, total)
            changes += binary_change(p, on, total, step * LN2, tile_adv - tile)
    delta = tl.sum(changes, 0)
    takes = takes_adversarial(loss, delta, policy)
    loss = tl.where(takes, loss + delta, loss)
    lam_sel = tl.where(takes, lam_adv, lam)
    zero = tl.full((), 0.0, lam.dtype)
    no = tl.full((), False, tl.int1)
    share = tl.sum(shares, 0) / problem.C
    return Role(loss, share, lam_sel, lam_adv, grad, delta, takes, zero, zero, zero, zero, no)


@triton.jit
def careful_grad(problem, a, b, role, row, other, cols, policy: tl.constexpr):
    """A tile of g of the role of `row` mixed with `other`, from its scalars (10)."""
    x, _ = mixed_logits(a, b, role.shift_a, role.shift_b, role.lam)
    lam = tl.load(problem.lam_ptr + row)
    if policy.loss == "binary_cross_entropy":
        on, total, _ = binary_target_tile(problem, lam, row, other, cols, policy)
        _, p = binary_loss(x, on, total)
        return total * p - on
    else:
        on, _ = target_tile(problem, lam, row, other, cols, policy)
        return role.total * tl.exp2(x - role.lse) - on


@triton.jit
def careful_row_grad(
    problem, dlogits_ptr, row, other, source, role, role_source, scale, policy: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of one row from its role with `other`, and from that of `source`, whose partner it is (11)."""
    for start in range(0, problem.C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        a = load_logits(problem, row, cols)
        g = careful_grad(problem, a, load_logits(problem, other, cols), role, row, other, cols, policy)
        g_source = careful_grad(problem, load_logits(problem, source, cols), a, role_source, source, row, cols, policy)
        dz = scale * (role.lam * g + (1.0 - role_source.lam) * g_source)
        tl.store(dlogits_ptr + row * problem.C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=cols < problem.C)
