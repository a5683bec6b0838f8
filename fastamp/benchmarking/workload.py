"""Inputs with what follows them, a contender bound to them, and the proof that it computes what it claims."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastamp import Mix, reference
from fastamp.benchmarking.contenders import Contender
from fastamp.benchmarking.peers import STEP_SIZE
from fastamp.mixing import draw

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far a contender may be from the definition: in its loss, relative to max(1, loss), and in each gradient, in norm.
# float32 tells Mixup from AMP (their losses differ by about 5e-4); a narrow dtype is held to its rounding.
LOSS_TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
GRAD_TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
MAX_COPIES = 32
DIRECTIONS = ("forward", "backward", "both")
# The definition holds some twenty tensors of logits in float64: so many elements of each at a time.
TRUTH_ELEMENTS = 1 << 22


class Work(ABC):
    """What a step is timed on.

    Attributes:
        dtype: a key of DTYPES.
        takes: what results call its input: "hidden", "logits" or "words".
        device: where.
        copies: how many inputs the steps rotate over.
        inputs: (x, y) each, the input and its labels (B,).
        mix: what contenders are checked with.
        matched: the same with partners that are each other's, where contenders may take such.
        truths: `truth`, kept, by mode and whether it is that of `matched`.
        captured: whether its steps are also to be timed as CUDA graphs.
        directions: which of DIRECTIONS mean something, and "step" where there is `optimize`.
        varies: the size ("B", "C" or "D") whose growth it is a point of, or None.
        optimize: takes an optimizer's step by the gradients to `leaves`, where whole training steps are timed as well.
        negligible: the share of the norm of all gradients below which that of a single one is not relied upon.
    """

    dtype: str
    takes: str
    device: torch.device
    copies: int
    inputs: list[tuple[Tensor, Tensor]]
    mix: Mix
    matched: Mix
    truths: dict[tuple[str, bool], tuple[Tensor, ...]]
    captured: bool = True
    directions: tuple[str, ...] = DIRECTIONS
    varies: str | None = None
    optimize: Callable[[tuple[Tensor, ...]], None] | None = None
    negligible: float = 0.0

    @property
    @abstractmethod
    def name(self) -> str:
        """Without the dtype, one line."""

    @property
    def label(self) -> str:
        """One line."""
        return f"{self.name}, {self.dtype}"

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int | None]:
        """The sizes by name, for results."""

    @property
    def least_bytes(self) -> int | None:
        """The least that a step moves, where that is known."""
        return None

    @property
    def moves(self) -> str:
        """How those bytes come about, in words."""
        return ""

    @abstractmethod
    def leaves(self, i: int) -> dict[str, Tensor]:
        """What a step on the i-th input differentiates by."""

    def gradients(self, i: int, loss: Tensor) -> tuple[Tensor, ...]:
        """The gradients of a loss to `leaves`."""
        return torch.autograd.grad(loss, list(self.leaves(i).values()))

    def truth(self, mode: str, *, matched: bool = False) -> tuple[Tensor, ...]:
        """The loss () and the gradients to `leaves` on the first input, by the definition in float64."""
        if (mode, matched) not in self.truths:
            self.truths[mode, matched] = self._truth(mode, self.matched if matched else self.mix)
        return self.truths[mode, matched]

    @abstractmethod
    def _truth(self, mode: str, mix: Mix) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def bind(self, contender: Contender) -> Runner:
        """A contender on these inputs."""

    def disagreement(self, runner: Runner, mode: str) -> str | None:
        """What a contender computes otherwise than the definition, given the same λ and partners; None for nothing.

        The truth is `fastamp.reference` in float64, for the loss and for every gradient.
        """
        dtype = DTYPES[self.dtype]
        mix = self.matched if runner.matched else self.mix
        loss = runner.forward(0, None if mode == "none" else mix)
        values = runner.backward(0, loss)
        expected, *truths = self.truth(mode, matched=runner.matched)
        off = float(((loss.double() - expected).abs() / expected.abs().clamp(min=1)).detach())
        if not off <= LOSS_TOLERANCE[dtype]:
            return f"its loss is off by {off:.1e} (allowed {LOSS_TOLERANCE[dtype]:.0e})"
        whole = torch.stack([truth.norm() for truth in truths]).norm()
        for name, value, truth in zip(self.leaves(0), values, truths, strict=True):
            off = distance(value, truth, at_least=self.negligible * whole)
            if not off <= GRAD_TOLERANCE[dtype]:
                return f"its gradient to {name} is off by {off:.1e} in norm (allowed {GRAD_TOLERANCE[dtype]:.0e})"
        return None


def distance(value: Tensor, truth: Tensor, *, at_least: Tensor | float = 0.0) -> float:
    """In norm, relative to the truth's, or to `at_least`."""
    off = (value.double() - truth).norm()
    return float(off / truth.norm().clamp(min=at_least)) if off else 0.0


@dataclass
class Workload(Work):
    """Inputs of one shape and dtype, with a linear layer behind them or with nothing.

    Attributes:
        shape: (B, D, C).
        dtype: a key of DTYPES.
        takes: "hidden": x is (B, D), and a linear layer follows; "logits": x is (B, C).
        device: where.
        copies: how many inputs the steps rotate over.
        seed: of inputs, head, λ and partners.
        captured: whether its steps are also to be timed as CUDA graphs.
        varies: the size whose growth it is a point of, or None.
    """

    shape: tuple[int, int, int]
    dtype: str
    takes: str
    device: torch.device
    copies: int = 1
    seed: int = 0
    captured: bool = True
    varies: str | None = None
    inputs: list[tuple[Tensor, Tensor]] = field(init=False, repr=False)
    head: nn.Linear | None = field(init=False, repr=False)
    mix: Mix = field(init=False, repr=False)
    matched: Mix = field(init=False, repr=False)
    truths: dict[tuple[str, bool], tuple[Tensor, ...]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        batch, width, classes = self.shape
        generator = torch.Generator(self.device).manual_seed(self.seed)
        torch_dtype = DTYPES[self.dtype]
        made: dict[str, Any] = {"device": self.device, "generator": generator}
        columns = width if self.takes == "hidden" else classes
        self.inputs = []
        for _ in range(self.copies):
            x = torch.randn(batch, columns, **made).to(torch_dtype).requires_grad_()
            self.inputs.append((x, torch.randint(classes, (batch,), **made)))
        self.head = None
        if self.takes == "hidden":
            self.head = nn.Linear(width, classes, device=self.device, dtype=torch_dtype)
            with torch.no_grad():
                for parameter in self.head.parameters():
                    parameter.copy_(torch.randn(parameter.shape, **made) * 2 / width**0.5)
        # Rows are mixed within the parts that the definition takes at a time.
        lam = torch.rand(batch, **made)
        self.mix = Mix(lam, torch.cat([part[torch.randperm(len(part), **made)] for part in self._parts()]))
        matchings = [part[draw(len(part), pairing="matching", **made).partner] for part in self._parts()]
        self.matched = Mix(lam, torch.cat(matchings))

    def _parts(self) -> tuple[Tensor, ...]:
        rows = max(1, TRUTH_ELEMENTS // max(self.shape[1:]))
        return torch.arange(self.shape[0], device=self.device).split(rows)

    @property
    def name(self) -> str:
        """Without the dtype, one line."""
        batch, width, classes = self.shape
        return f"({batch}, {width}) -> {classes}" if self.takes == "hidden" else f"logits ({batch}, {classes})"

    @property
    def sizes(self) -> dict[str, int | None]:
        """B, D and C; no D for logits."""
        batch, width, classes = self.shape
        return {"B": batch, "D": width if self.takes == "hidden" else None, "C": classes}

    @property
    def least_bytes(self) -> int | None:
        """What a step on logits moves at least: read B·C, write B·C."""
        return 2 * self.shape[0] * self.shape[2] * DTYPES[self.dtype].itemsize if self.takes == "logits" else None

    @property
    def moves(self) -> str:
        """How those bytes come about, in words."""
        return "read B·C and write B·C"

    def leaves(self, i: int) -> dict[str, Tensor]:
        """The i-th input, weight and bias."""
        return {"its input": self.inputs[i][0], **({} if self.head is None else dict(self.head.named_parameters()))}

    def _truth(self, mode: str, mix: Mix) -> tuple[Tensor, ...]:
        batch = self.shape[0]
        x, *head = [leaf.detach().double() for leaf in self.leaves(0).values()]
        y = self.inputs[0][1]
        options: dict[str, Any] = {"mode": mode}
        if mode == "official":  # the history that it re-weights rows by is no single step's
            options = {**reference.OFFICIAL, "reweight": None}
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        grads = [torch.zeros_like(value) for value in (x, *head)]
        for rows in self._parts():
            part, *parameters = leaves = [value.detach().requires_grad_() for value in (x[rows], *head)]
            f = partial(_affine, parameters)
            if mode == "none":
                share = nn.functional.cross_entropy(f(part), y[rows], reduction="sum") / batch
            else:
                among = (mix.lam[rows].double(), mix.partner[rows] - rows[0])
                share = reference.amp(f, part, y[rows], *among, step_size=STEP_SIZE, num_items=batch, **options).loss
            grad, *others = torch.autograd.grad(share, leaves)
            loss += share.detach()
            grads[0][rows] = grad
            for total, other in zip(grads[1:], others, strict=True):
                total += other
        return (loss, *grads)

    def bind(self, contender: Contender) -> Runner:
        """A contender on these inputs."""
        loss: Any = contender.loss
        if contender.compiled:
            # A function of its own: two contenders, or two shapes, do not share a cache or its limits.
            def traced(x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
                return contender.loss(self.head, x, y, mix)

            compiled = torch.compile(traced, fullgraph=True, dynamic=False, mode=contender.compile_mode)

            def drawn(x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
                # Drawn before the graph, so that the graph that is timed is the one that was checked; besides,
                # torch 2.13 cannot compile x[torch.randperm(len(x))].
                if mix is None and contender.mode != "none":
                    mix = Mix(torch.rand(len(x), device=x.device), torch.randperm(len(x), device=x.device))
                return compiled(x, y, mix)

            return Runner(contender.name, self, drawn, compiled=True)
        return Runner(contender.name, self, lambda x, y, mix: loss(self.head, x, y, mix), matched=contender.matched)


@dataclass(frozen=True)
class Runner:
    """A contender on a workload: what is timed."""

    name: str
    workload: Work
    loss: Callable[[Tensor, Tensor, Mix | None], Any]
    compiled: bool = False
    matched: bool = False

    def forward(self, i: int, mix: Mix | None = None) -> Any:
        """The loss on the i-th input, the inputs taken in turn."""
        inputs = self.workload.inputs
        return self.loss(*inputs[i % len(inputs)], mix)

    def backward(self, i: int, loss: Any) -> tuple[Tensor, ...]:
        """The gradients to what a step on that input differentiates by."""
        return self.workload.gradients(i % len(self.workload.inputs), loss)


def _affine(parameters: list[Tensor], rows: Tensor) -> Tensor:
    return nn.functional.linear(rows, *parameters) if parameters else rows


def disagreement(runner: Runner, mode: str) -> str | None:
    """`Work.disagreement` of the workload that a runner is bound to."""
    return runner.workload.disagreement(runner, mode)


def copies_to_exceed_cache(one: int, device: torch.device) -> int:
    """How many inputs of `one` bytes to rotate over so that each is gone from the L2 cache when its turn comes.

    At most 32, and a single one on a CPU.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_COPIES, -(-3 * cache // one)))
