"""The operations of a step at any layer, on checked arguments: mix, ∇λ and remix of hidden rows, selection by logits.

What `fastamp.functional` checks arguments for and `AMPLoss.step` composes. Each picks its backend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp import closed_form
from fastamp.autograd import in_torch_func, once_differentiable
from fastamp.backend import uses_triton
from fastamp.policy import Policy


class Selected(NamedTuple):
    """Row losses at λ and λ', the choice between them, and what backward needs; all detached."""

    loss: Tensor  # (B,) the selected loss
    delta: Tensor  # (B,) ℓ(λ') - ℓ(λ)
    mask: Tensor  # (B,) bool: rows that take ℓ(λ')
    grad: Tensor  # (B, C) ∂ℓ_r/∂logits_r at λ, of every row, selected or not
    grad_adv: Tensor | None  # (B, C) the same at λ'; None without logits_adv


def _takes_kernels(rows: Tensor) -> bool:
    return uses_triton(rows) and rows.numel() > 0 and not in_torch_func()


def mixed(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """λ_r h_r + (1-λ_r) h_π(r) of hidden's dtype (B, ...); differentiable to hidden, with λ a constant."""
    lam = lam.detach().to(closed_form.compute_dtype(hidden.dtype))
    if _takes_kernels(hidden):
        from fastamp import layer_ops

        return layer_ops.mixed(hidden, lam, partner)
    composed = torch.compiler.is_compiling() or in_torch_func()
    return (_mix if composed else _Mixed.apply)(hidden, lam, partner)


class _Mixed(torch.autograd.Function):
    """Keeps no rows for backward, and adds up the two roles of a row in the compute dtype there, too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
        ctx.save_for_backward(lam, partner)
        return _mix(hidden, lam, partner)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _mix_grad(upstream, *ctx.saved_tensors).to(upstream.dtype), None, None


def _mix(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    wide = hidden.to(lam.dtype)
    coefficient = lam.view(-1, *[1] * (hidden.dim() - 1))
    return torch.lerp(partner_rows(wide, partner), wide, coefficient).to(hidden.dtype)


def partner_rows(rows: Tensor, partner: Tensor) -> Tensor:
    """`rows[partner]` in the memory format of `rows`, which index_select, the faster one of contiguous rows, loses."""
    return rows.index_select(0, partner) if rows.is_contiguous() else rows[partner]


def _mix_grad(upstream: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """Gradient of the unmixed rows, of lam's dtype."""
    return closed_form.scatter_roles(upstream.to(lam.dtype), lam, partner, lam.new_ones(()))


def embedding_mixed(ids: Tensor, table: Tensor, lam: Tensor, partner: Tensor, padding_idx: int | None) -> Tensor:
    """λ_r E[ids_r] + (1-λ_r) E[ids_π(r)] of the table's dtype (B, T, D); differentiable to the table.

    Args:
        ids: (B, T) int64.
        table: (V, D) E.
        lam: (B,).
        partner: (B,) int64.
        padding_idx: an id in 0..V-1 whose row gets no gradient, or None.
    """
    lam = lam.detach().to(closed_form.compute_dtype(table.dtype))
    if _takes_kernels(table) and ids.numel():
        from fastamp import layer_ops

        return layer_ops.embedding_mixed(ids, table, lam, partner, padding_idx)
    if torch.compiler.is_compiling() or in_torch_func():
        return _mix(F.embedding(ids, table, padding_idx), lam, partner)
    return _EmbeddingMixed.apply(table, ids, lam, partner, padding_idx)


class _EmbeddingMixed(torch.autograd.Function):
    """Keeps no embedding for backward, and adds up everything that reaches a row of the table in the compute dtype."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, lam: Tensor, partner: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids, lam, partner)
        ctx.size, ctx.padding = table.shape[0], -1 if padding_idx is None else padding_idx
        return _mix(F.embedding(ids, table), lam, partner)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        ids, lam, partner = ctx.saved_tensors
        rows = _mix_grad(upstream, lam, partner)
        grad = torch.ops.aten.embedding_dense_backward(rows, ids, ctx.size, ctx.padding, False)
        return grad.to(upstream.dtype), *[None] * 4


def lambda_grad(grad_mixed: Tensor, hidden: Tensor, partner: Tensor) -> Tensor:
    """⟨∂ℓ_r/∂m_r, h_r - h_π(r)⟩, (B,) of the compute dtype, detached."""
    if _takes_kernels(hidden):
        from fastamp import layer_ops

        return layer_ops.lambda_grad(grad_mixed, hidden, partner)
    with torch.no_grad():
        dtype = closed_form.compute_dtype(hidden.dtype)
        wide = hidden.to(dtype)
        return (grad_mixed.to(dtype) * (wide - partner_rows(wide, partner))).unsqueeze(-1).flatten(1).sum(1)


def remixed(
    hidden: Tensor, grad_mixed: Tensor, lam: Tensor, partner: Tensor, policy: Policy, grad_divisor: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """∇λ (B,), λ' (B,), both detached, and the rows mixed at λ' (B, ...), differentiable to hidden.

    Args:
        hidden: (B, ...) the unmixed rows.
        grad_mixed: (B, ...) gradient of the summed row losses to the rows mixed at λ.
        lam: (B,) compute dtype.
        partner: (B,) int64.
        policy: for mode, grad_scale, step_size, grad_clip and clamp.
        grad_divisor: divides ∇λ under grad_scale="mean"; a number or a 0-d tensor. 0 makes ∇λ zero.
    """
    if _takes_kernels(hidden):
        from fastamp import layer_ops

        return layer_ops.remixed(hidden, grad_mixed, lam, partner, policy, grad_divisor)
    grad = closed_form.scaled_grad(lambda_grad(grad_mixed, hidden, partner), policy, grad_divisor)
    lam_adv = closed_form.step_lam(lam, grad, policy)
    return grad, lam_adv, mixed(hidden, lam_adv, partner)


def selected(
    logits: Tensor,
    logits_adv: Tensor | None,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    policy: Policy,
    ties: tuple[float, float],
    *,
    all_kept: bool,
) -> Selected:
    """Losses of the rows mixed at λ and, if given, at λ', with the same mixed target, and Eq. 18-21 between them.

    Without `logits_adv` only the losses at λ and their gradient: δ is 0 and no row is masked.

    Args:
        logits: (B, C) of the rows mixed at λ.
        logits_adv: (B, C) of the rows mixed at λ', or None.
        target: (B,) int64 or (B, C) floating point, of the unmixed rows.
        lam: (B,) compute dtype; the labels' coefficients.
        partner: (B,) int64.
        weight: (C,) class weights or None.
        policy: for mode, loss, ignore_index and label_smoothing.
        ties: (absolute, relative): a row takes λ' where δ >= -(absolute + relative·max(1, |ℓ|)); (0, 0): where δ > 0.
        all_kept: promises that no label equals ignore_index.
    """
    if _takes_kernels(logits):
        from fastamp import layer_ops

        return Selected(*layer_ops.selected(logits, logits_adv, target, lam, partner, weight, policy, ties))
    dtype = lam.dtype
    with torch.no_grad():
        x = _wide_logits(logits, dtype, policy)
        mixed_target = closed_form.mixed_target(target, lam, partner, x.shape[1], weight, policy, all_kept=all_kept)
        loss, grad = closed_form.loss_and_grad(x, mixed_target)
        if logits_adv is None:
            return Selected(loss, torch.zeros_like(loss), torch.zeros_like(loss, dtype=torch.bool), grad, None)
        x_adv = _wide_logits(logits_adv, dtype, policy)
        loss_adv, grad_adv = closed_form.loss_and_grad(x_adv, mixed_target)
        delta = loss_adv - loss
        if policy.loss == "cross_entropy":
            # From the change of the logits: the difference of two losses has lost digits that these still hold.
            u = torch.where((x == -torch.inf) & (x_adv == -torch.inf), 0, x_adv - x)
            near = u.abs().amax(1) <= 1
            change = torch.log1p((x.softmax(1) * torch.expm1(u.clamp(-1, 1))).sum(1))
            if mixed_target.total is not None:
                change = change * mixed_target.total
            delta = torch.where(near, change - (mixed_target.on * u).sum(1), delta)
        mask = closed_form.select(loss, delta, policy, ties)
        return Selected(torch.where(mask, loss_adv, loss), delta, mask, grad, grad_adv)


def selected_loss(
    logits: Tensor,
    logits_adv: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    policy: Policy,
    ties: tuple[float, float],
    *,
    all_kept: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, δ and mask of `selected`, the loss differentiable to both sets of logits; same arguments."""
    rows = selected(logits, logits_adv, target, lam, partner, weight, policy, ties, all_kept=all_kept)
    return chosen_loss(rows, logits, logits_adv), rows.delta, rows.mask


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


def _wide_logits(logits: Tensor, dtype: torch.dtype, policy: Policy) -> Tensor:
    # softmax_bce takes several sums of exponentials: an offset common to a row would cost digits in each.
    x = logits.to(dtype)
    return x if policy.loss == "cross_entropy" else x - x.amax(1, keepdim=True)
