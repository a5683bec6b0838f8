"""Normalisation over the batch inside a network that is run more than once a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# One hook for all: torch.compile specialises on a hook's identity.
_called: list[nn.Module] = []

# A compiled module inside f is told of the hook below every time, which is meant.
warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")


def _note(module: nn.Module, _: Any) -> None:
    if isinstance(module, _NormBase) or "_orig_mod" in module._modules:  # the latter: a compiled module
        _called.append(module)


class BatchStatistics:
    """Which layers of f use or update statistics of the batch.

    A module is searched. Of any other callable, the modules that its first pass calls are looked at; batch
    normalisation by a function (F.batch_norm) is not noticed.
    """

    def __init__(self, f: Callable[..., Any]) -> None:
        self._f = f
        self._layers = _normalising([f]) if isinstance(f, nn.Module) else []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Encloses the first pass."""
        if isinstance(self._f, nn.Module):
            yield
            return
        _called.clear()
        hook = register_module_forward_pre_hook(_note)
        try:
            yield
        finally:
            hook.remove()
            self._layers = _normalising(_called)
            _called.clear()

    @property
    def couple_rows(self) -> bool:
        """Whether a row's logits depend on the other rows of its batch."""
        return any(isinstance(layer, _BatchNorm) for layer in self._layers)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Encloses every later pass: running statistics are those of the first one, updated once."""
        # Other tensors in their place, rather than their values put back: a graph that keeps them is not disturbed.
        saved = [(layer, name, layer._buffers[name]) for layer in self._layers for name in _BUFFERS]
        for layer, name, buffer in saved:
            layer._buffers[name] = None if buffer is None else buffer.clone()
        try:
            yield
        finally:
            for layer, name, buffer in saved:
                layer._buffers[name] = buffer


def _normalising(modules: list[nn.Module]) -> list[_NormBase]:
    """The layers in `modules` that normalise by statistics of what they are given."""
    layers = {id(layer): layer for module in modules for layer in module.modules() if isinstance(layer, _NormBase)}
    return [layer for layer in layers.values() if layer.training or layer.running_mean is None]
