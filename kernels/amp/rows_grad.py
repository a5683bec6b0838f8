"""From the scalars that a forward left: the gradient, the sum of the losses, and the rescaling of a gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    LAM,
    LOSS,
    LSE,
    MASS,
    SHIFT_A,
    SHIFT_B,
    TOTAL,
    field_at,
    load_logits,
    mixed_logits,
    target_tile,
    tile_index,
    tile_mask,
)


@triton.jit
def _field(rows_ptr, field: tl.constexpr, row, B):
    return tl.load(field_at(rows_ptr, field, row, B))


@triton.jit
def _role_grad(
    a,  # tile of the row's logits
    b,  # tile of its partner's
    target_ptr,
    lam_ptr,
    weight_ptr,
    rows_ptr,
    row,
    other,
    cols,
    B,
    C,
    policy: tl.constexpr,
):
    """λ* per row of the role of `row` mixed with `other`, and a tile of its g (10)."""
    lam = tl.load(lam_ptr + row)
    lam_sel = _field(rows_ptr, LAM, row, B)
    x, _ = mixed_logits(a, b, _field(rows_ptr, SHIFT_A, row, B), _field(rows_ptr, SHIFT_B, row, B), lam_sel)
    on, _ = target_tile(target_ptr, weight_ptr, lam, row, other, cols, C, policy)
    lse = _field(rows_ptr, LSE, row, B)
    total = _field(rows_ptr, TOTAL, row, B)
    g = total * tl.exp(x - lse) - on
    return lam_sel, g


@triton.jit
def _amp_rows_grad_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    inverse_ptr,  # (B,) int64; None: it is partner
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
    BLOCK_C: tl.constexpr,
):
    """dz_r = u_r λ*_r g_r + u_q (1-λ*_q) g_q (11): elementwise in the scalars that a forward left.

    Where the partner is known to be the source as well, the program of the smaller of the two writes both rows.
    """
    row, cols, ok = tile_index(tl.program_id(0), tl.program_id(1), B, BLOCK_B, BLOCK_C)
    pairs: tl.constexpr = policy.pairing == "matching" and BLOCK_B == 1
    other = tl.load(partner_ptr + row)
    if not pairs or other >= row:
        dtype = lam_ptr.dtype.element_ty
        a = load_logits(logits_ptr, row, cols, C, stride_zm, stride_zn, dtype)
        b = load_logits(logits_ptr, other, cols, C, stride_zm, stride_zn, dtype)
        if policy.pairing == "matching":
            source = other
            c = b
        else:
            source = tl.load(inverse_ptr + row)
            c = load_logits(logits_ptr, source, cols, C, stride_zm, stride_zn, dtype)
        lam, g = _role_grad(a, b, target_ptr, lam_ptr, weight_ptr, rows_ptr, row, other, cols, B, C, policy)
        lam_source, g_source = _role_grad(
            c, a, target_ptr, lam_ptr, weight_ptr, rows_ptr, source, row, cols, B, C, policy
        )
        own = tl.load(upstream_ptr + row * stride_u)
        theirs = tl.load(upstream_ptr + source * stride_u)
        if divisor_ptr is not None:
            divisor = tl.load(divisor_ptr)
            some = divisor != 0.0
            divisor = tl.where(some, divisor, 1.0)
            own = tl.where(some, own / divisor, 0.0)
            theirs = tl.where(some, theirs / divisor, 0.0)
        # A row without an upstream gradient gives exactly nothing, also where it is NaN: chunks rely upon it.
        g = tl.where(own == 0.0, 0.0, g)
        lam = tl.where(own == 0.0, 0.0, lam)
        g_source = tl.where(theirs == 0.0, 0.0, g_source)
        lam_source = tl.where(theirs == 0.0, 0.0, lam_source)
        mask = tile_mask(ok, cols, C, BLOCK_B)
        dz = own * lam * g + theirs * (1.0 - lam_source) * g_source
        tl.store(dlogits_ptr + row * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)
        if pairs:
            dz = theirs * lam_source * g_source + own * (1.0 - lam) * g
            tl.store(dlogits_ptr + other * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _amp_total_kernel(
    rows_ptr,  # (fields, B)
    loss_ptr,  # () out
    divisor_ptr,  # () out, or None
    factor_ptr,  # () out, or None: what gradients that were divided by `assumed` are to be multiplied by
    B,
    divisor: tl.float64,  # 0 stands for the kept mass
    assumed: tl.float64,
    BLOCK: tl.constexpr,
):
    """Sum the rows' losses and divide, in one program and always in the same order."""
    loss = tl.zeros((BLOCK,), loss_ptr.dtype.element_ty)
    mass = loss
    for start in range(0, B, BLOCK):
        index = start + tl.arange(0, BLOCK)
        loss += tl.load(field_at(rows_ptr, LOSS, index, B), mask=index < B, other=0.0)
        mass += tl.load(field_at(rows_ptr, MASS, index, B), mask=index < B, other=0.0)
    scale = tl.full((), divisor, loss.dtype)
    scale = tl.where(scale == 0.0, tl.sum(mass), scale)
    tl.store(loss_ptr, tl.sum(loss) / scale)
    if divisor_ptr is not None:
        tl.store(divisor_ptr, scale)
    if factor_ptr is not None:
        # Nothing kept: the mean is 0/0, and its gradient 0.
        assumed = tl.full((), assumed, loss.dtype)
        tl.store(factor_ptr, tl.where(scale == 0.0, 0.0, assumed / tl.where(scale == 0.0, 1.0, scale)))


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
