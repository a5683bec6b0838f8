"""embedding_mix: the word embeddings of every row with its partner's, without either being written down."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp.autograd import in_torch_func
from fastamp.backend import takes_kernels
from fastamp.checks import check_float_rows, check_partner, checked_lam
from fastamp.mixing import Mix
from fastamp.ops import mix as mix_op
from fastamp.ops.operator import operator
from fastamp.ops.rows import compute_dtype


def embedding_mix(
    ids: Tensor, table: Tensor, lam: Tensor, partner: Tensor, *, padding_idx: int | None = None
) -> Tensor:
    """Mix the word embeddings of every row with its partner's (WordAMP, Eq. 10), without either being written down.

    m_rt = λ_r E[ids_rt] + (1-λ_r) E[ids_π(r)t], as `mix(F.embedding(ids, table, padding_idx), lam, partner)`.

    Args:
        ids: (B, T) int64 in 0..V-1.
        table: (V, D) float16/bfloat16/float32/float64, the weight of an nn.Embedding.
        lam: (B,) floating point in [0, 1], or outside it for a λ' that left the interval; () for all rows alike.
        partner: (B,) int64, a permutation of 0..B-1.
        padding_idx: as in nn.Embedding: the gradient of this row of the table is zero. A negative one counts from
            the end.

    Returns:
        (B, T, D) of the table's dtype, differentiable to the table, with λ a constant. The table's gradient is dense,
        and summed in float32 (float64 for float64) in a fixed order.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; on the CPU also ids out of range. On a GPU an id out
            of range stops the kernel by a device-side assertion.
    """
    check_float_rows("table", table, dims=2)
    size = len(table)
    _check_ids(ids, size, table.device)
    lam = checked_lam(lam, len(ids), table.device)
    check_partner(partner, len(ids), table.device)
    if padding_idx is not None:
        if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
            raise TypeError(f"padding_idx must be an int or None, got {padding_idx!r}")
        if not -size <= padding_idx < size:
            raise ValueError(f"padding_idx must lie in {-size}..{size - 1} for a table of {size}, got {padding_idx}")
        padding_idx %= size
    return dispatch(ids, table, Mix(lam, partner), padding_idx)


def _check_ids(ids: object, size: int, device: torch.device) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}; pass ids.long()")
    if ids.dim() != 2:
        raise ValueError(f"ids must be (B, T), got shape {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"ids is on {ids.device}, the table is on {device}; they must be together")
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= size:
        raise ValueError(f"ids must lie in 0..{size - 1}, the rows of table, got values from {int(low)} to {int(high)}")


def dispatch(ids: Tensor, table: Tensor, mix: Mix, padding_idx: int | None) -> Tensor:
    """`embedding_mix` for checked arguments, `padding_idx` in 0..V-1."""
    lam = mix.lam.detach().to(compute_dtype(table.dtype))
    if not _takes_kernels(table, ids) and (torch.compiler.is_compiling() or in_torch_func()):
        return mix_op.closed_form(F.embedding(ids, table, padding_idx), lam, mix.partner)
    return _EmbeddingMix.apply(table, ids, lam, mix.partner, padding_idx)


def _takes_kernels(rows: Tensor, ids: Tensor) -> bool:
    return takes_kernels(rows) and ids.numel() > 0


def closed_form(table: Tensor, ids: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """The mixed embeddings of the table's dtype."""
    return mix_op.closed_form(F.embedding(ids, table), lam, partner)


def closed_form_grad(
    upstream: Tensor, ids: Tensor, lam: Tensor, partner: Tensor, size: int, padding_idx: int | None
) -> Tensor:
    """The gradient of the table; all that reaches a row of it is summed in the compute dtype."""
    rows = mix_op.closed_form_grad(upstream, lam, partner)
    padding = -1 if padding_idx is None else padding_idx
    return torch.ops.aten.embedding_dense_backward(rows, ids, size, padding, False).to(upstream.dtype)


class _EmbeddingMix(torch.autograd.Function):
    """Keeps no embedding for backward."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, lam: Tensor, partner: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids, lam, partner)
        ctx.options = table.shape[0], padding_idx
        return (forward if _takes_kernels(table, ids) else closed_form)(table, ids, lam, partner)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad = backward if torch.compiler.is_compiling() else _EmbeddingMixGrad.apply
        return grad(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 4


class _EmbeddingMixGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, upstream: Tensor, *arguments: Any) -> Tensor:
        *tensors, _, ctx.padding_idx = arguments
        ctx.save_for_backward(*tensors)
        return (backward if _takes_kernels(upstream, arguments[0]) else closed_form_grad)(upstream, *arguments)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.padding_idx is not None:
            row = torch.arange(upstream.shape[0], device=upstream.device) == ctx.padding_idx
            upstream = upstream.masked_fill(row.unsqueeze(1), 0)
        return _EmbeddingMix.apply(upstream, *ctx.saved_tensors, None), *[None] * 5


@operator(
    "fastamp::embedding_mix",
    lambda table, ids, *_: torch.empty(*ids.shape, table.shape[1], dtype=table.dtype, device=table.device),
)
def forward(table: Tensor, ids: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """The mixed embeddings, by a kernel."""
    from fastamp import kernels

    return kernels.embedding_mix_forward(ids, table, lam, partner)


@operator(
    "fastamp::embedding_mix_backward",
    lambda upstream, ids, lam, partner, size, _: torch.empty(
        size, upstream.shape[2], dtype=upstream.dtype, device=upstream.device
    ),
)
def backward(upstream: Tensor, ids: Tensor, lam: Tensor, partner: Tensor, size: int, padding_idx: int | None) -> Tensor:
    """The gradient of the table, by kernels."""
    from fastamp import kernels

    return kernels.embedding_mix_backward(upstream, ids, lam, partner, size, padding_idx)
