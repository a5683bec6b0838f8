"""Losses of tiles by either cross-entropy, their gradients and their changes, to the last digits.

Tiles are as in rows.py, logits in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import LN2, LOG2E


@triton.jit
def expm1_near(u):
    """expm1 for |u| <= 1/4 by its Taylor series: no cancellation, and cheaper than an exponential."""
    if u.dtype == tl.float64:
        y = 1.0 + u * 0.07142857142857142  # u/14
        y = 1.0 + u * 0.07692307692307693 * y
        y = 1.0 + u * 0.08333333333333333 * y
        y = 1.0 + u * 0.09090909090909091 * y
        y = 1.0 + u * 0.1 * y
        y = 1.0 + u * 0.1111111111111111 * y
        y = 1.0 + u * 0.125 * y
        y = 1.0 + u * 0.14285714285714285 * y
    else:
        y = 1.0 + u * 0.14285714285714285
    y = 1.0 + u * 0.16666666666666666 * y
    y = 1.0 + u * 0.2 * y
    y = 1.0 + u * 0.25 * y
    y = 1.0 + u * 0.3333333333333333 * y
    y = 1.0 + u * 0.5 * y
    return u * y


@triton.jit
def expm1_unit(u):
    """expm1 for |u| <= 1: that of a quarter, squared up twice; expm1(2a) = e (e + 2) with e = expm1(a)."""
    e = expm1_near(0.25 * u)
    e = e * (e + 2.0)
    return e * (e + 2.0)


@triton.jit
def log1p_any(v):
    """log(1 + v) for v > -1, exact near 0 and without a branch; NaN beyond the numbers.

    k log 2 + 2 atanh(t / (2 + t)) by its series, where 1 + v = 2^k (1 + t) with 1 + t in [1/√2, √2): the bits of 1 + v
    less those of 1/√2 begin with k.
    """
    if v.dtype == tl.float64:
        k = ((1.0 + v).to(tl.int64, bitcast=True) - 0x3FE6A09E667F3BCD) >> 52
        shrink = (0x3FF0000000000000 - (k << 52)).to(tl.float64, bitcast=True)
    else:
        k = ((1.0 + v).to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23
        shrink = (0x3F800000 - (k << 23)).to(tl.float32, bitcast=True)
    t = v * shrink + (shrink - 1.0)
    y = t / (2.0 + t)
    y2 = y * y
    series = tl.full(v.shape, 0.1111111111111111, v.dtype)
    if v.dtype == tl.float64:
        series = 0.05263157894736842 + y2 * (0.047619047619047616 + y2 * 0.043478260869565216)
        series = 0.07692307692307693 + y2 * (0.06666666666666667 + y2 * (0.058823529411764705 + y2 * series))
        series = 0.1111111111111111 + y2 * (0.09090909090909091 + y2 * series)
    series = 0.3333333333333333 + y2 * (0.2 + y2 * (0.14285714285714285 + y2 * series))
    return k.to(v.dtype) * LN2 + (2.0 * y + 2.0 * y * y2 * series)


@triton.jit
def sigmoid(x):
    """2^x, and the sigmoid of x in units of log 2; NaN where the power leaves the range of numbers."""
    e = tl.exp2(x)
    return e, e * (1.0 / (1.0 + e))


@triton.jit
def binary_loss(x, on, total):
    """A tile of binary cross-entropy of logits in units of log 2, whatever they are, and their sigmoids (30, 32)."""
    e = tl.exp2(-tl.abs(x))
    p = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    above = tl.where(x > 0, total, 0.0) - on
    return total * log1p_any(e) + tl.where(above != 0, above * x, 0.0) * LN2, p


@triton.jit
def binary_change(p, on, total, u, far):
    """A tile of δ from the change u of the logits (33); `far`, the difference of the losses, where |u| > 1."""
    near = total * log1p_any(p * expm1_unit(tl.where(u > 1.0, 1.0, tl.where(u < -1.0, -1.0, u)))) - on * u
    return tl.where(tl.abs(u) <= 1.0, near, far)


@triton.jit
def loss_at(x, on, total, policy: tl.constexpr):
    """The loss of rows in units of log 2; p, their softmax or sigmoids; and lse, the softmax's normalisation (2, 3)."""
    top = tl.max(x, 0)
    if policy.loss == "binary_cross_entropy":
        losses, p = binary_loss(x, on, total)
        loss = tl.sum(losses, 0)
        lse = tl.zeros_like(top)
    else:
        x = x - top
        p = tl.exp2(x)
        sum_exp = tl.sum(p, 0)
        log_sum = tl.log(sum_exp) * LOG2E
        loss = tl.sum(tl.where(on != 0, on * (log_sum - x), 0.0), 0) * LN2
        p *= 1.0 / sum_exp
        lse = top + log_sum
    return loss, p, lse


@triton.jit
def loss_change(p, on, total, u, far, policy: tl.constexpr):
    """δ per row from the change u of its logits (26, 33); `far`, the difference of the losses, where some |u| > 1."""
    if policy.loss == "binary_cross_entropy":
        near = tl.sum(binary_change(p, on, total, u, 0.0), 0)
    else:
        u_near = tl.where(u > 1.0, 1.0, tl.where(u < -1.0, -1.0, u))  # comparisons keep NaN
        near = total * log1p_any(tl.sum(p * expm1_unit(u_near), 0)) - tl.sum(on * u, 0)
    return tl.where(tl.max(tl.abs(u), 0) <= 1.0, near, far)
