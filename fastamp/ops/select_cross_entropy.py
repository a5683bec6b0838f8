"""select_cross_entropy: the losses of the rows mixed at λ and at λ', and the larger of the two (Eq. 13, 18-21)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastamp.autograd import once_differentiable
from fastamp.backend import takes_kernels
from fastamp.checks import (
    all_kept,
    check_device,
    check_float_rows,
    check_logits,
    checked_class_weights,
    checked_mix,
    checked_target,
)
from fastamp.mixing import Mixture
from fastamp.ops.operator import operator
from fastamp.ops.rows import compute_dtype, loss_and_grad, loss_change, mixed_target, select
from fastamp.policy import Loss, Mode, Policy, checked_policy

Ties = tuple[float, float]


def select_loss(loss: Tensor, loss_adv: Tensor, *, tie_tol: float | str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Keep ℓ' where ℓ' - ℓ > 0, else ℓ (MinOp, Eq. 18-21); a difference below the tie tolerance takes ℓ'.

    Args:
        loss: (B,) ℓ, the losses at λ.
        loss_adv: (B,) ℓ', the losses at λ'.
        tie_tol: "auto" (4 ulp of the loss in its dtype), or an absolute tolerance; 0.0 is Eq. 21 to the letter.

    Returns:
        The selected losses (B,), differentiable; δ = ℓ' - ℓ (B,) and the mask (B,) of rows that took ℓ', detached.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices.
    """
    policy = checked_policy(tie_tol=tie_tol)
    check_float_rows("loss", loss, dims=1)
    check_float_rows("loss_adv", loss_adv, dims=1)
    if loss_adv.shape != loss.shape:
        raise ValueError(f"loss_adv must have loss's shape {tuple(loss.shape)}, got {tuple(loss_adv.shape)}")
    check_device("loss_adv", loss_adv, loss.device)
    delta = (loss_adv - loss).detach()
    mask = select(loss.detach(), delta, policy, policy.tie_bounds(loss.dtype))
    return torch.where(mask, loss_adv, loss), delta, mask


def select_cross_entropy(
    logits: Tensor,
    logits_adv: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    loss: Loss = "cross_entropy",
    tie_tol: float | str = "auto",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mode: Mode = "amp",
    sum_classes: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of the rows mixed at λ and at λ', and the larger of the two (Eq. 13, 18-21), in one pass.

    ℓ_r = λ_r CE(logits_r, y_r) + (1-λ_r) CE(logits_r, y_π(r)), and ℓ'_r with the same λ_r of logits_adv;
    δ_r = ℓ'_r - ℓ_r, ℓ'_r kept where δ_r > 0 or a tie. Where no logit moved by more than 1, δ is computed from the
    change of the logits, without the cancellation that a difference of losses has.

    Args:
        logits: (B, C) float16/bfloat16/float32/float64, any strides, of the rows mixed at λ.
        logits_adv: (B, C) of the rows mixed at λ', of the same dtype.
        target: (B,) int64 or uint8 class indices or (B, C) floating-point probabilities, of the unmixed rows.
        lam: (B,) λ, floating point in [0, 1], or () for all rows alike.
        partner: (B,) int64, a permutation of 0..B-1.
        weight: (C,) class weights, as nn.CrossEntropyLoss has them.
        pos_weight: (C,) weights of the positive side, as nn.BCEWithLogitsLoss has them; "binary_cross_entropy" only.
        loss: "cross_entropy", "binary_cross_entropy" (the mean over classes) or "softmax_bce".
        tie_tol: "auto" (4 ulp of the loss in the logits' dtype), or an absolute tolerance; 0.0 is Eq. 21 to the
            letter.
        ignore_index: a class index whose side of the mixture contributes nothing; for "binary_cross_entropy" also an
            entry of a (B, C) target that does.
        label_smoothing: in [0, 1].
        mode: "amp"; "maxop" always keeps ℓ', "mixup" always ℓ.
        sum_classes: "binary_cross_entropy" is the sum over classes in place of the mean.

    Returns:
        The selected losses (B,), float32 (float64 for float64 logits), differentiable once, to whichever logits each
        row's loss was taken from; δ (B,) and the mask (B,) of rows that took ℓ', detached.

    Raises:
        TypeError, ValueError: wrong options, dtypes, shapes or devices; on the CPU also labels out of range and λ
            outside [0, 1]. On a GPU a label out of range stops the kernel by a device-side assertion.
    """
    policy = checked_policy(
        mode=mode,
        loss=loss,
        tie_tol=tie_tol,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        sum_classes=sum_classes,
    )
    check_logits("logits", logits)
    check_float_rows("logits_adv", logits_adv, dims=2)
    if logits_adv.shape != logits.shape or logits_adv.dtype != logits.dtype:
        raise ValueError(
            f"logits_adv must have logits' shape {tuple(logits.shape)} and dtype {logits.dtype}, "
            f"got {tuple(logits_adv.shape)} of {logits_adv.dtype}"
        )
    check_device("logits_adv", logits_adv, logits.device)
    target = checked_target(target, logits)
    lam = checked_mix(lam, partner, len(logits), logits.device)
    weight = checked_class_weights(weight, pos_weight, logits.shape[1], logits, loss)
    kept = all_kept(target, logits.shape[1], policy)
    mixture = Mixture(target, lam.detach().to(compute_dtype(logits.dtype)), partner, weight)
    rows = dispatch(logits, logits_adv, mixture, policy, policy.tie_bounds(logits.dtype), kept)
    return chosen_loss(rows, logits, logits_adv), rows.delta, rows.mask


class Selected(NamedTuple):
    """Row losses at λ and λ', the choice between them, and what backward needs; all detached."""

    loss: Tensor  # (B,) the selected loss
    delta: Tensor  # (B,) ℓ(λ') - ℓ(λ)
    mask: Tensor  # (B,) bool: rows that take ℓ(λ')
    grad: Tensor  # (B, C) ∂ℓ_r/∂logits_r at λ, of every row, selected or not
    grad_adv: Tensor | None  # (B, C) the same at λ'; None without logits_adv

    @property
    def grad_chosen(self) -> Tensor:
        """(B, C) the gradient of every row at its λ*."""
        assert self.grad_adv is not None
        return torch.where(self.mask[:, None], self.grad_adv, self.grad)


def dispatch(
    logits: Tensor, logits_adv: Tensor | None, mixture: Mixture, policy: Policy, ties: Ties, all_kept: bool
) -> Selected:
    """Losses of the rows mixed at λ and, if given, at λ', with the same mixed target, and Eq. 18-21 between them.

    Without `logits_adv` only the losses at λ and their gradient: δ is 0 and no row is masked.

    Args:
        logits: (B, C) of the rows mixed at λ.
        logits_adv: (B, C) of the rows mixed at λ', or None.
        mixture: λ of the compute dtype: the labels' coefficients.
        policy: for mode, loss, ignore_index and label_smoothing.
        ties: (absolute, relative): a row takes λ' where δ >= -(absolute + relative·max(1, |ℓ|)); (0, 0): where δ > 0.
        all_kept: promises that no label equals ignore_index.
    """
    with torch.no_grad():
        if takes_kernels(logits) and policy.loss != "softmax_bce":
            target, lam, partner, weight = mixture
            loss, delta, mask, grad, grad_adv = forward(
                logits.detach(),
                None if logits_adv is None else logits_adv.detach(),
                Mixture(target.detach(), lam, partner, weight if weight is None else weight.detach()),
                policy,
                *ties,
            )
            return Selected(loss, delta, mask, grad, None if logits_adv is None else grad_adv)
        return closed_form(logits, logits_adv, mixture, policy, ties, all_kept)


def closed_form(
    logits: Tensor, logits_adv: Tensor | None, mixture: Mixture, policy: Policy, ties: Ties, all_kept: bool
) -> Selected:
    """`dispatch` in plain PyTorch, for every loss."""
    x = _wide_logits(logits, mixture.lam.dtype, policy)
    target = mixed_target(mixture, x.shape[1], policy, all_kept=all_kept)
    loss, grad = loss_and_grad(x, target)
    if logits_adv is None:
        return Selected(loss, torch.zeros_like(loss), torch.zeros_like(loss, dtype=torch.bool), grad, None)
    x_adv = _wide_logits(logits_adv, mixture.lam.dtype, policy)
    loss_adv, grad_adv = loss_and_grad(x_adv, target)
    delta = loss_adv - loss
    if policy.loss != "softmax_bce":
        # From the change of the logits: the difference of two losses has lost digits that these still hold.
        u = torch.where((x == -torch.inf) & (x_adv == -torch.inf), 0, x_adv - x)
        delta = torch.where(u.abs().amax(1) <= 1, loss_change(x, u, target), delta)
    mask = select(loss, delta, policy, ties)
    return Selected(torch.where(mask, loss_adv, loss), delta, mask, grad, grad_adv)


def _wide_logits(logits: Tensor, dtype: torch.dtype, policy: Policy) -> Tensor:
    # softmax_bce takes several sums of exponentials: an offset common to a row would cost digits in each.
    x = logits.to(dtype)
    return x if policy.loss != "softmax_bce" else x - x.amax(1, keepdim=True)


def chosen_loss(rows: Selected, logits: Tensor, logits_adv: Tensor) -> Tensor:
    """(B,) the selected losses, each with the graph of the logits (B, C) that it was taken from."""
    at_lam, at_adv = with_graph(logits, rows.loss, rows.grad), with_graph(logits_adv, rows.loss, rows.grad_adv)
    return torch.where(rows.mask, at_adv, at_lam)


def with_graph(logits: Tensor, loss: Tensor, grad: Tensor | None) -> Tensor:
    """(B,) row losses that are known, with their known gradients (B, C), as a function of their logits (B, C)."""
    return _WithGraph.apply(logits, loss, grad)


class _WithGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        upstream = upstream.unsqueeze(1)
        # A row that is not asked for may have no finite gradient.
        return torch.where(upstream == 0, 0, grad * upstream).to(ctx.dtype), None, None


def _selected_like(
    logits: Tensor, logits_adv: Tensor | None, mixture: Mixture, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lam = mixture.lam
    grad = lam.new_empty(logits.shape)
    mask = torch.empty_like(lam, dtype=torch.bool)
    grad_adv = lam.new_empty(0) if logits_adv is None else torch.empty_like(grad)
    return torch.empty_like(lam), torch.empty_like(lam), mask, grad, grad_adv


@operator("fastamp::select_cross_entropy", _selected_like)
def forward(
    logits: Tensor, logits_adv: Tensor | None, mixture: Mixture, policy: Policy, tie_abs: float, tie_rel: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`dispatch` by a kernel, for cross-entropy."""
    from fastamp import kernels

    made = kernels.select_cross_entropy_forward(logits, logits_adv, mixture, policy, tie_abs, tie_rel)
    # An operator returns tensors: an empty one stands for none.
    grad_adv = mixture.lam.new_empty(0) if made.grad_adv is None else made.grad_adv
    return made.loss, made.delta, made.mask, made.grad, grad_adv
