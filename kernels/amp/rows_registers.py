"""The losses of rows that are held in registers whole, and their step of λ (2-15)."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    bce_share,
    bce_terms,
    expm1_near,
    expm1_unit,
    log1p_any,
    row_argmax,
    row_max,
    row_sum,
    scaled_grad,
    step_lam,
    takes_adversarial,
)


@triton.jit
def cross_entropy_role(x, d, on, lam, step_size, grad_divisor_ptr, policy: tl.constexpr):
    """One row's AMP with its whole width in registers: its scalars and g at λ* (1-9)."""
    total = row_sum(on)
    top = row_max(x)
    p = tl.exp(x - top)
    sum_exp = row_sum(p)
    p = p / sum_exp
    lse = top + tl.log(sum_exp)
    loss = -row_sum(tl.where(on != 0, on * (x - lse), 0.0))
    grad = scaled_grad(row_sum((total * p - on) * d), grad_divisor_ptr)
    lam_adv = step_lam(lam, grad, step_size, policy)
    delta = tl.full(lam.shape, 0.0, lam.dtype)
    lse_change = delta
    p_adv = p
    if policy.mode != "mixup":
        eta = lam_adv - lam
        u = eta * d
        if tl.max(tl.abs(u)) <= 0.25:
            # The perturbed softmax from the first one: no second exponential, no cancellation in δ.
            gain = p * expm1_near(u)
            gain_sum = row_sum(gain)
            lse_change = log1p_any(gain_sum)
            p_adv = (p + gain) / (1.0 + gain_sum)
        else:
            top_adv = row_max(x + u)
            p_adv = tl.exp(x + u - top_adv)
            sum_adv = row_sum(p_adv)
            lse_change = (top_adv - top) + (tl.log(sum_adv) - tl.log(sum_exp))
            p_adv = p_adv / sum_adv
        delta = total * lse_change - eta * row_sum(on * d)
    takes = takes_adversarial(loss, delta, policy)
    loss = tl.where(takes, loss + delta, loss)
    lse = tl.where(takes, lse + lse_change, lse)
    g = total * tl.where(takes, p_adv, p) - on
    return loss, tl.where(takes, lam_adv, lam), lam_adv, grad, delta, takes, lse, total, g


@triton.jit
def cross_entropy_at(x, on):
    """Cross-entropy of rows in registers, and their softmax (2, 3)."""
    x = x - row_max(x)  # before anything is rounded at the size of a common offset
    p = tl.exp(x)
    sum_exp = row_sum(p)
    return -row_sum(tl.where(on != 0, on * (x - tl.log(sum_exp)), 0.0)), p / sum_exp


@triton.jit
def loss_change(p, on, total, u, far):
    """δ per row from the change u of its logits (26); `far`, the difference of the losses, where some |u| > 1."""
    u_near = tl.where(u > 1.0, 1.0, tl.where(u < -1.0, -1.0, u))  # comparisons keep NaN
    near = total * log1p_any(row_sum(p * expm1_unit(u_near))) - row_sum(on * u)
    return tl.where(row_max(tl.abs(u)) <= 1.0, near, far)


@triton.jit
def bce_at(x, on, off, cols):
    """softmax_bce of rows in registers: loss, the six scalars that g is made of, and g (12-15)."""
    top = row_argmax(x)
    is_top = cols == top
    top_x = row_max(x)
    others = tl.where(is_top, float("-inf"), x)
    second = row_max(others)
    second = tl.where(second == float("-inf"), 0.0, second)
    lse_others = second + tl.log(row_sum(tl.exp(others - second)))
    lse = top_x + log1p_any(tl.exp(lse_others - top_x))
    a, b, bo, p, terms = bce_terms(x, on, off, is_top, lse, lse_others)
    sum_a = row_sum(a)
    sum_bo = row_sum(bo)
    bp_top = row_sum(tl.where(is_top, b * p, 0.0))
    grad = a - p * (sum_a + b) + p * (sum_bo - bo) + bp_top * bce_share(x, is_top, lse_others)
    return row_sum(terms), top.to(x.dtype), lse, lse_others, sum_a, sum_bo, bp_top, grad


@triton.jit
def bce_role(x, d, on, off, lam, cols, step_size, grad_divisor_ptr, policy: tl.constexpr):
    """One row's AMP under softmax_bce with its whole width in registers."""
    loss, top, lse, lse_others, sum_a, sum_bo, bp_top, g = bce_at(x, on, off, cols)
    grad = scaled_grad(row_sum(g * d), grad_divisor_ptr)
    lam_adv = step_lam(lam, grad, step_size, policy)
    delta = tl.full(lam.shape, 0.0, lam.dtype)
    takes = takes_adversarial(loss, delta, policy)
    if policy.mode != "mixup":
        loss_adv, top_adv, lse_adv, lse_others_adv, sum_a_adv, sum_bo_adv, bp_top_adv, g_adv = bce_at(
            x + (lam_adv - lam) * d, on, off, cols
        )
        delta = loss_adv - loss
        takes = takes_adversarial(loss, delta, policy)
        loss = tl.where(takes, loss_adv, loss)
        top = tl.where(takes, top_adv, top)
        lse = tl.where(takes, lse_adv, lse)
        lse_others = tl.where(takes, lse_others_adv, lse_others)
        sum_a = tl.where(takes, sum_a_adv, sum_a)
        sum_bo = tl.where(takes, sum_bo_adv, sum_bo)
        bp_top = tl.where(takes, bp_top_adv, bp_top)
        g = tl.where(takes, g_adv, g)
    lam_sel = tl.where(takes, lam_adv, lam)
    return loss, lam_sel, lam_adv, grad, delta, takes, lse, sum_a, top, lse_others, sum_bo, bp_top, g
