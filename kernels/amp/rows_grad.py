"""From the scalars that a forward left: the gradient, the sum of the losses, and the rescaling of a gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .config import TOTAL_BLOCK, TOTAL_TURNS, cdiv
from .losses import sigmoid
from .rows import (
    EASY,
    LAM,
    LOSS,
    LSE,
    MASS,
    OPTIONS,
    SHIFT_A,
    SHIFT_B,
    TOTAL,
    Problem,
    field_at,
    load_finite,
    load_labels,
    load_logits,
    reciprocal,
    scaled,
    target_tile,
)
from .rows_careful import careful_grad
from .rows_registers import holds, minus_target, softmax_factor


class Stored(NamedTuple):
    """What a forward left of a role, as far as the gradient needs it."""

    lam: Any
    shift_a: Any
    shift_b: Any
    lse: Any
    total: Any
    easy: Any


@triton.jit
def _stored(rows_ptr, row, B):
    return Stored(
        tl.load(field_at(rows_ptr, LAM, row, B)),
        tl.load(field_at(rows_ptr, SHIFT_A, row, B)),
        tl.load(field_at(rows_ptr, SHIFT_B, row, B)),
        tl.load(field_at(rows_ptr, LSE, row, B)),
        tl.load(field_at(rows_ptr, TOTAL, row, B)),
        tl.load(field_at(rows_ptr, EASY, row, B)),
    )


@triton.jit
def _upstream(upstream_ptr, at, divisor_ptr):
    upstream = tl.load(upstream_ptr + at)
    if divisor_ptr is not None:
        upstream = upstream * reciprocal(tl.load(divisor_ptr))
    return upstream


@triton.jit
def _store_careful(
    problem, dlogits_ptr, row, other, source, role, role_source, own, theirs, cols, mask, policy: tl.constexpr
):
    """A tile of dz of rows that hold anything; one without an upstream gradient gives 0, also where it is NaN (11)."""
    a = load_logits(problem, row, cols)
    g = careful_grad(problem, a, load_logits(problem, other, cols), role, row, other, cols, policy)
    g_source = careful_grad(problem, load_logits(problem, source, cols), a, role_source, source, row, cols, policy)
    dz = tl.where(own == 0.0, 0.0, own * role.lam * g)
    dz += tl.where(theirs == 0.0, 0.0, theirs * (1.0 - role_source.lam) * g_source)
    tl.store(dlogits_ptr + row * problem.C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _amp_rows_grad_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    inverse_ptr,  # (B,) int64; that of a matching is partner
    weight_ptr,  # (C,) class weights or None
    rows_ptr,  # (fields, B) compute dtype, from any forward
    upstream_ptr,  # () or (B,) gradient of the loss or of each row's, compute dtype
    divisor_ptr,  # () divisor of the loss; None for reduction="none"
    dlogits_ptr,  # (B, C) contiguous
    B,
    C,
    stride_zm: tl.int64,
    stride_zn,  # usually 1, and then compiled in: with a type beside it, it would not be
    stride_u: tl.int64,  # of upstream; 0 for a scalar
    policy: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C and of the stride of rows
    BLOCK_C: tl.constexpr,
):
    """dz_r = u_r λ*_r g_r + u_q (1-λ*_q) g_q (11): elementwise in the scalars that a forward left.

    Where the partner is known to be the source as well, the program of the smaller of the two writes both rows.
    """
    # Which tells the compiler so, for loads of 16 bytes.
    C = C // ALIGN * ALIGN
    stride_zm = stride_zm // ALIGN * ALIGN
    problem = Problem(logits_ptr, stride_zm, stride_zn, target_ptr, weight_ptr, lam_ptr, None, C, 0.0)
    binary: tl.constexpr = policy.loss == "binary_cross_entropy"
    has_labels: tl.constexpr = target_ptr.dtype.element_ty == tl.int64
    sparse: tl.constexpr = has_labels and policy.label_smoothing == 0 and not (binary and weight_ptr is not None)
    pairs: tl.constexpr = policy.pairing == "matching" and BLOCK_B == 1
    if BLOCK_B == 1:
        row = tl.program_id(0).to(tl.int64)
        cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        ok = True
    else:
        index = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
        row = tl.where(index < B, index, B - 1)
        # A row to a lane, as in `_amp_few_classes_kernel`.
        cols = tl.arange(0, BLOCK_C)[:, None] * tl.minimum(B, 1)
        ok = index < B
    other = tl.load(partner_ptr + row)
    if not pairs or other >= row:
        source = other
        if policy.pairing != "matching":
            source = tl.load(inverse_ptr + row)
        role = _stored(rows_ptr, row, B)
        role_source = _stored(rows_ptr, source, B)
        own = _upstream(upstream_ptr, row * stride_u, divisor_ptr)
        theirs = _upstream(upstream_ptr, source * stride_u, divisor_ptr)
        mask = ok & (cols < C)
        if BLOCK_B == 1 and (sparse or not binary):
            easy = (role.easy > 0) & (role_source.easy > 0)
            if easy:
                a = load_finite(problem, row, cols)
                b = load_finite(problem, other, cols)
                c = b
                if not pairs:
                    c = load_finite(problem, source, cols)
                # What was subtracted from an easy row depends upon that row alone.
                a = scaled(a, role.shift_a)
                b = scaled(b, role.shift_b)
                c = b if pairs else scaled(c, role_source.shift_a)
                x = b + role.lam * (a - b)
                x_source = a + role_source.lam * (c - a)
                if binary:
                    _, e = sigmoid(tl.minimum(x, 126.0))
                    _, e_source = sigmoid(tl.minimum(x_source, 126.0))
                else:
                    e = tl.exp2(x)
                    e_source = tl.exp2(x_source)
                slope = softmax_factor(role)
                slope_source = softmax_factor(role_source)
                lam = tl.load(lam_ptr + row)
                lam_source = tl.load(lam_ptr + source)
                start = tl.program_id(1) * BLOCK_C
                hit = True
                if sparse:
                    on = load_labels(problem, lam, row, other, policy)
                    on_source = load_labels(problem, lam_source, source, row, policy)
                    hit = holds(on.a, start, BLOCK_C) | holds(on.b, start, BLOCK_C)
                    hit = hit | holds(on_source.a, start, BLOCK_C)
                else:
                    on, _ = target_tile(problem, lam, row, other, cols, policy)
                    on_source, _ = target_tile(problem, lam_source, source, row, cols, policy)
                at = own * role.lam
                rest = theirs * (1.0 - role_source.lam)
                dz = (at * slope) * e + (rest * slope_source) * e_source
                if hit:
                    dz = minus_target(dz, on, on_source, at, rest, cols, pairs, sparse)
                tl.store(dlogits_ptr + row * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)
                if pairs:
                    at = theirs * role_source.lam
                    rest = own * (1.0 - role.lam)
                    dz = (at * slope_source) * e_source + (rest * slope) * e
                    if hit:
                        dz = minus_target(dz, on_source, on, at, rest, cols, pairs, sparse)
                    tl.store(dlogits_ptr + other * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)
            else:
                _store_careful(
                    problem, dlogits_ptr, row, other, source, role, role_source, own, theirs, cols, mask, policy
                )
                if pairs:
                    _store_careful(
                        problem, dlogits_ptr, other, row, row, role_source, role, theirs, own, cols, mask, policy
                    )
        else:
            _store_careful(problem, dlogits_ptr, row, other, source, role, role_source, own, theirs, cols, mask, policy)
            if pairs:
                _store_careful(
                    problem, dlogits_ptr, other, row, row, role_source, role, theirs, own, cols, mask, policy
                )


@triton.jit
def _amp_total_kernel(
    rows_ptr,  # (fields, B): losses, then shares of the divisor
    sums_ptr,  # (2, programs) out, or None where one program sums all
    loss_ptr,  # () out, or None
    divisor_ptr,  # () out, or None
    factor_ptr,  # () out, or None: what gradients that were divided by `assumed` are to be multiplied by
    B,
    divisor: tl.float64,  # 0 stands for the kept mass
    assumed: tl.float64,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Sum the losses and shares, always in the same order. One program divides; the sums of many are summed again."""
    loss = tl.zeros((BLOCK,), rows_ptr.dtype.element_ty)
    mass = loss
    for turn in range(TURNS):
        index = (tl.program_id(0) * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        loss += tl.load(field_at(rows_ptr, LOSS, index, B), mask=index < B, other=0.0)
        mass += tl.load(field_at(rows_ptr, MASS, index, B), mask=index < B, other=0.0)
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0), tl.sum(loss))
        tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(mass))
    else:
        scale = tl.full((), divisor, loss.dtype)
        scale = tl.where(scale == 0.0, tl.sum(mass), scale)
        tl.store(loss_ptr, tl.sum(loss) / scale)
        if divisor_ptr is not None:
            tl.store(divisor_ptr, scale)
        if factor_ptr is not None:
            tl.store(factor_ptr, tl.full((), assumed, loss.dtype) * reciprocal(scale))


@triton.jit
def _rescale_kernel(
    dlogits_ptr,  # (numel,) in and out
    upstream_ptr,  # ()
    divisor_ptr,  # ()
    numel: tl.int64,
    assumed: tl.float64,  # the divisor that the forward divided by; 0: the right one
    BLOCK: tl.constexpr,
):
    """Multiply by upstream·assumed/divisor; reads and writes nothing where that is 1."""
    divisor = tl.load(divisor_ptr)
    factor = tl.load(upstream_ptr).to(divisor.dtype)
    assumed = tl.full((), assumed, divisor.dtype)
    if assumed != 0.0:
        factor = tl.where(divisor == 0.0, 0.0, factor * (assumed / tl.where(divisor == 0.0, 1.0, divisor)))
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
            index = start + tl.arange(0, BLOCK)
            value = tl.load(dlogits_ptr + index, mask=index < numel, other=0.0)
            scaled = (value.to(divisor.dtype) * factor).to(value.dtype)
            tl.store(dlogits_ptr + index, scaled, mask=index < numel)


def total(
    rows: Tensor,
    loss: Tensor,
    divisor: float,
    *,
    used: Tensor | None = None,
    factor: Tensor | None = None,
    assumed: float = 0.0,
) -> None:
    """Reduce the losses of a forward, on the device that is current.

    Args:
        rows: (fields, B) compute dtype, B >= 1.
        loss: () out, of the same dtype, as the two below.
        divisor: 0 stands for the kept mass.
        used: () out, what was divided by.
        factor: () out, assumed over what was divided by.
        assumed: what gradients have been divided by.
    """
    batch = rows.shape[1]
    programs = cdiv(batch, TOTAL_BLOCK * TOTAL_TURNS)
    options = {"BLOCK": TOTAL_BLOCK, "TURNS": TOTAL_TURNS, "num_warps": 4, **OPTIONS}
    if programs > 1:
        sums = rows.new_empty(2, programs)
        _amp_total_kernel[(programs,)](rows, sums, None, None, None, batch, divisor, assumed, **options)
        total(sums, loss, divisor, used=used, factor=factor, assumed=assumed)
    else:
        _amp_total_kernel[(1,)](rows, None, loss, used, factor, batch, divisor, assumed, **options)
