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


def as_matrix(rows: Tensor) -> Tensor:
    """`rows` (B, ...) as (B, N): a view where one exists, a copy where the inner dimensions allow none."""
    return rows.reshape(rows.shape[0], -1)
