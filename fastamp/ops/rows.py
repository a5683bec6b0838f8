"""What the closed forms of several operations share: a row's mixed target, its loss, the step of λ, the choice.

Notation, for one row of C classes: a, b the row's and its partner's logits, d = a - b, x = b + λd the mixed
logits, t the mixed target mass with sum S, p = softmax(x). Then

    ℓ = -⟨t, log p⟩      g = ∂ℓ/∂x = S p - t      ∇λ = ⟨g, d⟩      η = λ' - λ
    δ = ℓ(λ') - ℓ(λ) = S log1p(Σ_c p_c expm1(η d_c)) - η⟨t, d⟩

and for binary cross-entropy, with target mass t_c for and f_c against each class, S_c = t_c + f_c, σ = sigmoid(x):

    ℓ = -Σ_c t_c log σ_c + f_c log(1 - σ_c)      g_c = S_c σ_c - t_c      δ = Σ_c S_c log1p(σ_c expm1(η d_c)) - η⟨t, d⟩

kernels/README.md derives them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp.mixing import Mixture
from fastamp.policy import Policy

LOG_FLOOR = -100.0  # nn.BCELoss clamps both of its logarithms here


class Target(NamedTuple):
    """The mixed target of every row."""

    on: Tensor  # (B, C) class-weighted target mass t
    off: Tensor | None  # (B, C) class-weighted mass of "not this class"; None for cross-entropy
    total: Tensor | None  # (B,) S = Σ_c t_c; None stands for 1
    loss: str = "cross_entropy"


class Rows(NamedTuple):
    """What AMP made of every row."""

    loss: Tensor  # (B,) the selected loss
    lam: Tensor  # (B,) the selected coefficient λ*
    grad_mixed: Any  # (B, C) g at λ*; None where no gradient is needed
    lam_adv: Tensor  # (B,)
    grad: Any  # (B,) ∇λ; None, as the two below, where no statistics are needed and none were made
    delta: Any  # (B,)
    mask: Any  # (B,) bool


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_row(values: Tensor, rows: Tensor) -> Tensor:
    """(B,) values in the shape in which they go with rows (B, ...)."""
    return values.view(-1, *[1] * (rows.dim() - 1))


def partner_rows(rows: Tensor, partner: Tensor) -> Tensor:
    """`rows[partner]` in the memory format of `rows`, which index_select, the faster one of contiguous rows, loses."""
    return rows.index_select(0, partner) if rows.is_contiguous() else rows[partner]


def mixed_rows(values: Tensor, lam: Tensor) -> Tensor:
    """The rows that are mixed: all, or the first ones, where λ is of these and the others are only partners."""
    return values if values.shape[0] == lam.shape[0] else values[: lam.shape[0]]


def mixed_target(mixture: Mixture, classes: int, policy: Policy, *, all_kept: bool) -> Target:
    """The mixed target mass of every row with a λ; `all_kept` promises that no label equals ignore_index."""
    target, lam, partner, weight = mixture
    lam = lam.unsqueeze(1)
    smoothing = policy.label_smoothing
    binary = policy.loss == "binary_cross_entropy"
    kept = None
    if target.is_floating_point():
        soft = target.to(lam.dtype)
        if binary and not all_kept:
            is_kept = target != policy.ignore_index
            soft = torch.where(is_kept, soft, 0)
            sides = is_kept.to(lam.dtype)
            kept = torch.lerp(sides.index_select(0, partner), mixed_rows(sides, lam), lam)
        on = torch.lerp(soft.index_select(0, partner), mixed_rows(soft, lam), lam)
    else:
        label, label_mass, other_mass = target.unsqueeze(1), lam, lam.neg().add_(1)  # faster than 1 - lam
        if not all_kept:
            is_kept = label != policy.ignore_index
            label = torch.where(is_kept, label, 0)
            label_mass = label_mass * mixed_rows(is_kept, lam)
            other_mass = other_mass * is_kept.index_select(0, partner)
            kept = label_mass + other_mass
        other_label, label = label.index_select(0, partner), mixed_rows(label, lam)
        if torch.compiler.is_compiling():  # comparisons fuse; scatters do not
            numbers = torch.arange(classes, device=target.device)
            on = torch.where(label == numbers, label_mass, 0) + torch.where(other_label == numbers, other_mass, 0)
        else:
            on = lam.new_zeros(lam.shape[0], classes).scatter_(1, label, label_mass)
            on.scatter_add_(1, other_label, other_mass)
    if smoothing > 0:
        # What says nothing: all classes alike, or yes and no alike for each class on its own.
        uniform = smoothing / (2 if binary and target.is_floating_point() else classes)
        on = (1 - smoothing) * on + (uniform if kept is None else uniform * kept)
    off = None
    if policy.loss != "cross_entropy":
        off = (1 if kept is None else kept) - on
        if binary:
            scale = 1 if policy.sum_classes else 1 / classes
            yes, no = (scale, scale) if weight is None else weight.to(lam.dtype) * scale
            return Target(on * yes, off * no, None, policy.loss)
        off = off if weight is None else off * weight.to(lam.dtype)
    if weight is not None:
        on = on * weight.to(lam.dtype)
    plain = kept is None and weight is None and not target.is_floating_point()
    return Target(on, off, None if plain else on.sum(1), policy.loss)


def loss_and_grad(x: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """(B,) losses of mixed logits x (B, C) and their gradients (B, C), by the loss that `target` was made for."""
    if target.off is not None:
        by = _softmax_bce if target.loss == "softmax_bce" else _binary_cross_entropy
        return by(x, target.on, target.off)
    logp = x.log_softmax(1)
    p = logp.exp()
    loss = -torch.where(target.on != 0, target.on * logp, 0).sum(1)
    return loss, (p if target.total is None else target.total.unsqueeze(1) * p) - target.on


def _binary_cross_entropy(x: Tensor, on: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    yes = torch.where(on != 0, on * F.logsigmoid(x), 0)
    no = torch.where(off != 0, off * F.logsigmoid(-x), 0)
    return -(yes + no).sum(1), off * x.sigmoid() - on * (-x).sigmoid()


def _softmax_bce(x: Tensor, on: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    # With o = p/(1-p) and A = -on, B = -off (zero where the logarithm is clamped):
    #   g_j = A_j - p_j (ΣA + B_j) + p_j Σ_{c≠j} B_c o_c.
    # The likeliest class is kept apart: its o is unbounded, while p_j·o_top = p_top·(share of j among the others).
    top = x.argmax(1, keepdim=True)
    others = x.scatter(1, top, -torch.inf)
    log_others = others.logsumexp(1, keepdim=True)
    logp = x.log_softmax(1)
    p = logp.exp()
    log_not_p = torch.log1p(-p).scatter(1, top, log_others - x.logsumexp(1, keepdim=True))
    loss = -(on * logp.clamp(min=LOG_FLOOR) + off * log_not_p.clamp(min=LOG_FLOOR)).sum(1)
    a = -on * (logp > LOG_FLOOR)
    b = -off * (log_not_p > LOG_FLOOR)
    odds = (p / (1 - p)).scatter(1, top, 0)
    share = torch.where(log_others > -torch.inf, (others - log_others).exp(), 0)
    bo = b * odds
    grad = a - p * (a.sum(1, keepdim=True) + b) + p * (bo.sum(1, keepdim=True) - bo)
    return loss, grad + (b * p).gather(1, top) * share


def loss_change(x: Tensor, u: Tensor, target: Target) -> Tensor:
    """(B,) ℓ(x + u) - ℓ(x) of either cross-entropy, without the cancellation of a difference."""
    if target.off is not None:
        near = torch.log1p(x.sigmoid() * torch.expm1(u.clamp(-1, 1)))
        far = torch.where(u == 0, 0, F.logsigmoid(-x) - F.logsigmoid(-x - u))
        return ((target.on + target.off) * torch.where(u.abs() <= 1, near, far) - target.on * u).sum(1)
    logp = x.log_softmax(1)
    # Where some |u| is large expm1 may overflow, or p underflow, and there is no cancellation to avoid.
    near = u.abs().amax(1) <= 1
    near_change = torch.log1p((logp.exp() * torch.expm1(u.clamp(-1, 1))).sum(1))
    far_change = (logp + u).logsumexp(1)
    total = 1 if target.total is None else target.total
    return total * torch.where(near, near_change, far_change) - (target.on * u).sum(1)


def scaled_grad(grad: Tensor, policy: Policy, grad_divisor: Tensor | float | None) -> Tensor:
    """∇λ of the row's loss, or, under grad_scale="mean", of the batch mean."""
    if policy.grad_scale == "row" or grad_divisor is None:
        return grad
    if isinstance(grad_divisor, Tensor):  # nothing kept: no gradient either
        return torch.where(grad_divisor == 0, 0, grad / grad_divisor)
    return grad / grad_divisor


def step_lam(lam: Tensor, grad: Tensor, policy: Policy, step_size: float) -> Tensor:
    """λ' = λ + ε·clip(∇λ), shape and dtype of `lam`."""
    if policy.mode == "mixup":
        return lam
    if policy.grad_clip is not None:
        grad = grad.clamp(-policy.grad_clip, policy.grad_clip)
    # In a product, an ε that changes from step to step is not compiled for each time.
    traced = torch.compiler.is_compiling()
    lam_adv = lam + step_size * grad if traced else torch.add(lam, grad, alpha=step_size)
    return lam_adv.clamp(0, 1) if policy.clamp else lam_adv


def select(loss: Tensor, delta: Tensor, policy: Policy, ties: tuple[float, float]) -> Tensor:
    """(B,) bool: which rows take the loss at λ' (Eq. 18-21, a difference below the tie tolerance included)."""
    if policy.mode != "amp":
        return torch.full_like(delta, policy.mode == "maxop", dtype=torch.bool)
    absolute, relative = ties
    if absolute == 0 and relative == 0:
        return delta > 0
    return delta >= -(absolute + relative * loss.abs().clamp(min=1))


def selected(rows: Rows, loss_change: Tensor, grad_adv: Tensor | None, policy: Policy) -> Rows:
    """What MinOp makes of the rows at λ and of what changes at λ' (Eq. 18-21)."""
    delta = torch.zeros_like(loss_change) if policy.mode == "mixup" else loss_change
    mask = select(rows.loss, delta, policy, policy.tie_bounds(rows.loss.dtype))
    return rows._replace(
        loss=torch.where(mask, rows.loss + delta, rows.loss),
        lam=torch.where(mask, rows.lam_adv, rows.lam),
        grad_mixed=rows.grad_mixed if grad_adv is None else torch.where(mask.unsqueeze(1), grad_adv, rows.grad_mixed),
        delta=delta,
        mask=mask,
    )


def scatter_roles(grad_mixed: Tensor, lam: Tensor, partner: Tensor, upstream: Tensor) -> Tensor:
    """Gradient of the unmixed rows: dz_r = u_r λ*_r g_r + u_q (1-λ*_q) g_q, where partner[q] = r.

    Args:
        grad_mixed: (B, ...) g.
        lam: (B,) λ*.
        partner: (B,) int64 permutation.
        upstream: () or (B,) gradient of each row's loss.
    """
    own = upstream * lam
    grad = grad_mixed * per_row(own, grad_mixed)
    # One addend a row: the result does not depend on any order.
    return grad.index_add_(0, partner, grad_mixed * per_row(upstream - own, grad_mixed))
