"""Whole training steps of networks mixed at their words or pixels: `fastamp bench --suite layers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastamp import AMPLoss, Mix, reference
from fastamp.benchmarking.contenders import Contender
from fastamp.benchmarking.networks import CLASSES, Cut, Network, Spec
from fastamp.benchmarking.peers import STEP_SIZE, draw, row_losses
from fastamp.benchmarking.workload import DIRECTIONS, DTYPES, Runner, Work

CHECK_ROWS = 32  # rows that are mixed among themselves in the check, so that float64 holds no more of them at once
EAGER = ("Mixup", "Mixup, split", "Mixup, AMPLoss.step")
COMPILED = ("Mixup, compiled", "Mixup, split, compiled")


class _Adam:
    """Adam, one fused operation, at a rate of zero: the weights stay as they are for whoever is timed next."""

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self.parameters = list(parameters)
        capturable = device.type == "cuda"
        self.adam = torch.optim.Adam(self.parameters, lr=0.0, fused=True, capturable=capturable)

    def __call__(self, gradients: tuple[Tensor, ...]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.adam.step()
        self.adam.zero_grad()


@dataclass
class LayerWorkload(Work):
    """A batch of sentences or images and a network behind it.

    Attributes:
        spec: what network.
        device: where.
        seed: of weights and inputs.
    """

    spec: Spec
    device: torch.device
    seed: int = 0
    copies: int = field(init=False, default=1)
    network: Network = field(init=False, repr=False)
    inputs: list[tuple[Tensor, Tensor]] = field(init=False, repr=False)
    mix: Mix = field(init=False, repr=False)
    truths: dict[tuple[str, bool], tuple[Tensor, ...]] = field(init=False, repr=False, default_factory=dict)
    optimize: Callable[[tuple[Tensor, ...]], None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.dtype, self.captured = self.spec.dtype, not self.spec.large
        self.takes, self.directions = "words" if self.spec.side is None else "pixels", (*DIRECTIONS, "step")
        # Some of a network's gradients are zero but for rounding, such as that to the bias of attention's keys.
        self.negligible = 0.1
        self.network = self.spec.network(self.device, DTYPES[self.dtype], self.seed)
        self.optimize = _Adam(self.network.model.parameters(), self.device)
        x, y = self.spec.batch_of(self.device, self.seed)
        self.inputs = [(x.to(DTYPES[self.dtype]) if x.is_floating_point() else x, y)]
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.arange(self.spec.batch).split(CHECK_ROWS)
        partner = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in rows])
        lam = torch.rand(self.spec.batch, generator=generator)
        self.mix = Mix(lam.to(self.device), partner.to(self.device))

    @property
    def name(self) -> str:
        """The network, and how many inputs of how many words or patches."""
        return f"{self.spec.title}, ({self.spec.batch}, {self.spec.lengths[1]})"

    @property
    def sizes(self) -> dict[str, int | None]:
        """B, T, the width of a word vector, and the number of classes."""
        return {"B": self.spec.batch, "T": self.spec.lengths[1], "D": self.spec.width, "C": CLASSES}

    def leaves(self, i: int) -> dict[str, Tensor]:
        """The network's parameters."""
        return dict(self.network.model.named_parameters())

    def _truth(self, mode: str, mix: Mix) -> tuple[Tensor, ...]:
        wide = self.spec.network(self.device, torch.float64, self.seed)
        wide.model.load_state_dict(self.network.model.state_dict())
        cut = wide.plain
        totals = [torch.zeros_like(p) for p in wide.model.parameters()]
        whole = torch.zeros((), dtype=torch.float64, device=self.device)
        ids, labels = self.inputs[0]
        for rows in torch.arange(self.spec.batch, device=self.device).split(CHECK_ROWS):
            x, y = ids[rows], labels[rows]
            x = x.double() if x.is_floating_point() else x
            among = Mix(mix.lam[rows].double(), mix.partner[rows] - rows[0])
            if mode == "none":
                loss = F.cross_entropy(cut.f(cut.g(x), **cut.context(x, None)), y, reduction="sum")
            else:
                f = partial(cut.f, **cut.context(x, among))
                loss = reference.amp(f, cut.g(x), y, *among, mode=mode, step_size=STEP_SIZE, reduction="sum").loss
            whole += loss.detach() / self.spec.batch
            for total, grad in zip(totals, torch.autograd.grad(loss, list(wide.model.parameters())), strict=True):
                total += grad / self.spec.batch
        return (whole, *totals)

    def bind(self, contender: Contender) -> Runner:
        """A contender on this network; compiled ones find both f compiled."""
        network = self.network
        if contender.compiled:
            network = replace(network, plain=_compiled(network.plain), split=_compiled(network.split))
        return Runner(
            contender.name,
            self,
            lambda x, y, mix: contender.loss(network, x, y, mix),
            compiled=contender.compiled,
        )


def _compiled(cut: Cut) -> Cut:
    return replace(cut, f=cast("nn.Module", torch.compile(cut.f)))


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


class _Step:
    """`AMPLoss.step` as its docstring uses it, or with a closure in the place of its context."""

    def __init__(self, *, context: bool = True, plan: str = "auto", **options: Any) -> None:
        self.criterion, self.context, self.plan = AMPLoss(step_size=STEP_SIZE, **options), context, plan

    def __call__(self, network: Network, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
        cut = network.split
        hidden = cut.g(x)
        mix = self.criterion.sample(len(x), device=x.device) if mix is None else mix
        context = cut.context(x, mix)
        if self.context:
            loss = self.criterion.step(cut.f, hidden, y, mix=mix, context=context, plan=self.plan)
        else:
            loss = self.criterion.step(partial(cut.f, **context), hidden, y, mix=mix, plan=self.plan)
        assert isinstance(loss, Tensor)
        return loss


def layer_contenders(work: LayerWorkload, *, compiled: bool) -> list[Contender]:
    """All that are timed on one network.

    Args:
        work: what they are for.
        compiled: also those whose f goes through torch.compile, where the network is not large.
    """
    every = [
        Contender("cross-entropy", "none", cross_entropy),
        Contender("Mixup", "mixup", mixup),
        Contender("Mixup, split", "mixup", partial(mixup, split=True)),
        Contender("Mixup, AMPLoss.step", "mixup", _Step(mode="mixup")),
        Contender("AMP as published", "amp", partial(amp_autograd, published=True)),
        Contender("AMP autograd", "amp", amp_autograd),
        Contender("AMP autograd, split", "amp", partial(amp_autograd, split=True)),
        Contender("AMPLoss.step", "amp", _Step()),
        # Eq. 21 to the letter: rows that keep λ because of rounding are then run again.
        Contender("AMPLoss.step, strict ties", "amp", _Step(tie_tol=0.0)),
        Contender("AMPLoss.step, strict ties, no context", "amp", _Step(tie_tol=0.0, context=False)),
        Contender("AMPLoss.step, merged", "amp", _Step(plan="merged")),
        Contender("Mixup, compiled", "mixup", mixup, compiled=True),
        Contender("Mixup, split, compiled", "mixup", partial(mixup, split=True), compiled=True),
        Contender("AMPLoss.step, compiled", "amp", _Step(), compiled=True),
    ]
    taken = [one for one in every if not one.compiled or (compiled and not work.spec.large)]
    taken = [one for one in taken if work.network.later or ", split" not in one.name]
    return [replace(one, base=COMPILED if one.compiled else EAGER) for one in taken]
