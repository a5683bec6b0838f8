"""One AMP step on checked arguments: which backend takes it, what it divides by, autograd of the closed forms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp import chunked_head, closed_form, closed_form_head
from fastamp.autograd import once_differentiable
from fastamp.backend import uses_triton
from fastamp.checks import labels_all_kept
from fastamp.mixing import MixStats
from fastamp.policy import Policy
from fastamp.reduction import divided, divisors, if_tensor, kernel_grad_divisor, reduced, upstream_of

SMALL_HEAD_CLASSES = 16


class HostFacts(NamedTuple):
    """What the host knows of the values in CPU tensors, at no cost worth naming."""

    all_kept: bool  # no label equals ignore_index
    tame: bool  # the logits are finite and small: see closed_form.is_tame


def host_facts(logits: Tensor, target: Tensor, policy: Policy) -> HostFacts:
    """Look at CPU tensors (elsewhere that would synchronise); ValueError for a label out of range."""
    all_kept = labels_facts(target, logits.shape[1], policy)
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or not logits.shape[0]:
        return HostFacts(all_kept, False)
    low, high = torch.aminmax(logits.detach())
    return HostFacts(all_kept, closed_form.is_tame(low.item(), high.item(), policy))


def labels_facts(target: Tensor, classes: int, policy: Policy) -> bool:
    """Whether it is known that no label is ignored; ValueError for a label of a CPU tensor that is out of range."""
    if target.is_floating_point():
        return True
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return labels_all_kept(target, classes, policy.ignore_index)


def never_rejects(
    policy: Policy, target: Tensor, weight: Tensor | None, num_items: float | Tensor | None, *, affine: bool = True
) -> bool:
    """Whether it is known beforehand that every row takes λ': by choice, or by convexity with rounding as a tie.

    ℓ = S·lse(x) - ⟨t, x⟩ is convex in λ where x is affine in λ and the target's mass S is not negative. Then
    δ >= η∇λ, which is not negative where η has the sign of ∇λ: where that is divided by no negative number.
    """
    if policy.mode != "amp":
        return policy.mode == "maxop"
    if policy.loss != "cross_entropy" or policy.tie_tol != "auto" or not affine:
        return False
    if policy.grad_scale == "mean" and isinstance(num_items, Tensor):
        return False
    return _not_negative(weight) and (not target.is_floating_point() or _not_negative(target))


def _not_negative(mass: Tensor | None) -> bool:
    """Whether no element is known to be negative: values are looked at on the CPU only."""
    if mass is None or not mass.numel():
        return True
    return mass.device.type == "cpu" and not torch.compiler.is_compiling() and mass.min().item() >= 0


def amp_cross_entropy_step(
    logits: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    policy: Policy,
    reduction: str,
    num_items: float | Tensor | None,
    facts: HostFacts,
    *,
    return_stats: bool,
) -> tuple[Tensor, MixStats | None]:
    """`amp_cross_entropy` for arguments that have been checked; the statistics where they are asked for, or free."""
    dtype = closed_form.compute_dtype(logits.dtype)
    lam = lam.detach().to(dtype) if lam.requires_grad or lam.dtype != dtype else lam
    if uses_triton(logits) and len(logits):
        from fastamp import ops

        return ops.amp_cross_entropy(
            logits,
            target,
            lam,
            partner,
            weight,
            policy,
            reduction,
            num_items,
            kernel_grad_divisor(target, lam, partner, weight, policy, num_items, facts.all_kept),
            never_rejects=never_rejects(policy, target, weight, num_items),
            return_stats=return_stats,
        )
    divisor, grad_divisor = divisors(target, lam, partner, weight, policy, reduction, num_items, facts.all_kept)
    need_grad = logits.requires_grad and torch.is_grad_enabled()  # inside a Function grad mode is always off
    if facts.tame and reduction != "none" and _needs_one_loss(policy, target, weight, num_items):
        loss, *stats = _TameTotal.apply(
            logits, target, lam, partner, weight, divisor, grad_divisor, policy, facts.all_kept, need_grad, return_stats
        )
        return loss, MixStats(lam, *stats) if return_stats else None
    loss, lam_adv, grad, delta, mask = _AmpCrossEntropy.apply(
        logits, target, lam, partner, weight, divisor, grad_divisor, policy, reduction, *facts, need_grad
    )
    return loss, MixStats(lam, lam_adv, grad, delta, mask)


def _needs_one_loss(policy: Policy, target: Tensor, weight: Tensor | None, num_items: float | Tensor | None) -> bool:
    if policy.loss != "cross_entropy":
        return False
    return policy.mode == "mixup" or never_rejects(policy, target, weight, num_items)


class _TameTotal(torch.autograd.Function):
    """`closed_form.tame_total`, divided; the saved gradient is scaled out of place."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        lam: Tensor,
        partner: Tensor,
        weight: Tensor | None,
        divisor: Tensor | float,
        grad_divisor: Tensor | float,
        policy: Policy,
        all_kept: bool,
        need_grad: bool,
        return_stats: bool,
    ) -> tuple[Tensor, ...]:
        negative_loss, grad, stats = closed_form.tame_total(
            logits,
            target,
            lam,
            partner,
            weight,
            policy,
            grad_divisor,
            need_grad=need_grad,
            all_kept=all_kept,
            return_stats=return_stats,
        )
        if stats:
            ctx.mark_non_differentiable(*stats)
            ctx.set_materialize_grads(False)
        if grad is not None:
            ctx.save_for_backward(grad, *if_tensor(divisor))
            ctx.divisor, ctx.dtype = divisor if isinstance(divisor, float) else None, logits.dtype
        return negative_loss.div_(-divisor), *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad, *divisor = ctx.saved_tensors
        upstream = upstream_of(grad_loss, *divisor or (ctx.divisor,))
        return ((grad * upstream).to(ctx.dtype), *[None] * 10)


class _AmpCrossEntropy(torch.autograd.Function):
    """The closed forms, with g kept for backward; nothing saved is ever written to."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        lam: Tensor,
        partner: Tensor,
        weight: Tensor | None,
        divisor: Tensor | float,
        grad_divisor: Tensor | float,
        policy: Policy,
        reduction: str,
        all_kept: bool,
        tame: bool,
        need_grad: bool,
    ) -> tuple[Tensor, ...]:
        rows = closed_form.amp_rows(
            logits,
            target,
            lam,
            partner,
            weight,
            policy,
            grad_divisor,
            need_grad=need_grad,
            all_kept=all_kept,
            tame=tame,
        )
        if need_grad:
            ctx.save_for_backward(rows.grad_mixed, rows.lam, partner, *if_tensor(divisor))
            ctx.divisor, ctx.dtype = divisor if isinstance(divisor, float) else None, logits.dtype
        ctx.mark_non_differentiable(rows.lam_adv, rows.grad, rows.delta, rows.mask)
        ctx.set_materialize_grads(False)
        return reduced(rows.loss, reduction, divisor), rows.lam_adv, rows.grad, rows.delta, rows.mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_mixed, lam, partner, *divisor = ctx.saved_tensors
        upstream = upstream_of(grad_loss, *divisor or (ctx.divisor,))
        grad = closed_form.scatter_roles(grad_mixed, lam, partner, upstream)
        return (grad.to(ctx.dtype), *[None] * 11)


def linear_step(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    relu: bool,
    keep: Tensor | None,
    weight: Tensor | None,
    policy: Policy,
    reduction: str,
    num_items: float | Tensor | None,
    *,
    chunk_rows: int | None,
    return_stats: bool,
) -> tuple[Tensor, MixStats | None]:
    """`linear_amp_cross_entropy` for arguments that have been checked."""
    by_kernel = False
    if uses_triton(hidden):
        from fastamp import ops

        by_kernel = ops.linear_head_fits(hidden, linear_weight, policy)
    affine = not relu and keep is None
    needs = (_wants_grad(hidden), _wants_grad(linear_weight), _wants_grad(linear_bias))
    # A graph stays whole unless chunks are asked for.
    if chunk_rows is None and affine and not by_kernel and not torch.compiler.is_compiling():
        chunk_rows = chunked_head.automatic_rows(hidden, len(linear_weight), needs)
    if chunk_rows is not None and len(hidden):
        tensors = (hidden, linear_weight, linear_bias, target, lam, partner, weight)
        step = _chunked_step
        if torch.compiler.is_compiling():
            # Here and not by a decorator: that imports the compiler, which is slow and imports Triton.
            step = torch.compiler.disable(step, reason="chunk_rows breaks the graph: leave it out for fullgraph=True")
        return step(*tensors, policy, reduction, num_items, chunk_rows, needs)
    # Where a product in half precision would cost digits and save little, it is done in float32.
    small_half = hidden.dtype.itemsize == 2 and len(linear_weight) <= SMALL_HEAD_CLASSES
    if not by_kernel and affine and not small_half:
        # Affine: mix the logits instead of the hidden rows.
        logits = F.linear(hidden, linear_weight, linear_bias)
        facts = host_facts(logits, target, policy)
        return amp_cross_entropy_step(
            logits,
            target,
            lam,
            partner,
            weight,
            policy,
            reduction,
            num_items,
            facts,
            return_stats=return_stats,
        )
    lam = lam.detach().to(closed_form.compute_dtype(hidden.dtype))
    all_kept = labels_facts(target, len(linear_weight), policy)
    if by_kernel:
        return ops.linear_amp_cross_entropy(
            hidden,
            linear_weight,
            linear_bias,
            target,
            lam,
            partner,
            relu,
            keep,
            weight,
            policy,
            reduction,
            num_items,
            kernel_grad_divisor(target, lam, partner, weight, policy, num_items, all_kept),
            never_rejects=never_rejects(policy, target, weight, num_items, affine=not relu),
            return_stats=return_stats,
        )
    divisor, grad_divisor = divisors(target, lam, partner, weight, policy, reduction, num_items, all_kept)
    loss, lam_adv, grad, delta, mask = _LinearAmpCrossEntropy.apply(
        hidden,
        linear_weight,
        linear_bias,
        target,
        lam,
        partner,
        relu,
        keep,
        weight,
        divisor,
        grad_divisor,
        policy,
        reduction,
        all_kept,
    )
    return loss, MixStats(lam, lam_adv, grad, delta, mask)


def _wants_grad(leaf: Tensor | None) -> bool:
    return leaf is not None and leaf.requires_grad and torch.is_grad_enabled()


def _chunked_step(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    policy: Policy,
    reduction: str,
    num_items: float | Tensor | None,
    chunk_rows: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, MixStats]:
    """An affine head, `chunk_rows` rows at a time; B >= 1."""
    dtype = chunked_head.product_dtype(hidden)
    lam = lam.detach().to(closed_form.compute_dtype(dtype))
    all_kept = labels_facts(target, len(linear_weight), policy)
    divisor, _ = divisors(target, lam, partner, weight, policy, reduction, num_items, all_kept)
    grad_divisor = kernel_grad_divisor(target, lam, partner, weight, policy, num_items, all_kept)
    per_row = chunked_head.gradients_in_backward(dtype, reduces=reduction != "none")
    loss, lam_adv, grad, delta, mask = chunked_head.chunked_losses(
        chunked_head.Head(hidden, linear_weight, linear_bias, target, lam, partner, weight, grad_divisor),
        chunked_head.How(
            policy,
            chunk_rows,
            dtype,
            uses_triton(hidden),
            all_kept,
            never_rejects(policy, target, weight, num_items),
        ),
        needs,
        per_row=per_row,
    )
    if per_row and reduction != "none":
        loss = loss.sum()
    return divided(loss, divisor), MixStats(lam, lam_adv, grad, delta, mask)


class _LinearAmpCrossEntropy(torch.autograd.Function):
    """`closed_form_head.linear_amp_rows`, with the selected pass kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        lam: Tensor,
        partner: Tensor,
        relu: bool,
        keep: Tensor | None,
        weight: Tensor | None,
        divisor: Tensor | float,
        grad_divisor: Tensor | float,
        policy: Policy,
        reduction: str,
        all_kept: bool,
    ) -> tuple[Tensor, ...]:
        dtype = lam.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            rows, head_input, grad_m = closed_form_head.linear_amp_rows(
                hidden.to(dtype),
                linear_weight.to(dtype),
                None if linear_bias is None else linear_bias.to(dtype),
                target,
                lam,
                partner,
                weight,
                policy,
                grad_divisor,
                relu=relu,
                keep=None if keep is None else keep.to(dtype),
                all_kept=all_kept,
            )
        ctx.save_for_backward(rows.grad_mixed, grad_m, head_input, rows.lam, partner, *if_tensor(divisor))
        ctx.divisor = divisor if isinstance(divisor, float) else None
        ctx.dtypes = hidden.dtype, linear_weight.dtype, None if linear_bias is None else linear_bias.dtype
        ctx.mark_non_differentiable(rows.lam_adv, rows.grad, rows.delta, rows.mask)
        ctx.set_materialize_grads(False)
        return reduced(rows.loss, reduction, divisor), rows.lam_adv, rows.grad, rows.delta, rows.mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        g, grad_m, head_input, lam, partner, *divisor = ctx.saved_tensors
        upstream = upstream_of(grad_loss, *divisor or (ctx.divisor,))
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_hidden = grad_weight = grad_bias = None
        with torch.autocast(g.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_hidden = closed_form.scatter_roles(grad_m, lam, partner, upstream).to(hidden_dtype)
            weighted = g * (upstream[:, None] if upstream.dim() else upstream)
            if ctx.needs_input_grad[1]:
                grad_weight = (weighted.mT @ head_input).to(weight_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = weighted.sum(0).to(bias_dtype)
        return (grad_hidden, grad_weight, grad_bias, *[None] * 11)
