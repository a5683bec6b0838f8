"""Triton kernels and their launchers; importing this imports Triton."""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(f'{error}; fastamp.set_backend("torch") computes the same without Triton') from error

from . import rows as _rows
from .amp_cross_entropy import amp_cross_entropy_backward, amp_cross_entropy_forward, rescaled
from .config import linear_head_config
from .draw import draw_partner
from .embedding_mix import embedding_mix_backward, embedding_mix_forward
from .launch import empty_rows, memory_order
from .linear_amp_cross_entropy import linear_amp_cross_entropy_launch
from .mix import mix_backward, mix_forward
from .remix import lambda_grad, remix_forward
from .select_cross_entropy import Selection, select_cross_entropy_forward

# Rows of the buffer that a forward leaves, as plain integers for indexing tensors.
LOSS, LAM, LAM_ADV, GRAD, DELTA, MASK = (
    getattr(_rows, name).value for name in ("LOSS", "LAM", "LAM_ADV", "GRAD", "DELTA", "MASK")
)

__all__ = [
    "DELTA",
    "GRAD",
    "LAM",
    "LAM_ADV",
    "LOSS",
    "MASK",
    "Selection",
    "amp_cross_entropy_backward",
    "amp_cross_entropy_forward",
    "draw_partner",
    "embedding_mix_backward",
    "embedding_mix_forward",
    "empty_rows",
    "lambda_grad",
    "linear_amp_cross_entropy_launch",
    "linear_head_config",
    "memory_order",
    "mix_backward",
    "mix_forward",
    "remix_forward",
    "rescaled",
    "select_cross_entropy_forward",
]
