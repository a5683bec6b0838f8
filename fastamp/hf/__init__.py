"""Hugging Face transformers: cut a model at any layer.

    g, f = fastamp.hf.split(model, at="embeddings")
    loss = criterion.step(f, g(**inputs), labels, mix=mix, context=f.context(inputs, mix))

`import fastamp` does not import this package; it needs transformers 5.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ImportError("fastamp.hf needs transformers 5 or newer: pip install 'fastamp[hf]'")

from fastamp.hf.splitting import Split, split

__all__ = ["Split", "split"]
