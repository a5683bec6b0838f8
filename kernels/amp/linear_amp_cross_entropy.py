"""AMP before a small linear head, mixed before its activation and dropout: everything in one pass over the rows.

A program walks over a few rows with W and its share of dW in registers; a row's second role, as its predecessor's
partner, is recomputed rather than added into shared memory. The shares of dW and db are summed afterwards, in a
fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import SEARCH_ROWS, HeadConfig, cdiv, linear_head_config
from .launch import inverse_permutation, on_device_of
from .losses import loss_at, loss_change
from .rows import (
    ASSERTING,
    LOG2E,
    Problem,
    Role,
    partners,
    scaled_grad,
    step_lam,
    store_role,
    takes_adversarial,
    target_masses,
)
from .rows_few import role_at
from .rows_grad import total
from .tuning import batch_class, tuned

FIELDS = tl.constexpr(7)  # the first of the row fields: the rest serve the gradient of logits


@triton.jit
def _head(m, keep, w, bias, RELU: tl.constexpr):
    """The head's input a (1, BLOCK_D), its slope ∂a/∂m, and its logits x (BLOCK_C,) (17)."""
    slope = keep
    if RELU:
        slope = tl.where(m > 0, keep, 0.0)
    a = m * slope
    return a, slope, tl.sum(w * a, 1) + bias


@triton.jit
def _head_moved(m, m_adv, step, keep, RELU: tl.constexpr):
    """The head's input at λ' less that at λ, and its slope there; `step` is m' - m without its rounding."""
    slope = keep
    if RELU:
        slope = tl.where(m_adv > 0, keep, 0.0)
        step = tl.where((m > 0) & (m_adv > 0), step, tl.where(m_adv > 0, m_adv, 0.0) - tl.where(m > 0, m, 0.0))
    return keep * step, slope


@triton.jit
def _head_role(
    problem,  # of the hidden rows
    keep_ptr,
    row,  # int64
    other,  # int64, its partner
    w,  # (BLOCK_C, BLOCK_D)
    bias,  # (BLOCK_C,), -inf past the last class
    cols,  # (BLOCK_C,)
    depth,  # (1, BLOCK_D)
    D,
    policy: tl.constexpr,
    RELU: tl.constexpr,
):
    """The role of `row` mixed with `other`, g (BLOCK_C,), a at λ* and ∂ℓ/∂m (1, BLOCK_D) (17-19)."""
    inside = depth < D
    lam = tl.load(problem.lam_ptr + row)
    h = tl.load(problem.logits_ptr + row * problem.stride_zm + depth, mask=inside, other=0.0).to(lam.dtype)
    h_other = tl.load(problem.logits_ptr + other * problem.stride_zm + depth, mask=inside, other=0.0).to(lam.dtype)
    d = h - h_other
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + row * D + depth, mask=inside, other=0.0).to(lam.dtype)
    else:
        keep = tl.full(d.shape, 1.0, lam.dtype)
    on, total, share = target_masses(problem, lam, row, other, cols, policy)
    m = h_other + lam * d
    a, slope, x = _head(m, keep, w, bias, RELU)
    if not RELU:
        # Affine in λ: the step, δ and all follow from the logits, as in the row kernel (1-9).
        dx = tl.where(cols < problem.C, tl.sum(w * (keep * d), 1), 0.0)
        role, g = role_at(problem, x * LOG2E, dx * LOG2E, on, total, share, lam, 0.0, 0.0, policy)
        a = keep * (h_other + role.lam * d)
    else:
        loss, p, _ = loss_at(x * LOG2E, on, total, policy)
        g = total * p - on
        grad = scaled_grad(tl.sum(tl.sum(w * g[:, None], 0)[None, :] * slope * d), problem.grad_divisor_ptr)
        lam_adv = step_lam(lam, grad, problem.step_size, policy)
        delta = tl.full((), 0.0, lam.dtype)
        takes = takes_adversarial(loss, delta, policy)
        if policy.mode != "mixup":
            moved, slope_adv = _head_moved(m, h_other + lam_adv * d, (lam_adv - lam) * d, keep, RELU)
            u = tl.sum(w * moved, 1)
            loss_adv, p_adv, _ = loss_at((x + u) * LOG2E, on, total, policy)
            delta = loss_change(p, on, total, u, loss_adv - loss, policy)
            takes = takes_adversarial(loss, delta, policy)
            loss = tl.where(takes, loss_adv, loss)
            g = tl.where(takes, total * p_adv - on, g)
            a = tl.where(takes, a + moved, a)
            slope = tl.where(takes, slope_adv, slope)
        lam_sel = tl.where(takes, lam_adv, lam)
        role = Role(loss, share, lam_sel, lam_adv, grad, delta, takes, 0.0, 0.0, 0.0, 0.0, takes)
    return role, g, a, tl.sum(w * g[:, None], 0)[None, :] * slope


@triton.jit
def _linear_amp_cross_entropy_kernel(
    hidden_ptr,  # (B, D), last dimension contiguous
    weight_ptr,  # (C, D) contiguous
    bias_ptr,  # (C,) or None
    target_ptr,  # (B,) int64 or (B, C) floating point, contiguous
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    inverse_ptr,  # (B,) int64 with inverse[partner[r]] = r; None: it is partner, or looked for
    keep_ptr,  # (B, D) dropout mask, contiguous, or None
    class_weight_ptr,  # (C,) or None
    grad_divisor_ptr,  # () divisor of ∇λ or None
    upstream_ptr,  # () or (B,) gradient of each row's loss, compute dtype; None stands for 1
    rows_ptr,  # (7, B) compute dtype, or None
    dhidden_ptr,  # (B, D) contiguous, or None with the two below
    dweight_ptr,  # (programs, C, D) compute dtype: each program's share
    dbias_ptr,  # (programs, C) compute dtype
    B,
    C,
    D,
    stride_hm: tl.int64,
    stride_u: tl.int64,
    step_size: tl.float64,
    divisor: tl.float64,  # of the gradients
    policy: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,  # rows a program walks over
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Losses, ∇λ, λ', selection, and the gradients to h, W and b (17-21)."""
    problem = Problem(hidden_ptr, stride_hm, 1, target_ptr, class_weight_ptr, lam_ptr, grad_divisor_ptr, C, step_size)
    cols = tl.arange(0, BLOCK_C)
    # Rows lie as those of W do: a row of another shape would have to go through shared memory.
    depth = tl.arange(0, BLOCK_D)[None, :]
    inside = (cols[:, None] < C) & (depth < D)
    dtype = lam_ptr.dtype.element_ty
    w = tl.load(weight_ptr + cols[:, None] * D + depth, mask=inside, other=0.0).to(dtype)
    bias = tl.where(cols < C, 0.0, float("-inf")).to(dtype)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < C, other=float("-inf")).to(dtype)
    scale = tl.full((), divisor, dtype)
    dw = tl.zeros((BLOCK_C, BLOCK_D), dtype)
    db = tl.zeros((BLOCK_C,), dtype)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for step in range(0, ROWS):
        row = first + step
        ok = row < B
        row = tl.where(ok, row, B - 1)  # a row too many repeats the last one, and counts for nothing
        other, source = partners(partner_ptr, inverse_ptr if dhidden_ptr is not None else partner_ptr, row, B, policy)
        role, g, a, grad_m = _head_role(problem, keep_ptr, row, other, w, bias, cols, depth, D, policy, RELU)
        if rows_ptr is not None:
            store_role(rows_ptr, row, B, ok, role, FIELDS)
        if dhidden_ptr is not None:
            role_source, _, _, grad_m_source = _head_role(
                problem, keep_ptr, source, row, w, bias, cols, depth, D, policy, RELU
            )
            own = 1.0 / scale
            theirs = own
            if upstream_ptr is not None:
                own = tl.load(upstream_ptr + row * stride_u) / scale
                theirs = tl.load(upstream_ptr + source * stride_u) / scale
            dh = own * role.lam * grad_m + theirs * (1.0 - role_source.lam) * grad_m_source
            tl.store(
                dhidden_ptr + row * D + depth,
                dh.to(dhidden_ptr.dtype.element_ty),
                mask=(depth < D) & (depth >= tl.where(ok, 0, D)),
            )
            own = tl.where(ok, own, 0.0)
            db += own * g
            dw += (own * g)[:, None] * a
    if dhidden_ptr is not None:
        program = tl.program_id(0).to(tl.int64)
        tl.store(dweight_ptr + program * C * D + cols[:, None] * D + depth, dw, mask=inside)
        tl.store(dbias_ptr + program * C + cols, db, mask=cols < C)


class HeadLaunch(NamedTuple):
    """What `linear_amp_cross_entropy_launch` leaves."""

    rows: Any  # (7, B), or None
    loss: Tensor | None  # () reduced loss
    factor: Tensor | None  # () what the gradients are to be multiplied by, the upstream gradient apart
    # (B, D) of hidden's dtype, or the compute dtype for float16; (C, D) and (C,) of the compute dtype
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]


def linear_amp_cross_entropy_launch(
    head: Any,
    mixture: Any,
    policy: Any,
    step_size: float,
    grad_divisor: Tensor | None,
    *,
    divisor: float | None = None,
    upstream: Tensor | None = None,
    want_rows: bool = False,
    want_grad: bool = False,
) -> HeadLaunch:
    """Launch the head: as a forward (`want_rows`), as a backward for a given `upstream`, or as both at once.

    Args:
        head: hidden (B, D), B >= 1, weight (C, D), bias (C,) or None, dropout mask (B, D) with its scaling or None, and
            whether a ReLU stands between mixing and the head.
        mixture: target (B,) int64 or (B, C), λ (B,) compute dtype, partner (B,), class weight (C,) or None.
        policy: what to compile for.
        step_size: ε.
        grad_divisor: () compute dtype, or None.
        divisor: of the summed loss; 0 stands for the kept mass; None for no reduction.
        upstream: () or (B,) gradient of each row's loss, or None for 1.
        want_rows: write the rows' losses and scalars.
        want_grad: compute the gradients.
    """
    hidden, weight, bias, keep, relu = head
    target, lam, partner, class_weight = mixture
    batch, depth = hidden.shape
    classes = weight.shape[0]
    config = linear_head_config(batch, classes, depth, lam.element_size())
    if config is None:
        raise ValueError(f"a head of {classes} classes over {depth} features does not fit in registers")
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    partner = partner.contiguous()
    looked_for = policy.pairing == "matching" or batch <= SEARCH_ROWS
    inverse = inverse_permutation(partner) if want_grad and not looked_for else None
    assumed = 1.0 if divisor is None else divisor or float(batch)
    rows = lam.new_empty(FIELDS.value, batch) if want_rows else None
    dhidden = loss = factor = None
    if want_grad:
        # float16 is rounded after the upstream gradient, usually a loss scale, has been applied.
        wide = hidden.dtype == torch.float16
        dhidden = torch.empty(batch, depth, dtype=lam.dtype if wide else hidden.dtype, device=hidden.device)
        upstream = None if upstream is None else upstream.to(lam.dtype)
    weight, target, lam = weight.contiguous(), target.contiguous(), lam.contiguous()
    bias, keep, class_weight = (None if given is None else given.contiguous() for given in (bias, keep, class_weight))

    def launch(config: HeadConfig) -> tuple[Tensor | None, Tensor | None]:
        programs = cdiv(batch, config.rows)
        dweight = lam.new_empty(programs, classes, depth) if want_grad else None
        dbias = lam.new_empty(programs, classes) if want_grad else None
        _linear_amp_cross_entropy_kernel[(programs,)](
            hidden,
            weight,
            bias,
            target,
            lam,
            partner,
            inverse,
            keep,
            class_weight,
            grad_divisor,
            upstream,
            rows,
            dhidden,
            dweight,
            dbias,
            batch,
            classes,
            depth,
            hidden.stride(0),
            upstream.stride(0) if upstream is not None and upstream.dim() else 0,
            step_size,
            assumed,
            policy=policy,
            RELU=relu,
            ROWS=config.rows,
            BLOCK_C=config.block_c,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            **ASSERTING,
        )
        if dweight is None or dbias is None:
            return None, None
        return dweight.sum(0), dbias.sum(0)

    with on_device_of(hidden):
        dweight, dbias = tuned(
            "_linear_amp_cross_entropy_kernel",
            lambda: (
                hidden.dtype,
                policy.mangle(),
                relu,
                keep is not None,
                class_weight is not None,
                batch_class(batch),
                f"D={depth} C={classes}",
                hidden.device,
            ),
            config,
            ("rows", "num_warps"),
            launch,
        )
        if rows is not None and divisor is not None:
            loss, factor = lam.new_empty(()), lam.new_empty(())
            total(rows, loss, divisor, factor=factor, assumed=assumed)
    return HeadLaunch(rows, loss, factor, (dhidden, dweight, dbias))
