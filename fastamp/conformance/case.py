"""What a case is, what it gives, and what the cases share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
SPOILED = 1  # a class that no row of the -inf cases is labelled with


class Outcome(NamedTuple):
    """What a run gave."""

    values: Tensors  # outputs and gradients by name, detached
    mask: Tensor | None = None  # (B,) bool: rows that took ℓ(λ'); None where nothing is selected
    delta: Tensor | None = None  # (B,) ℓ(λ') - ℓ(λ)
    loss: Tensor | None = None  # (B,) the selected losses, which the tie tolerance is relative to


class Case(Protocol):
    """One comparison."""

    @property
    def op(self) -> str:
        """The operation's name in fastamp.functional."""

    @property
    def name(self) -> str:
        """What is special about the inputs or options."""

    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Inputs on the CPU, floating-point ones in `dtype` but for λ and upstream gradients."""

    def ours(self, inputs: Tensors) -> Outcome:
        """Runs the operation."""

    def defined(self, inputs: Tensors, dtype: torch.dtype, mask: Tensor | None) -> Outcome:
        """Runs the definition in `dtype`; `mask`, if given, says which rows take ℓ(λ')."""


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def lam_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of λ beside rows of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mix(batch: int, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
    """λ (B,), uniform, and partners (B,), for rows of `dtype`."""
    lam = torch.rand(batch, generator=generator, dtype=torch.float64).to(lam_dtype(dtype))
    return {"lam": lam, "partner": torch.randperm(batch, generator=generator)}


def cast(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """Floating-point ones in `dtype`."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def laid_out(rows: Tensor, layout: str) -> Tensor:
    """The same values in another layout."""
    if layout == "strided":
        return torch.stack([rows, -rows], -1)[..., 0]
    if layout == "misaligned":
        memory = rows.new_full((rows.numel() + 1,), torch.nan)
        memory[1:] = rows.flatten()
        return memory[1:].view(rows.shape)
    return rows


def fresh(inputs: Tensors, names: tuple[str, ...]) -> Tensors:
    """Leaves for autograd."""
    return {name: inputs[name].detach().requires_grad_() for name in names}


def gradients(
    output: Tensor, leaves: Tensors, of: str, upstream: Tensor | None = None, *, again: bool = False
) -> Tensors:
    """Gradients of an output to the leaves, by name."""
    grads = torch.autograd.grad(output, list(leaves.values()), upstream, retain_graph=again)
    return {f"gradient {of} to {name}".replace("  ", " "): grad for name, grad in zip(leaves, grads, strict=True)}


def outputs(made: Tensors, leaves: Tensors, upstream: Tensor) -> Tensors:
    """What an operation made, and the gradients of the one of them that has some, by name."""
    (differentiable,) = (x for x in made.values() if x.requires_grad)
    return {name: x.detach() for name, x in made.items()} | gradients(differentiable, leaves, "", upstream)
