"""Steps from the last hidden rows or from logits on: the suites "head", "scaling" and "vocabulary".

A contender maps a head, its input, labels and a `Mix` to a loss, as `peers` says. Without a `Mix` it draws its own λ
and partners, which is how it is timed: drawing costs launches as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastamp import AMPLoss, Mix, functional
from fastamp.benchmarking import peers
from fastamp.benchmarking.peers import STEP_SIZE
from fastamp.benchmarking.workload import (
    DTYPES,
    MIXUP,
    Contender,
    Note,
    Runner,
    Work,
    among,
    copies_to_exceed_cache,
    definition,
)
from fastamp.mixing import draw
from fastamp.policy import Pairing

PLAIN = "cross-entropy"
DEFINITION_ELEMENTS = 1 << 24  # of the definition of the official code's AMP, which holds (B, C, C) in float64
GROWING = (*MIXUP, "AMPLoss")  # of the suite "scaling"
WITH_VOCABULARY = (PLAIN, MIXUP[0], "AMP autograd", "AMPLoss", "linear_amp_cross_entropy")
AUTOTUNED_ELEMENTS = 1 << 20  # of logits: the compiler's search among products of more takes minutes
PAIRED_CLASSES = 1000  # from here on a kernel for pairs has rows long enough to be worth reading once
# The definition holds some twenty tensors of logits in float64: so many elements of each at a time.
TRUTH_ELEMENTS = 1 << 22


class Workload(Work):
    """Inputs of one shape and dtype, with a linear layer behind them or with nothing.

    Args:
        shape: (B, D, C).
        dtype: a key of DTYPES.
        takes: "hidden": x is (B, D), and a linear layer follows; "logits": x is (B, C).
        device: where.
        captured: whether its steps are also to be timed as CUDA graphs, and rotate over several inputs.
        varies: the size whose growth it is a point of, or None.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: str,
        takes: str,
        device: torch.device,
        *,
        captured: bool = True,
        varies: str | None = None,
    ) -> None:
        super().__init__(dtype, takes, device)
        self.shape, self.captured, self.varies = shape, captured, varies
        batch, width, classes = shape
        made: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
        columns = width if takes == "hidden" else classes
        # A step reads an input, and makes logits, or a gradient, of (B, C).
        moved = batch * (columns + classes) * DTYPES[dtype].itemsize
        self.inputs = []
        for _ in range(copies_to_exceed_cache(moved, device) if captured else 1):
            x = torch.randn(batch, columns, **made).to(DTYPES[dtype]).requires_grad_()
            self.inputs.append((x, torch.randint(classes, (batch,), **made)))
        self.head = None
        if takes == "hidden":
            self.head = nn.Linear(width, classes, device=device, dtype=DTYPES[dtype])
            with torch.no_grad():
                for parameter in self.head.parameters():
                    parameter.copy_(torch.randn(parameter.shape, **made) * 2 / width**0.5)
        head = {} if self.head is None else dict(self.head.named_parameters())
        self.leaves = [{"its input": x, **head} for x, _ in self.inputs]
        self.sizes = {"B": batch, "D": width if takes == "hidden" else None, "C": classes}
        self.name = f"({batch}, {width}) -> {classes}" if takes == "hidden" else f"logits ({batch}, {classes})"
        # Rows are mixed within the parts that the definition takes at a time.
        lam = torch.rand(batch, **made)
        self.mix = Mix(lam, torch.cat([part[torch.randperm(len(part), **made)] for part in self._parts()]))
        matchings = [part[draw(len(part), pairing="matching", **made).partner] for part in self._parts()]
        self.matched = Mix(lam, torch.cat(matchings))
        if takes == "logits":
            self.least_bytes, self.moves = 2 * batch * classes * DTYPES[dtype].itemsize, "read B·C and write B·C"

    def _parts(self) -> tuple[Tensor, ...]:
        rows = max(1, TRUTH_ELEMENTS // max(self.shape[1:]))
        return torch.arange(self.shape[0], device=self.device).split(rows)

    def _truth(self, mode: str, mix: Mix) -> tuple[Tensor, ...]:
        batch, y = self.shape[0], self.inputs[0][1]
        x, *head = [leaf.detach().double() for leaf in self.leaves[0].values()]
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        grads = [torch.zeros_like(value) for value in (x, *head)]
        for rows in self._parts():
            part, *parameters = leaves = [value.detach().requires_grad_() for value in (x[rows], *head)]
            share = definition(partial(_affine, parameters), part, y[rows], among(mix, rows), mode, batch)
            grad, *others = torch.autograd.grad(share, leaves)
            loss += share.detach()
            grads[0][rows] = grad
            for total, other in zip(grads[1:], others, strict=True):
                total += other
        return (loss, *grads)

    def bind(self, contender: Contender) -> Runner:
        """A contender on these inputs."""

        # A function of its own: two contenders, or two shapes, do not share a cache or its limits.
        def loss(x: Tensor, y: Tensor, mix: Mix | None) -> Any:
            return contender.loss(self.head, x, y, mix)

        if not contender.compiled:
            return Runner(contender, self, lambda given, mix: loss(given[0], given[1], mix))
        compiled = torch.compile(loss, fullgraph=True, dynamic=False, mode=contender.compile_mode)

        def drawn(given: tuple[Tensor, Tensor], mix: Mix | None) -> Any:
            # Drawn before the graph, so that the graph that is timed is the one that was checked; besides, torch 2.13
            # cannot compile x[torch.randperm(len(x))].
            if mix is None and contender.mode != "none":
                batch, device = len(given[0]), self.device
                mix = Mix(torch.rand(batch, device=device), torch.randperm(batch, device=device))
            return compiled(*given, mix)

        return Runner(contender, self, drawn)


def _affine(parameters: list[Tensor], rows: Tensor) -> Tensor:
    return nn.functional.linear(rows, *parameters) if parameters else rows


def criterion(pairing: Pairing = "permutation") -> Callable[..., Any]:
    """`fastamp.AMPLoss` as the README uses it, or with other partners."""
    loss = AMPLoss(step_size=STEP_SIZE, pairing=pairing)
    return lambda head, x, y, mix: loss(peers.logits_of(head, x), y, mix=mix)


def linear_head(chunk_rows: int | None = None) -> Callable[..., Any]:
    """`linear_amp_cross_entropy`: the head inside the operation, `chunk_rows` rows of logits at a time."""
    amp = AMPLoss(step_size=STEP_SIZE)

    def loss(head: nn.Linear, x: Tensor, y: Tensor, mix: Mix | None) -> Any:
        lam, partner = amp.sample(len(x), device=x.device) if mix is None else mix
        return functional.linear_amp_cross_entropy(
            x, head.weight, head.bias, y, lam, partner, step_size=STEP_SIZE, chunk_rows=chunk_rows
        )

    return loss


def contenders() -> list[Contender]:
    """All there are, whatever the shape, dtype and device; new ones, so that nothing compiled is kept."""
    compiled, hidden = {"compiled": True}, {"takes": "hidden"}
    liger = {"takes": "hidden", "capturable": False}  # its steps read from the device
    searched = {"compile_mode": "max-autotune-no-cudagraphs", **compiled, **hidden}
    every: tuple[tuple[str, str, Callable[..., Any], dict[str, Any]], ...] = (
        (PLAIN, "none", peers.cross_entropy, {}),
        ("Mixup, two terms", "mixup", peers.mixup_two_terms, {}),
        ("Mixup, soft targets", "mixup", peers.mixup_soft_targets, {}),
        ("AMP autograd", "amp", peers.amp_autograd, hidden),
        ("AMPLoss", "amp", criterion(), {}),
        ("linear_amp_cross_entropy", "amp", linear_head(), hidden),
        ("cross-entropy, compiled", "none", peers.cross_entropy, {"takes": "logits", **compiled}),
        ("Mixup, compiled", "mixup", peers.mixup_two_terms, compiled),
        ("AMP torch.func, compiled", "amp", peers.amp_functorch, {**compiled, **hidden}),
        ("AMPLoss, compiled", "amp", criterion(), compiled),
        ("AMP, official code", "official", peers.amp_published, hidden),
        ("AMP torch.func, max-autotune", "amp", peers.amp_functorch, searched),
        ("AMPLoss, matching", "amp", criterion("matching"), {"takes": "logits", "matched": True}),
        ("Liger, no mixing", "none", peers.liger_cross_entropy, liger),
        ("torch fused linear, no mixing", "none", peers.torch_linear_cross_entropy, hidden),
        ("Liger fused linear, no mixing", "none", peers.liger_linear_cross_entropy, liger),
    )
    return [Contender(name, mode, loss, **options) for name, mode, loss, options in every]


def missing(work: Workload) -> dict[str, str | None]:
    """What keeps some contenders from running on a workload, by name; None where nothing does."""
    batch, _, classes = work.shape
    gpu = None if work.device.type == "cuda" else "it takes a GPU"
    liger = gpu or (None if find_spec("liger_kernel") else "liger_kernel is not installed")
    official = None if work.dtype == "fp32" else "its binary cross-entropy of a softmax takes fp32"
    if batch * classes**2 > DEFINITION_ELEMENTS:
        official = official or f"its definition would hold ({batch}, {classes}, {classes})"
    few = f"kernels for pairs are for {PAIRED_CLASSES} classes or more"
    return {
        "AMP, official code": official,
        "AMP torch.func, max-autotune": "autotuning takes minutes" if batch * classes > AUTOTUNED_ELEMENTS else gpu,
        "AMPLoss, matching": few if classes < PAIRED_CLASSES else None,
        "torch fused linear, no mixing": None if hasattr(nn, "LinearCrossEntropyOptions") else "this torch lacks it",
        "Liger, no mixing": liger,
        "Liger fused linear, no mixing": liger,
    }


def of_head(work: Workload, *, compiled: bool, autotuned: bool, note: Note) -> list[Contender]:
    """Who is timed on a workload of the suite "head"; `note` is called with who is not, and why."""
    every = [one for one in contenders() if compiled or not one.compiled]
    if not autotuned and compiled:
        note("torch.compile's search for the fastest products is left out")
    return _present(work, [one for one in every if autotuned or one.compile_mode is None], note)


def of_vocabulary(work: Workload, *, note: Note) -> list[Contender]:
    """Who is timed on a workload of the suite "vocabulary", ratios being to a linear layer and cross-entropy.

    On a CPU `linear_amp_cross_entropy`, which holds all logits of itself there, is timed in chunks as well.
    """
    every = [one for one in contenders() if one.name in WITH_VOCABULARY or "fused linear" in one.name]
    if work.device.type == "cpu":
        rows = max(1, work.shape[0] // 4 - 2)
        every.append(Contender(f"linear_amp_cross_entropy, chunks of {rows}", "amp", linear_head(rows)))
    return _present(work, [replace(one, base=(PLAIN,)) for one in every], note)


def _present(work: Workload, every: list[Contender], note: Note) -> list[Contender]:
    taken, reasons = [], missing(work)
    for one in every:
        if one.takes in (work.takes, "both"):
            if reasons.get(one.name) is None:
                taken.append(one)
            else:
                note(f"{one.name}: not run, {reasons[one.name]}")
    return taken
