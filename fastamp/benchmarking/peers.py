"""What one could use instead, from the published algorithms; nobody is timed before agreeing with the definition.

A peer maps a head, its input, labels and a `Mix` to a loss. The head is the last linear layer and its input the hidden
rows (B, D), or the head is None and its input logits (B, C). Without a `Mix` it draws its own λ and partners.
"""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastamp import Mix

STEP_SIZE = 2e-3
LIGER = "liger_kernel.transformers.functional"


def draw(x: Tensor, mix: Mix | None) -> tuple[Tensor, Tensor]:
    """λ (B, 1, ...) of x's dtype and number of dimensions, and partners, as one writes it by hand."""
    batch = len(x)
    lam = torch.rand(batch, device=x.device, dtype=x.dtype) if mix is None else mix.lam.to(x.dtype)
    partner = torch.randperm(batch, device=x.device) if mix is None else mix.partner
    return lam.view(-1, *[1] * (x.dim() - 1)), partner


def logits_of(head: nn.Linear | None, x: Tensor) -> Tensor:
    """(B, C)."""
    return x if head is None else head(x)


def row_losses(logits: Tensor, y: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """λ·CE(·, y) + (1-λ)·CE(·, y[π]), (B,)."""
    lam = lam.flatten()
    own = F.cross_entropy(logits, y, reduction="none")
    return lam * own + (1 - lam) * F.cross_entropy(logits, y[partner], reduction="none")


def cross_entropy(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """No mixing at all: `torch.nn.functional.cross_entropy`."""
    return F.cross_entropy(logits_of(head, x), y)


def mixup_two_terms(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Mixup by two weighted cross-entropies.

    Of inputs: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, in the form of the authors' code.
    Of hidden rows: Verma et al., "Manifold Mixup", ICML 2019; of sentences: Guo et al., "Augmenting Data with Mixup for
    Sentence Classification", 2019.
    """
    lam, partner = draw(x, mix)
    return row_losses(logits_of(head, torch.lerp(x[partner], x, lam)), y, lam, partner).mean()


def mixup_soft_targets(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Mixup by one cross-entropy against mixed one-hot targets, as Zhang et al., ICLR 2018, define it."""
    lam, partner = draw(x, mix)
    logits = logits_of(head, torch.lerp(x[partner], x, lam))
    one_hot = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(logits, torch.lerp(one_hot[partner], one_hot, lam))


def amp_autograd(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """AMP as Eq. 10-21 of Liu et al., EMNLP 2021, read: two passes, ∇λ by autograd through the first."""
    lam, partner = draw(x, mix)
    lam_leaf = lam.detach().requires_grad_()
    other = x[partner]
    loss = row_losses(logits_of(head, torch.lerp(other, x, lam_leaf)), y, lam, partner)
    (grad,) = torch.autograd.grad(loss.sum(), lam_leaf, retain_graph=True)
    lam_adv = lam + STEP_SIZE * grad.clamp(-1, 1)
    loss_adv = row_losses(logits_of(head, torch.lerp(other, x, lam_adv)), y, lam, partner)
    return torch.where(loss_adv > loss, loss_adv, loss).mean()


def amp_published(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """AMP as the code published with Liu et al., EMNLP 2021, computes it, its re-weighting of rows left out.

    Binary cross-entropy of the softmax, summed over classes; ∇λ of the batch mean, not clipped, by a whole backward
    pass, that of the parameters included; then back through the graphs of both passes.
    `fastamp.reference.OFFICIAL` is what it is held to.
    """
    lam, partner = draw(x, mix)
    one_hot = F.one_hot(y, x.shape[1] if head is None else head.out_features).to(x.dtype)
    target = torch.lerp(one_hot[partner], one_hot, lam)

    def losses(at: Tensor) -> Tensor:
        probabilities = logits_of(head, torch.lerp(x[partner], x, at)).softmax(1)
        return F.binary_cross_entropy(probabilities, target, reduction="none").sum(1)

    lam_leaf = lam.detach().requires_grad_()
    loss = losses(lam_leaf)
    by = [lam_leaf, x, *(() if head is None else head.parameters())]
    grad = torch.autograd.grad(loss.mean(), by, retain_graph=True)[0]
    loss_adv = losses(lam + STEP_SIZE * grad)
    return torch.where(loss_adv > loss, loss_adv, loss).mean()


def amp_functorch(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Eq. 10-21 of Liu et al. in a form that torch.compile takes: ∇λ by torch.func, its pass over detached values.

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


def liger_cross_entropy(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Liger-Kernel's cross-entropy, Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024.

    No mixing: it does less work than any Mixup. It writes the gradient over its logits, so it takes a head, which makes
    them anew in every step.
    """
    loss: Tensor = import_module(LIGER).liger_cross_entropy(logits_of(head, x), y)
    return loss


def torch_linear_cross_entropy(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """PyTorch's own fused linear cross-entropy, `F.linear_cross_entropy` in chunks of rows: no mixing."""
    assert head is not None  # taken for hidden rows only
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, head.weight, y, linear_bias=head.bias, options=options)


def liger_linear_cross_entropy(head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
    """Liger-Kernel's fused linear cross-entropy, Hsu et al., 2024: chunks of rows, no mixing, no logits held."""
    assert head is not None  # taken for hidden rows only
    loss: Tensor = import_module(LIGER).liger_fused_linear_cross_entropy(x, head.weight, y, bias=head.bias)
    return loss
