"""The same random numbers in every pass of a step: what a row is dropped out by must not differ between λ and λ'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, when nothing may wait for the device or set its generator back."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class RandomStates:
    """The default generators of the CPU and of `device`, as they are now; entering a pass again sets them back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._read()
        self.drew = False  # whether the pass that `first` enclosed drew any numbers

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

    For where generators cannot be set back: inside torch.compile, and while a CUDA graph is captured. Any other
    function that draws random numbers is refused.
    """

    def __init__(self) -> None:
        super().__init__()
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
        if func in _BATCHED_DIMS:
            return self._dropout(_BATCHED_DIMS[func], *args, **kwargs)
        if func in _REFUSED or (func is F.scaled_dot_product_attention and _attention_dropout(args, kwargs) > 0):
            name = getattr(func, "__name__", str(func))
            raise NotImplementedError(
                f"f draws random numbers by {name}, which cannot be repeated under torch.compile or in a CUDA graph: "
                "set its dropout to 0 (for attention in transformers: attention_probs_dropout_prob=0 or "
                "attn_implementation='eager'), use dropout='redrawn', or call step outside and compile f alone"
            )
        return func(*args, **kwargs)

    def _dropout(
        self, dims: int | None, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        if self._next is None:
            shape = input.shape if dims is None else input.shape[: input.dim() - dims] + (1,) * dims
            keep = torch.rand(shape, device=input.device) >= p
            self.masks.append(keep.to(input.dtype) / (1 - p) if p < 1 else keep.to(input.dtype))
            mask = self.masks[-1]
        else:
            mask = self.masks[self._next]
            self._next += 1
        return input.mul_(mask) if inplace else input * mask


# How many trailing dimensions one number of the mask covers; None: none, every element has its own.
_BATCHED_DIMS: dict[Any, int | None] = {F.dropout: None, F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}
_REFUSED: set[Any] = {
    F.alpha_dropout,
    F.feature_alpha_dropout,
    F.gumbel_softmax,
    torch.bernoulli,
    torch.multinomial,
    torch.normal,
    torch.rand_like,
    torch.randint_like,
    torch.randn_like,
    torch.Tensor.bernoulli,
    torch.Tensor.bernoulli_,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
}


def _attention_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    return kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
