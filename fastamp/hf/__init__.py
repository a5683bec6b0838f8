"""Hugging Face transformers: cut a model at any layer, and train it with AMP through the Trainer.

    g, f = fastamp.hf.split(model, at="embeddings")
    loss = criterion.step(f, g(**inputs), labels, mix=mix, context=f.context(inputs, mix))

    Trainer(..., compute_loss_func=fastamp.hf.sent_loss(criterion))
    fastamp.hf.AMPTrainer(..., criterion=criterion, mix_at="embeddings")

`import fastamp` does not import this package; it needs transformers 5, and its Trainer parts also accelerate.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("transformers") is None:
    raise ImportError("fastamp.hf needs transformers 5 or newer: pip install 'fastamp[hf]'")

from fastamp.hf.splitting import Split, split

if TYPE_CHECKING:
    from fastamp.hf.losses import SentLoss, sent_loss
    from fastamp.hf.trainer import AMPTrainer, AMPTrainerMixin

__all__ = ["AMPTrainer", "AMPTrainerMixin", "SentLoss", "Split", "sent_loss", "split"]

# Importing transformers' Trainer takes seconds and needs accelerate: only for those who ask for it.
_LAZY = {
    "AMPTrainer": "fastamp.hf.trainer",
    "AMPTrainerMixin": "fastamp.hf.trainer",
    "SentLoss": "fastamp.hf.losses",
    "sent_loss": "fastamp.hf.losses",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError(f"fastamp.hf.{name} needs accelerate: pip install 'fastamp[hf]'")
    return getattr(importlib.import_module(_LAZY[name]), name)
