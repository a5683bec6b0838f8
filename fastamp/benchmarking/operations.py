"""The operations of a step at any layer, alone, beside the same in plain PyTorch: the suite "rows"."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp import Mix, functional
from fastamp.benchmarking.peers import STEP_SIZE, row_losses
from fastamp.benchmarking.workload import DTYPES, Contender, Runner, Work, copies_to_exceed_cache

# (B, T, D): BERT-base's words at the paper's batch, and a large batch of long sentences.
HIDDEN_SHAPES = ((24, 64, 768), (256, 128, 768))
GPU_HIDDEN_SHAPES = (*HIDDEN_SHAPES, (2048, 128, 768))  # the last is far beyond any cache
CLASS_SHAPES = ((256, 1000), (512, 32000))  # (B, C)
VOCABULARY = 30_522  # BERT's
Tensors = dict[str, Tensor]


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


def plain_embedding_mix(ids: Tensor, table: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """Mixed embeddings as one writes it."""
    return plain_mix(F.embedding(ids, table), lam, partner)


def plain_select(logits: Tensor, logits_adv: Tensor, target: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """The larger of the two mixed losses, row by row, as one writes it."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss, loss_adv = (row_losses(given.to(wide), target, lam.to(wide), partner) for given in (logits, logits_adv))
    return torch.where(loss_adv > loss, loss_adv, loss)


_remix = partial(functional.remix, step_size=STEP_SIZE)


def _select(*given: Tensor) -> Tensor:
    return functional.select_cross_entropy(*given, tie_tol=0.0)[0]


class Operation(NamedTuple):
    """One of them, as one writes it and as fastamp has it."""

    plain: Callable[..., Any]
    ours: Callable[..., Any]
    takes: tuple[str, ...]  # what of the inputs both take, in order
    gives: tuple[str, ...]  # the names of what both give
    bytes: Callable[[tuple[int, ...], int], int]  # that have to move at least, of its shape and the bytes of an element
    moves: str  # how these come about
    leaves: tuple[str, ...] = ()  # the inputs whose gradients are made as well
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = (HIDDEN_SHAPES, GPU_HIDDEN_SHAPES)  # on a CPU, on a GPU

    def run(self, f: Callable[..., Any], x: Tensors, takes: tuple[str, ...]) -> Tensors:
        """What `plain` or `ours` gives, and its gradients."""
        made = f(*(x[name] for name in takes))
        found = dict(zip(self.gives, made if isinstance(made, tuple) else (made,), strict=True))
        if self.leaves:
            grads = torch.autograd.grad(found[self.gives[0]], [x[name] for name in self.leaves], x["grad"])
            found |= {f"its gradient to {name}": grad for name, grad in zip(self.leaves, grads, strict=True)}
        return found


def _times(count: int) -> Callable[[tuple[int, ...], int], int]:
    return lambda shape, size: count * math.prod(shape) * size


def _embedding_bytes(shape: tuple[int, ...], size: int) -> int:
    return (3 * math.prod(shape) + VOCABULARY * shape[-1]) * size + 2 * 8 * shape[0] * shape[1]


_MIXING = ("hidden", "lam", "partner")
_READ = "read h and the gradient of m"
_REMIX = "read h twice, read the gradient of m, write m at λ'"
_TO_HIDDEN = "read h, write m, read its gradient, write h's"
_TO_TABLE = "read a row of the table for every id, write m, read its gradient, write the table's"
_TO_LOGITS = "read both logits, write their gradients in float32, read that of the loss taken, write both"
OPERATIONS = {
    "mix": Operation(plain_mix, functional.mix, _MIXING, ("m",), _times(2), "read h, write m"),
    "mix with backward": Operation(plain_mix, functional.mix, _MIXING, ("m",), _times(4), _TO_HIDDEN, ("hidden",)),
    "lambda_grad": Operation(
        plain_lambda_grad, functional.lambda_grad, ("grad", "hidden", "partner"), ("∇λ",), _times(2), _READ
    ),
    "remix": Operation(plain_remix, _remix, (*_MIXING, "grad"), ("λ'", "m"), _times(4), _REMIX),
    "embedding_mix with backward": Operation(
        plain_embedding_mix, functional.embedding_mix, ("ids", "table", "lam", "partner"), ("m",), _embedding_bytes,
        _TO_TABLE, ("table",), (HIDDEN_SHAPES, HIDDEN_SHAPES[1:]),
    ),
    "select_cross_entropy with backward": Operation(
        plain_select, _select, ("logits", "logits_adv", "target", "lam", "partner"), ("loss",),
        lambda shape, size: (4 * size + 12) * math.prod(shape), _TO_LOGITS, ("logits", "logits_adv"),
        (CLASS_SHAPES, CLASS_SHAPES[1:]),
    ),
}  # fmt: skip


class HiddenWork(Work):
    """The inputs of one operation.

    Args:
        op: a key of OPERATIONS.
        shape: (B, ..., D) of hidden rows, (B, C) of logits.
        dtype: a key of DTYPES.
        device: where.
    """

    directions = ("both",)

    def __init__(self, op: str, shape: tuple[int, ...], dtype: str, device: torch.device) -> None:
        super().__init__(dtype, "rows", device)
        self.op, self.operation, self.shape = op, OPERATIONS[op], shape
        one = 2 * math.prod(shape) * DTYPES[dtype].itemsize
        generator = torch.Generator(device).manual_seed(0)
        self.inputs = [self._drawn(generator) for _ in range(copies_to_exceed_cache(one, device))]
        self.mix = self.matched = Mix(self.inputs[0]["lam"], self.inputs[0]["partner"])
        self.leaves = [{} for _ in self.inputs]  # what is differentiated is inside the operation
        self.name = f"{op} ({', '.join(map(str, shape))})"
        batch, *between, width = shape
        self.sizes = {"B": batch, "T": math.prod(between), "D": width, "C": None}
        if "logits" in self.operation.takes:
            self.sizes = {"B": batch, "T": None, "D": None, "C": width}
        self.least_bytes = self.operation.bytes(shape, DTYPES[dtype].itemsize)
        self.moves = self.operation.moves

    def _drawn(self, generator: torch.Generator) -> Tensors:
        made: dict[str, Any] = {"device": self.device, "generator": generator}
        dtype, (batch, *rest) = DTYPES[self.dtype], self.shape

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, **made)).to(dtype)

        lam = torch.rand(batch, **made)
        x = {"lam": lam, "narrow": lam.to(dtype), "partner": torch.randperm(batch, **made)}
        if "logits" in self.operation.takes:
            logits = normal(*self.shape, scale=3.0)
            x |= {"logits": logits, "logits_adv": logits + normal(*self.shape, scale=0.02)}
            x |= {"target": torch.randint(rest[-1], (batch,), **made), "grad": torch.rand(batch, **made)}
        else:
            # The gradient of such a size that ∇λ is about 1, where the clip takes hold of some rows only.
            x["grad"] = normal(*self.shape, scale=math.prod(rest) ** -0.5)
            if "table" in self.operation.takes:
                x["ids"] = (torch.rand(self.shape[:-1], **made) ** 3 * VOCABULARY).long()  # small ids are frequent
                x["table"] = normal(VOCABULARY, rest[-1])
            else:
                x["hidden"] = normal(*self.shape)
        return {name: value.requires_grad_(name in self.operation.leaves) for name, value in x.items()}

    def results(self, runner: Runner) -> Tensors:
        """What an operation gives, and its gradients."""
        return {name: value.detach() for name, value in runner.forward(0).items()}

    def _truth(self, mode: str, mix: Mix) -> tuple[Tensor, ...]:
        wide = {name: x.detach().double() if x.is_floating_point() else x for name, x in self.inputs[0].items()}
        for name in self.operation.leaves:
            wide[name].requires_grad_()
        found = self.operation.run(self.operation.plain, wide, self.operation.takes)
        return tuple(value.detach() for value in found.values())

    def bind(self, contender: Contender) -> Runner:
        """A contender on these inputs; fastamp's get λ in float32, the others in the dtype of the rows."""
        takes = self.operation.takes
        if contender.name != "fastamp":
            takes = tuple("narrow" if name == "lam" else name for name in takes)
        return Runner(contender, self, lambda x, _: self.operation.run(contender.loss, x, takes))


def operation_contenders(op: str, *, compiled: bool) -> list[Contender]:
    """Fastamp's operation and the composition of PyTorch's, the latter under torch.compile as well where asked for."""
    plain, ours = OPERATIONS[op].plain, OPERATIONS[op].ours
    every = [Contender("PyTorch", op, plain), Contender("fastamp", op, ours)]
    if compiled:
        plain = torch.compile(plain, fullgraph=True, dynamic=False)
        every.append(Contender("PyTorch, compiled", op, plain, compiled=True))
    return [replace(one, base=("PyTorch",)) for one in every]
