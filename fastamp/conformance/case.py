"""What a case is, what it gives, and what the cases share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastamp.mixing import draw
from fastamp.policy import Pairing

Tensors = dict[str, Tensor]
SPOILED = 1  # a class that no row of the -inf cases is labelled with


class Outcome(NamedTuple):
    """What a run gave."""

    values: Tensors  # outputs by name, and in the end detached, beside their gradients
    mask: Tensor | None = None  # (B,) bool: rows that took ℓ(λ'); None where nothing is selected
    delta: Tensor | None = None  # (B,) ℓ(λ') - ℓ(λ)
    loss: Tensor | None = None  # (B,) the selected losses, which the tie tolerance is relative to


class Case(ABC):
    """One comparison of an operation with its definition."""

    op: str  # the operation's name in fastamp.functional
    name: str  # what is special about the inputs or options
    leaves: tuple[str, ...]  # inputs whose gradients are compared, of every output that has some

    @abstractmethod
    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Inputs on the CPU, floating-point ones in `dtype` but for λ and upstream gradients."""

    @abstractmethod
    def run(self, x: Tensors) -> Outcome:
        """Runs the operation."""

    @abstractmethod
    def define(self, x: Tensors, given: Tensors, mask: Tensor | None) -> Outcome:
        """Runs the definition.

        Args:
            x: the inputs in the dtype of the definition.
            given: the inputs in their own.
            mask: says which rows take ℓ(λ'), where it is given.
        """

    def ours(self, inputs: Tensors) -> Outcome:
        """What the operation gives, and its gradients."""
        leaves = self._fresh(inputs)
        return _with_gradients(self.run(inputs | leaves), leaves, inputs["upstream"])

    def defined(self, inputs: Tensors, dtype: torch.dtype, mask: Tensor | None) -> Outcome:
        """The same by the definition in `dtype`; `mask`, if given, says which rows take ℓ(λ')."""
        x = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        leaves = self._fresh(x)
        return _with_gradients(self.define(x | leaves, inputs, mask), leaves, inputs["upstream"])

    def _fresh(self, inputs: Tensors) -> Tensors:
        return {name: inputs[name].detach().requires_grad_() for name in self.leaves}


def _with_gradients(made: Outcome, leaves: Tensors, upstream: Tensor) -> Outcome:
    values = {name: value.detach() for name, value in made.values.items()}
    for of, value in made.values.items():
        if value.requires_grad:
            above = upstream.to(value.dtype) if value.dim() else None
            grads = torch.autograd.grad(value, list(leaves.values()), above, retain_graph=True)
            values |= {f"gradient of {of} to {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return made._replace(values=values)


@dataclass(frozen=True)
class OfClasses(Case):
    """A case of rows of classes, and what these may have besides their logits."""

    name: str
    soft: bool = False  # targets are probabilities
    weighted: bool = False
    ignored: bool = False  # every third row
    spoiled: bool = False  # one class is -inf in some rows
    layout: str = "contiguous"  # "strided": every second column of a wider tensor; "misaligned": one element in
    offset: float = 0.0

    def rows(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """Float64 rows as the case has them."""
        logits = logits + self.offset
        if self.spoiled:
            logits[: len(logits) // 2, SPOILED] = -torch.inf
        return laid_out(logits.to(dtype), self.layout)

    def beside(self, batch: int, classes: int, dtype: torch.dtype, generator: torch.Generator, **mixed: Any) -> Tensors:
        """Targets, class weights, λ, partners and upstream gradients."""
        target = torch.randint(classes, (batch,), generator=generator)
        if self.spoiled:
            target[target == SPOILED] = 0
        if self.ignored:
            target[::3] = -100
        if self.soft:
            target = normal(generator, batch, classes).softmax(1).to(dtype)
        weight = {"class_weight": (torch.rand(classes, generator=generator) + 0.5).to(dtype)} if self.weighted else {}
        upstream = normal(generator, batch).to(lam_dtype(dtype))
        return {"target": target, "upstream": upstream, **mix(batch, dtype, generator, **mixed), **weight}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def lam_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of λ beside rows of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mix(batch: int, dtype: torch.dtype, generator: torch.Generator, pairing: Pairing = "permutation") -> Tensors:
    """λ (B,), uniform, and partners (B,), for rows of `dtype`."""
    lam = torch.rand(batch, generator=generator, dtype=torch.float64).to(lam_dtype(dtype))
    return {"lam": lam, "partner": draw(batch, pairing=pairing, generator=generator).partner}


def laid_out(rows: Tensor, layout: str) -> Tensor:
    """The same values in another layout."""
    if layout == "strided":
        return torch.stack([rows, -rows], -1)[..., 0]
    if layout == "misaligned":
        memory = rows.new_full((rows.numel() + 1,), torch.nan)
        memory[1:] = rows.flatten()
        return memory[1:].view(rows.shape)
    return rows
