"""Binary cross-entropy of rows of more than a few classes, a program a row or pair (28-31).

A class does not see the others, so nothing has to be relative to a row's largest logit. Most rows that registers hold
take a lean path, which knows beforehand which of the two losses is wanted. A logit beyond the range of exponentials and
an excluded class show in its sums, once a row, as does a step too large for it: such a row takes the careful loops,
and so does every longer one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    LN2,
    ROW_FIELDS,
    Labels,
    Problem,
    Role,
    binary_target_tile,
    load_finite,
    log1p_any,
    partners,
    per_class,
    reciprocal,
    scaled,
    scaled_grad,
    step_lam,
    store_role,
    takes_adversarial,
)
from .rows_careful import careful_binary_role, careful_row_grad
from .rows_registers import minus_target, sparse_targets

REACH = tl.constexpr(0.03)  # change of a logit up to which δ is taken from the slopes at both ends, to 1e-7


@triton.jit
def _sigmoid(x):
    """2^x, and the sigmoid of x in units of log 2; NaN where the power leaves the range of numbers."""
    e = tl.exp2(x)
    return e, e * (1.0 / (1.0 + e))


@triton.jit
def _log_product(e):
    """Σ log(1 + e), four classes to a logarithm: log1p of Π(1 + e) - 1, in which no small e is lost."""
    for _ in tl.static_range(2):
        first, second = tl.split(tl.permute(tl.reshape(e, (2, e.shape[0] // 2)), (1, 0)))
        e = first + second + first * second
    return tl.sum(log1p_any(e), 0)


@triton.jit
def tame_binary_role(problem, a, b, row, other, cols, policy: tl.constexpr, SPARSE: tl.constexpr):
    """The role of one row from logits a and b in units of log 2, in the fewest instructions.

    Its field `easy` says whether that was right.

    Returns:
        The role, S·σ at λ*, and the target: `Labels`, or a tile.
    """
    lam = tl.load(problem.lam_ptr + row)
    d = a - b
    e, p = _sigmoid(b + lam * d)
    if SPARSE:
        part = per_class(problem, policy)
        labels, share, on_b, on_d = sparse_targets(problem, row, other, lam, 0.0, 0.0, policy)
        on = Labels(labels.a, labels.b, labels.mass_a, labels.mass_b, labels.on_a * part, labels.on_b * part)
        on_b *= part
        on_d *= part
        total = share * part
        grad = (total * tl.sum(p * d, 0) - on_d) * LN2
    else:
        on, total, kept = binary_target_tile(problem, lam, row, other, cols, policy)
        share = tl.sum(kept, 0) / problem.C
        grad = tl.sum((total * p - on) * d, 0) * LN2
    slope = scaled_grad(grad, problem.grad_divisor_ptr)
    lam_adv = step_lam(lam, slope, problem.step_size, policy)
    x = b + lam_adv * d
    e, p = _sigmoid(x)
    if SPARSE:
        grad_adv = (total * tl.sum(p * d, 0) - on_d) * LN2
        loss = total * _log_product(e) - (on_b + lam_adv * on_d) * LN2
    else:
        grad_adv = tl.sum((total * p - on) * d, 0) * LN2
        loss = tl.sum(total * log1p_any(e) - on * x * LN2, 0)
    step = lam_adv - lam
    delta = 0.5 * step * (grad + grad_adv)
    easy = (tl.abs(loss) < float("inf")) & (tl.abs(grad) < float("inf")) & (tl.abs(grad_adv) < float("inf"))
    easy = easy & (tl.abs(step) * tl.max(tl.abs(d), 0) * LN2 <= REACH)
    zero = tl.full((), 0.0, lam.dtype)
    takes = takes_adversarial(loss, delta, policy)
    role = Role(loss, share, lam_adv, lam_adv, slope, delta, takes, zero, zero, zero, zero, easy)
    return role, total * p, on


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
    decided: tl.constexpr = policy.keeps_all or policy.mode == "mixup"
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    other, source = partners(partner_ptr, inverse_ptr if has_source else partner_ptr, row, B, policy)
    if not pairs or other >= row:
        scale = reciprocal(tl.full((), divisor, lam_ptr.dtype.element_ty))
        easy = False
        # Doubles are too exact for what the lean path makes of δ.
        if WHOLE and decided and lam_ptr.dtype.element_ty != tl.float64:
            # All rows are asked for before the first is used.
            a = load_finite(problem, row, cols)
            b = load_finite(problem, other, cols)
            c = b
            if has_source and not pairs:
                c = load_finite(problem, source, cols)
            a = scaled(a, 0.0)
            b = scaled(b, 0.0)
            role, p, on = tame_binary_role(problem, a, b, row, other, cols, policy, sparse)
            easy = role.easy
            if has_source:
                c = scaled(c, 0.0)
                role_source, p_source, on_source = tame_binary_role(problem, c, a, source, row, cols, policy, sparse)
                easy = easy & role_source.easy
            if easy:
                store_role(rows_ptr, row, B, True, role, ROW_FIELDS)
                if pairs:
                    store_role(rows_ptr, other, B, True, role_source, ROW_FIELDS)
                if dlogits_ptr is not None:
                    own = scale * role.lam
                    theirs = scale * (1.0 - role_source.lam)
                    dz = own * p + theirs * p_source
                    dz = minus_target(dz, on, on_source, own, theirs, cols, pairs, sparse)
                    _store(dlogits_ptr, row, cols, C, dz)
                    if pairs:
                        own = scale * role_source.lam
                        theirs = scale * (1.0 - role.lam)
                        dz = own * p_source + theirs * p
                        dz = minus_target(dz, on_source, on, own, theirs, cols, pairs, sparse)
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
