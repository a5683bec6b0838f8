"""Rows of up to some thousand classes, each held by one program whole (1-11): most of them in few instructions."""

from __future__ import annotations

import triton
import triton.language as tl

from .losses import expm1_near, log1p_any
from .rows import (
    LN2,
    LOG2E,
    ROW_FIELDS,
    Problem,
    Role,
    is_tame,
    load_finite,
    load_labels,
    load_tile,
    partners,
    reciprocal,
    scaled,
    scaled_grad,
    step_lam,
    store_role,
    takes_adversarial,
    target_tile,
)
from .rows_careful import careful_role, careful_row_grad


@triton.jit
def sparse_targets(problem, row, other, lam, shift_a, shift_b, policy: tl.constexpr):
    """Labels without smoothing; S, ⟨t, b⟩ and ⟨t, d⟩ from the logits at both: no pass over the classes."""
    on = load_labels(problem, lam, row, other, policy)
    a_a = scaled(load_tile(problem, row, on.a, 0.0), shift_a)
    b_a = scaled(load_tile(problem, other, on.a, 0.0), shift_b)
    a_b = scaled(load_tile(problem, row, on.b, 0.0), shift_a)
    b_b = scaled(load_tile(problem, other, on.b, 0.0), shift_b)
    return on, on.on_a + on.on_b, on.on_a * b_a + on.on_b * b_b, on.on_a * (a_a - b_a) + on.on_b * (a_b - b_b)


@triton.jit
def is_sound(sum_exp):
    """Whether a sum of exponentials is a number, and so large that none that mattered has vanished."""
    return (sum_exp > 5.421010862427522e-20) & (sum_exp < float("inf"))  # 2⁻⁶⁴


@triton.jit
def tame_role(problem, a, b, shift_a, shift_b, easy, row, other, lam, cols, policy: tl.constexpr, SPARSE: tl.constexpr):
    """The role of one row from shifted logits a and b in units of log 2, in the fewest instructions.

    Its field `easy` says whether that was right: not where a class is excluded, a logit is NaN or +inf, or a sum has
    overflowed or vanished.

    Returns:
        The role, the exponentials at λ*, S over their sum, and the target: `Labels`, or a tile.
    """
    d = a - b
    e = tl.exp2(b + lam * d)
    sum_exp, sum_d = tl.split(tl.sum(tl.join(e, e * d), 0))
    if SPARSE:
        on, total, on_b, on_d = sparse_targets(problem, row, other, lam, shift_a, shift_b, policy)
        share = total
    else:
        on, share = target_tile(problem, lam, row, other, cols, policy)
        total = tl.sum(on, 0)
        on_b = tl.sum(on * b, 0)
        on_d = tl.sum(on * d, 0)
    easy = easy & is_sound(sum_exp) & (tl.abs(sum_d) < float("inf"))
    log_sum = tl.log(sum_exp)
    loss = total * log_sum - (on_b + lam * on_d) * LN2
    grad = scaled_grad((total * (sum_d / sum_exp) - on_d) * LN2, problem.grad_divisor_ptr)
    lam_adv = step_lam(lam, grad, problem.step_size, policy)
    lam_sel = lam_adv
    delta = tl.full((), 0.0, lam.dtype)
    takes = takes_adversarial(loss, delta, policy)
    if policy.mode != "mixup":
        if not policy.keeps_all:
            step = (lam_adv - lam) * LN2
            u = step * d
            delta = total * log1p_any(tl.sum(e * expm1_near(u), 0) / sum_exp) - step * on_d
            easy = easy & (tl.max(tl.abs(u), 0) <= 0.25)
            takes = takes_adversarial(loss, delta, policy)
            lam_sel = tl.where(takes, lam_adv, lam)
        e = tl.exp2(b + lam_sel * d)
        sum_exp = tl.sum(e, 0)
        easy = easy & is_sound(sum_exp)
        before = log_sum
        log_sum = tl.log(sum_exp)
        if policy.keeps_all:
            delta = total * (log_sum - before) - (lam_adv - lam) * on_d * LN2
            loss = total * log_sum - (on_b + lam_adv * on_d) * LN2
        else:
            loss = tl.where(takes, loss + delta, loss)
    easy = easy & (tl.abs(loss) < float("inf"))
    role = Role(loss, share, lam_sel, lam_adv, grad, delta, takes, shift_a, shift_b, log_sum * LOG2E, total, easy)
    return role, e, total / sum_exp, on


@triton.jit
def softmax_factor(role):
    """S over the sum of exponentials at λ*: what an exponential of shifted logits times this is, is S·p (3)."""
    return role.total * tl.exp2(-role.lse)


@triton.jit
def holds(label, start, BLOCK_C: tl.constexpr):
    """Whether a tile from column `start` on has that class in it."""
    return (label >= start) & (label < start + BLOCK_C)


@triton.jit
def label_tile(on, cols):
    """A tile of the target of labels without smoothing."""
    return tl.where(cols == on.a, on.on_a, 0.0) + tl.where(cols == on.b, on.on_b, 0.0)


@triton.jit
def minus_target(dz, on, on_source, own, theirs, cols, PAIR: tl.constexpr, SPARSE: tl.constexpr):
    """`dz` less the targets of both roles of a row, each times its factor; of a PAIR both have the same two labels."""
    if SPARSE:
        dz -= tl.where(cols == on.a, own * on.on_a + theirs * on_source.on_b, 0.0)
        if PAIR:
            dz -= tl.where(cols == on.b, own * on.on_b + theirs * on_source.on_a, 0.0)
        else:
            dz -= tl.where(cols == on.b, own * on.on_b, 0.0)
            dz -= tl.where(cols == on_source.a, theirs * on_source.on_a, 0.0)
    else:
        dz -= own * on + theirs * on_source
    return dz


@triton.jit
def _shifted(problem, z):
    """A row in units of log 2, its largest logit 0; what was subtracted, and whether the row may be tame."""
    top = tl.max(z, 0)
    shift = top * LOG2E
    return scaled(z, shift), shift, is_tame(problem, top)


@triton.jit
def _amp_cross_entropy_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    inverse_ptr,  # (B,) int64 with inverse[partner[r]] = r; None: it is partner, or looked for
    weight_ptr,  # (C,) class weights or None
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
):
    """Loss and complete gradient of a row; of a pair, by the program of its smaller row."""
    # Which tells the compiler so, for loads of 16 bytes.
    C = C // ALIGN * ALIGN
    stride_zm = stride_zm // ALIGN * ALIGN
    problem = Problem(logits_ptr, stride_zm, stride_zn, target_ptr, weight_ptr, lam_ptr, grad_divisor_ptr, C, step_size)
    sparse: tl.constexpr = target_ptr.dtype.element_ty == tl.int64 and policy.label_smoothing == 0
    pairs: tl.constexpr = policy.pairing == "matching"
    has_source: tl.constexpr = pairs or dlogits_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    other, source = partners(partner_ptr, inverse_ptr if has_source else partner_ptr, row, B, policy)
    if not pairs or other >= row:
        # All rows are asked for before the first is used.
        a = load_finite(problem, row, cols)
        b = load_finite(problem, other, cols)
        c = b
        if has_source and not pairs:
            c = load_finite(problem, source, cols)
        lam = tl.load(lam_ptr + row)
        a, shift_a, easy_a = _shifted(problem, a)
        b, shift_b, easy_b = _shifted(problem, b)
        role, e, slope, on = tame_role(
            problem, a, b, shift_a, shift_b, easy_a & easy_b, row, other, lam, cols, policy, sparse
        )
        easy = role.easy
        scale = reciprocal(tl.full((), divisor, lam.dtype))
        if has_source:
            shift_c = shift_b
            easy_c = easy_b
            if pairs:
                c = b
            else:
                c, shift_c, easy_c = _shifted(problem, c)
            lam = tl.load(lam_ptr + source)
            role_source, e_source, slope_source, on_source = tame_role(
                problem, c, a, shift_c, shift_a, easy_c & easy_a, source, row, lam, cols, policy, sparse
            )
            easy = easy & role_source.easy
            if easy:
                store_role(rows_ptr, row, B, True, role, ROW_FIELDS)
                if pairs:
                    store_role(rows_ptr, other, B, True, role_source, ROW_FIELDS)
                if dlogits_ptr is not None:
                    own = scale * role.lam
                    theirs = scale * (1.0 - role_source.lam)
                    dz = (own * slope) * e + (theirs * slope_source) * e_source
                    dz = minus_target(dz, on, on_source, own, theirs, cols, pairs, sparse)
                    tl.store(dlogits_ptr + row * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=cols < C)
                    if pairs:
                        own = scale * role_source.lam
                        theirs = scale * (1.0 - role.lam)
                        dz = (own * slope_source) * e_source + (theirs * slope) * e
                        dz = minus_target(dz, on_source, on, own, theirs, cols, pairs, sparse)
                        tl.store(dlogits_ptr + other * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=cols < C)
            else:
                role = careful_role(problem, row, other, policy, BLOCK_CAREFUL)
                role_source = careful_role(problem, source, row, policy, BLOCK_CAREFUL)
                store_role(rows_ptr, row, B, True, role, ROW_FIELDS)
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
        else:
            if not easy:
                role = careful_role(problem, row, other, policy, BLOCK_CAREFUL)
            store_role(rows_ptr, row, B, True, role, ROW_FIELDS)
