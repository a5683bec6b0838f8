"""What one could use instead, from the published algorithms; nobody is timed before agreeing with the definition.

A peer maps a network, its input, labels and a `Mix` to a loss. Without a `Mix` it draws its own λ and partners.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp import Mix
from fastamp.benchmarking.networks import Network

STEP_SIZE = 2e-3
LIGER = "liger_kernel.transformers.functional"


def mixing(
    network: Network, x: Tensor, mix: Mix | None, *, split: bool = False
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Logits (B, C) by λ, λ (B, 1, ...) in the dtype of what is mixed, and partners, as one writes it by hand.

    Args:
        network: is cut as one cuts it, or with `split` where fastamp does.
        x: its input.
        mix: is drawn where it is None.
        split: where to cut.
    """
    cut = network.split if split else network.plain
    hidden = cut.g(x)
    batch, device = len(hidden), hidden.device
    lam = torch.rand(batch, device=device, dtype=hidden.dtype) if mix is None else mix.lam.to(hidden.dtype)
    lam = lam.view(-1, *[1] * (hidden.dim() - 1))
    partner = torch.randperm(batch, device=device) if mix is None else mix.partner
    other, context = hidden[partner], cut.context(x, Mix(lam, partner))
    return lambda at: cut.f(torch.lerp(other, hidden, at), **context), lam, partner


def row_losses(logits: Tensor, y: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """λ·CE(·, y) + (1-λ)·CE(·, y[π]), (B,)."""
    lam = lam.flatten()
    own = F.cross_entropy(logits, y, reduction="none")
    return lam * own + (1 - lam) * F.cross_entropy(logits, y[partner], reduction="none")


def cross_entropy(network: Network, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """No mixing at all: `torch.nn.functional.cross_entropy`."""
    cut = network.split if network.later else network.plain
    return F.cross_entropy(cut.f(cut.g(x), **cut.context(x, None)), y)


def mixup_two_terms(network: Network, x: Tensor, y: Tensor, mix: Mix | None, *, split: bool = False) -> Tensor:
    """Mixup by two weighted cross-entropies.

    Of inputs: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, in the form of the authors' code.
    Of hidden rows: Verma et al., "Manifold Mixup", ICML 2019; of sentences: Guo et al., "Augmenting Data with Mixup for
    Sentence Classification", 2019.
    """
    logits, lam, partner = mixing(network, x, mix, split=split)
    return row_losses(logits(lam), y, lam, partner).mean()


def mixup_soft_targets(network: Network, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Mixup by one cross-entropy against mixed one-hot targets, as Zhang et al., ICLR 2018, define it."""
    mixed, lam, partner = mixing(network, x, mix)
    logits = mixed(lam)
    one_hot = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(logits, torch.lerp(one_hot[partner], one_hot, lam))


def amp_autograd(
    network: Network, x: Tensor, y: Tensor, mix: Mix | None, *, split: bool = False, published: bool = False
) -> Tensor:
    """AMP as Eq. 10-21 of Liu et al., EMNLP 2021, read: two passes, ∇λ by autograd through the first.

    `published` takes a whole backward pass for ∇λ, as the published code does.
    """
    logits, lam, partner = mixing(network, x, mix, split=split)
    lam_leaf = lam.detach().requires_grad_()
    loss = row_losses(logits(lam_leaf), y, lam, partner)
    by = [lam_leaf, *(network.model.parameters() if published else ())]
    grad = torch.autograd.grad(loss.sum(), by, retain_graph=True)[0]
    loss_adv = row_losses(logits(lam + STEP_SIZE * grad.clamp(-1, 1)), y, lam, partner)
    return torch.where(loss_adv > loss, loss_adv, loss).mean()


def amp_official(network: Network, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """AMP as the code published with Liu et al., EMNLP 2021, computes it, its re-weighting of rows left out.

    Binary cross-entropy of the softmax, summed over classes; ∇λ of the batch mean, not clipped, by a whole backward
    pass, that of the parameters included; then back through the graphs of both passes.
    `fastamp.reference.OFFICIAL` is what it is held to.
    """
    logits, lam, partner = mixing(network, x, mix)

    def losses(at: Tensor) -> Tensor:
        probabilities = logits(at).softmax(1)
        one_hot = F.one_hot(y, probabilities.shape[1]).to(x.dtype)
        target = torch.lerp(one_hot[partner], one_hot, lam)
        return F.binary_cross_entropy(probabilities, target, reduction="none").sum(1)

    lam_leaf = lam.detach().requires_grad_()
    loss = losses(lam_leaf)
    grad = torch.autograd.grad(loss.mean(), [lam_leaf, x, *network.model.parameters()], retain_graph=True)[0]
    loss_adv = losses(lam + STEP_SIZE * grad)
    return torch.where(loss_adv > loss, loss_adv, loss).mean()


def amp_functorch(network: Network, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Eq. 10-21 of Liu et al. in a form that torch.compile takes: ∇λ by torch.func, its pass over detached values.

    Detached, because the compiler would otherwise compute the parameters' gradients of that pass as well. The first
    pass stands here twice, and the compiler merges the two.
    """
    _, lam, partner = mixing(network, x, mix)

    def losses(at: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        return row_losses(F.linear(torch.lerp(x[partner], x, at), *parameters), y, lam, partner)

    given = [x, *network.model.parameters()]
    fixed = [value.detach() for value in given]
    grad, _ = torch.func.grad_and_value(lambda at: losses(at, *fixed).sum())(lam)
    loss, loss_adv = losses(lam, *given), losses(lam + STEP_SIZE * grad.clamp(-1, 1), *given)
    return torch.where(loss_adv > loss, loss_adv, loss).mean()


def liger_cross_entropy(network: Network, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Liger-Kernel's cross-entropy, Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024.

    No mixing: it does less work than any Mixup. It writes the gradient over its logits, so it takes a head, which makes
    new ones in every step.
    """
    loss: Tensor = import_module(LIGER).liger_cross_entropy(network.model(x), y)
    return loss


def torch_linear_cross_entropy(network: Network, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """PyTorch's own fused linear cross-entropy, `F.linear_cross_entropy` in chunks of rows: no mixing."""
    weight, bias = network.model.parameters()
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight, y, linear_bias=bias, options=options)


def liger_linear_cross_entropy(network: Network, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Liger-Kernel's fused linear cross-entropy, Hsu et al., 2024: chunks of rows, no mixing, no logits held."""
    weight, bias = network.model.parameters()
    loss: Tensor = import_module(LIGER).liger_fused_linear_cross_entropy(x, weight, y, bias=bias)
    return loss
