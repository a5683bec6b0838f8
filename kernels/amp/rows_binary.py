"""Binary cross-entropy of rows of more than a few classes, a program a row or pair (30-34).

A class does not see the others, so nothing has to be relative to a row's largest logit. Most rows take a lean path,
which knows beforehand which of the two losses is wanted. A logit beyond the range of exponentials and an excluded class
show in its sums, once a row, as does a step too large for it: such a row takes careful loops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .losses import log1p_any, sigmoid
from .rows import (
    LN2,
    ROW_FIELDS,
    Problem,
    Role,
    binary_target_tile,
    load_finite,
    partners,
    reciprocal,
    scaled,
    scaled_grad,
    step_lam,
    store_role,
    takes_adversarial,
)
from .rows_careful import careful_binary_role, careful_row_grad
from .rows_registers import minus_target, sparse_targets


class Mass(NamedTuple):
    """A target: of a row of labels without weights and smoothing, which is SPARSE, as a whole, else of a tile."""

    on: Any  # `Labels`, or a tile
    total: Any  # S
    kept: Any
    on_b: Any  # ⟨t, b⟩ of a SPARSE row
    on_d: Any  # ⟨t, d⟩


class Sums(NamedTuple):
    """Over the classes of a row: of ∂ℓ/∂λ and of the loss at λ', of S d², the largest |d|, and the kept share."""

    slope: Any
    loss: Any
    spread: Any
    top: Any
    share: Any


@triton.jit
def _product(first, second):
    """(1 + first)(1 + second) - 1, in which nothing small is lost."""
    return first + second + first * second


@triton.jit
def _at(b, d, lam, mass, SPARSE: tl.constexpr, ALIGN: tl.constexpr):
    """A tile of ∂ℓ/∂λ in units of log 2, one of the loss, and the sigmoids, of rows mixed at λ (30-32).

    With SPARSE targets both are over S and less what the labels have of it; and the loss is that of eight classes to an
    element: of those that a lane has loaded at once, or of classes a part of a row apart.
    """
    x = b + lam * d
    e, p = sigmoid(x)
    if SPARSE:
        slope = p * d
        if ALIGN > 1:
            loss = log1p_any(tl.reduce(tl.reshape(e, (e.shape[0] // 8, 8)), 1, _product))
        else:
            loss = log1p_any(tl.reduce(tl.reshape(e, (8, e.shape[0] // 8)), 0, _product))
    else:
        slope = (mass.total * p - mass.on) * d
        loss = mass.total * log1p_any(e) - mass.on * x * LN2
    return slope, loss, p


@triton.jit
def _mass(problem, lam, row, other, cols, policy: tl.constexpr, SPARSE: tl.constexpr):
    """The target of a SPARSE row, or of a tile."""
    if SPARSE:
        on, total, on_b, on_d = sparse_targets(problem, row, other, lam, 0.0, 0.0, policy)
        return Mass(on, total, on.mass_a + on.mass_b, on_b, on_d)
    else:
        on, total, kept = binary_target_tile(problem, lam, row, other, cols, policy)
        return Mass(on, total, kept, 0.0, 0.0)


@triton.jit
def _stepped(problem, lam, slope, mass, policy: tl.constexpr, SPARSE: tl.constexpr):
    """The row's own ∇λ from the sum of its slopes; ∇λ, and λ'."""
    own = (mass.total * slope - mass.on_d) * LN2 if SPARSE else slope * LN2
    grad = scaled_grad(own, problem.grad_divisor_ptr)
    return own, grad, step_lam(lam, grad, problem.step_size, policy)


@triton.jit
def _role(lam, lam_adv, own, grad, mass, sums, policy: tl.constexpr, SPARSE: tl.constexpr):
    """The role of a row from the sums over its classes, `easy` where they decide it.

    δ is taken from the slopes at both ends, a trapezoid (34); the spread and the top bound what that leaves out.
    """
    slope, loss, spread = sums.slope, sums.loss, sums.spread
    total = tl.full((), 0.0, lam.dtype)
    zero = total
    if SPARSE:
        total = mass.total
        slope = total * slope - mass.on_d
        loss = total * loss - (mass.on_b + lam_adv * mass.on_d) * LN2
        spread *= total
    step = lam_adv - lam
    delta = 0.5 * step * (own + slope * LN2)
    reach = tl.abs(step) * sums.top * LN2
    left_out = 0.0039 * reach * step * step * spread  # log(2)² / (12·6√3)
    easy = (tl.abs(loss) < float("inf")) & (tl.abs(own) < float("inf")) & (tl.abs(slope) < float("inf"))
    easy = easy & (reach <= 0.25) & (left_out <= 2e-7 * tl.maximum(tl.abs(loss), 1.0))
    takes = takes_adversarial(loss, delta, policy)
    return Role(loss, sums.share, lam_adv, lam_adv, grad, delta, takes, zero, zero, zero, total, easy)


@triton.jit
def _whole_role(problem, a, b, row, other, cols, policy: tl.constexpr, SPARSE: tl.constexpr, ALIGN: tl.constexpr):
    """The role of one row from logits a and b in units of log 2; the sigmoids at λ*, and the target."""
    lam = tl.load(problem.lam_ptr + row)
    mass = _mass(problem, lam, row, other, cols, policy, SPARSE)
    d = a - b
    slope, _, _ = _at(b, d, lam, mass, SPARSE, ALIGN)
    own, grad, lam_adv = _stepped(problem, lam, tl.sum(slope, 0), mass, policy, SPARSE)
    slope, loss, p = _at(b, d, lam_adv, mass, SPARSE, ALIGN)
    share = mass.kept if SPARSE else tl.sum(mass.kept, 0) / problem.C
    spread = tl.sum(d * d, 0) if SPARSE else tl.sum(mass.total * d * d, 0)
    sums = Sums(tl.sum(slope, 0), tl.sum(loss, 0), spread, tl.max(tl.abs(d), 0), share)
    return _role(lam, lam_adv, own, grad, mass, sums, policy, SPARSE), p, mass


@triton.jit
def _source_role(problem, a, b, row, other, cols, policy: tl.constexpr, SPARSE: tl.constexpr, ALIGN: tl.constexpr):
    """What another row's gradient needs of a role: λ', whether it is right, and as `_whole_role`."""
    lam = tl.load(problem.lam_ptr + row)
    mass = _mass(problem, lam, row, other, cols, policy, SPARSE)
    slope, _, _ = _at(b, a - b, lam, mass, SPARSE, ALIGN)
    own, _, lam_adv = _stepped(problem, lam, tl.sum(slope, 0), mass, policy, SPARSE)
    # What was in range at λ may leave it by the step, which nothing else would show.
    _, p = sigmoid(tl.minimum(b + lam_adv * (a - b), 126.0))
    return lam_adv, tl.abs(own) < float("inf"), p, mass


@triton.jit
def _long_role(
    problem, row, other, policy: tl.constexpr, SPARSE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):
    """The role of one row by two loops over tiles."""
    lam = tl.load(problem.lam_ptr + row)
    first = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), lam.dtype)
    slopes = zeros
    spreads = zeros
    shares = zeros
    top = zeros
    mass = _mass(problem, lam, row, other, first, policy, SPARSE)
    share = mass.kept
    for start in range(0, problem.C, BLOCK):
        cols = start + first
        b = scaled(load_finite(problem, other, cols), 0.0)
        d = scaled(load_finite(problem, row, cols), 0.0) - b
        if not SPARSE:
            mass = _mass(problem, lam, row, other, cols, policy, SPARSE)
            shares += mass.kept
        slope, _, _ = _at(b, d, lam, mass, SPARSE, ALIGN)
        slopes += slope
        spreads += d * d if SPARSE else mass.total * d * d
        top = tl.maximum(top, tl.abs(d))
    own, grad, lam_adv = _stepped(problem, lam, tl.sum(slopes, 0), mass, policy, SPARSE)
    slopes = zeros
    losses = tl.zeros((BLOCK // 8 if SPARSE else BLOCK,), lam.dtype)
    for start in range(0, problem.C, BLOCK):
        cols = start + first
        b = scaled(load_finite(problem, other, cols), 0.0)
        d = scaled(load_finite(problem, row, cols), 0.0) - b
        if not SPARSE:
            mass = _mass(problem, lam, row, other, cols, policy, SPARSE)
        slope, loss, _ = _at(b, d, lam_adv, mass, SPARSE, ALIGN)
        slopes += slope
        losses += loss
    if not SPARSE:
        share = tl.sum(shares, 0) / problem.C
    sums = Sums(tl.sum(slopes, 0), tl.sum(losses, 0), tl.sum(spreads, 0), tl.max(top, 0), share)
    return _role(lam, lam_adv, own, grad, mass, sums, policy, SPARSE)


@triton.jit
def _store(dlogits_ptr, row, cols, C, dz):
    tl.store(dlogits_ptr + row * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=cols < C)


@triton.jit
def _amp_binary_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    inverse_ptr,  # (B,) int64 with inverse[partner[r]] = r; None: it is partner, or looked for
    weight_ptr,  # (2, C) class weights, of yes and of no, or None
    grad_divisor_ptr,  # () divisor of ∇λ or None
    dlogits_ptr,  # (B, C) contiguous, the complete gradient, or None
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
    WHOLE: tl.constexpr,  # whether a tile holds a row
):
    """Loss and complete gradient of a row; of a pair, by the program of its smaller row."""
    # Which tells the compiler so, for loads of 16 bytes.
    C = C // ALIGN * ALIGN
    stride_zm = stride_zm // ALIGN * ALIGN
    problem = Problem(logits_ptr, stride_zm, stride_zn, target_ptr, weight_ptr, lam_ptr, grad_divisor_ptr, C, step_size)
    has_labels: tl.constexpr = target_ptr.dtype.element_ty == tl.int64
    sparse: tl.constexpr = has_labels and policy.label_smoothing == 0 and weight_ptr is None
    pairs: tl.constexpr = policy.pairing == "matching"
    has_source: tl.constexpr = pairs or dlogits_ptr is not None
    # Doubles are too exact for what the lean path makes of δ.
    lean: tl.constexpr = (policy.keeps_all or policy.mode == "mixup") and lam_ptr.dtype.element_ty != tl.float64
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    other, source = partners(partner_ptr, inverse_ptr if has_source else partner_ptr, row, B, policy)
    if not pairs or other >= row:
        scale = reciprocal(tl.full((), divisor, lam_ptr.dtype.element_ty))
        easy = False
        if not lean:
            pass
        elif not WHOLE:
            role = _long_role(problem, row, other, policy, sparse, ALIGN, BLOCK_C)
            easy = role.easy
            if pairs:
                role_source = _long_role(problem, other, row, policy, sparse, ALIGN, BLOCK_C)
                easy = easy & role_source.easy
            if easy:
                store_role(rows_ptr, row, B, True, role, ROW_FIELDS)
                if pairs:
                    store_role(rows_ptr, other, B, True, role_source, ROW_FIELDS)
        else:
            # All rows are asked for before the first is used.
            a = load_finite(problem, row, cols)
            b = load_finite(problem, other, cols)
            c = b
            if has_source and not pairs:
                c = load_finite(problem, source, cols)
            a = scaled(a, 0.0)
            b = scaled(b, 0.0)
            role, p, mass = _whole_role(problem, a, b, row, other, cols, policy, sparse, ALIGN)
            easy = role.easy
            if pairs:
                role_source, p_source, mass_source = _whole_role(problem, b, a, other, row, cols, policy, sparse, ALIGN)
                lam_source = role_source.lam
                easy = easy & role_source.easy
            elif has_source:
                c = scaled(c, 0.0)
                lam_source, is_right, p_source, mass_source = _source_role(
                    problem, c, a, source, row, cols, policy, sparse, ALIGN
                )
                easy = easy & is_right
            if easy:
                store_role(rows_ptr, row, B, True, role, ROW_FIELDS)
                if pairs:
                    store_role(rows_ptr, other, B, True, role_source, ROW_FIELDS)
                if dlogits_ptr is not None:
                    own = scale * role.lam
                    theirs = scale * (1.0 - lam_source)
                    dz = (own * mass.total) * p + (theirs * mass_source.total) * p_source
                    dz = minus_target(dz, mass.on, mass_source.on, own, theirs, cols, pairs, sparse)
                    _store(dlogits_ptr, row, cols, C, dz)
                    if pairs:
                        own = scale * lam_source
                        theirs = scale * (1.0 - role.lam)
                        dz = (own * mass_source.total) * p_source + (theirs * mass.total) * p
                        dz = minus_target(dz, mass_source.on, mass.on, own, theirs, cols, pairs, sparse)
                        _store(dlogits_ptr, other, cols, C, dz)
        if not easy:
            role = careful_binary_role(problem, row, other, policy, BLOCK_CAREFUL)
            store_role(rows_ptr, row, B, True, role, ROW_FIELDS)
            if has_source:
                role_source = careful_binary_role(problem, source, row, policy, BLOCK_CAREFUL)
                if pairs:
                    store_role(rows_ptr, other, B, True, role_source, ROW_FIELDS)
                if dlogits_ptr is not None:
                    careful_row_grad(
                        problem, dlogits_ptr, row, other, source, role, role_source, scale, policy, BLOCK_CAREFUL
                    )
                    if pairs:
                        careful_row_grad(
                            problem, dlogits_ptr, other, row, row, role_source, role, scale, policy, BLOCK_CAREFUL
                        )
