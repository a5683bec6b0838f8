"""What a step is timed on, a contender bound to it, and the proof that it computes what it claims."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp import Mix, reference
from fastamp.benchmarking.networks import Network
from fastamp.benchmarking.peers import STEP_SIZE
from fastamp.mixing import draw

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far a contender may be from the definition: in its loss or λ', relative to max(1, value), and in a gradient or
# mixed rows, in norm. float32 tells Mixup from AMP (their losses differ by about 5e-4); a narrow dtype is held to its
# rounding.
LOSS_TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
GRAD_TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
LOSSES = ("its loss", "λ'")  # what LOSS_TOLERANCE is for
DIRECTIONS = ("forward", "backward", "both")
MIXUP = ("Mixup, two terms", "Mixup, soft targets")  # ratios are to the faster of the two
MAX_COPIES = 32
Note = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss, or an operation."""

    name: str  # as results show it
    mode: str  # what it claims to compute: "none", "official", a mode of `fastamp.AMPLoss`, or an operation
    loss: Callable[..., Any]  # of what its workload gives it
    compiled: bool = False  # whether `loss` goes through torch.compile
    takes: str = "both"  # of Workload: "hidden" (needs a head), "logits" (needs none) or "both"
    base: tuple[str, ...] = MIXUP  # its ratio is to the fastest of these
    compile_mode: str | None = None  # torch.compile's
    matched: bool = False  # whether its partners are a matching, each the other's
    capturable: bool = True  # whether its step can be captured in a CUDA graph, as far as is known


class Work(ABC):
    """What a step is timed on."""

    name: str  # without the dtype, one line
    sizes: dict[str, int | None]  # by name, for results
    inputs: list[Any]  # of the steps, taken in turn
    leaves: list[dict[str, Tensor]]  # what a step on each of them differentiates by
    mix: Mix  # what contenders are checked with
    matched: Mix  # the same with partners that are each other's, where contenders may take such
    captured: bool = True  # whether its steps are also to be timed as CUDA graphs
    directions: tuple[str, ...] = DIRECTIONS  # those that mean something, and "step" where there is `optimize`
    varies: str | None = None  # the size ("B", "C" or "D") whose growth it is a point of
    optimize: Callable[[tuple[Tensor, ...]], None] | None = None  # takes an optimizer's step by these gradients
    negligible: float = 0.0  # a gradient is held to at least this share of the norm of all of them
    least_bytes: int | None = None  # the least that a step moves, where that is known
    moves: str = ""  # how those bytes come about

    def __init__(self, dtype: str, takes: str, device: torch.device) -> None:
        self.dtype = dtype  # a key of DTYPES
        self.takes = takes  # what results call its input: "hidden", "logits", "words", "pixels" or "rows"
        self.device = device
        self._truths: dict[tuple[str, bool], tuple[Tensor, ...]] = {}

    @property
    def label(self) -> str:
        """One line."""
        return f"{self.name}, {self.dtype}"

    @abstractmethod
    def bind(self, contender: Contender) -> Runner:
        """A contender on these inputs."""

    @abstractmethod
    def _truth(self, mode: str, mix: Mix) -> tuple[Tensor, ...]:
        """What `results` has to be, by the definition in float64."""

    def results(self, runner: Runner) -> dict[str, Tensor]:
        """What is checked: the loss and the gradients to `leaves` on the first input, by name."""
        mix = self.matched if runner.contender.matched else self.mix
        loss = runner.forward(0, None if runner.contender.mode == "none" else mix)
        gradients = zip(self.leaves[0], runner.backward(0, loss), strict=True)
        return {"its loss": loss.detach(), **{f"its gradient to {name}": gradient for name, gradient in gradients}}

    def truth(self, mode: str, *, matched: bool = False) -> tuple[Tensor, ...]:
        """`results` by the definition in float64, kept until `forget`."""
        if (mode, matched) not in self._truths:
            self._truths[mode, matched] = self._truth(mode, self.matched if matched else self.mix)
        return self._truths[mode, matched]

    def forget(self) -> None:
        """Drops the truths, which are large."""
        self._truths.clear()


@dataclass(frozen=True)
class Runner:
    """A contender on a workload: what is timed."""

    contender: Contender
    work: Work
    loss: Callable[[Any, Mix | None], Any]  # of one of the inputs; without a mix the contender draws its own

    def forward(self, i: int, mix: Mix | None = None) -> Any:
        """The loss on the i-th input, the inputs taken in turn."""
        return self.loss(self.work.inputs[i % len(self.work.inputs)], mix)

    def backward(self, i: int, loss: Any) -> tuple[Tensor, ...]:
        """The gradients to what a step on that input differentiates by."""
        leaves = list(self.work.leaves[i % len(self.work.inputs)].values())
        return torch.autograd.grad(loss, leaves) if leaves else ()

    def disagreement(self) -> str | None:
        """What the contender computes otherwise than the definition in float64, with the same λ; None for nothing."""
        dtype = DTYPES[self.work.dtype]
        found = self.work.results(self)
        truths = self.work.truth(self.contender.mode, matched=self.contender.matched)
        whole = torch.stack([truth.norm() for truth in truths[1:] or truths]).norm()
        for (name, value), truth in zip(found.items(), truths, strict=True):
            difference = value.double() - truth
            if name in LOSSES:
                off, allowed = float((difference.abs() / truth.abs().clamp(min=1)).max()), LOSS_TOLERANCE[dtype]
            else:
                norm = truth.norm().clamp(min=self.work.negligible * whole)
                off = float(difference.norm() / norm) if difference.any() else 0.0
                allowed = GRAD_TOLERANCE[dtype]
            if not off <= allowed:
                return f"{name} is off by {off:.1e} (allowed {allowed:.0e})"
        return None


class Steps(Work):
    """Steps of a network on batches.

    Args:
        network: whose steps.
        inputs: a batch, or several to take in turn; x is a leaf where a step differentiates by it.
        rows: how many are mixed among themselves in the check, so that float64 holds no more of them at once.
        dtype: of the network, a key of DTYPES.
        takes: what results call x.
    """

    whole = True  # whether torch.compile takes the whole of a loss, or the network behind the cut

    def __init__(
        self, network: Network, inputs: list[tuple[Tensor, Tensor]], rows: int, *, dtype: str, takes: str
    ) -> None:
        x, y = inputs[0]
        super().__init__(dtype, takes, x.device)
        self.network, self.inputs = network, inputs
        parameters = dict(network.model.named_parameters())
        self.leaves = [({"its input": x} if x.requires_grad else {}) | parameters for x, _ in inputs]
        made: dict[str, Any] = {"device": x.device, "generator": torch.Generator(x.device).manual_seed(1)}
        self.parts = torch.arange(len(y), device=x.device).split(rows)
        lam = torch.rand(len(y), **made)
        self.mix = Mix(lam, torch.cat([part[torch.randperm(len(part), **made)] for part in self.parts]))
        matchings = [part[draw(len(part), pairing="matching", **made).partner] for part in self.parts]
        self.matched = Mix(lam, torch.cat(matchings))

    def _truth(self, mode: str, mix: Mix) -> tuple[Tensor, ...]:
        (x, y), model, cut = self.inputs[0], self.network.model, self.network.plain
        parameters = list(model.parameters())
        totals = [torch.zeros(p.shape, dtype=torch.float64, device=self.device) for p in (y.sum(), *parameters)]
        of_input = []
        model.double()  # exact, and so is the way back
        try:
            for rows in self.parts:
                part, among = x.detach()[rows], Mix(mix.lam[rows].double(), mix.partner[rows] - rows[0])
                if part.is_floating_point():
                    part = part.double().requires_grad_(x.requires_grad)
                context = cut.context(part, None if mode == "none" else among)
                share = _share(partial(cut.f, **context), cut.g(part), y[rows], among, mode, len(y))
                by = [part, *parameters] if x.requires_grad else parameters
                grads = list(torch.autograd.grad(share, by))
                if x.requires_grad:
                    of_input.append(grads.pop(0))
                for total, value in zip(totals, (share.detach(), *grads), strict=True):
                    total += value
        finally:
            model.to(DTYPES[self.dtype])
        return (totals[0], *([torch.cat(of_input)] if of_input else []), *totals[1:])

    def bind(self, contender: Contender) -> Runner:
        """A contender on these inputs."""
        network, compiled = self.network, contender.compiled
        if compiled and not self.whole:
            plain, split = (cut._replace(f=torch.compile(cut.f)) for cut in (network.plain, network.split))
            network = network._replace(plain=plain, split=split)

        # A function of its own: two contenders, or two shapes, do not share a cache or its limits.
        def loss(x: Tensor, y: Tensor, mix: Mix | None) -> Any:
            return contender.loss(network, x, y, mix)

        if not (compiled and self.whole):
            return Runner(contender, self, lambda given, mix: loss(given[0], given[1], mix))
        step = torch.compile(loss, fullgraph=True, dynamic=False, mode=contender.compile_mode)

        def drawn(given: tuple[Tensor, Tensor], mix: Mix | None) -> Any:
            # Drawn before the graph, so that the graph that is timed is the one that was checked; besides, torch 2.13
            # cannot compile x[torch.randperm(len(x))].
            if mix is None and contender.mode != "none":
                batch, device = len(given[0]), self.device
                mix = Mix(torch.rand(batch, device=device), torch.randperm(batch, device=device))
            return step(*given, mix)

        return Runner(contender, self, drawn)


def _share(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, mix: Mix, mode: str, batch: int) -> Tensor:
    """What some rows, mixed among themselves, add to the loss of their batch, by `fastamp.reference` in float64."""
    if mode == "none":
        return F.cross_entropy(f(x), y, reduction="sum") / batch
    # The history that the official code re-weights rows by is no single step's.
    options: dict[str, Any] = {**reference.OFFICIAL, "reweight": None} if mode == "official" else {"mode": mode}
    return reference.amp(f, x, y, *mix, step_size=STEP_SIZE, num_items=batch, **options).loss


def copies_to_exceed_cache(one: int, device: torch.device) -> int:
    """How many inputs of `one` bytes to rotate over so that each is gone from the L2 cache when its turn comes.

    At most 32, and a single one on a CPU.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_COPIES, -(-3 * cache // one)))
