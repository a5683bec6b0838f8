"""The losses of rows that are held in registers whole, and their step of λ (2-10)."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    expm1_near,
    expm1_unit,
    log1p_any,
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
