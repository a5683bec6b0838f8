"""What launchers share."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU current: Triton launches on the current one, whatever its arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def inverse_permutation(partner: Tensor) -> Tensor:
    """(B,) int64 q with partner[q[r]] = r."""
    index = torch.arange(len(partner), device=partner.device)
    return torch.empty_like(partner).scatter_(0, partner, index)


def memory_order(rows: Tensor) -> list[int] | None:
    """The dimensions of `rows` (B, ...) from the outermost of a row's in memory to the innermost; None: as they are."""
    if rows.dim() < 3 or rows.is_contiguous() or 0 in rows.stride()[1:]:
        return None
    inner = range(1, rows.dim())
    order = sorted(inner, key=rows.stride, reverse=True)
    return None if order == list(inner) else [0, *order]


def as_matrix(rows: Tensor, order: list[int] | None = None) -> Tensor:
    """`rows` (B, ...) as (B, N), elements in `memory_order`: a view where one exists, else a copy."""
    return (rows if order is None else rows.permute(order)).reshape(rows.shape[0], -1)


def empty_rows(rows: Tensor, order: list[int] | None) -> Tensor:
    """Memory for rows like these, one after the other, each in `memory_order`: channels_last stays what it is."""
    if order is None:
        return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    # Not a permuted view of other memory: autograd forbids writing to a view that an autograd function returns.
    strides, stride = [0] * len(order), 1
    for dim in reversed(order):
        strides[dim] = stride
        stride *= rows.shape[dim]
    return torch.empty_strided(rows.shape, strides, dtype=rows.dtype, device=rows.device)
