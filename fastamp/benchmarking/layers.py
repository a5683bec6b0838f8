"""Whole training steps of networks mixed at their words or pixels: the suite "layers"."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastamp import AMPLoss, Mix
from fastamp.benchmarking.networks import CLASSES, Network, Spec
from fastamp.benchmarking.peers import STEP_SIZE, draw, row_losses
from fastamp.benchmarking.workload import DIRECTIONS, DTYPES, Contender, Runner, Work, among, definition
from fastamp.policy import Plan

CHECK_ROWS = 32  # rows that are mixed among themselves in the check, so that float64 holds no more of them at once
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


class LayerWorkload(Work):
    """A batch of sentences or images and a network behind it, on a device."""

    directions = (*DIRECTIONS, "step")
    negligible = 0.1  # some of a network's gradients are zero but for rounding, as that to the bias of attention's keys

    def __init__(self, spec: Spec, device: torch.device) -> None:
        super().__init__(spec.dtype, "words" if spec.side is None else "pixels", device)
        self.spec, self.captured = spec, not spec.large
        self.network = spec.network(device, DTYPES[spec.dtype], seed=0)
        self.optimize = adam(self.network.model.parameters(), device)
        x, y = spec.batch_of(device, seed=0)
        self.inputs = [(x.to(DTYPES[spec.dtype]) if x.is_floating_point() else x, y)]
        generator = torch.Generator().manual_seed(0)
        rows = torch.arange(spec.batch).split(CHECK_ROWS)
        partner = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in rows])
        self.leaves = [dict(self.network.model.named_parameters())]
        self.name = f"{spec.title}, ({spec.batch}, {spec.lengths[1]})"
        self.sizes = {"B": spec.batch, "T": spec.lengths[1], "D": spec.width, "C": CLASSES}
        self.mix = self.matched = Mix(torch.rand(spec.batch, generator=generator).to(device), partner.to(device))

    def _truth(self, mode: str, mix: Mix) -> tuple[Tensor, ...]:
        wide = self.spec.network(self.device, torch.float64, seed=0)
        wide.model.load_state_dict(self.network.model.state_dict())
        cut, leaves = wide.plain, list(wide.model.parameters())
        totals = [torch.zeros((), dtype=torch.float64, device=self.device), *map(torch.zeros_like, leaves)]
        ids, labels = self.inputs[0]
        for rows in torch.arange(self.spec.batch, device=self.device).split(CHECK_ROWS):
            x, of_rows = ids[rows], among(mix, rows)
            context = cut.context(x, None if mode == "none" else of_rows)
            hidden = cut.g(x.double() if x.is_floating_point() else x)
            f = partial(cut.f, **context)
            share = definition(f, hidden, labels[rows], of_rows, mode, self.spec.batch)
            for total, value in zip(totals, (share.detach(), *torch.autograd.grad(share, leaves)), strict=True):
                total += value
        return tuple(totals)

    def bind(self, contender: Contender) -> Runner:
        """A contender on this network; compiled ones find both f compiled."""
        network = self.network
        if contender.compiled:
            plain, split = (cut._replace(f=torch.compile(cut.f)) for cut in (network.plain, network.split))
            network = network._replace(plain=plain, split=split)
        return Runner(contender, self, lambda given, mix: contender.loss(network, *given, mix))


def cross_entropy(network: Network, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """No mixing at all."""
    cut = network.split if network.later else network.plain
    return F.cross_entropy(cut.f(cut.g(x), **cut.context(x, None)), y)


def mixup(network: Network, x: Tensor, y: Tensor, mix: Mix | None, *, split: bool = False) -> Tensor:
    """Mixup of the words or pixels as one writes it, or where fastamp cuts the network."""
    cut = network.split if split else network.plain
    hidden = cut.g(x)
    lam, partner = draw(hidden, mix)
    context = cut.context(x, Mix(lam, partner))
    return row_losses(cut.f(torch.lerp(hidden[partner], hidden, lam), **context), y, lam, partner).mean()


def amp_autograd(
    network: Network, x: Tensor, y: Tensor, mix: Mix | None, *, split: bool = False, published: bool = False
) -> Tensor:
    """AMP as the equations read; `published` takes a whole backward pass for ∇λ, as the published code does."""
    cut = network.split if split else network.plain
    hidden = cut.g(x)
    lam, partner = draw(hidden, mix)
    other, context = hidden[partner], cut.context(x, Mix(lam, partner))
    lam_leaf = lam.detach().requires_grad_()
    loss = row_losses(cut.f(torch.lerp(other, hidden, lam_leaf), **context), y, lam, partner)
    by = [lam_leaf, *(network.model.parameters() if published else ())]
    grad = torch.autograd.grad(loss.sum(), by, retain_graph=True)[0]
    lam_adv = lam + STEP_SIZE * grad.clamp(-1, 1)
    loss_adv = row_losses(cut.f(torch.lerp(other, hidden, lam_adv), **context), y, lam, partner)
    return torch.where(loss_adv > loss, loss_adv, loss).mean()


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
