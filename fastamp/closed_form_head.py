"""AMP before a linear head in closed form, in plain PyTorch: where mixing comes before an activation or dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp import closed_form
from fastamp.policy import Policy


def linear_amp_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    class_weight: Tensor | None,
    policy: Policy,
    grad_divisor: Tensor | float,
    *,
    relu: bool,
    keep: Tensor | None,
    all_kept: bool = False,
) -> tuple[closed_form.Rows, Tensor, Tensor]:
    """AMP before a linear head: logits = W (keep ∘ act(m)) + b with m the mixture of hidden rows.

    Args:
        hidden: (B, D) compute dtype.
        weight: (C, D) compute dtype.
        bias: (C,) compute dtype or None.
        target: as `amp_rows` takes it; lam, partner, class_weight, policy and grad_divisor too.
        lam: (B,).
        partner: (B,).
        class_weight: (C,) or None.
        policy: the options.
        grad_divisor: a number or a 0-d tensor.
        relu: whether act is ReLU or the identity.
        keep: (B, D) dropout mask, scaling included, or None.
        all_kept: promises that no label equals ignore_index.

    Returns:
        The rows (grad_mixed is the gradient to the logits), the head's input at λ* (B, D), and ∂ℓ/∂m (B, D).
    """
    mixed = closed_form.mixed_target(target, lam, partner, weight.shape[0], class_weight, policy, all_kept=all_kept)
    other = hidden.index_select(0, partner)
    d = hidden - other

    def at(coefficient: Tensor) -> tuple[Tensor, Tensor]:
        m = torch.addcmul(other, coefficient.unsqueeze(1), d)
        slope = (m > 0).to(m.dtype) if relu else torch.ones_like(m)
        return m, slope if keep is None else slope * keep

    m, slope = at(lam)
    head_input = m * slope
    x = F.linear(head_input, weight, bias)
    loss, g = closed_form.loss_and_grad(x, mixed)
    grad_m = (g @ weight) * slope
    grad = closed_form.scaled_grad((grad_m * d).sum(1), policy, grad_divisor)
    lam_adv = closed_form.step_lam(lam, grad, policy)
    m_adv, slope_adv = at(lam_adv)
    # Where the slope is that of λ the change of m is known without its rounding.
    step = torch.where(slope_adv == slope, (lam_adv - lam).unsqueeze(1) * d * slope, m_adv * slope_adv - head_input)
    u = F.linear(step, weight)
    loss_adv, g_adv = closed_form.loss_and_grad(x + u, mixed)
    delta = loss_adv - loss if policy.loss == "softmax_bce" else closed_form.loss_change(x, u, mixed)
    rows = closed_form.selected(loss, delta, lam, lam_adv, grad, g, g_adv, policy)
    took = rows.mask.unsqueeze(1)
    grad_m = torch.where(took, (g_adv @ weight) * slope_adv, grad_m)
    return rows, torch.where(took, head_input + step, head_input), grad_m
