"""Whole training steps of networks mixed at their words or pixels: the suite "layers"."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastamp import AMPLoss, Mix
from fastamp.benchmarking.networks import CLASSES, Network, Spec
from fastamp.benchmarking.peers import STEP_SIZE, amp_autograd, cross_entropy
from fastamp.benchmarking.peers import mixup_two_terms as mixup
from fastamp.benchmarking.workload import DIRECTIONS, DTYPES, Contender, Steps
from fastamp.policy import Plan

CHECK_ROWS = 32  # that are mixed among themselves in the check
EAGER = ("Mixup", "Mixup, split", "Mixup, AMPLoss.step")
COMPILED = ("Mixup, compiled", "Mixup, split, compiled")


def adam(parameters: Iterable[nn.Parameter], device: torch.device) -> Callable[[tuple[Tensor, ...]], None]:
    """Steps of Adam, one fused operation, at a rate of zero: the weights stay as they are for whoever is timed next."""
    taken = list(parameters)
    optimizer = torch.optim.Adam(taken, lr=0.0, fused=True, capturable=device.type == "cuda")

    def step(gradients: tuple[Tensor, ...]) -> None:
        for parameter, gradient in zip(taken, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return step


class LayerWorkload(Steps):
    """A batch of sentences or images and a network behind it, on a device."""

    directions = (*DIRECTIONS, "step")
    negligible = 0.1  # some of a network's gradients are zero but for rounding, as that to the bias of attention's keys
    whole = False

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec, self.captured = spec, not spec.large
        network = spec.network(device, DTYPES[spec.dtype], seed=0)
        x, y = spec.batch_of(device, seed=0)
        x = x.to(DTYPES[spec.dtype]) if x.is_floating_point() else x
        takes = "words" if spec.side is None else "pixels"
        super().__init__(network, [(x, y)], CHECK_ROWS, dtype=spec.dtype, takes=takes)
        self.optimize = adam(network.model.parameters(), device)
        self.name = f"{spec.title}, ({spec.batch}, {spec.lengths[1]})"
        self.sizes = {"B": spec.batch, "T": spec.lengths[1], "D": spec.width, "C": CLASSES}


def step(*, context: bool = True, plan: Plan = "auto", **options: Any) -> Callable[..., Any]:
    """`AMPLoss.step` as its docstring uses it, or with a closure in the place of its context."""
    criterion = AMPLoss(step_size=STEP_SIZE, **options)

    def loss(network: Network, x: Tensor, y: Tensor, mix: Mix | None) -> Any:
        cut = network.split
        hidden = cut.g(x)
        mix = criterion.sample(len(x), device=x.device) if mix is None else mix
        given = cut.context(x, mix)
        if context:
            return criterion.step(cut.f, hidden, y, mix=mix, context=given, plan=plan)
        return criterion.step(partial(cut.f, **given), hidden, y, mix=mix, plan=plan)

    return loss


def layer_contenders(work: LayerWorkload, *, compiled: bool) -> list[Contender]:
    """Who is timed on a network; those whose f goes through torch.compile where asked for, if it is not large."""
    every = [
        Contender("cross-entropy", "none", cross_entropy),
        Contender("Mixup", "mixup", mixup),
        Contender("Mixup, split", "mixup", partial(mixup, split=True)),
        Contender("Mixup, AMPLoss.step", "mixup", step(mode="mixup")),
        Contender("AMP as published", "amp", partial(amp_autograd, published=True)),
        Contender("AMP autograd", "amp", amp_autograd),
        Contender("AMP autograd, split", "amp", partial(amp_autograd, split=True)),
        Contender("AMPLoss.step", "amp", step()),
        # Eq. 21 to the letter: rows that keep λ because of rounding are then run again.
        Contender("AMPLoss.step, strict ties", "amp", step(tie_tol=0.0)),
        Contender("AMPLoss.step, strict ties, no context", "amp", step(tie_tol=0.0, context=False)),
        Contender("AMPLoss.step, merged", "amp", step(plan="merged")),
        Contender("Mixup, compiled", "mixup", mixup, compiled=True),
        Contender("Mixup, split, compiled", "mixup", partial(mixup, split=True), compiled=True),
        Contender("AMPLoss.step, compiled", "amp", step(), compiled=True),
    ]
    taken = [one for one in every if not one.compiled or (compiled and not work.spec.large)]
    taken = [one for one in taken if work.network.later or ", split" not in one.name]
    return [replace(one, base=COMPILED if one.compiled else EAGER) for one in taken]
