"""The same random numbers in every pass of a step: what a row is dropped out by must not differ between λ and λ'."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, when nothing may wait for the device or set its generator back."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch asks the current stream of the current device
        return torch.cuda.is_current_stream_capturing()


def recomputes() -> bool:
    """Whether a backward pass is running: then an activation checkpoint calls the criterion a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def check_drawn_once(generator: torch.Generator | None) -> None:
    """RuntimeError in a checkpoint's recomputation, if numbers drawn now would not be those of the forward pass."""
    if not recomputes():
        return
    if generator is not None:
        why = "its generator has gone on since the forward pass, and a checkpoint sets back torch's default ones only"
    elif not _default_states_are_restored():
        why = "preserve_rng_state=False does not set torch's default generators back"
    else:
        return
    raise RuntimeError(
        f"an activation checkpoint runs the criterion again in its backward pass and would draw another λ: {why}. "
        "Leave the criterion out of the checkpoint, or draw outside of it and pass mix=criterion.sample(batch_size)"
    )


def _default_states_are_restored() -> bool:
    """What the checkpoint that recomputes was asked to preserve; True where there is none of torch's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            known = frame.f_locals
            return known.get("preserve_rng_state", getattr(known.get("ctx"), "preserve_rng_state", True))
        frame = frame.f_back
    return True


class RandomStates:
    """The default generators of the CPU and of `device`, as they are now; entering a pass again sets them back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._read()
        self.drew = False  # whether the pass that this enclosed drew any numbers

    def __enter__(self) -> RandomStates:
        return self

    def __exit__(self, *_: object) -> None:
        self.drew = any(not torch.equal(a, b) for a, b in zip(self._before, self._read(), strict=True))

    def again(self) -> RandomStates:
        """The same pass once more; use in a `with` statement."""
        self.rewind()
        return self

    def rewind(self) -> None:
        """Set the generators back."""
        cpu, *accelerator = self._before
        torch.set_rng_state(cpu)
        for state in accelerator:
            self._module().set_rng_state(state, *self._which())

    def _read(self) -> list[Tensor]:
        cpu = torch.get_rng_state()
        return [cpu] if self._device.type == "cpu" else [cpu, self._module().get_rng_state(*self._which())]

    def _module(self) -> Any:
        return torch.get_device_module(self._device)

    def _which(self) -> tuple[torch.device, ...]:
        return () if self._device.type == "mps" else (self._device,)


@contextmanager
def random_states_kept_on_error(device: torch.device, generator: torch.Generator | None) -> Iterator[None]:
    """After an error inside, the default generators and `generator` are as they were before."""
    if torch.compiler.is_compiling() or capturing(device):
        yield
        return
    states, own = RandomStates(device), None if generator is None else generator.get_state()
    try:
        yield
    except BaseException:
        states.rewind()
        if generator is not None and own is not None:
            generator.set_state(own)
        raise


class RecordedMasks(TorchFunctionMode):
    """Dropout masks, drawn in a first pass and used again in the following ones.

    For where generators cannot be set back: inside torch.compile, and while a CUDA graph is captured. Other functions
    of torch that draw random numbers are refused.

    Args:
        batch_norm: whether F.batch_norm is let pass in train mode.
    """

    def __init__(self, *, batch_norm: bool = True) -> None:
        super().__init__()
        self._batch_norm = batch_norm
        self.masks: list[Tensor] = []
        self._next: int | None = None  # None: the first pass

    @property
    def drew(self) -> bool:
        """Whether there are masks."""
        return len(self.masks) > 0

    def again(self) -> RecordedMasks:
        """The same pass once more; use in a `with` statement."""
        self._next = 0
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace dropout; pass everything else on."""
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._dropout(_DROPOUTS[func], *args, **kwargs)
        if func is F.batch_norm and not self._batch_norm and _argument(args, kwargs, 5, "training", False):
            raise NotImplementedError(
                "batch normalisation in train mode cannot be traced, since rows depend on each other: compile f alone "
                "and call step outside"
            )
        attention = func is F.scaled_dot_product_attention and _argument(args, kwargs, 4, "dropout_p", 0.0) > 0
        if func in _REFUSED or attention or (func in _RECURRENT and _recurrent_dropout(args)):
            name = getattr(func, "__name__", str(func))
            raise NotImplementedError(
                f"f draws random numbers by {name}, which cannot be repeated under torch.compile or in a CUDA graph: "
                "set its dropout to 0 (for attention in transformers: attention_probs_dropout_prob=0 or "
                "attn_implementation='eager'), use dropout='redrawn', or call step outside and compile f alone"
            )
        return func(*args, **kwargs)

    def _dropout(
        self, unbatched: int | None, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        if self._next is None:
            shape = input.shape
            if unbatched is not None:  # a number a channel
                kept = 1 if input.dim() == unbatched else 2
                shape = shape[:kept] + (1,) * (input.dim() - kept)
            keep = torch.rand(shape, dtype=torch.float32, device=input.device) >= p
            self.masks.append(keep.to(input.dtype) / (1 - p) if p < 1 else keep.to(input.dtype))
            mask = self.masks[-1]
        else:
            mask = self.masks[self._next]
            self._next += 1
        return input.mul_(mask) if inplace else input * mask


# How many dimensions an input without a batch dimension has (-1: there is none); None: a number for every element.
_DROPOUTS: dict[Any, int | None] = {F.dropout: None, F.dropout1d: 2, F.dropout2d: -1, F.dropout3d: 4}
_DRAWING = """
    alpha_dropout alpha_dropout_ feature_alpha_dropout feature_alpha_dropout_ feature_dropout feature_dropout_
    native_dropout gumbel_softmax rrelu rrelu_ fractional_max_pool2d fractional_max_pool3d
    bernoulli bernoulli_ binomial multinomial normal normal_ poisson uniform_ exponential_ random_ log_normal_ cauchy_
    geometric_ rand rand_like randn randn_like randint randint_like randperm
"""
_REFUSED: set[Any] = {
    getattr(owner, name) for name in _DRAWING.split() for owner in (torch, F, torch.Tensor) if hasattr(owner, name)
} | {torch.dropout, torch.dropout_, torch.nn.init.uniform_, torch.nn.init.normal_}
_RECURRENT: set[Any] = {
    getattr(owner, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for owner in (torch, torch._VF)
}


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return kwargs.get(name, args[position] if len(args) > position else default)


def _recurrent_dropout(args: tuple[Any, ...]) -> bool:
    """Whether a recurrent layer drops out between its layers: after its first flag, has_biases."""
    has_biases = next(index for index, value in enumerate(args) if isinstance(value, bool))
    layers, dropout, train = args[has_biases + 1 : has_biases + 4]
    return bool(train and dropout > 0 and layers > 1)
