"""fastamp: the Adversarial Mixing Policy (EMNLP 2021), Mixup with an adversarial λ.

"AMP" here is never automatic mixed precision.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastamp import functional, reference
    from fastamp.backend import set_backend
    from fastamp.loss import AMPLoss
    from fastamp.mixing import Mix, MixStats

__all__ = ["AMPLoss", "Mix", "MixStats", "functional", "reference", "set_backend"]
__version__ = "0.2.0"

# Where each public name lives. Loaded on first use: the command line's help should not wait for torch.
_HOMES = {
    "AMPLoss": "fastamp.loss",
    "Mix": "fastamp.mixing",
    "MixStats": "fastamp.mixing",
    "functional": "fastamp.functional",
    "hf": "fastamp.hf",  # not in __all__: a star import should not need transformers
    "reference": "fastamp.reference",
    "set_backend": "fastamp.backend",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastamp' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = module if module.__name__ == f"fastamp.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
