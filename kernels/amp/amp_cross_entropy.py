"""AMP on rows of logits: one launch while a row pair fits in registers, a loop over tiles beyond.

Every kernel recomputes the one other role that a row plays, as its predecessor's partner, instead of adding into
memory that two programs share: no atomics, the same bits in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import RESCALE_BLOCK, SEARCH_ROWS, Config, backward_config, careful_block, cdiv, forward_config
from .launch import alignment, inverse_permutation, is_captured, on_device_of
from .rows import ASSERTING, OPTIONS, ROW_FIELDS
from .rows_binary import _amp_binary_kernel
from .rows_few import _amp_few_classes_kernel
from .rows_grad import _amp_rows_grad_kernel, _rescale_kernel, total
from .rows_loop import _amp_rows_kernel
from .rows_registers import _amp_cross_entropy_kernel
from .tuning import batch_class, tuned


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
    rows = lam.new_empty(ROW_FIELDS.value, batch)
    # Two tensors, not one: the user may write to the loss, and the divisor is kept for backward.
    loss, loss_divisor = (None, None) if divisor is None else (lam.new_empty(()), lam.new_empty(()))
    dense_target = target.is_floating_point() or policy.label_smoothing > 0
    config = forward_config(batch, classes, lam.element_size(), policy, dense_target=dense_target)
    few = config.block_b > 1
    single = few and config.block_b >= batch
    assumed = 0.0 if divisor is None or single else divisor or float(batch)
    matching = policy.pairing == "matching"
    dlogits = None
    # A float16 gradient has to see the upstream gradient, usually a loss scale, before it is rounded.
    binary = policy.loss == "binary_cross_entropy"
    at_once = config.in_registers or (matching and not binary)
    if want_grad and divisor is not None and logits.dtype != torch.float16 and at_once:
        dlogits = torch.empty(batch, classes, dtype=logits.dtype, device=logits.device)
    inverse = None
    if config.in_registers and dlogits is not None and not matching and batch > SEARCH_ROWS:
        inverse = inverse_permutation(partner)
    sizes = (batch, classes, *logits.stride(), step_size)

    def launch(config: Config) -> None:
        options = {"policy": policy, "BLOCK_C": config.block_c, "num_warps": config.num_warps, **ASSERTING}
        given = (logits, target, lam, partner, inverse, weight, grad_divisor, dlogits, rows)
        if few:
            out = (loss, loss_divisor) if single else (None, None)
            used = divisor or 0.0 if single else assumed
            grid = (cdiv(batch, config.block_b),)
            _amp_few_classes_kernel[grid](*given, *out, *sizes, used, BLOCK_B=config.block_b, **options)
        else:
            kernel = _amp_cross_entropy_kernel if config.in_registers else _amp_rows_kernel
            if binary:
                kernel = _amp_binary_kernel
                options["WHOLE"] = config.in_registers
            options |= {"ALIGN": alignment(logits), "BLOCK_CAREFUL": careful_block(config, lam.element_size(), policy)}
            kernel[(batch,)](*given, *sizes, assumed, **options)

    free = ("num_warps",) if config.in_registers else ("block_c", "num_warps")
    with on_device_of(logits):
        tuned("_amp_cross_entropy_kernel", lambda: _facts(logits, target, weight, policy), config, free, launch)
        if loss is not None and divisor is not None and not single:
            total(rows, loss, divisor, used=loss_divisor)
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
    inverse = partner if policy.pairing == "matching" else inverse_permutation(partner)

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
            ALIGN=alignment(logits),
            BLOCK_B=config.block_b,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
            **OPTIONS,
        )
        return dlogits

    config = backward_config(classes, lam.element_size(), policy)
    with on_device_of(logits):
        return tuned(
            "_amp_rows_grad_kernel",
            lambda: _facts(logits, target, weight, policy),
            config,
            ("num_warps",) if config.block_b > 1 else ("block_c", "num_warps"),
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
