"""AMP on rows of logits in closed form, in plain PyTorch: the backend wherever Triton is not.

Notation, for one row of C classes: a, b the row's and its partner's logits, d = a - b, x = b + λd the mixed
logits, t the mixed target mass with sum S, p = softmax(x). Then

    ℓ = -⟨t, log p⟩      g = ∂ℓ/∂x = S p - t      ∇λ = ⟨g, d⟩      η = λ' - λ
    δ = ℓ(λ') - ℓ(λ) = S log1p(Σ_c p_c expm1(η d_c)) - η⟨t, d⟩ = S (log1p(·) - η⟨p, d⟩) + η∇λ

kernels/README.md derives them. A class whose logit is -inf in either row is excluded from the pair: it stays
-inf, d is 0 there, and no gradient reaches it unless it carries target mass, when the loss is +inf.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastamp.policy import Policy

LOG_FLOOR = -100.0  # nn.BCELoss clamps both of its logarithms here


class Target(NamedTuple):
    """The mixed target of every row."""

    on: Tensor  # (B, C) class-weighted target mass t
    off: Tensor | None  # (B, C) class-weighted mass of "not this class"; softmax_bce only
    total: Tensor | None  # (B,) S = Σ_c t_c; None stands for 1


class Rows(NamedTuple):
    """What AMP made of every row."""

    loss: Tensor  # (B,) the selected loss
    lam: Tensor  # (B,) the selected coefficient λ*
    grad_mixed: Tensor | None  # (B, C) g at λ*; None where no gradient is needed
    lam_adv: Tensor  # (B,)
    grad: Tensor  # (B,)
    delta: Tensor  # (B,)
    mask: Tensor  # (B,) bool


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_mass(target: Tensor, lam: Tensor, partner: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """(B,) kept, class-weighted mass λ_r w(y_r) + (1-λ_r) w(y_π(r)) of each row; 1 for soft targets."""
    if target.is_floating_point():
        return torch.ones_like(lam)
    kept = target != ignore_index
    mass = kept.to(lam.dtype)
    if weight is not None:
        mass = mass * weight.to(lam.dtype)[torch.where(kept, target, 0)]
    return torch.lerp(mass.index_select(0, partner), mass, lam)


def mixed_target(
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    num_classes: int,
    weight: Tensor | None,
    policy: Policy,
    *,
    all_kept: bool,
) -> Target:
    """The mixed target mass of every row; `all_kept` promises that no label equals ignore_index."""
    lam = lam.unsqueeze(1)
    smoothing = policy.label_smoothing
    kept = None
    if target.is_floating_point():
        on = torch.lerp(target.index_select(0, partner).to(lam.dtype), target.to(lam.dtype), lam)
    else:
        label, label_mass, other_mass = target.unsqueeze(1), lam, lam.neg().add_(1)  # faster than 1 - lam
        if not all_kept:
            is_kept = label != policy.ignore_index
            label = torch.where(is_kept, label, 0)
            label_mass, other_mass = label_mass * is_kept, other_mass * is_kept.index_select(0, partner)
            kept = label_mass + other_mass
        other_label = label.index_select(0, partner)
        if torch.compiler.is_compiling():  # comparisons fuse; scatters do not
            classes = torch.arange(num_classes, device=target.device)
            on = torch.where(label == classes, label_mass, 0) + torch.where(other_label == classes, other_mass, 0)
        else:
            on = lam.new_zeros(target.shape[0], num_classes).scatter_(1, label, label_mass)
            on.scatter_add_(1, other_label, other_mass)
    if smoothing > 0:
        uniform = smoothing / num_classes
        on = (1 - smoothing) * on + (uniform if kept is None else uniform * kept)
    off = None
    if policy.loss == "softmax_bce":
        off = (1 if kept is None else kept) - on
        off = off if weight is None else off * weight.to(lam.dtype)
    if weight is not None:
        on = on * weight.to(lam.dtype)
    plain = kept is None and weight is None and not target.is_floating_point()
    return Target(on, off, None if plain else on.sum(1))


def loss_and_grad(x: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """(B,) losses of mixed logits x (B, C) and their gradients (B, C), by the loss that `target` was made for."""
    if target.off is not None:
        return _softmax_bce(x, target.on, target.off)
    logp = x.log_softmax(1)
    p = logp.exp()
    loss = -torch.where(target.on != 0, target.on * logp, 0).sum(1)
    return loss, (p if target.total is None else target.total.unsqueeze(1) * p) - target.on


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


def step_lam(lam: Tensor, grad: Tensor, policy: Policy) -> Tensor:
    """λ' = λ + ε·clip(∇λ), shape and dtype of `lam`."""
    if policy.mode == "mixup":
        return lam
    if policy.grad_clip is not None:
        grad = grad.clamp(-policy.grad_clip, policy.grad_clip)
    lam_adv = torch.add(lam, grad, alpha=policy.step_size)
    return lam_adv.clamp(0, 1) if policy.clamp else lam_adv


def select(loss: Tensor, delta: Tensor, policy: Policy, ties: tuple[float, float] | None = None) -> Tensor:
    """(B,) bool: which rows take the loss at λ' (Eq. 18-21, a difference below the tie tolerance included).

    `ties` is the (absolute, relative) tolerance; by default the policy's in the dtype of the loss.
    """
    if policy.mode != "amp":
        return torch.full_like(delta, policy.mode == "maxop", dtype=torch.bool)
    absolute, relative = policy.tie_bounds(loss.dtype) if ties is None else ties
    if absolute == 0 and relative == 0:
        return delta > 0
    return delta >= -(absolute + relative * loss.abs().clamp(min=1))


TAME_LOGIT = 32.0


def is_tame(low: float, high: float, policy: Policy) -> bool:
    """Whether logits in [low, high] are finite, lose no digits by mixing, and keep |η d| <= 1; False for NaN."""
    return -low <= TAME_LOGIT and high <= TAME_LOGIT and (high - low) * policy.lam_reach <= 1.0


def amp_rows(
    logits: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    policy: Policy,
    grad_divisor: Tensor | float,
    *,
    need_grad: bool,
    all_kept: bool,
    tame: bool,
) -> Rows:
    """AMP on logits (B, C); everything returned is in the compute dtype.

    `tame` promises small finite logits (see `is_tame`).
    """
    z = logits.to(lam.dtype)
    if tame:
        other = z.index_select(0, partner)
        d = z - other
        x = torch.addcmul(other, lam.unsqueeze(1), d)
    else:
        # A common offset of a row changes nothing in exact arithmetic, and costs digits in the mixture.
        z = z - z.amax(1, keepdim=True)
        other = z.index_select(0, partner)
        excluded = (z == -torch.inf) | (other == -torch.inf)
        d = (z - other).masked_fill(excluded, 0)
        x = (other + lam.unsqueeze(1) * d).masked_fill(excluded, -torch.inf)
    mixed = mixed_target(target, lam, partner, logits.shape[1], weight, policy, all_kept=all_kept)

    if policy.loss == "cross_entropy":
        rows = _cross_entropy_rows if not tame else _tame_cross_entropy_rows
        return rows(x, d, lam, mixed, policy, grad_divisor, need_grad)
    loss, g = loss_and_grad(x, mixed)
    grad = scaled_grad((g * d).sum(1), policy, grad_divisor)
    lam_adv = step_lam(lam, grad, policy)
    loss_adv, g_adv = loss_and_grad(x + (lam_adv - lam).unsqueeze(1) * d, mixed)
    return selected(loss, loss_adv - loss, lam, lam_adv, grad, g, g_adv, policy)


def _cross_entropy_rows(
    x: Tensor,
    d: Tensor,
    lam: Tensor,
    target: Target,
    policy: Policy,
    grad_divisor: Tensor | float,
    need_grad: bool,
) -> Rows:
    loss, g = loss_and_grad(x, target)
    grad = scaled_grad((g * d).sum(1), policy, grad_divisor)
    lam_adv = step_lam(lam, grad, policy)
    u = (lam_adv - lam).unsqueeze(1) * d
    delta = loss_change(x, u, target)
    g_adv = loss_and_grad(x + u, target)[1] if need_grad else None
    return selected(loss, delta, lam, lam_adv, grad, g, g_adv, policy)


def loss_change(x: Tensor, u: Tensor, target: Target) -> Tensor:
    """(B,) ℓ(x + u) - ℓ(x) of cross-entropy, without the cancellation of a difference."""
    logp = x.log_softmax(1)
    # Where some |u| is large expm1 may overflow, or p underflow, and there is no cancellation to avoid.
    near = u.abs().amax(1) <= 1
    near_change = torch.log1p((logp.exp() * torch.expm1(u.clamp(-1, 1))).sum(1))
    far_change = (logp + u).logsumexp(1)
    total = 1 if target.total is None else target.total
    return total * torch.where(near, near_change, far_change) - (target.on * u).sum(1)


def _tame_cross_entropy_rows(
    x: Tensor,
    d: Tensor,
    lam: Tensor,
    target: Target,
    policy: Policy,
    grad_divisor: Tensor | float,
    need_grad: bool,
) -> Rows:
    """The same with no large |ηd|, no -inf and no NaN: the perturbed softmax follows from the first one."""
    logp = x.log_softmax(1)
    p = logp.exp()
    loss = (target.on * logp).sum(1).neg_()
    total = None if target.total is None else target.total.unsqueeze(1)
    g = (p if total is None else total * p) - target.on
    grad = scaled_grad((g * d).sum(1), policy, grad_divisor)
    if policy.mode == "mixup":
        zero = torch.zeros_like(lam)
        return Rows(loss, lam, g, lam, grad, zero, zero > 0)
    lam_adv = step_lam(lam, grad, policy)
    eta = lam_adv - lam
    gain = torch.expm1(eta.unsqueeze(1) * d).mul_(p)
    gain_sum = gain.sum(1)
    change = torch.log1p(gain_sum)
    if target.total is not None:
        change = change * target.total
    delta = change.sub_(eta * (target.on * d).sum(1))
    g_adv = None
    if need_grad:
        p_adv = p.add_(gain).div_((1 + gain_sum).unsqueeze(1))  # g does not share p's memory
        g_adv = (p_adv if total is None else total * p_adv).sub_(target.on)
    return selected(loss, delta, lam, lam_adv, grad, g, g_adv, policy)


def tame_total(
    logits: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    policy: Policy,
    grad_divisor: Tensor | float,
    *,
    need_grad: bool,
    all_kept: bool,
    return_stats: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """The negative of the summed loss, and the loss's complete gradient, in the fewest operations.

    Where MinOp never rejects only the loss at λ' is needed, and of the pass at λ only its softmax. For tame
    cross-entropy. The statistics, λ', ∇λ, δ and the mask, are made on request, beside the loss and not on its way: it
    has the same bits without them.
    """
    x = logits.to(lam.dtype)
    other = x.index_select(0, partner)
    d = x - other
    column = lam.unsqueeze(1)
    p = None
    if policy.mode != "mixup" or return_stats:
        p = torch.addcmul(other, column, d).softmax(1)
    on, _, total = mixed_target(target, lam, partner, logits.shape[1], weight, policy, all_kept=all_kept)
    stats: tuple[Tensor, ...] = ()
    if p is not None:
        softmax = p.clone() if return_stats else p
        p = p if total is None else p.mul_(total.unsqueeze(1))
        slope = scaled_grad(p.sub_(on).mul_(d).sum(1, keepdim=True), policy, grad_divisor)
        column = step_lam(column, slope, policy)
        if return_stats:
            u = (column - lam.unsqueeze(1)) * d
            change = torch.log1p(softmax.mul_(torch.expm1(u)).sum(1))
            delta = (change if total is None else total * change) - (on * u).sum(1)
            took = torch.full_like(lam, policy.mode != "mixup", dtype=torch.bool)
            stats = (column.squeeze(1), slope.squeeze(1), delta, took)
        del softmax
    # Of many classes each of these is large: what has served goes before the next is made.
    del p
    x = other.addcmul_(column, d)
    del other, d
    logp = x.log_softmax(1)
    del x
    negative_loss = (on * logp).sum()
    if not need_grad:
        return negative_loss, None, stats
    g = logp.exp_()
    g = (g if total is None else g.mul_(total.unsqueeze(1))).sub_(on)
    del on
    own = g * column
    return negative_loss, own.index_add_(0, partner, g.sub_(own)), stats


def scaled_grad(grad: Tensor, policy: Policy, grad_divisor: Tensor | float) -> Tensor:
    """∇λ of the row's loss, or, under grad_scale="mean", of the batch mean."""
    if policy.grad_scale == "row":
        return grad
    if isinstance(grad_divisor, Tensor):  # nothing kept: no gradient either
        return torch.where(grad_divisor == 0, 0, grad / grad_divisor)
    return grad / grad_divisor


def selected(
    loss: Tensor,
    delta: Tensor,
    lam: Tensor,
    lam_adv: Tensor,
    grad: Tensor,
    g: Tensor,
    g_adv: Tensor | None,
    policy: Policy,
) -> Rows:
    """What MinOp makes of both losses and gradients (Eq. 18-21)."""
    if policy.mode == "mixup":
        delta = torch.zeros_like(delta)
    mask = select(loss, delta, policy)
    chosen = torch.where(mask, loss + delta, loss)
    g = g if g_adv is None else torch.where(mask.unsqueeze(1), g_adv, g)
    return Rows(chosen, torch.where(mask, lam_adv, lam), g, lam_adv, grad, delta, mask)


def scatter_roles(grad_mixed: Tensor, lam: Tensor, partner: Tensor, upstream: Tensor) -> Tensor:
    """Gradient of the unmixed rows: dz_r = u_r λ*_r g_r + u_q (1-λ*_q) g_q, where partner[q] = r.

    Args:
        grad_mixed: (B, ...) g.
        lam: (B,) λ*.
        partner: (B,) int64 permutation.
        upstream: () or (B,) gradient of each row's loss.
    """
    shape = (-1, *[1] * (grad_mixed.dim() - 1))
    own = upstream * lam
    grad = grad_mixed * own.view(shape)
    # One addend a row: the result does not depend on any order.
    return grad.index_add_(0, partner, grad_mixed * (upstream - own).view(shape))
