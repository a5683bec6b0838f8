"""The definition of AMP, by autograd, in plain PyTorch: what everything else in this library is held to.

Liu et al., "Adversarial Mixing Policy for Relaxing Locally Linear Constraints in Mixup", EMNLP 2021.
Written to be read, not to be fast; run it in float64.

RandOp  m_r(λ) = λ h_r + (1-λ) h_π(r),  ℓ_r(λ) = λ_r L(f(m_r(λ)), y_r) + (1-λ_r) L(f(m_r(λ)), y_π(r))
MaxOp   λ'_r = λ_r + ε·clip(∂ℓ_r/∂λ, -1, 1)          the λ_r in front of L is a label weight: held fixed
MinOp   ℓ_r(λ'_r) where ℓ_r(λ'_r) - ℓ_r(λ_r) > 0, else ℓ_r(λ_r)          λ' is a constant to autograd
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PAPER: dict[str, Any] = {"loss": "cross_entropy", "grad_scale": "row", "grad_clip": 1.0, "tie_tol": 0.0}
OFFICIAL: dict[str, Any] = {
    "loss": "softmax_bce",
    "grad_scale": "mean",
    "grad_clip": None,
    "tie_tol": 0.0,
    "reweight": "moving",
}
LOG_FLOOR = -100.0  # nn.BCELoss clamps both of its logarithms here


class Result(NamedTuple):
    """What one step of AMP gives; every field but `loss` is detached."""

    loss: Tensor  # () or, for reduction="none", (B,); carries the graph
    row_loss: Tensor  # (B,) the selected loss of each row
    lam_adv: Tensor  # (B,) λ'
    grad: Tensor  # (B,) ∇λ, after grad_scale, before the clip
    delta: Tensor  # (B,) ℓ(λ') - ℓ(λ)
    mask: Tensor  # (B,) bool: which rows took ℓ(λ')


def mix(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """λ h_r + (1-λ) h_π(r). A value that is -inf in either row is -inf in the mixture, and constant."""
    lam = lam.view(-1, *[1] * (hidden.dim() - 1))
    other = hidden[partner]
    excluded = (hidden == -torch.inf) | (other == -torch.inf)
    mixed = lam * hidden.masked_fill(excluded, 0) + (1 - lam) * other.masked_fill(excluded, 0)
    return mixed.masked_fill(excluded, -torch.inf)


def class_mass(
    target: Tensor, logits: Tensor, ignore_index: int, label_smoothing: float, loss: str
) -> tuple[Tensor, Tensor]:
    """Target probabilities q (B, C), zero where ignored, and what is kept (B, C), 1.0 or 0.0.

    Smoothing mixes with what says nothing: all classes alike, or yes and no alike for each class on its own.
    """
    nothing = 1 / logits.shape[1]
    if target.is_floating_point():
        q, kept = target.to(logits.dtype), torch.ones_like(logits)
        if loss == "binary_cross_entropy":
            kept, nothing = (target != ignore_index).to(logits.dtype), 1 / 2
    else:
        is_kept = target != ignore_index
        q = F.one_hot(torch.where(is_kept, target, 0), logits.shape[1]).to(logits.dtype)
        kept = is_kept[:, None].to(logits.dtype).expand_as(logits)
    q = (1 - label_smoothing) * q + label_smoothing * nothing
    return q * kept, kept


def row_losses(
    logits: Tensor,
    q: Tensor,
    kept: Tensor,
    weight: Tensor,
    loss: str,
    *,
    pos_weight: Tensor | None = None,
    sum_classes: bool = False,
) -> Tensor:
    """(B,) losses of logits (B, C) against target mass q (B, C), of which `kept` (B, C) was not ignored."""
    if loss == "binary_cross_entropy":
        on, off = weight * q if pos_weight is None else weight * pos_weight * q, weight * (kept - q)
        yes, no = (torch.where(t != 0, t * F.logsigmoid(x), 0) for t, x in ((on, logits), (off, -logits)))
        return -(yes + no).sum(-1) / (1 if sum_classes else logits.shape[1])
    logp = logits.log_softmax(-1)
    if loss == "cross_entropy":
        return -torch.where(q != 0, weight * q * logp, 0).sum(-1)
    others = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    # log(1 - p_c) as the log of the sum over the other classes: exact also where p_c rounds to 1.
    log_not_p = logits[:, None, :].masked_fill(others, -torch.inf).logsumexp(-1) - logits.logsumexp(-1, True)
    on, off = weight * q, weight * (kept - q)
    return -(on * logp.clamp(min=LOG_FLOOR) + off * log_not_p.clamp(min=LOG_FLOOR)).sum(-1)


def tie_tolerance(tie_tol: float | str, loss: Tensor, dtype: torch.dtype) -> Tensor:
    """|δ| up to which two losses count as equal: 4 ulp of the loss in the dtype f ran in, or as given."""
    if tie_tol == "auto":
        return 4 * torch.finfo(dtype).eps * loss.abs().clamp(min=1)
    return torch.full_like(loss, float(tie_tol))


def moving_weights(delta: Tensor, history: list[Tensor]) -> Tensor:
    """1 + (δ-μ)/σ where δ > μ, else 1; μ, σ (unbiased) of the positive δ of the last five steps, this one included."""
    history.append(delta[delta > 0])
    del history[:-5]
    positive = torch.cat(history)
    if positive.numel() < 2 or positive.std() == 0:
        return torch.ones_like(delta)
    mean, std = positive.mean(), positive.std()
    return torch.where(delta > mean, 1 + (delta - mean) / std, 1)


def amp(
    f: Callable[[Tensor], Tensor],
    hidden: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    *,
    mode: str = "amp",
    loss: str = "cross_entropy",
    step_size: float = 2e-3,
    grad_clip: float | None = 1.0,
    grad_scale: str = "row",
    clamp: bool = False,
    tie_tol: float | str = "auto",
    reweight: str | None = None,
    history: list[Tensor] | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    sum_classes: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Result:
    """One step of AMP on any layer of any network.

    Args:
        f: the rest of the network; maps a mixed hidden state (B, ...) to logits (B, C), rows independently.
        hidden: (B, ...) hidden state to mix, floating point; pass logits and the identity for SentAMP.
        target: (B,) int64 class indices or (B, C) probabilities, for "binary_cross_entropy" of each class on its own.
        lam: (B,) mixing coefficients.
        partner: (B,) int64, a permutation of 0..B-1.
        mode: "mixup" (RandOp), "maxop" (RandOp + MaxOp) or "amp" (all three).
        loss: "cross_entropy"; "binary_cross_entropy", with logits, the mean over classes; or "softmax_bce", that of the
            softmax, summed over classes.
        step_size: ε.
        grad_clip: two-sided bound on ∇λ, or None.
        grad_scale: "row" differentiates the row's loss, "mean" the batch mean.
        clamp: keep λ' inside [0, 1].
        tie_tol: "auto", or a number; 0.0 is Eq. 21 to the letter.
        reweight: None or "moving"; `history` then holds the positive δ of the steps before and is extended.
        history: see `reweight`.
        weight: (C,) class weights.
        pos_weight: (C,) weights of the positive side, as nn.BCEWithLogitsLoss has them.
        sum_classes: of "binary_cross_entropy", in place of the mean over classes.
        ignore_index: class index whose side contributes nothing; with "binary_cross_entropy" also such a probability.
        label_smoothing: as nn.CrossEntropyLoss has it; see `class_mass`.
        reduction: "mean" divides by the kept, class-weighted mass, "sum", or "none".
        num_items: replaces the divisor of the mean.
    """
    dtype = hidden.dtype
    lam = lam.to(dtype)

    def losses(lam_in: Tensor) -> Tensor:
        logits = f(mix(hidden, lam_in, partner))
        q, kept = class_mass(target, logits, ignore_index, label_smoothing, loss)
        w = logits.new_ones(logits.shape[1]) if weight is None else weight.to(logits.dtype)
        q, kept = (lam[:, None] * t + (1 - lam[:, None]) * t[partner] for t in (q, kept))
        return row_losses(logits, q, kept, w, loss, pos_weight=pos_weight, sum_classes=sum_classes)

    def divisor() -> Tensor:
        if num_items is not None:
            return torch.as_tensor(num_items, dtype=dtype, device=lam.device)
        kept = target != ignore_index
        if target.is_floating_point():
            mass = kept.to(dtype).mean(1) if loss == "binary_cross_entropy" else torch.ones_like(lam)
        else:
            mass = kept.to(dtype)
            if weight is not None and loss != "binary_cross_entropy":
                mass = mass * weight.to(dtype)[torch.where(kept, target, 0)]
        return (lam * mass + (1 - lam) * mass[partner]).sum()

    lam_leaf = lam.detach().requires_grad_()
    row_loss = losses(lam_leaf)
    scale = divisor() if grad_scale == "mean" else lam.new_ones(())
    scale = torch.where(scale == 0, 1, scale)  # nothing kept: no gradient either
    grad = torch.autograd.grad((row_loss / scale).sum(), lam_leaf, retain_graph=True)[0]
    grad = grad.detach()
    lam_adv, delta, mask = lam, torch.zeros_like(lam), torch.zeros_like(lam, dtype=torch.bool)
    if mode != "mixup":
        lam_adv = lam + step_size * (grad if grad_clip is None else grad.clamp(-grad_clip, grad_clip))
        lam_adv = (lam_adv.clamp(0, 1) if clamp else lam_adv).detach()
        row_loss_adv = losses(lam_adv)
        delta = (row_loss_adv - row_loss).detach()
        tol = tie_tolerance(tie_tol, row_loss.detach(), dtype)
        mask = torch.ones_like(mask) if mode == "maxop" else (delta > 0) | ((delta >= -tol) & (tol > 0))
        row_loss = torch.where(mask, row_loss_adv, row_loss)

    total = row_loss
    if reweight == "moving":
        total = moving_weights(delta, [] if history is None else history) * row_loss
    if reduction != "none":
        total = total.sum() / divisor() if reduction == "mean" else total.sum()
    return Result(total, row_loss.detach(), lam_adv, grad, delta, mask)
