"""Random rows of a hidden state, and what they are mixed with."""

from __future__ import annotations

import torch
from torch import Tensor

# The interpreter cuts float32 to bfloat16 where a GPU rounds: twice the error, of values of the size of 1.
SCALE = 0.25


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (SCALE * torch.randn(shape)).to(dtype)


FORMATS = ("channels_last", "channels_last_3d", "channels last of text", "cropped channels_last")


def formatted(form: str, batch: int = 3) -> Tensor:
    """Rows whose elements lie in memory in another order than that of their dimensions."""
    if form == "channels_last_3d":
        return rows(batch, 4, 2, 3, 5).to(memory_format=torch.channels_last_3d)
    if form == "channels last of text":
        return rows(batch, 6, 4).transpose(1, 2)
    values = rows(batch, 4, 5, 6).to(memory_format=torch.channels_last)
    return values[..., 1:] if form.startswith("cropped") else values


def draw(batch: int, *, dtype: torch.dtype = torch.float32, outside: bool = False) -> tuple[Tensor, Tensor]:
    """λ, within [0, 1] or around it, and partners."""
    lam = torch.rand(batch, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return 3 * lam - 1 if outside else lam, torch.randperm(batch)


def gradient(output: Tensor, leaf: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(output, leaf, upstream, retain_graph=True)[0]
