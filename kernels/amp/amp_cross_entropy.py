"""AMP on rows of logits: one launch while a row pair fits in registers, a loop over tiles beyond.

Every kernel recomputes the one other role that a row plays, as its predecessor's partner, instead of adding into
memory that two programs share: no atomics, the same bits in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import RESCALE_BLOCK, TOTAL_BLOCK, Config, backward_config, cdiv, forward_config, pairs_config
from .launch import inverse_permutation, is_captured, on_device_of
from .rows import (
    ASSERTING,
    OPTIONS,
    ROW_FIELDS,
    load_logits,
    mixed_logits,
    row_shift,
    row_sum,
    rows_total,
    store_scalars,
    target_tile,
    tile_index,
    tile_mask,
)
from .rows_grad import _amp_rows_grad_kernel, _amp_total_kernel, _rescale_kernel
from .rows_loop import _amp_rows_kernel
from .rows_pairs import _amp_pairs_kernel
from .rows_registers import cross_entropy_role
from .tuning import batch_class, tuned


@triton.jit
def _register_role(
    a,  # tile of the row's logits
    b,  # tile of its partner's
    shift_a,  # per row
    shift_b,  # per row
    target_ptr,
    lam_ptr,
    weight_ptr,
    grad_divisor_ptr,
    rows_ptr,
    row,  # int64, per row
    other,  # int64, per row: the partner
    ok,  # per row: whether it exists
    cols,
    B,
    C,
    step_size,
    policy: tl.constexpr,
    STORE: tl.constexpr,  # whether the rows' scalars are written to rows_ptr
):
    """The role of `row` mixed with `other`: loss, divisor share and λ* per row, and the tile of g."""
    lam = tl.load(lam_ptr + row)
    x, d = mixed_logits(a, b, shift_a, shift_b, lam)
    on, share = target_tile(target_ptr, weight_ptr, lam, row, other, cols, C, policy)
    loss, lam_sel, lam_adv, grad, delta, takes, lse, total, g = cross_entropy_role(
        x, d, on, lam, step_size, grad_divisor_ptr, policy
    )
    if STORE:
        store_scalars(
            rows_ptr, row, B, ok, loss, share, lam_sel, lam_adv, grad, delta, takes, shift_a, shift_b, lse, total
        )
    return loss, share, lam_sel, g


@triton.jit
def _amp_cross_entropy_kernel(
    logits_ptr,  # (B, C), any strides
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    inverse_ptr,  # (B,) int64 with inverse[partner[r]] = r; None: it is partner, or one program finds it
    weight_ptr,  # (C,) class weights or None
    grad_divisor_ptr,  # () divisor of ∇λ or None
    dlogits_ptr,  # (B, C) contiguous, the complete gradient, or None
    rows_ptr,  # (fields, B) compute dtype
    loss_ptr,  # () reduced loss, written where one program holds the batch; else None
    divisor_ptr,  # () what it was divided by; None with loss_ptr
    B,
    C,
    stride_zm: tl.int64,
    stride_zn,  # usually 1, and then compiled in: with a type beside it, it would not be
    step_size: tl.float64,
    divisor: tl.float64,  # of the gradient; 0 stands for the kept mass (one program only)
    policy: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Loss and complete gradient of BLOCK_B rows, whole rows in registers (1-11).

    Where partner is its own inverse, and a program has one row, the smaller row of a pair does both.
    """
    row, cols, ok = tile_index(tl.program_id(0), 0, B, BLOCK_B, BLOCK_C)
    pairs: tl.constexpr = policy.pairing == "matching" and BLOCK_B == 1 and loss_ptr is None
    other = tl.load(partner_ptr + row)
    if policy.pairing == "matching":
        tl.device_assert(tl.load(partner_ptr + other) == row, "partner is not its own inverse")
    if not pairs or other >= row:
        dtype = lam_ptr.dtype.element_ty
        a = load_logits(logits_ptr, row, cols, C, stride_zm, stride_zn, dtype)
        b = load_logits(logits_ptr, other, cols, C, stride_zm, stride_zn, dtype)
        shift_a = row_shift(a)
        shift_b = row_shift(b)
        loss, share, lam_sel, g = _register_role(
            a, b, shift_a, shift_b, target_ptr, lam_ptr, weight_ptr, grad_divisor_ptr, rows_ptr,
            row, other, ok, cols, B, C, step_size, policy, True,
        )  # fmt: skip
        scale = tl.full((), divisor, loss.dtype)
        if loss_ptr is not None:
            mass = rows_total(tl.where(ok, share, 0.0))
            scale = tl.where(scale == 0.0, mass, scale)
            tl.store(loss_ptr, rows_total(tl.where(ok, loss, 0.0)) / scale)
            tl.store(divisor_ptr, scale)
        if pairs or dlogits_ptr is not None:
            if policy.pairing == "matching":
                source = other
                c = b
                shift_c = shift_b
            else:
                if inverse_ptr is not None:
                    source = tl.load(inverse_ptr + row)
                elif BLOCK_B == 1:
                    source = row
                else:
                    every = tl.arange(0, BLOCK_B)[None, :]
                    points = tl.load(partner_ptr + every, mask=every < B, other=-1)
                    source = row_sum(tl.where(points == row, every, 0)).to(tl.int64)
                c = load_logits(logits_ptr, source, cols, C, stride_zm, stride_zn, dtype)
                shift_c = row_shift(c)
            _, _, lam_source, g_source = _register_role(
                c, a, shift_c, shift_a, target_ptr, lam_ptr, weight_ptr, grad_divisor_ptr, rows_ptr,
                source, row, ok, cols, B, C, step_size, policy, pairs,
            )  # fmt: skip
            if dlogits_ptr is not None:
                # Nothing kept: the mean is 0/0, and its gradient 0.
                over = tl.where(scale == 0.0, 0.0, 1.0 / tl.where(scale == 0.0, 1.0, scale))
                g = over * g
                g_source = over * g_source
                mask = tile_mask(ok, cols, C, BLOCK_B)
                dz = lam_sel * g + (1.0 - lam_source) * g_source
                tl.store(dlogits_ptr + row * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)
                if pairs:
                    dz = lam_source * g_source + (1.0 - lam_sel) * g
                    tl.store(dlogits_ptr + other * C + cols, dz.to(dlogits_ptr.dtype.element_ty), mask=mask)


class Forward(NamedTuple):
    """What `amp_cross_entropy_forward` leaves."""

    rows: Tensor  # (fields, B) compute dtype: see rows.py
    loss: Tensor | None  # () the reduced loss; None without reduction
    divisor: Tensor | None  # () what it was divided by; None without reduction
    dlogits: Tensor | None  # (B, C), divided by `assumed` (0: by the right divisor); None where not asked for
    assumed: float


def amp_cross_entropy_forward(
    logits: Tensor,
    mixture: Any,
    policy: Any,
    step_size: float,
    grad_divisor: Tensor | None,
    *,
    divisor: float | None,
    want_grad: bool,
) -> Forward:
    """Losses of all rows and, where one launch can give it, the complete gradient.

    Args:
        logits: (B, C), B >= 1, any strides.
        mixture: target (B,) int64 or (B, C), λ (B,) compute dtype, partner (B,), class weight (C,) or None.
        policy: what to compile for.
        step_size: ε.
        grad_divisor: () compute dtype, or None.
        divisor: of the summed loss; 0 stands for the kept mass; None for no reduction.
        want_grad: whether a gradient to the logits will be asked for.
    """
    batch, classes = logits.shape
    target, lam, partner, weight = mixture
    target, lam, partner = target.contiguous(), lam.contiguous(), partner.contiguous()
    weight = None if weight is None else weight.contiguous()
    rows = lam.new_empty(ROW_FIELDS, batch)
    # Two tensors, not one: the user may write to the loss, and the divisor is kept for backward.
    loss, loss_divisor = (None, None) if divisor is None else (lam.new_empty(()), lam.new_empty(()))
    config = forward_config(batch, classes, lam.element_size(), policy)
    single = config.in_registers and config.block_b >= batch
    assumed = 0.0 if divisor is None or single else divisor or float(batch)
    pairs = policy.pairing == "matching" and not config.in_registers
    if pairs:
        dense_target = target.is_floating_point() or policy.label_smoothing > 0
        config = pairs_config(lam.element_size(), dense_target=dense_target)
    dlogits = None
    # A float16 gradient has to see the upstream gradient, usually a loss scale, before it is rounded.
    if want_grad and divisor is not None and logits.dtype != torch.float16 and (config.in_registers or pairs):
        dlogits = torch.empty(batch, classes, dtype=logits.dtype, device=logits.device)
    tensors = (logits, target, lam, partner)
    sizes = (batch, classes, *logits.stride(), step_size)
    inverse = None
    if config.in_registers and not single and dlogits is not None and policy.pairing != "matching":
        inverse = inverse_permutation(partner)

    def launch(config: Config) -> None:
        options = {"policy": policy, "BLOCK_C": config.block_c, "num_warps": config.num_warps, **ASSERTING}
        if pairs:
            _amp_pairs_kernel[(batch,)](*tensors, weight, grad_divisor, dlogits, rows, *sizes, assumed, **options)
        elif not config.in_registers:
            _amp_rows_kernel[(batch,)](*tensors, weight, grad_divisor, rows, *sizes, **options)
        else:
            _amp_cross_entropy_kernel[(cdiv(batch, config.block_b),)](
                *tensors,
                inverse,
                weight,
                grad_divisor,
                dlogits,
                rows,
                loss if single else None,
                loss_divisor if single else None,
                *sizes,
                divisor or 0.0 if single else assumed,
                BLOCK_B=config.block_b,
                **options,
            )

    if single:
        free: tuple[str, ...] = ("num_warps",)
    else:
        free = ("block_b" if config.in_registers else "block_c", "num_warps")
    with on_device_of(logits):
        tuned(
            "_amp_cross_entropy_kernel",
            lambda: _facts(logits, target, weight, policy),
            config,
            free,
            launch,
        )
        if loss is not None and not single:
            _amp_total_kernel[(1,)](
                rows, loss, loss_divisor, None, batch, divisor, 0.0, BLOCK=TOTAL_BLOCK, num_warps=4, **OPTIONS
            )
    return Forward(rows, loss, loss_divisor, dlogits, assumed)


def amp_cross_entropy_backward(
    logits: Tensor, mixture: Any, policy: Any, rows: Tensor, divisor: Tensor | None, upstream: Tensor
) -> Tensor:
    """The complete gradient (B, C) from a forward's `rows`, for an upstream gradient () or (B,) of any stride."""
    batch, classes = logits.shape
    target, lam, partner, weight = mixture
    upstream = upstream.to(lam.dtype)
    dlogits = torch.empty(batch, classes, dtype=logits.dtype, device=logits.device)
    target, lam, partner = target.contiguous(), lam.contiguous(), partner.contiguous()
    weight = None if weight is None else weight.contiguous()
    inverse = None if policy.pairing == "matching" else inverse_permutation(partner)

    def launch(config: Config) -> Tensor:
        _amp_rows_grad_kernel[(cdiv(batch, config.block_b), cdiv(classes, config.block_c))](
            logits,
            target,
            lam,
            partner,
            inverse,
            weight,
            rows,
            upstream,
            divisor,
            dlogits,
            batch,
            classes,
            *logits.stride(),
            upstream.stride(0) if upstream.dim() else 0,
            policy=policy,
            BLOCK_B=config.block_b,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
            **OPTIONS,
        )
        return dlogits

    config = backward_config(classes, lam.element_size())
    with on_device_of(logits):
        return tuned(
            "_amp_rows_grad_kernel",
            lambda: _facts(logits, target, weight, policy),
            config,
            ("block_b", "block_c", "num_warps"),
            launch,
        )


def _facts(logits: Tensor, target: Tensor, weight: Tensor | None, policy: Any) -> tuple[object, ...]:
    """What decides which launch is the fastest: all that the kernel is compiled for, the sizes and the device."""
    batch, classes = logits.shape
    compiled_for = (logits.dtype, target.dtype, weight is not None, policy.mangle())
    return *compiled_for, batch_class(batch), f"C={classes}", logits.device


def rescaled(dlogits: Tensor, upstream: Tensor, divisor: Tensor, assumed: float) -> Tensor:
    """`dlogits` times upstream·assumed/divisor, in its memory, none of which is touched where that is 1.

    While a CUDA graph is captured it is copied first: a backward may be replayed more often than the forward that wrote
    what is scaled.
    """
    numel = dlogits.numel()
    with on_device_of(dlogits):
        if is_captured(dlogits.device):
            dlogits = dlogits.clone()
        _rescale_kernel[(min(cdiv(numel, RESCALE_BLOCK), 2048),)](
            dlogits, upstream, divisor, numel, assumed, BLOCK=RESCALE_BLOCK, num_warps=8, **OPTIONS
        )
    return dlogits
