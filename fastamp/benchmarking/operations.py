"""The operations of a step at any layer, alone, beside the same in plain PyTorch: `fastamp bench --suite rows`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastamp import Mix, functional, reference
from fastamp.benchmarking.contenders import Contender
from fastamp.benchmarking.peers import STEP_SIZE
from fastamp.benchmarking.workload import (
    DTYPES,
    GRAD_TOLERANCE,
    LOSS_TOLERANCE,
    Runner,
    Work,
    copies_to_exceed_cache,
    distance,
)

# (B, T, D): BERT-base's words at the paper's batch, and a large batch of long sentences.
HIDDEN_SHAPES = ((24, 64, 768), (256, 128, 768))
GPU_HIDDEN_SHAPES = (*HIDDEN_SHAPES, (2048, 128, 768))  # the last is far beyond any cache
Made = dict[str, Tensor]
Body = Callable[[Tensor, Tensor, Mix], Made]  # of h (B, ...), the gradient of the mixed rows, λ and partners


class Operation(NamedTuple):
    """What one of them does with memory.

    Attributes:
        times: how often as many bytes as h has must at least be read or written.
        moves: how that comes about.
        differentiates: whether its body runs backward to h.
    """

    times: int
    moves: str
    differentiates: bool = False


OPERATIONS = {
    "mix": Operation(2, "read h, write m"),
    "mix with backward": Operation(4, "read h, write m, read its gradient, write h's", differentiates=True),
    "lambda_grad": Operation(2, "read h and the gradient of m"),
    "remix": Operation(4, "read h twice, read the gradient of m, write m at λ'"),
}


@dataclass
class HiddenWork(Work):
    """Hidden rows, the gradient of the mixed rows, λ and partners, for one operation.

    Attributes:
        op: a key of OPERATIONS.
        shape: (B, ...).
        dtype: a key of DTYPES.
        device: where.
        seed: of all of them.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    device: torch.device
    seed: int = 0
    inputs: list[tuple[Tensor, Tensor]] = field(init=False, repr=False)
    mix: Mix = field(init=False, repr=False)
    narrow: Mix = field(init=False, repr=False)
    truths: dict[tuple[str, bool], tuple[Tensor, ...]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.takes, self.directions = "rows", ("both",)
        dtype, row = DTYPES[self.dtype], math.prod(self.shape[1:])
        self.copies = copies_to_exceed_cache(2 * self.shape[0] * row * dtype.itemsize, self.device)
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(scale: float) -> Tensor:
            return (scale * torch.randn(self.shape, device=self.device, generator=generator)).to(dtype)

        # The gradient of such a size that ∇λ is about 1, where the clip takes hold of some rows only.
        self.inputs = [
            (normal(1.0).requires_grad_(OPERATIONS[self.op].differentiates), normal(row**-0.5))
            for _ in range(self.copies)
        ]
        lam = torch.rand(self.shape[0], device=self.device, generator=generator)
        partner = torch.randperm(self.shape[0], device=self.device, generator=generator)
        self.mix, self.narrow = Mix(lam, partner), Mix(lam.to(dtype), partner)

    @property
    def name(self) -> str:
        """Without the dtype, one line."""
        return f"{self.op} ({', '.join(map(str, self.shape))})"

    @property
    def sizes(self) -> dict[str, int | None]:
        """B, T for what is between, and D."""
        batch, *between, width = self.shape
        return {"B": batch, "T": math.prod(between), "D": width, "C": None}

    @property
    def least_bytes(self) -> int:
        """What the operation moves at least."""
        return OPERATIONS[self.op].times * math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def moves(self) -> str:
        """How those bytes come about, in words."""
        return OPERATIONS[self.op].moves

    def leaves(self, i: int) -> dict[str, Tensor]:
        """None: what is differentiated is inside the operation's body."""
        return {}

    def gradients(self, i: int, loss: Made) -> tuple[Tensor, ...]:  # type: ignore[override]
        """None."""
        return ()

    def _truth(self, mode: str, mix: Mix) -> tuple[Tensor, ...]:
        hidden, grad = (value.detach().double() for value in self.inputs[0])
        hidden.requires_grad_()
        lam, partner = mix.lam.double().requires_grad_(), mix.partner
        mixed = reference.mix(hidden, lam, partner)
        if self.op == "mix":
            return (mixed.detach(),)
        grad_hidden, slope = torch.autograd.grad(mixed, [hidden, lam], grad)
        if self.op == "mix with backward":
            return mixed.detach(), grad_hidden
        if self.op == "lambda_grad":
            return (slope,)
        lam_adv = (lam + STEP_SIZE * slope.clamp(-1, 1)).detach()
        return lam_adv, reference.mix(hidden, lam_adv, partner).detach()

    def disagreement(self, runner: Runner, mode: str) -> str | None:
        """What an operation gives otherwise than the definition; λ' is held to as much as a loss is."""
        dtype = DTYPES[self.dtype]
        made: Made = runner.forward(0)
        for (name, value), truth in zip(made.items(), self.truth(mode), strict=True):
            if name == "λ'":
                off, allowed = float((value.double() - truth).abs().max()), LOSS_TOLERANCE[dtype]
            else:
                off, allowed = distance(value.detach(), truth), GRAD_TOLERANCE[dtype]
            if not off <= allowed:
                return f"{name} is off by {off:.1e} (allowed {allowed:.0e})"
        return None

    def bind(self, contender: Contender) -> Runner:
        """A contender on these rows; fastamp's get λ in float32, the others in the dtype of the rows."""
        mix = self.mix if contender.name == "fastamp" else self.narrow
        return Runner(contender.name, self, lambda x, grad, _: contender.loss(x, grad, mix), contender.compiled)


def plain_mix(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """Mixup as one writes it."""
    return torch.lerp(hidden[partner], hidden, lam.view(-1, *[1] * (hidden.dim() - 1)))


def plain_lambda_grad(grad: Tensor, hidden: Tensor, partner: Tensor) -> Tensor:
    """∇λ as one writes it, from the gradient of the mixed rows."""
    return (grad * (hidden - hidden[partner])).flatten(1).sum(1)


def plain_remix(hidden: Tensor, lam: Tensor, partner: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """λ' and the rows mixed by it, as one writes it."""
    lam_adv = lam + STEP_SIZE * plain_lambda_grad(grad, hidden, partner).clamp(-1, 1)
    return lam_adv, plain_mix(hidden, lam_adv, partner)


def _body(op: str, *, ours: bool, compiled: bool = False) -> Body:
    def made(plain: Callable[..., Any], fast: Callable[..., Any]) -> Callable[..., Any]:
        chosen = fast if ours else plain
        return torch.compile(chosen, fullgraph=True, dynamic=False) if compiled else chosen

    if op in ("mix", "mix with backward"):
        mix = made(plain_mix, functional.mix)
        if op == "mix":
            return lambda hidden, grad, at: {"m": mix(hidden, *at)}

        def both(hidden: Tensor, grad: Tensor, at: Mix) -> Made:
            mixed = mix(hidden, *at)
            return {"m": mixed, "its gradient": torch.autograd.grad(mixed, hidden, grad)[0]}

        return both
    if op == "lambda_grad":
        lambda_grad = made(plain_lambda_grad, functional.lambda_grad)
        return lambda hidden, grad, at: {"∇λ": lambda_grad(grad, hidden, at.partner)}
    remix = made(plain_remix, partial(functional.remix, step_size=STEP_SIZE))
    return lambda hidden, grad, at: dict(zip(("λ'", "m"), remix(hidden, *at, grad), strict=True))


def operation_contenders(op: str, *, compiled: bool) -> list[Contender]:
    """Fastamp's operation, and the composition of PyTorch's.

    Args:
        op: a key of OPERATIONS.
        compiled: also that composition under torch.compile.
    """
    base = ("PyTorch",)
    every = [
        Contender("PyTorch", op, _body(op, ours=False), base=base),
        Contender("fastamp", op, _body(op, ours=True), base=base),
    ]
    if compiled:
        every.append(Contender("PyTorch, compiled", op, _body(op, ours=False, compiled=True), compiled=True, base=base))
    return every
