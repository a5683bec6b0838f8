"""The published code's weights: rows whose loss AMP raised by more than was usual of late count for more."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 5  # steps that are looked back on


def new_window() -> Tensor:
    """Count, mean and sum of squared deviations of the positive δ of each of the last steps: (WINDOW, 3) float32."""
    return torch.zeros(WINDOW, 3, dtype=torch.float32)


def moving_weights(delta: Tensor, window: Tensor, step: Tensor) -> Tensor:
    """1 + (δ-μ)/σ where δ > μ, else 1; μ, σ of the positive δ of the last steps, this one included.

    σ is the unbiased one (n - 1); all weights are 1 while there are fewer than two positive δ.

    Args:
        delta: (B,) δ of this step's rows.
        window: as `new_window` makes it; this step's row is replaced in place.
        step: () int64 number of the step; counted up in place.
    """
    positive = delta > 0
    count = positive.sum()
    mean = torch.where(positive, delta, 0).sum() / count.clamp(min=1)
    spread = torch.where(positive, (delta - mean).square(), 0).sum()
    row = torch.stack([count.to(mean.dtype), mean, spread]).to(window.dtype)
    window.index_copy_(0, (step % WINDOW).view(1), row[None])
    step.add_(1)

    counts, means, spreads = window.to(delta.dtype).unbind(1)
    total = counts.sum()
    mean = (counts * means).sum() / total.clamp(min=1)
    std = ((spreads + counts * (means - mean).square()).sum() / (total - 1).clamp(min=1)).sqrt()
    return torch.where((delta > mean) & (std > 0), 1 + (delta - mean) / std, 1)
