"""AMP as functions of tensors: no state, no random numbers.

`amp_cross_entropy` and `linear_amp_cross_entropy` are whole steps; `mix`, `embedding_mix`, `lambda_grad`, `remix`,
`select_loss` and `select_cross_entropy` are the paper's operations one by one, for a step of your own at any layer.
"""

from fastamp.functional.layers import embedding_mix, lambda_grad, mix, remix, select_cross_entropy, select_loss
from fastamp.functional.logits import amp_cross_entropy, linear_amp_cross_entropy

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
