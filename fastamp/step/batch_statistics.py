"""Normalisation over the batch inside a network that is run more than once a step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# Who watches, by thread: hooks on all modules are called by every thread's modules.
_called: dict[int, list[nn.Module]] = {}


# One function for all watches: torch.compile specialises on a hook's identity.
def _note(module: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling():
        return  # the compiled module that this one belongs to has been noted
    if (isinstance(module, _NormBase) or _compiled(module)) and threading.get_ident() in _called:
        _called[threading.get_ident()].append(module)


class BatchStatistics:
    """Which layers of f use or update statistics of the batch, and whether f is compiled.

    A module is searched. In any other callable, the modules that its first pass calls are looked at, but for those
    within a compiled function; batch normalisation by a function (F.batch_norm) is not noticed. Where such a callable
    calls a compiled module, torch warns of a hook on all modules: the one that looks.
    """

    def __init__(self, f: Callable[..., Any]) -> None:
        modules = list(f.modules()) if isinstance(f, nn.Module) else []
        self.is_compiled = hasattr(f, "_torchdynamo_orig_callable") or any(map(_compiled, modules))
        self._whole = self.is_compiled and bool(modules)  # nothing else to be seen, and hooks would be compiled as well
        self._layers = _normalising(modules)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Encloses the first pass."""
        if self._whole:
            yield
            return
        called = _called.setdefault(threading.get_ident(), [])
        hook = register_module_forward_pre_hook(_note)
        try:
            yield
        finally:
            hook.remove()
            _called.pop(threading.get_ident(), None)
            compiled = [module for module in called if _compiled(module)]
            self.is_compiled = self.is_compiled or bool(compiled)
            inner = [layer for module in compiled for layer in module.modules()]
            self._layers = _normalising([*self._layers, *called, *inner])

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


def _compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _normalising(modules: list[Any]) -> list[_NormBase]:
    """Those of `modules` that normalise by statistics of what they are given."""
    layers = {id(layer): layer for layer in modules if isinstance(layer, _NormBase)}
    return [layer for layer in layers.values() if layer.training or layer.running_mean is None]
