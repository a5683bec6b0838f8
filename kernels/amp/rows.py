"""What every kernel over rows of logits shares: the mixture, its target and the step of λ.

Equation numbers refer to kernels/README.md. A tile is (BLOCK_C,) for one row, whose scalars are then scalars, or
(BLOCK_C, BLOCK_B) for several, whose scalars are (BLOCK_B,) and whose column numbers are (BLOCK_C, 1): sums are over
the first dimension, and the code is the same for both. Below "per row" means either. All arithmetic is in lam's dtype:
float32, or float64 for float64 logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
SHIFT_A = tl.constexpr(7)  # what was subtracted from the row's logits, in units of log 2, as the three below
SHIFT_B = tl.constexpr(8)  # and from its partner's
LSE = tl.constexpr(9)  # log Σ_c exp x_c at λ*, of shifted logits
TOTAL = tl.constexpr(10)  # S = Σ_c t_c
EASY = tl.constexpr(11)  # 1 where both rows are finite
ROW_FIELDS = tl.constexpr(12)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# What every launch says: Triton fuses products and sums where nothing is said, and has announced that it will not.
OPTIONS = {"enable_fp_fusion": True}
# Launch options under which a label out of range stops the kernel; without the checks of integer overflow that
# would come with them.
ASSERTING = {**OPTIONS, "debug": True, "sanitize_overflow": False}


class Problem(NamedTuple):
    """What all roles of a launch share."""

    logits_ptr: Any  # (B, C), any strides
    stride_zm: Any
    stride_zn: Any
    target_ptr: Any  # (B,) int64 or (B, C) floating point, contiguous
    weight_ptr: Any  # (C,) class weights, for binary cross-entropy (2, C), of yes and of no; or None
    lam_ptr: Any  # (B,) compute dtype
    grad_divisor_ptr: Any  # () divisor of ∇λ or None
    C: Any
    step_size: Any


class Role(NamedTuple):
    """What AMP makes of a row that is mixed with its partner: scalars per row, in the order of the fields."""

    loss: Any
    share: Any
    lam: Any
    lam_adv: Any
    grad: Any
    delta: Any
    takes: Any
    shift_a: Any
    shift_b: Any
    lse: Any
    total: Any
    easy: Any


class Labels(NamedTuple):
    """Both labels of a mixed row (0 for what is ignored), their mass, and that with class weights or per class."""

    a: Any
    b: Any
    mass_a: Any
    mass_b: Any
    on_a: Any
    on_b: Any


# Rows


@triton.jit
def _source(partner_ptr, row, B):
    """The row whose partner each row is, by a look at all of them."""
    if len(row.shape) == 1:
        found = tl.zeros(row.shape, tl.int32)
        for start in range(0, B, 16):
            index = start + tl.arange(0, 16)[:, None]
            points = tl.load(partner_ptr + index, mask=index < B, other=-1)
            found += tl.sum(tl.where(points == row, index, 0), 0)
    else:
        found = tl.zeros((64,), tl.int32)
        for start in range(0, B, 64):
            index = start + tl.arange(0, 64)
            found += tl.where(tl.load(partner_ptr + index, mask=index < B, other=-1) == row, index, 0)
        found = tl.sum(found, 0)
    return found.to(tl.int64)


@triton.jit
def partners(partner_ptr, inverse_ptr, row, B, policy: tl.constexpr):
    """The partner of each row, and the row whose partner it is."""
    other = tl.load(partner_ptr + row)
    if policy.pairing == "matching":
        tl.device_assert(tl.load(partner_ptr + other) == row, "partner is not its own inverse")
        source = other
    elif inverse_ptr is not None:
        source = tl.load(inverse_ptr + row)
    else:
        source = _source(partner_ptr, row, B)
    return other, source


# Logits


@triton.jit
def load_tile(problem, row, cols, OTHER: tl.constexpr):
    """A tile of logits in the compute dtype, OTHER past the last class."""
    at = problem.logits_ptr + row * problem.stride_zm + cols.to(tl.int64) * problem.stride_zn
    return tl.load(at, mask=cols < problem.C, other=OTHER).to(problem.lam_ptr.dtype.element_ty)


@triton.jit
def load_logits(problem, row, cols):
    """A tile of logits, -inf past the last class."""
    return load_tile(problem, row, cols, float("-inf"))


@triton.jit
def load_finite(problem, row, cols):
    """A tile of logits, past the last class a number so low that its exponential is 0 beside any tame one's."""
    low: tl.constexpr = -65504.0 if problem.logits_ptr.dtype.element_ty == tl.float16 else -1e30
    return load_tile(problem, row, cols, low)


@triton.jit
def is_tame(problem, top):
    """Whether a row's largest logit stands clear of what `load_finite` puts past the last class."""
    if problem.logits_ptr.dtype.element_ty == tl.float16:
        return top > -6e4
    else:
        return top > -1e29


@triton.jit
def row_shift(a, policy: tl.constexpr):
    """log2(e) times a value near the largest logit of each row of a tile; 0 where the tile has no finite one.

    And 0 for binary cross-entropy, which an offset changes.
    """
    top = tl.max(a, 0)
    if policy.loss == "binary_cross_entropy":
        top = tl.zeros_like(top)
    return tl.where((top == float("-inf")) | (top == float("inf")), 0.0, top) * LOG2E


@triton.jit
def scaled(z, shift):
    """Logits in units of log 2, less a shift: rounded once, so that a common offset, however large, costs no digits."""
    return tl.fma(z, tl.full((), LOG2E, z.dtype), -shift)


@triton.jit
def mixed_logits(
    a,  # tile of the row's logits
    b,  # tile of its partner's
    shift_a,  # per row
    shift_b,  # per row
    lam,  # per row
):
    """X = b + λd and d = a - b of shifted logits, in units of log 2; -inf in either makes -inf in x, with d = 0."""
    excluded = (a == float("-inf")) | (b == float("-inf"))
    b = scaled(b, shift_b)
    d = tl.where(excluded, 0.0, scaled(a, shift_a) - b)
    return tl.where(excluded, float("-inf"), b + lam * d), d


# Targets


@triton.jit
def per_class(problem, policy: tl.constexpr):
    """What binary cross-entropy takes of each class: 1/C, or 1 for their sum."""
    one = tl.full((), 1.0, problem.lam_ptr.dtype.element_ty)
    return one if policy.sum_classes else one / problem.C


@triton.jit
def load_labels(problem, lam, row, other, policy: tl.constexpr):
    """Both labels of each row, with their mass: λ_r of the row's own, 1-λ_r of its partner's, 0 of an ignored one."""
    C = problem.C
    a = tl.load(problem.target_ptr + row)
    b = tl.load(problem.target_ptr + other)
    tl.device_assert((a == policy.ignore_index) | ((a >= 0) & (a < C)), "target out of range")
    # An out-of-range label must not become an out-of-range read where assertions are off.
    known_a = (a != policy.ignore_index) & (a >= 0) & (a < C)
    known_b = (b != policy.ignore_index) & (b >= 0) & (b < C)
    mass_a = tl.where(known_a, lam, 0.0)
    mass_b = tl.where(known_b, 1.0 - lam, 0.0)
    a = tl.where(known_a, a, 0).to(tl.int32)
    b = tl.where(known_b, b, 0).to(tl.int32)
    if policy.loss == "binary_cross_entropy":
        part = per_class(problem, policy)
        return Labels(a, b, mass_a, mass_b, mass_a * part, mass_b * part)
    elif problem.weight_ptr is None:
        return Labels(a, b, mass_a, mass_b, mass_a, mass_b)
    else:
        weight_a = tl.load(problem.weight_ptr + a).to(lam.dtype)
        weight_b = tl.load(problem.weight_ptr + b).to(lam.dtype)
        return Labels(a, b, mass_a, mass_b, mass_a * weight_a, mass_b * weight_b)


@triton.jit
def target_tile(problem, lam, row, other, cols, policy: tl.constexpr):
    """Class-weighted target mass, and the row's share of the divisor."""
    inside = cols < problem.C
    if problem.target_ptr.dtype.element_ty == tl.int64:
        labels = load_labels(problem, lam, row, other, policy)
        on = tl.where(cols == labels.a, labels.mass_a, 0.0) + tl.where(cols == labels.b, labels.mass_b, 0.0)
        kept = labels.mass_a + labels.mass_b
        share = labels.on_a + labels.on_b
    else:
        on_a = tl.load(problem.target_ptr + row * problem.C + cols, mask=inside, other=0.0).to(lam.dtype)
        on_b = tl.load(problem.target_ptr + other * problem.C + cols, mask=inside, other=0.0).to(lam.dtype)
        on = lam * on_a + (1.0 - lam) * on_b
        kept = tl.full(lam.shape, 1.0, lam.dtype)
        share = kept
    if policy.label_smoothing > 0:
        smoothing = tl.full((), policy.label_smoothing, lam.dtype)
        on = tl.where(inside, (1.0 - smoothing) * on + smoothing / problem.C * kept, 0.0)
    if problem.weight_ptr is not None:
        on *= tl.load(problem.weight_ptr + cols, mask=inside, other=0.0).to(lam.dtype)
    return on, share


@triton.jit
def binary_target_tile(problem, lam, row, other, cols, policy: tl.constexpr):
    """Target mass of binary cross-entropy for each class, S_c = that for and against it, and what is kept."""
    C = problem.C
    inside = cols < C
    if problem.target_ptr.dtype.element_ty == tl.int64:
        labels = load_labels(problem, lam, row, other, policy)
        on = tl.where(cols == labels.a, labels.mass_a, 0.0) + tl.where(cols == labels.b, labels.mass_b, 0.0)
        kept = tl.where(inside, labels.mass_a + labels.mass_b, 0.0)
        nothing = 1.0 / C.to(lam.dtype)
    else:
        a = tl.load(problem.target_ptr + row * C + cols, mask=inside, other=0.0).to(lam.dtype)
        b = tl.load(problem.target_ptr + other * C + cols, mask=inside, other=0.0).to(lam.dtype)
        mass_a = tl.where(inside & (a != policy.ignore_index), lam, 0.0)
        mass_b = tl.where(inside & (b != policy.ignore_index), 1.0 - lam, 0.0)
        on = mass_a * a + mass_b * b
        kept = mass_a + mass_b
        nothing = 0.5
    if policy.label_smoothing > 0:
        smoothing = tl.full((), policy.label_smoothing, lam.dtype)
        on = (1.0 - smoothing) * on + smoothing * nothing * kept
    total = kept
    if problem.weight_ptr is not None:
        off = (kept - on) * tl.load(problem.weight_ptr + C + cols, mask=inside, other=0.0).to(lam.dtype)
        on *= tl.load(problem.weight_ptr + cols, mask=inside, other=0.0).to(lam.dtype)
        total = on + off
    part = per_class(problem, policy)
    return on * part, total * part, kept


@triton.jit
def target_masses(problem, lam, row, other, cols, policy: tl.constexpr):
    """Target mass t, S with g = S p - t, one per row or for binary cross-entropy one per class, and the row's share."""
    if policy.loss == "binary_cross_entropy":
        on, total, kept = binary_target_tile(problem, lam, row, other, cols, policy)
        share = tl.sum(kept, 0) / problem.C
    else:
        on, share = target_tile(problem, lam, row, other, cols, policy)
        total = tl.sum(on, 0)
    return on, total, share


# The step of λ and the choice


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
    elif policy.keeps_all or policy.mode == "maxop":
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
def reciprocal(scale):
    """1/scale; 0 where nothing is kept: the mean is then 0/0, and its gradient 0."""
    return tl.where(scale == 0.0, 0.0, 1.0 / tl.where(scale == 0.0, 1.0, scale))


# The buffer of a forward


@triton.jit
def field_at(rows_ptr, field: tl.constexpr, row, B):
    """Where a value per row stands in the (fields, B) buffer, of less than 2^31 elements.

    An offset in 64 bits costs the program of a whole batch more registers than sm_100 has room for.
    """
    return rows_ptr + field * B + row


@triton.jit
def store_role(rows_ptr, row, B, ok, role, FIELDS: tl.constexpr):
    """Write the first FIELDS values of each row that is ok."""
    for field in tl.static_range(FIELDS):
        tl.store(field_at(rows_ptr, field, row, B), role[field].to(rows_ptr.dtype.element_ty), mask=ok)
