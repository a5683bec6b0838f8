"""What every kernel over rows of logits shares: the mixture, its target, its loss and the step of λ.

Equation numbers refer to kernels/README.md. A tile is (BLOCK_C,) for one row, whose scalars are then scalars, or
(BLOCK_B, BLOCK_C) for several, whose scalars are (BLOCK_B, 1) and whose column numbers are (1, BLOCK_C): the code
is the same for both, and below "per row" means either. (A (1, BLOCK_C) tile would do for one row, but its
(1, 1) scalars lead the compiler to layouts that spill.) A column past the last class holds -inf in a tile of logits
and 0 in a tile of target mass. All arithmetic is in lam's dtype: float32, or float64 for float64 logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of the (ROW_FIELDS, B) buffer that a forward leaves for the loss, the statistics and the backward.
LOSS = tl.constexpr(0)  # ℓ at the selected λ*
MASS = tl.constexpr(1)  # kept, class-weighted mass: the row's share of the divisor
LAM = tl.constexpr(2)  # λ*
LAM_ADV = tl.constexpr(3)  # λ'
GRAD = tl.constexpr(4)  # ∇λ
DELTA = tl.constexpr(5)  # ℓ(λ') - ℓ(λ)
MASK = tl.constexpr(6)  # 1 where λ* = λ'
SHIFT_A = tl.constexpr(7)  # what was subtracted from the row's logits
SHIFT_B = tl.constexpr(8)  # and from its partner's
LSE = tl.constexpr(9)  # log Σ_c exp x_c at λ*, of shifted logits
TOTAL = tl.constexpr(10)  # S = Σ_c t_c
ROW_FIELDS = 11

# What every launch says: Triton fuses products and sums where nothing is said, and has announced that it will not.
OPTIONS = {"enable_fp_fusion": True}
# Launch options under which a label out of range stops the kernel; without the checks of integer overflow that
# would come with them.
ASSERTING = {**OPTIONS, "debug": True, "sanitize_overflow": False}


@triton.jit
def row_sum(tile):
    """Sum of each row of a tile."""
    if len(tile.shape) == 2:
        return tl.sum(tile, 1)[:, None]
    else:
        return tl.sum(tile, 0)


@triton.jit
def row_max(tile):
    """Maximum of each row of a tile."""
    if len(tile.shape) == 2:
        return tl.max(tile, 1)[:, None]
    else:
        return tl.max(tile, 0)


@triton.jit
def row_argmax(tile):
    """Position of the first maximum of each row of a tile."""
    if len(tile.shape) == 2:
        return tl.argmax(tile, 1)[:, None]
    else:
        return tl.argmax(tile, 0)


@triton.jit
def rows_total(value):
    """Sum over rows of a value per row."""
    if len(value.shape) == 2:
        return tl.sum(value)
    else:
        return value


@triton.jit
def tile_index(block_row, block_col, B, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row numbers (int64), column numbers and which rows exist, for one tile of a (B, C) matrix."""
    cols = block_col * BLOCK_C + tl.arange(0, BLOCK_C)
    if BLOCK_B == 1:
        row = block_row.to(tl.int64)
        return row, cols, row < B  # the grid is exact: every row exists
    else:
        index = (block_row.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
        # A row too many repeats the last one, and is not written.
        return tl.where(index < B, index, B - 1), cols[None, :], index < B


@triton.jit
def tile_mask(ok, cols, C, BLOCK_B: tl.constexpr):
    """Which elements of a tile exist."""
    if BLOCK_B == 1:
        return cols < C
    else:
        return ok & (cols < C)


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
    else:
        y = 1.0 + u * 0.125
    y = 1.0 + u * 0.14285714285714285 * y
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
    """log(1 + v) for v > -1, exact near 0: 2 atanh(v / (2 + v)) by its series where |v| < 0.3."""
    y = v / (2.0 + v)
    y2 = y * y
    if v.dtype == tl.float64:
        series = 0.07692307692307693 + y2 * (
            0.06666666666666667 + y2 * (0.058823529411764705 + y2 * 0.05263157894736842)
        )
        series = 0.1111111111111111 + y2 * (0.09090909090909091 + y2 * series)
    else:
        series = tl.full(v.shape, 0.1111111111111111, v.dtype)
    series = 1.0 + y2 * (0.3333333333333333 + y2 * (0.2 + y2 * (0.14285714285714285 + y2 * series)))
    return tl.where(tl.abs(v) < 0.3, 2.0 * y * series, tl.log(1.0 + v))


@triton.jit
def load_logits(
    logits_ptr,  # (B, C)
    row,  # int64, per row, in 0..B-1
    cols,
    C,
    stride_zm,
    stride_zn,
    dtype: tl.constexpr,
):
    """A tile of logits in `dtype`, -inf past the last class."""
    at = logits_ptr + row * stride_zm + cols.to(tl.int64) * stride_zn
    return tl.load(at, mask=cols < C, other=float("-inf")).to(dtype)


@triton.jit
def mixed_logits(
    a,  # tile of the row's logits
    b,  # tile of its partner's
    shift_a,  # per row
    shift_b,  # per row
    lam,  # per row
):
    """X = b + λd and d = a - b of shifted logits; a class that is -inf in either is -inf in x, with d = 0."""
    excluded = (a == float("-inf")) | (b == float("-inf"))
    b = b - shift_b
    d = tl.where(excluded, 0.0, (a - shift_a) - b)
    return tl.where(excluded, float("-inf"), b + lam * d), d


@triton.jit
def row_shift(a):
    """A value near the largest logit of each row of a tile; 0 where the tile has no finite one."""
    top = row_max(a)
    return tl.where((top == float("-inf")) | (top == float("inf")), 0.0, top)


@triton.jit
def label_mass(target_ptr, weight_ptr, lam, row, other, C, policy: tl.constexpr):
    """Per row: both labels, their mass λ_r kept_r and (1-λ_r) kept_π, and the row's share of the divisor."""
    label_a = tl.load(target_ptr + row)
    label_b = tl.load(target_ptr + other)
    kept_a = label_a != policy.ignore_index
    kept_b = label_b != policy.ignore_index
    tl.device_assert((label_a == policy.ignore_index) | ((label_a >= 0) & (label_a < C)), "target out of range")
    mass_a = tl.where(kept_a, lam, 0.0)
    mass_b = tl.where(kept_b, 1.0 - lam, 0.0)
    if weight_ptr is None:
        share = mass_a + mass_b
    else:
        # An out-of-range label must not become an out-of-range read where assertions are off.
        known_a = kept_a & (label_a >= 0) & (label_a < C)
        known_b = kept_b & (label_b >= 0) & (label_b < C)
        weight_a = tl.load(weight_ptr + label_a, mask=known_a, other=0.0).to(lam.dtype)
        weight_b = tl.load(weight_ptr + label_b, mask=known_b, other=0.0).to(lam.dtype)
        share = mass_a * weight_a + mass_b * weight_b
    return label_a, label_b, mass_a, mass_b, share


@triton.jit
def target_tile(
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    weight_ptr,  # (C,) or None
    lam,  # per row
    row,  # int64, per row
    other,  # int64, per row
    cols,
    C,
    policy: tl.constexpr,
):
    """Class-weighted target mass, and the row's share of the divisor."""
    inside = cols < C
    if target_ptr.dtype.element_ty == tl.int64:
        label_a, label_b, mass_a, mass_b, share = label_mass(target_ptr, weight_ptr, lam, row, other, C, policy)
        on = tl.where(cols == label_a, mass_a, 0.0) + tl.where(cols == label_b, mass_b, 0.0)
        kept = mass_a + mass_b
    else:
        at_a = target_ptr + row * C + cols
        at_b = target_ptr + other * C + cols
        on_a = tl.load(at_a, mask=inside, other=0.0).to(lam.dtype)
        on_b = tl.load(at_b, mask=inside, other=0.0).to(lam.dtype)
        on = lam * on_a + (1.0 - lam) * on_b
        kept = tl.full(lam.shape, 1.0, lam.dtype)
        share = kept
    if policy.label_smoothing > 0:
        smoothing = tl.full((), policy.label_smoothing, lam.dtype)
        on = tl.where(inside, (1.0 - smoothing) * on + smoothing / C * kept, 0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(lam.dtype)
        on = on * weight
    return on, share


@triton.jit
def step_lam(lam, grad, step_size, policy: tl.constexpr):
    """λ' = λ + ε·clip(∇λ) (7); comparisons rather than minimum and maximum, so that NaN stays NaN."""
    lam_adv = lam
    if policy.mode != "mixup":
        if policy.grad_clip is not None:
            clip = tl.full((), policy.grad_clip, lam.dtype)
            grad = tl.where(grad > clip, clip, tl.where(grad < -clip, -clip, grad))
        lam_adv = lam + tl.full((), step_size, lam.dtype) * grad
        if policy.clamp:
            lam_adv = tl.where(lam_adv > 1.0, 1.0, tl.where(lam_adv < 0.0, 0.0, lam_adv))
    return lam_adv


@triton.jit
def takes_adversarial(loss, delta, policy: tl.constexpr):
    """Which rows take ℓ(λ') (9)."""
    if policy.mode == "mixup":
        takes = tl.full(delta.shape, False, tl.int1)
    elif policy.keeps_all:
        takes = tl.full(delta.shape, True, tl.int1)
    else:
        if policy.tie_tol is None:
            ulps: tl.constexpr = 8.881784197001252e-16 if loss.dtype == tl.float64 else 4.76837158203125e-07
            takes = gains(loss, delta, 0.0, ulps)
        elif policy.tie_tol == 0:
            takes = delta > 0
        else:
            takes = gains(loss, delta, policy.tie_tol, 0.0)
    return takes


@triton.jit
def gains(loss, delta, tie_abs, tie_rel):
    """Where δ > 0, or no further below than a tie tolerance that is not 0 (9); False for NaN."""
    size = tl.where(tl.abs(loss) > 1.0, tl.abs(loss), 1.0)
    tolerance = tl.full((), tie_abs, loss.dtype) + tl.full((), tie_rel, loss.dtype) * size
    return (delta > 0) | ((tolerance > 0) & (delta >= -tolerance))


@triton.jit
def scaled_grad(grad, grad_divisor_ptr):
    """∇λ of the row's loss, or of the batch mean where a divisor is given; 0 where nothing is kept."""
    if grad_divisor_ptr is not None:
        divisor = tl.load(grad_divisor_ptr).to(grad.dtype)
        grad = tl.where(divisor == 0.0, 0.0, grad / tl.where(divisor == 0.0, 1.0, divisor))
    return grad


@triton.jit
def field_at(rows_ptr, field: tl.constexpr, row, B):
    """Where a value per row stands in the (fields, B) buffer, of less than 2^31 elements.

    An offset in 64 bits costs the program of a whole batch more registers than sm_100 has room for.
    """
    return rows_ptr + field * B + row


@triton.jit
def store_field(rows_ptr, field: tl.constexpr, row, B, value, ok):
    """Write a value per row to a field of the (fields, B) buffer."""
    tl.store(field_at(rows_ptr, field, row, B), value, mask=ok)


@triton.jit
def store_scalars(
    rows_ptr,
    row,
    B,
    ok,  # per row: whether it exists
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
):
    """Write what every forward leaves of a row."""
    store_field(rows_ptr, LOSS, row, B, loss, ok)
    store_field(rows_ptr, MASS, row, B, share, ok)
    store_field(rows_ptr, LAM, row, B, lam_sel, ok)
    store_field(rows_ptr, LAM_ADV, row, B, lam_adv, ok)
    store_field(rows_ptr, GRAD, row, B, grad, ok)
    store_field(rows_ptr, DELTA, row, B, delta, ok)
    store_field(rows_ptr, MASK, row, B, takes.to(loss.dtype), ok)
    store_field(rows_ptr, SHIFT_A, row, B, shift_a, ok)
    store_field(rows_ptr, SHIFT_B, row, B, shift_b, ok)
    store_field(rows_ptr, LSE, row, B, lse, ok)
    store_field(rows_ptr, TOTAL, row, B, total, ok)
