"""What is measured against what: a training step's loss, from plain cross-entropy to AMP in several hands.

A contender maps a head, its input, labels and a `Mix` to a loss. The head is the last linear layer and its input the
hidden rows (B, D), or the head is None and its input logits (B, C); in `layers` it is a network. Without a `Mix` a
contender draws its own λ and partners, which is how it is timed: drawing costs launches too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastamp import AMPLoss, Mix, functional

STEP_SIZE = 2e-3
Loss = Callable[[Any, Tensor, Tensor, Mix | None], Tensor]
MIXUP = ("Mixup, two terms", "Mixup, soft targets")  # the faster of the two is what ratios are to


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss.

    Attributes:
        name: as results show it.
        mode: what it claims to compute: "none", or a mode of `fastamp.AMPLoss`.
        loss: how.
        compiled: whether `loss` goes through torch.compile.
        takes: "hidden" (needs a head), "logits" (needs none) or "both".
        base: names of the plain Mixups of its kind, the faster of which its ratio is to.
    """

    name: str
    mode: str
    loss: Loss
    compiled: bool = False
    takes: str = "both"
    base: tuple[str, ...] = MIXUP


def draw(x: Tensor, mix: Mix | None) -> tuple[Tensor, Tensor]:
    """λ (B, 1, ...) of x's dtype and number of dimensions, and partners, as one writes it by hand."""
    batch = len(x)
    lam = torch.rand(batch, device=x.device, dtype=x.dtype) if mix is None else mix.lam.to(x.dtype)
    partner = torch.randperm(batch, device=x.device) if mix is None else mix.partner
    return lam.view(-1, *[1] * (x.dim() - 1)), partner


def _logits(head: nn.Linear | None, x: Tensor) -> Tensor:
    return x if head is None else head(x)


def row_losses(logits: Tensor, y: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """λ·CE(·, y) + (1-λ)·CE(·, y[π]), (B,)."""
    lam = lam.flatten()
    own = F.cross_entropy(logits, y, reduction="none")
    return lam * own + (1 - lam) * F.cross_entropy(logits, y[partner], reduction="none")


def cross_entropy(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """No mixing at all."""
    return F.cross_entropy(_logits(head, x), y)


def mixup_two_terms(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Mixup by two weighted cross-entropies."""
    lam, partner = draw(x, mix)
    return row_losses(_logits(head, torch.lerp(x[partner], x, lam)), y, lam, partner).mean()


def mixup_soft_targets(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Mixup by one cross-entropy against mixed one-hot targets."""
    lam, partner = draw(x, mix)
    logits = _logits(head, torch.lerp(x[partner], x, lam))
    one_hot = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(logits, torch.lerp(one_hot[partner], one_hot, lam))


def amp_autograd(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """AMP as the equations read: two passes, ∇λ by autograd through the first."""
    lam, partner = draw(x, mix)
    lam_leaf = lam.detach().requires_grad_()
    other = x[partner]
    loss = row_losses(_logits(head, torch.lerp(other, x, lam_leaf)), y, lam, partner)
    (grad,) = torch.autograd.grad(loss.sum(), lam_leaf, retain_graph=True)
    lam_adv = lam + STEP_SIZE * grad.clamp(-1, 1)
    loss_adv = row_losses(_logits(head, torch.lerp(other, x, lam_adv)), y, lam, partner)
    return torch.where(loss_adv > loss, loss_adv, loss).mean()


def amp_functorch(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """AMP in a form that torch.compile takes: ∇λ by torch.func, its pass over detached values.

    Detached, because the compiler would otherwise compute the parameters' gradients of that pass as well. The first
    pass stands here twice, and the compiler merges the two.
    """
    lam, partner = draw(x, mix)
    weight, bias = (None, None) if head is None else (head.weight, head.bias)

    def losses(at: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mixed = torch.lerp(x[partner], x, at)
        return row_losses(mixed if weight is None else F.linear(mixed, weight, bias), y, lam, partner)

    fixed = [None if value is None else value.detach() for value in (weight, bias)]
    grad, _ = torch.func.grad_and_value(lambda at: losses(at, x.detach(), *fixed).sum())(lam)
    loss = losses(lam, x, weight, bias)
    loss_adv = losses(lam + STEP_SIZE * grad.clamp(-1, 1), x, weight, bias)
    return torch.where(loss_adv > loss, loss_adv, loss).mean()


class _Criterion:
    """`fastamp.AMPLoss` as the README uses it."""

    def __init__(self) -> None:
        self.criterion = AMPLoss(step_size=STEP_SIZE)

    def __call__(self, head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
        loss: Tensor = self.criterion(_logits(head, x), y, mix=mix)
        return loss


class _LinearHead:
    """`linear_amp_cross_entropy`: the head inside the operation."""

    def __init__(self) -> None:
        self.criterion = AMPLoss(step_size=STEP_SIZE)

    def __call__(self, head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
        assert head is not None  # taken for hidden rows only
        lam, partner = self.criterion.sample(len(x), device=x.device) if mix is None else mix
        arguments = (x, head.weight, head.bias, y, lam, partner)
        return functional.linear_amp_cross_entropy(*arguments, step_size=STEP_SIZE)  # type: ignore[return-value]


def contenders(takes: str, *, compiled: bool) -> list[Contender]:
    """All that are timed on one kind of input.

    Args:
        takes: "hidden" or "logits".
        compiled: also those under torch.compile.
    """
    every = [
        Contender("cross-entropy", "none", cross_entropy),
        Contender("Mixup, two terms", "mixup", mixup_two_terms),
        Contender("Mixup, soft targets", "mixup", mixup_soft_targets),
        Contender("AMP autograd", "amp", amp_autograd, takes="hidden"),
        Contender("AMPLoss", "amp", _Criterion()),
        Contender("linear_amp_cross_entropy", "amp", _LinearHead(), takes="hidden"),
        Contender("cross-entropy, compiled", "none", cross_entropy, compiled=True, takes="logits"),
        Contender("Mixup, compiled", "mixup", mixup_two_terms, compiled=True),
        Contender("AMP torch.func, compiled", "amp", amp_functorch, compiled=True, takes="hidden"),
        Contender("AMPLoss, compiled", "amp", _Criterion(), compiled=True),
    ]
    return [one for one in every if one.takes in (takes, "both") and (compiled or not one.compiled)]
