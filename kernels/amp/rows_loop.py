"""The same rows by a loop over tiles, for rows too long for registers, and the gradient from what a forward left."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    BP_TOP,
    DELTA,
    GRAD,
    LAM,
    LAM_ADV,
    LOSS,
    LSE,
    LSE_OTHERS,
    MASK,
    MASS,
    SHIFT_A,
    SHIFT_B,
    SUM_BO,
    TOP,
    TOTAL,
    bce_grad,
    bce_share,
    bce_terms,
    expm1_near,
    load_logits,
    log1p_any,
    mixed_logits,
    row_shift,
    scaled_grad,
    step_lam,
    store_field,
    takes_adversarial,
    target_tile,
    tile_index,
    tile_mask,
)


@triton.jit
def _mixed_tile(logits_ptr, row, other, shift_a, shift_b, lam_at, cols, C, stride_zm, stride_zn):
    """X at `lam_at` and d of one tile of one row; the row's own logits, and 0, where `shift_b` is None."""
    a = load_logits(logits_ptr, row, cols, C, stride_zm, stride_zn, lam_at.dtype)
    if shift_b is None:
        x = a - shift_a
        d = tl.zeros_like(x)
    else:
        b = load_logits(logits_ptr, other, cols, C, stride_zm, stride_zn, lam_at.dtype)
        x, d = mixed_logits(a, b, shift_a, shift_b, lam_at)
    return x, d


@triton.jit
def _loop_lse(
    logits_ptr,
    row,
    other,
    shift_a,
    shift_b,
    lam_at,
    without,  # a class to leave out, or -1
    C,
    stride_zm,
    stride_zn,
    BLOCK_C: tl.constexpr,
):
    """Online log-sum-exp at `lam_at`: the maximum, and the log of the sum relative to it."""
    top = tl.full((), float("-inf"), lam_at.dtype)
    sums = tl.zeros((BLOCK_C,), lam_at.dtype)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x, _ = _mixed_tile(logits_ptr, row, other, shift_a, shift_b, lam_at, cols, C, stride_zm, stride_zn)
        x = tl.where(cols == without, float("-inf"), x)
        new_top = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        sums = sums * tl.exp(top - base) + tl.exp(x - base)
        top = new_top
    return top, tl.log(tl.sum(sums, 0))


@triton.jit
def _cross_entropy_loop(
    logits_ptr,
    target_ptr,
    weight_ptr,
    grad_divisor_ptr,
    row,
    other,
    shift_a,
    shift_b,
    lam,
    C,
    stride_zm,
    stride_zn,
    step_size,
    policy: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Scalars of one row under cross-entropy: one pass at λ, one at λ' (1-9)."""
    top = tl.full((), float("-inf"), lam.dtype)
    zeros = tl.zeros((BLOCK_C,), lam.dtype)
    sums = zeros
    sums_d = zeros
    on_sum = zeros
    on_d = zeros
    on_x = zeros
    d_max = zeros
    share = tl.full((), 0.0, lam.dtype)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x, d = _mixed_tile(logits_ptr, row, other, shift_a, shift_b, lam, cols, C, stride_zm, stride_zn)
        on, _, share = target_tile(target_ptr, weight_ptr, lam, row, other, cols, C, policy)
        new_top = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - base)
        e = tl.exp(x - base)
        sums = sums * shrink + e
        sums_d = sums_d * shrink + e * d
        on_sum += on
        on_d += on * d
        on_x += tl.where(on != 0, on * x, 0.0)
        d_max = tl.maximum(d_max, tl.abs(d))
        top = new_top
    sum_exp = tl.sum(sums, 0)
    total = tl.sum(on_sum, 0)
    target_d = tl.sum(on_d, 0)
    lse = top + tl.log(sum_exp)
    loss = total * lse - tl.sum(on_x, 0)
    grad = scaled_grad(total * (tl.sum(sums_d, 0) / sum_exp) - target_d, grad_divisor_ptr)
    lam_adv = step_lam(lam, grad, step_size, policy)
    delta = tl.full((), 0.0, lam.dtype)
    lse_change = delta
    if policy.mode != "mixup":
        eta = lam_adv - lam
        if tl.abs(eta) * tl.max(d_max, 0) <= 0.25:
            gains = zeros
            for start in range(0, C, BLOCK_C):
                cols = start + tl.arange(0, BLOCK_C)
                x, d = _mixed_tile(logits_ptr, row, other, shift_a, shift_b, lam, cols, C, stride_zm, stride_zn)
                gains += tl.exp(x - lse) * expm1_near(eta * d)
            lse_change = log1p_any(tl.sum(gains, 0))
        else:
            top_adv, log_adv = _loop_lse(
                logits_ptr, row, other, shift_a, shift_b, lam_adv, -1, C, stride_zm, stride_zn, BLOCK_C
            )
            lse_change = (top_adv - top) + (log_adv - tl.log(sum_exp))
        delta = total * lse_change - eta * target_d
    takes = takes_adversarial(loss, delta, policy)
    loss = tl.where(takes, loss + delta, loss)
    lse = tl.where(takes, lse + lse_change, lse)
    return loss, share, tl.where(takes, lam_adv, lam), lam_adv, grad, delta, takes, lse, total


@triton.jit
def bce_scan(
    logits_ptr,
    target_ptr,
    weight_ptr,
    row,
    other,
    shift_a,
    shift_b,
    lam,
    lam_at,
    C,
    stride_zm,
    stride_zn,
    policy: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """softmax_bce of one row at `lam_at`: loss, the scalars of g, ⟨g, d⟩ and the divisor share (12-16)."""
    top_x = tl.full((), float("-inf"), lam.dtype)
    top = tl.full((), 0, tl.int32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x, _ = _mixed_tile(logits_ptr, row, other, shift_a, shift_b, lam_at, cols, C, stride_zm, stride_zn)
        tile_top = tl.max(x, 0)
        top = tl.where(tile_top > top_x, start + tl.argmax(x, 0), top)
        top_x = tl.maximum(top_x, tile_top)
    second, log_others = _loop_lse(
        logits_ptr, row, other, shift_a, shift_b, lam_at, top, C, stride_zm, stride_zn, BLOCK_C
    )
    lse_others = tl.where(second == float("-inf"), second, second + log_others)
    lse = top_x + log1p_any(tl.exp(lse_others - top_x))
    zeros = tl.zeros((BLOCK_C,), lam.dtype)
    losses = zeros
    a_sum = zeros
    bo_sum = zeros
    bp_top_sum = zeros
    ad = zeros
    pd = zeros
    pbd = zeros
    share_d = zeros
    share = tl.full((), 0.0, lam.dtype)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x, d = _mixed_tile(logits_ptr, row, other, shift_a, shift_b, lam_at, cols, C, stride_zm, stride_zn)
        on, off, share = target_tile(target_ptr, weight_ptr, lam, row, other, cols, C, policy)
        is_top = cols == top
        a, b, bo, p, terms = bce_terms(x, on, off, is_top, lse, lse_others)
        losses += terms
        a_sum += a
        bo_sum += bo
        bp_top_sum += tl.where(is_top, b * p, 0.0)
        ad += a * d
        pd += p * d
        pbd += p * (b + bo) * d
        share_d += bce_share(x, is_top, lse_others) * d
    sum_a = tl.sum(a_sum, 0)
    sum_bo = tl.sum(bo_sum, 0)
    bp_top = tl.sum(bp_top_sum, 0)
    g_d = tl.sum(ad, 0) + (sum_bo - sum_a) * tl.sum(pd, 0)
    g_d += bp_top * tl.sum(share_d, 0) - tl.sum(pbd, 0)
    return tl.sum(losses, 0), top.to(lam.dtype), lse, lse_others, sum_a, sum_bo, bp_top, g_d, share


@triton.jit
def _amp_rows_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    weight_ptr,  # (C,) class weights or None
    grad_divisor_ptr,  # () divisor of ∇λ or None
    rows_ptr,  # (fields, B) compute dtype
    B,
    C,
    stride_zm: tl.int64,
    stride_zn,  # 1 mostly, and then compiled in: with a type beside it, it would not be
    step_size: tl.float64,
    policy: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All scalars of one row, its loss among them; the gradient follows in `_amp_rows_grad_kernel`."""
    row, first, ok = tile_index(tl.program_id(0), 0, B, 1, BLOCK_C)
    other = tl.load(partner_ptr + row)
    lam = tl.load(lam_ptr + row)
    # A value of the size of the row's logits is all that the shift has to be: the first tile has one.
    shift_a = row_shift(load_logits(logits_ptr, row, first, C, stride_zm, stride_zn, lam.dtype))
    shift_b = row_shift(load_logits(logits_ptr, other, first, C, stride_zm, stride_zn, lam.dtype))
    if policy.bce:
        loss, top, lse, lse_others, total, sum_bo, bp_top, g_d, share = bce_scan(
            logits_ptr, target_ptr, weight_ptr, row, other, shift_a, shift_b, lam, lam,
            C, stride_zm, stride_zn, policy, BLOCK_C,
        )  # fmt: skip
        grad = scaled_grad(g_d, grad_divisor_ptr)
        lam_adv = step_lam(lam, grad, step_size, policy)
        delta = tl.full((), 0.0, lam.dtype)
        takes = takes_adversarial(loss, delta, policy)
        if policy.mode != "mixup":
            loss_adv, top_adv, lse_adv, lse_others_adv, total_adv, sum_bo_adv, bp_top_adv, _, _ = bce_scan(
                logits_ptr, target_ptr, weight_ptr, row, other, shift_a, shift_b, lam, lam_adv,
                C, stride_zm, stride_zn, policy, BLOCK_C,
            )  # fmt: skip
            delta = loss_adv - loss
            takes = takes_adversarial(loss, delta, policy)
            loss = tl.where(takes, loss_adv, loss)
            top = tl.where(takes, top_adv, top)
            lse = tl.where(takes, lse_adv, lse)
            lse_others = tl.where(takes, lse_others_adv, lse_others)
            total = tl.where(takes, total_adv, total)
            sum_bo = tl.where(takes, sum_bo_adv, sum_bo)
            bp_top = tl.where(takes, bp_top_adv, bp_top)
        lam_sel = tl.where(takes, lam_adv, lam)
        store_field(rows_ptr, TOP, row, B, top, ok)
        store_field(rows_ptr, LSE_OTHERS, row, B, lse_others, ok)
        store_field(rows_ptr, SUM_BO, row, B, sum_bo, ok)
        store_field(rows_ptr, BP_TOP, row, B, bp_top, ok)
    else:
        loss, share, lam_sel, lam_adv, grad, delta, takes, lse, total = _cross_entropy_loop(
            logits_ptr, target_ptr, weight_ptr, grad_divisor_ptr, row, other, shift_a, shift_b, lam,
            C, stride_zm, stride_zn, step_size, policy, BLOCK_C,
        )  # fmt: skip
    store_field(rows_ptr, LOSS, row, B, loss, ok)
    store_field(rows_ptr, MASS, row, B, share, ok)
    store_field(rows_ptr, LAM, row, B, lam_sel, ok)
    store_field(rows_ptr, LAM_ADV, row, B, lam_adv, ok)
    store_field(rows_ptr, GRAD, row, B, grad, ok)
    store_field(rows_ptr, DELTA, row, B, delta, ok)
    store_field(rows_ptr, MASK, row, B, takes.to(lam.dtype), ok)
    store_field(rows_ptr, SHIFT_A, row, B, shift_a, ok)
    store_field(rows_ptr, SHIFT_B, row, B, shift_b, ok)
    store_field(rows_ptr, LSE, row, B, lse, ok)
    store_field(rows_ptr, TOTAL, row, B, total, ok)


@triton.jit
def _field(rows_ptr, field: tl.constexpr, row, B):
    return tl.load(rows_ptr + field * B + row)


@triton.jit
def _role_grad(
    logits_ptr,
    target_ptr,
    lam_ptr,
    weight_ptr,
    rows_ptr,
    row,
    other,
    cols,
    B,
    C,
    stride_zm,
    stride_zn,
    policy: tl.constexpr,
):
    """λ* per row of the role of `row` mixed with `other`, and a tile of its g (10, 15)."""
    lam = tl.load(lam_ptr + row)
    lam_sel = _field(rows_ptr, LAM, row, B)
    shift_a = _field(rows_ptr, SHIFT_A, row, B)
    shift_b = _field(rows_ptr, SHIFT_B, row, B)
    x, _ = _mixed_tile(logits_ptr, row, other, shift_a, shift_b, lam_sel, cols, C, stride_zm, stride_zn)
    on, off, _ = target_tile(target_ptr, weight_ptr, lam, row, other, cols, C, policy)
    lse = _field(rows_ptr, LSE, row, B)
    total = _field(rows_ptr, TOTAL, row, B)
    if policy.bce:
        is_top = cols == _field(rows_ptr, TOP, row, B).to(tl.int32)
        lse_others = _field(rows_ptr, LSE_OTHERS, row, B)
        sum_bo = _field(rows_ptr, SUM_BO, row, B)
        bp_top = _field(rows_ptr, BP_TOP, row, B)
        g = bce_grad(x, on, off, is_top, lse, lse_others, total, sum_bo, bp_top)
    else:
        g = total * tl.exp(x - lse) - on
    return lam_sel, g


@triton.jit
def _amp_rows_grad_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    inverse_ptr,  # (B,) int64
    weight_ptr,  # (C,) class weights or None
    rows_ptr,  # (fields, B) compute dtype, from either forward
    upstream_ptr,  # () or (B,) gradient of the loss or of each row's, compute dtype
    divisor_ptr,  # () divisor of the loss; None for reduction="none"
    dlogits_ptr,  # (B, C) contiguous
    B,
    C,
    stride_zm: tl.int64,
    stride_zn,  # 1 mostly, and then compiled in: with a type beside it, it would not be
    stride_u: tl.int64,  # of upstream; 0 for a scalar
    policy: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz_r = u_r λ*_r g_r + u_q (1-λ*_q) g_q (11): elementwise in the scalars that a forward left."""
    row, cols, ok = tile_index(tl.program_id(0), tl.program_id(1), B, BLOCK_B, BLOCK_C)
    source = tl.load(inverse_ptr + row)
    other = tl.load(partner_ptr + row)
    lam, g = _role_grad(
        logits_ptr, target_ptr, lam_ptr, weight_ptr, rows_ptr, row, other,
        cols, B, C, stride_zm, stride_zn, policy,
    )  # fmt: skip
    lam_source, g_source = _role_grad(
        logits_ptr, target_ptr, lam_ptr, weight_ptr, rows_ptr, source, row,
        cols, B, C, stride_zm, stride_zn, policy,
    )  # fmt: skip
    upstream = tl.load(upstream_ptr + row * stride_u)
    upstream_source = tl.load(upstream_ptr + source * stride_u)
    dz = upstream * lam * g + upstream_source * (1.0 - lam_source) * g_source
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr)
        dz = tl.where(divisor == 0.0, 0.0, dz / tl.where(divisor == 0.0, 1.0, divisor))
    mask = tile_mask(ok, cols, C, BLOCK_B)
    tl.store(dlogits_ptr + row * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _amp_total_kernel(
    rows_ptr,  # (fields, B)
    loss_ptr,  # () out
    divisor_ptr,  # () out
    B,
    divisor: tl.float64,  # 0 stands for the kept mass
    BLOCK: tl.constexpr,
):
    """Sum the rows' losses and divide, in one program and always in the same order."""
    loss = tl.zeros((BLOCK,), loss_ptr.dtype.element_ty)
    mass = loss
    for start in range(0, B, BLOCK):
        index = start + tl.arange(0, BLOCK)
        loss += tl.load(rows_ptr + LOSS * B + index, mask=index < B, other=0.0)
        mass += tl.load(rows_ptr + MASS * B + index, mask=index < B, other=0.0)
    scale = tl.full((), divisor, loss.dtype)
    scale = tl.where(scale == 0.0, tl.sum(mass), scale)
    tl.store(loss_ptr, tl.sum(loss) / scale)
    tl.store(divisor_ptr, scale)


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
