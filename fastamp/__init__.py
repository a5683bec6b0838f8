"""fastamp: the Adversarial Mixing Policy (EMNLP 2021), Mixup with an adversarial λ, at the price of plain Mixup.

"AMP" here is never automatic mixed precision.
"""

from fastamp import functional, reference
from fastamp.backend import set_backend
from fastamp.loss import AMPLoss
from fastamp.mixing import Mix, MixStats

__all__ = ["AMPLoss", "Mix", "MixStats", "functional", "reference", "set_backend"]
__version__ = "0.1.0"
