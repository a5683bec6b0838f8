"""The paper's operations as functions, each at home in a file of its own in `fastamp.ops`.

Whole steps: `amp_cross_entropy` on logits and `linear_amp_cross_entropy` before a linear head. Their parts, for a step
at any layer: `mix`, `embedding_mix`, `lambda_grad`, `remix`, `select_loss` and `select_cross_entropy`.
"""

from fastamp.ops.amp_cross_entropy import amp_cross_entropy
from fastamp.ops.embedding_mix import embedding_mix
from fastamp.ops.linear_amp_cross_entropy import linear_amp_cross_entropy
from fastamp.ops.mix import mix
from fastamp.ops.remix import lambda_grad, remix
from fastamp.ops.select_cross_entropy import select_cross_entropy, select_loss

__all__ = [
    "amp_cross_entropy",
    "embedding_mix",
    "lambda_grad",
    "linear_amp_cross_entropy",
    "mix",
    "remix",
    "select_cross_entropy",
    "select_loss",
]
