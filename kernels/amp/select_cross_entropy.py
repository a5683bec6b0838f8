"""Losses of the rows mixed at λ and at λ' from two sets of logits, the choice between them, and both gradients.

What stands between the mixture and the logits may be any network, so the loss is no function of λ that a kernel could
know: the change of the loss is taken from the change of the logits (25-27).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Config, careful_block, cdiv, select_config
from .launch import alignment, on_device_of
from .losses import binary_change, binary_loss, expm1_unit, log1p_any, loss_at, loss_change
from .rows import (
    ASSERTING,
    LN2,
    LOG2E,
    Problem,
    binary_target_tile,
    gains,
    is_tame,
    load_finite,
    load_labels,
    load_logits,
    load_tile,
    row_shift,
    scaled,
    target_masses,
    target_tile,
)
from .rows_registers import is_sound, label_tile
from .tuning import batch_class, tuned


class Out(NamedTuple):
    """Where the results go."""

    loss_ptr: Any
    delta_ptr: Any
    mask_ptr: Any
    grad_ptr: Any
    grad_adv_ptr: Any


@triton.jit
def _store_rows(out, row, ok, loss, loss_adv, delta, tie_abs, tie_rel, policy: tl.constexpr):
    """Choose between the losses of each row (9), and write what was chosen."""
    if policy.mode == "mixup" or out.grad_adv_ptr is None:
        takes = tl.full(delta.shape, False, tl.int1)
    elif policy.mode == "maxop":
        takes = tl.full(delta.shape, True, tl.int1)
    else:
        takes = gains(loss, delta, tie_abs, tie_rel)
    tl.store(out.loss_ptr + row, tl.where(takes, loss_adv, loss), mask=ok)
    tl.store(out.delta_ptr + row, delta, mask=ok)
    tl.store(out.mask_ptr + row, takes.to(tl.int8), mask=ok)


@triton.jit
def _logit_change(x, x_adv):
    """The change u = x' - x; 0 where a class is -inf in both (25)."""
    return tl.where((x == float("-inf")) & (x_adv == float("-inf")), 0.0, x_adv - x)


@triton.jit
def _select_few_classes_kernel(
    logits_ptr,  # (B, C) at λ, any strides
    logits_adv_ptr,  # (B, C) at λ', any strides, or None
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype: the labels' coefficients
    partner_ptr,  # (B,) int64
    weight_ptr,  # (C,) class weights or None
    loss_ptr,  # (B,) out, compute dtype
    delta_ptr,  # (B,) out, compute dtype
    mask_ptr,  # (B,) out, int8
    grad_ptr,  # (B, C) out, contiguous, compute dtype
    grad_adv_ptr,  # (B, C) out, contiguous, compute dtype; None with logits_adv_ptr
    B,
    C,
    stride_zm: tl.int64,
    stride_zn,  # without a type, as stride_an: 1 is then compiled in
    stride_am: tl.int64,
    stride_an,
    tie_abs: tl.float64,
    tie_rel: tl.float64,
    policy: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All of BLOCK_B rows, a row to a lane, whatever they hold (2, 3, 25-27)."""
    problem = Problem(logits_ptr, stride_zm, stride_zn, target_ptr, weight_ptr, lam_ptr, None, C, 0.0)
    out = Out(loss_ptr, delta_ptr, mask_ptr, grad_ptr, grad_adv_ptr)
    index = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    ok = index < B
    row = tl.where(ok, index, B - 1)
    cols = tl.arange(0, BLOCK_C)[:, None] * tl.minimum(B, 1)  # see `_amp_few_classes_kernel`
    mask = ok & (cols < C)
    lam = tl.load(lam_ptr + row)
    on, total, _ = target_masses(problem, lam, row, tl.load(partner_ptr + row), cols, policy)
    z = load_logits(problem, row, cols)
    loss, p, _ = loss_at(scaled(z, row_shift(z, policy)), on, total, policy)
    tl.store(grad_ptr + row * C + cols, total * p - on, mask=mask)
    loss_adv = loss
    delta = tl.full(lam.shape, 0.0, lam.dtype)
    if logits_adv_ptr is not None:
        problem = Problem(logits_adv_ptr, stride_am, stride_an, target_ptr, weight_ptr, lam_ptr, None, C, 0.0)
        z_adv = load_logits(problem, row, cols)
        loss_adv, p_adv, _ = loss_at(scaled(z_adv, row_shift(z_adv, policy)), on, total, policy)
        tl.store(grad_adv_ptr + row * C + cols, total * p_adv - on, mask=mask)
        delta = loss_change(p, on, total, _logit_change(z, z_adv), loss_adv - loss, policy)
    _store_rows(out, row, ok, loss, loss_adv, delta, tie_abs, tie_rel, policy)


@triton.jit
def _scan(sums, top, x):
    """One tile more in an online sum of exponentials: the sums, and the maximum that they are relative to."""
    new_top = tl.maximum(top, tl.max(x, 0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    return sums * tl.exp(top - base) + tl.exp(x - base), new_top


@triton.jit
def _careful(problem, problem_adv, out, row, other, lam, policy: tl.constexpr, BLOCK: tl.constexpr):
    """ℓ(λ), ℓ(λ') and δ of one row that holds anything; a pass for the sums of exponentials, one for the rest."""
    zeros = tl.zeros((BLOCK,), lam.dtype)
    top = tl.full((), float("-inf"), lam.dtype)
    top_adv = top
    sums = zeros
    sums_adv = zeros
    on_sum = zeros
    for start in range(0, problem.C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        on, _ = target_tile(problem, lam, row, other, cols, policy)
        on_sum += on
        sums, top = _scan(sums, top, load_logits(problem, row, cols))
        sums_adv, top_adv = _scan(sums_adv, top_adv, load_logits(problem_adv, row, cols))
    total = tl.sum(on_sum, 0)
    log_sum = tl.log(tl.sum(sums, 0))
    log_sum_adv = tl.log(tl.sum(sums_adv, 0))
    losses = zeros
    losses_adv = zeros
    changes = zeros
    on_u = zeros
    u_max = zeros
    for start in range(0, problem.C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        at = row * problem.C + cols
        on, _ = target_tile(problem, lam, row, other, cols, policy)
        x = load_logits(problem, row, cols)
        # Relative to the maximum first: a large common offset costs no digits.
        logp = (x - top) - log_sum
        p = tl.exp(logp)
        losses -= tl.where(on != 0, on * logp, 0.0)
        tl.store(out.grad_ptr + at, total * p - on, mask=cols < problem.C)
        if out.grad_adv_ptr is not None:
            x_adv = load_logits(problem_adv, row, cols)
            logp = (x_adv - top_adv) - log_sum_adv
            losses_adv -= tl.where(on != 0, on * logp, 0.0)
            tl.store(out.grad_adv_ptr + at, total * tl.exp(logp) - on, mask=cols < problem.C)
            u = _logit_change(x, x_adv)
            changes += p * expm1_unit(tl.where(u > 1.0, 1.0, tl.where(u < -1.0, -1.0, u)))  # comparisons keep NaN
            on_u += on * u
            u_max = tl.maximum(u_max, tl.abs(u))
    loss = tl.sum(losses, 0)
    loss_adv = tl.sum(losses_adv, 0)
    near = total * log1p_any(tl.sum(changes, 0)) - tl.sum(on_u, 0)
    return loss, loss_adv, tl.where(tl.max(u_max, 0) <= 1.0, near, loss_adv - loss)


@triton.jit
def _softmax_row(
    problem,
    problem_adv,
    out,
    row,
    other,
    lam,
    policy: tl.constexpr,
    SPARSE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_CAREFUL: tl.constexpr,
):
    """ℓ(λ), ℓ(λ') and δ of cross-entropy, and its gradients: one pass for the sums, one for the rest (2, 3, 25-27)."""
    has_adv: tl.constexpr = out.grad_adv_ptr is not None
    C = problem.C
    first = tl.arange(0, BLOCK_C)
    # A value of the size of the row's logits is all that a shift has to be: the first tile has one.
    top = tl.max(load_finite(problem, row, first), 0)
    top_adv = top
    if has_adv:
        top_adv = tl.max(load_finite(problem_adv, row, first), 0)
    shift = top * LOG2E
    shift_adv = top_adv * LOG2E
    sums = tl.zeros((BLOCK_C,), lam.dtype)
    sums_adv = sums
    on_sum = sums
    on_z = sums
    on_adv = sums
    on_u = sums
    for start in range(0, C, BLOCK_C):
        cols = start + first
        z = load_finite(problem, row, cols)
        z_adv = z
        if has_adv:
            z_adv = load_finite(problem_adv, row, cols)
        x = scaled(z, shift)
        x_adv = scaled(z_adv, shift_adv)
        sums += tl.exp2(x)
        sums_adv += tl.exp2(x_adv)
        if not SPARSE:
            on, _ = target_tile(problem, lam, row, other, cols, policy)
            on_sum += on
            on_z += on * x
            on_adv += on * x_adv
            on_u += on * (z_adv - z)
    if SPARSE:
        on = load_labels(problem, lam, row, other, policy)
        z_a = load_tile(problem, row, on.a, 0.0)
        z_b = load_tile(problem, row, on.b, 0.0)
        adv_a = load_tile(problem_adv, row, on.a, 0.0)
        adv_b = load_tile(problem_adv, row, on.b, 0.0)
        total = on.on_a + on.on_b
        target_z = on.on_a * scaled(z_a, shift) + on.on_b * scaled(z_b, shift)
        target_adv = on.on_a * scaled(adv_a, shift_adv) + on.on_b * scaled(adv_b, shift_adv)
        target_u = on.on_a * (adv_a - z_a) + on.on_b * (adv_b - z_b)
    else:
        total = tl.sum(on_sum, 0)
        target_z = tl.sum(on_z, 0)
        target_adv = tl.sum(on_adv, 0)
        target_u = tl.sum(on_u, 0)
    sum_exp = tl.sum(sums, 0)
    loss = total * tl.log(sum_exp) - target_z * LN2
    loss_adv = loss
    delta = tl.full((), 0.0, lam.dtype)
    easy = is_tame(problem, top) & is_sound(sum_exp) & (tl.abs(loss) < float("inf"))
    if has_adv:
        sum_adv = tl.sum(sums_adv, 0)
        loss_adv = total * tl.log(sum_adv) - target_adv * LN2
        easy = easy & is_tame(problem, top_adv) & is_sound(sum_adv) & (tl.abs(loss_adv) < float("inf"))
    if easy:
        slope = total / sum_exp
        if has_adv:
            slope_adv = total / sum_adv
        changed = tl.full((), 0.0, lam.dtype)
        u_top = changed
        for start in range(0, C, BLOCK_C):
            cols = start + first
            if SPARSE:
                tile = label_tile(on, cols)
            else:
                tile, _ = target_tile(problem, lam, row, other, cols, policy)
            z = load_finite(problem, row, cols)
            e = tl.exp2(scaled(z, shift))
            tl.store(out.grad_ptr + row * C + cols, slope * e - tile, mask=cols < C)
            if has_adv:
                z_adv = load_finite(problem_adv, row, cols)
                u = z_adv - z
                changed += tl.sum(e * expm1_unit(u), 0)
                u_top = tl.maximum(u_top, tl.max(tl.abs(u), 0))
                e = tl.exp2(scaled(z_adv, shift_adv))
                tl.store(out.grad_adv_ptr + row * C + cols, slope_adv * e - tile, mask=cols < C)
        if has_adv:
            near = total * log1p_any(changed / sum_exp) - target_u
            delta = tl.where(u_top <= 1.0, near, loss_adv - loss)
            easy = changed == changed  # a class that is -inf in both has made it NaN
            tl.debug_barrier()  # the gradients are written again, by other threads
    if easy:  # the usual side stands first, which is what the report on compiled code counts
        pass
    else:
        loss, loss_adv, delta = _careful(problem, problem_adv, out, row, other, lam, policy, BLOCK_CAREFUL)
        if not has_adv:
            delta = tl.full((), 0.0, lam.dtype)
    return loss, loss_adv, delta


@triton.jit
def _binary_row(problem, problem_adv, out, row, other, lam, policy: tl.constexpr, BLOCK_C: tl.constexpr):
    """The same of binary cross-entropy, whose classes do not depend on one another: one pass (30-33)."""
    losses = tl.zeros((BLOCK_C,), lam.dtype)
    losses_adv = losses
    changes = losses
    for start in range(0, problem.C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        at = row * problem.C + cols
        on, total, _ = binary_target_tile(problem, lam, row, other, cols, policy)
        z = load_logits(problem, row, cols)
        tile, p = binary_loss(scaled(z, 0.0), on, total)
        losses += tile
        tl.store(out.grad_ptr + at, total * p - on, mask=cols < problem.C)
        if out.grad_adv_ptr is not None:
            z_adv = load_logits(problem_adv, row, cols)
            tile_adv, p_adv = binary_loss(scaled(z_adv, 0.0), on, total)
            losses_adv += tile_adv
            tl.store(out.grad_adv_ptr + at, total * p_adv - on, mask=cols < problem.C)
            changes += binary_change(p, on, total, _logit_change(z, z_adv), tile_adv - tile)
    return tl.sum(losses, 0), tl.sum(losses_adv, 0), tl.sum(changes, 0)


@triton.jit
def _select_kernel(
    logits_ptr,  # (B, C) at λ, any strides
    logits_adv_ptr,  # (B, C) at λ', any strides, or None
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype: the labels' coefficients
    partner_ptr,  # (B,) int64
    weight_ptr,  # (C,) class weights or None
    loss_ptr,  # (B,) out, compute dtype
    delta_ptr,  # (B,) out, compute dtype
    mask_ptr,  # (B,) out, int8
    grad_ptr,  # (B, C) out, contiguous, compute dtype
    grad_adv_ptr,  # (B, C) out, contiguous, compute dtype; None with logits_adv_ptr
    B,
    C,
    stride_zm: tl.int64,
    stride_zn,  # without a type, as stride_an: 1 is then compiled in
    stride_am: tl.int64,
    stride_an,
    tie_abs: tl.float64,
    tie_rel: tl.float64,
    policy: tl.constexpr,
    ALIGN: tl.constexpr,  # a divisor of C and of the stride of rows
    BLOCK_C: tl.constexpr,
    BLOCK_CAREFUL: tl.constexpr,
):
    """All of one row."""
    has_adv: tl.constexpr = logits_adv_ptr is not None
    sparse: tl.constexpr = target_ptr.dtype.element_ty == tl.int64 and policy.label_smoothing == 0
    # Which tells the compiler so, for loads of 16 bytes.
    C = C // ALIGN * ALIGN
    stride_zm = stride_zm // ALIGN * ALIGN
    stride_am = stride_am // ALIGN * ALIGN
    problem = Problem(logits_ptr, stride_zm, stride_zn, target_ptr, weight_ptr, lam_ptr, None, C, 0.0)
    problem_adv = problem
    if has_adv:
        problem_adv = Problem(logits_adv_ptr, stride_am, stride_an, target_ptr, weight_ptr, lam_ptr, None, C, 0.0)
    out = Out(loss_ptr, delta_ptr, mask_ptr, grad_ptr, grad_adv_ptr)
    row = tl.program_id(0).to(tl.int64)
    other = tl.load(partner_ptr + row)
    lam = tl.load(lam_ptr + row)
    if policy.loss == "binary_cross_entropy":
        loss, loss_adv, delta = _binary_row(problem, problem_adv, out, row, other, lam, policy, BLOCK_C)
    else:
        loss, loss_adv, delta = _softmax_row(
            problem, problem_adv, out, row, other, lam, policy, sparse, BLOCK_C, BLOCK_CAREFUL
        )
    _store_rows(out, row, True, loss, loss_adv, delta, tie_abs, tie_rel, policy)


class Selection(NamedTuple):
    """What `select_cross_entropy_forward` leaves."""

    loss: Tensor  # (B,) the selected losses
    delta: Tensor  # (B,) ℓ(λ') - ℓ(λ), 0 without logits_adv
    mask: Tensor  # (B,) bool
    grad: Tensor  # (B, C) compute dtype, ∂ℓ_r/∂logits_r at λ
    grad_adv: Tensor | None  # (B, C) the same at λ'; None without logits_adv


def select_cross_entropy_forward(
    logits: Tensor, logits_adv: Tensor | None, mixture: Any, policy: Any, tie_abs: float, tie_rel: float
) -> Selection:
    """Losses at λ and, if given, at λ', the choice between them, and the gradients of both.

    Args:
        logits: (B, C), B >= 1, any strides.
        logits_adv: (B, C), any strides and dtype, or None.
        mixture: target (B,) int64 or (B, C), λ (B,) compute dtype, partner (B,), class weight (C,) or None.
        policy: what to compile for: mode, ignore_index and label_smoothing.
        tie_abs: a row takes λ' where δ >= -(tie_abs + tie_rel·max(1, |ℓ|)), or δ > 0 where both are 0.
        tie_rel: see there.
    """
    target, lam, partner, weight = mixture
    batch, classes = logits.shape
    lam = lam.contiguous()
    loss, delta = torch.empty_like(lam), torch.empty_like(lam)
    mask = torch.empty(batch, dtype=torch.int8, device=lam.device)
    grad = torch.empty(batch, classes, dtype=lam.dtype, device=lam.device)
    grad_adv = None if logits_adv is None else torch.empty_like(grad)
    tensors = (
        logits,
        logits_adv,
        target.contiguous(),
        lam,
        partner.contiguous(),
        None if weight is None else weight.contiguous(),
        loss,
        delta,
        mask,
        grad,
        grad_adv,
    )
    scalars = (*logits.stride(), *(logits if logits_adv is None else logits_adv).stride(), tie_abs, tie_rel)

    def launch(config: Config) -> Selection:
        options = {"policy": policy, "BLOCK_C": config.block_c, "num_warps": config.num_warps, **ASSERTING}
        if config.block_b > 1:
            grid = (cdiv(batch, config.block_b),)
            _select_few_classes_kernel[grid](*tensors, batch, classes, *scalars, BLOCK_B=config.block_b, **options)
        else:
            rows = (logits,) if logits_adv is None else (logits, logits_adv)
            options |= {"ALIGN": alignment(*rows), "BLOCK_CAREFUL": careful_block(config, lam.element_size(), policy)}
            _select_kernel[(batch,)](*tensors, batch, classes, *scalars, **options)
        return Selection(loss, delta, mask.view(torch.bool), grad, grad_adv)

    dense_target = target.is_floating_point() or policy.label_smoothing > 0
    config = select_config(classes, lam.element_size(), policy, dense_target=dense_target)
    with on_device_of(logits):
        return tuned(
            "_select_kernel",
            lambda: (
                logits.dtype,
                target.dtype,
                weight is not None,
                policy.mangle(),
                batch_class(batch),
                f"C={classes}",
                logits.device,
            ),
            config,
            ("num_warps",) if config.block_b > 1 else ("block_c", "num_warps"),
            launch,
        )
