"""mix: every row with its partner (RandOp, Eq. 10)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastamp.autograd import in_torch_func
from fastamp.backend import takes_kernels
from fastamp.checks import check_float_rows, check_partner, checked_lam
from fastamp.mixing import Mix
from fastamp.ops.operator import operator
from fastamp.ops.rows import compute_dtype, partner_rows, per_row, scatter_roles


def mix(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """Mix every row with its partner: m_r = λ_r h_r + (1-λ_r) h_π(r) (RandOp, Eq. 10).

    Args:
        hidden: (B, ...) float16/bfloat16/float32/float64.
        lam: (B,) floating point in [0, 1], or outside it for a λ' that left the interval; () for all rows alike.
        partner: (B,) int64, a permutation of 0..B-1.

    Returns:
        (B, ...) of hidden's dtype and memory format (channels_last stays what it is), differentiable to hidden, with λ
        a constant; float16 and bfloat16 are mixed in float32 and rounded once. An infinity in either row gives what
        arithmetic gives, usually NaN.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; integer `hidden` among them.
    """
    check_float_rows("hidden", hidden)
    lam = checked_lam(lam, len(hidden), hidden.device)
    check_partner(partner, len(hidden), hidden.device)
    return dispatch(hidden, Mix(lam, partner))


def dispatch(hidden: Tensor, mix: Mix) -> Tensor:
    """`mix` for checked arguments."""
    lam = mix.lam.detach().to(compute_dtype(hidden.dtype))
    if not takes_kernels(hidden) and (torch.compiler.is_compiling() or in_torch_func()):
        return closed_form(hidden, lam, mix.partner)
    return _MixRows.apply(hidden, lam, mix.partner)


def closed_form(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """The mixed rows of hidden's dtype."""
    wide = hidden.to(lam.dtype)
    return torch.lerp(partner_rows(wide, partner), wide, per_row(lam, hidden)).to(hidden.dtype)


def closed_form_grad(upstream: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """The gradient of the unmixed rows, of lam's dtype."""
    return scatter_roles(upstream.to(lam.dtype), lam, partner, lam.new_ones(()))


class _MixRows(torch.autograd.Function):
    """Keeps no rows for backward. Mixing is linear, so the gradient of its gradient is mixing again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
        ctx.save_for_backward(lam, partner)
        return (forward if takes_kernels(hidden) else closed_form)(hidden, lam, partner)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return mix_rows_grad(upstream, *ctx.saved_tensors), None, None


class _MixRowsGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, upstream: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
        ctx.save_for_backward(lam, partner)
        if takes_kernels(upstream):
            return backward(upstream, lam, partner)
        return closed_form_grad(upstream, lam, partner).to(upstream.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _MixRows.apply(upstream, *ctx.saved_tensors), None, None


def mix_rows_grad(upstream: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """The gradient of the unmixed rows in a backward, itself differentiable in eager mode."""
    return (backward if torch.compiler.is_compiling() else _MixRowsGrad.apply)(upstream, lam, partner)


def _like_rows(rows: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    from fastamp import kernels

    return kernels.empty_rows(rows, kernels.memory_order(rows))


@operator("fastamp::mix", _like_rows)
def forward(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """The mixed rows, by a kernel."""
    from fastamp import kernels

    return kernels.mix_forward(hidden, lam, partner)


@operator("fastamp::mix_backward", _like_rows)
def backward(upstream: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """The gradient of the unmixed rows, by a kernel."""
    from fastamp import kernels

    return kernels.mix_backward(upstream, lam, partner)
