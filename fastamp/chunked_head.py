"""AMP behind a linear head of many classes, some rows at a time: (B, C) logits and gradients are never held.

One product makes the logits of a chunk of unmixed rows, z = h Wᵀ + b; the row step of `amp_cross_entropy` makes their
gradient, and two more products take it to ∂h and ∂W, in the forward pass. With g_r the gradient to row r's mixed
logits, u_r the one of its loss, and π(q) = r, every row has two roles:

    dz_r = u_r λ*_r g_r + u_q (1-λ*_q) g_q      dh_r = Wᵀ dz_r      dW = Σ_r dz_r h_rᵀ      db = Σ_r dz_r

A role needs both rows' logits. Rows are therefore taken along the cycles of π, where the partner is the next row: of a
chunk only the last row's partner, and the first row of a cycle that an earlier chunk began, lie outside, and their
logits are made once more. dz is linear in the roles: each chunk adds what its own roles give to the rows it holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp import closed_form
from fastamp.autograd import once_differentiable
from fastamp.policy import Policy

# Chunks that save less are not made: it is no more than other activations of a training step take, and one product is
# the simpler and mostly the faster way.
SAVED_BYTES = 2**28
# Logits and gradient of one chunk (what the closed forms make besides is about five times as much): enough for an
# efficient product, or a part of what gradients in the compute dtype take anyway. Every chunk reads W and reads and
# writes dW: where these are large, a chunk must not be small. Which number of rows is the fastest on a GPU is open.
CHUNK_BYTES = 2**25
CHUNK_SHARE = 4
MIN_ROWS = 16
MIN_CHUNKS = 4  # but where rows do not divide by it
OUTSIDE = 2  # rows of a chunk that are only partners
SLICE_CLASSES = 1024  # at a time, where values of (C, D) are needed in a wider dtype only for a moment
# Before, torch.addmm with out_dtype takes only a sum in the dtype of the factors.
ADDS_WIDE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


class Head(NamedTuple):
    """The tensors of one call, checked."""

    hidden: Tensor  # (B, D)
    linear_weight: Tensor  # (C, D)
    linear_bias: Tensor | None  # (C,)
    target: Tensor  # (B,) int64 or (B, C)
    lam: Tensor  # (B,) compute dtype
    partner: Tensor  # (B,) int64
    weight: Tensor | None  # (C,)
    grad_divisor: Tensor | None  # () divisor of ∇λ; None for the row's own


class How(NamedTuple):
    """What else decides a call."""

    policy: Policy
    chunk_rows: int
    dtype: torch.dtype  # of the products
    by_triton: bool
    all_kept: bool  # promises that no label equals ignore_index
    never_rejects: bool  # promises that every row takes λ'


class Chunk(NamedTuple):
    """Rows whose roles are computed together, and the partners they need besides."""

    rows: Tensor  # (M,) int64: `own` rows, then those outside
    partner: Tensor  # (M,) int64: a permutation of 0..M-1, right for the own rows
    own: int


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that F.linear computes in, autocast taken into account."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def automatic_rows(hidden: Tensor, classes: int, needs: tuple[bool, bool, bool]) -> int | None:
    """Rows of a chunk, or None where chunks would not save `SAVED_BYTES` of what is held at most.

    Args:
        hidden: (B, D).
        classes: C.
        needs: whether gradients to hidden, linear_weight and linear_bias are wanted.
    """
    batch, depth = hidden.shape
    # Without a gradient the logits are alone.
    row_bytes = (1 + any(needs)) * classes * product_dtype(hidden).itemsize
    sizes = (batch * depth, classes * depth, classes)
    wanted = sum(size for size, need in zip(sizes, needs, strict=True) if need)
    # Chunks sum gradients in the compute dtype, and have them beside those that backward returns; the whole way, these
    # take the place of the logits. Under autocast parameters are as wide as the sums.
    wide = closed_form.compute_dtype(hidden.dtype).itemsize
    returned = wide if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype.itemsize
    rows = max(MIN_ROWS, max(CHUNK_BYTES, wanted * wide // CHUNK_SHARE) // row_bytes)
    # A power of two suits the products; it counts the rows outside, too.
    rows = min(2 ** (rows.bit_length() - 1) - OUTSIDE, -(-batch // MIN_CHUNKS))
    held = wanted * wide + max((rows + OUTSIDE) * row_bytes, wanted * returned)
    return rows if batch * row_bytes >= held + SAVED_BYTES else None


def gradients_in_backward(dtype: torch.dtype, *, reduces: bool) -> bool:
    """Whether gradients have to wait for the upstream gradient, and logits to be made once more.

    The gradients of a row's roles differ by the factors of the rows. And a float16 gradient has to see its factor, a
    loss scale mostly, before it is rounded.

    Args:
        dtype: of the products.
        reduces: whether the loss is a sum or a mean.
    """
    return not reduces or dtype == torch.float16


def cycle_order(partner: Tensor) -> tuple[Tensor, Tensor]:
    """Rows along the cycles of a permutation, without a look at its values: by pointer doubling.

    Args:
        partner: (B,) int64 permutation.

    Returns:
        The rows (B,) in an order in which the partner of each is the next one, but for the last row of a cycle, whose
        partner is the first; and of each row (B,) the first row of its cycle.
    """
    batch = len(partner)
    span = 2 * batch  # above any number of steps
    row = torch.arange(batch, device=partner.device)
    # The smallest row within the next `steps` rows of the cycle, and how many steps away it is, in one number.
    nearest, jump, steps = row * span, partner, 1
    while steps < batch:
        nearest = torch.minimum(nearest, nearest[jump] + steps)
        jump, steps = jump[jump], 2 * steps
    leader = nearest // span
    # The leader is the last of its cycle: nearest - leader·span steps from here.
    order = (2 * leader * span - nearest).argsort()
    return order, partner[leader]


def chunks(partner: Tensor, chunk_rows: int) -> list[Chunk]:
    """The batch in parts of `chunk_rows` own rows, the last one perhaps smaller. Only shapes are known to the host.

    Args:
        partner: (B,) int64 permutation.
        chunk_rows: at least 1.
    """
    batch = len(partner)
    if chunk_rows >= batch:
        return [Chunk(torch.arange(batch, device=partner.device), partner, batch)]
    order, first = cycle_order(partner)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(batch, device=order.device))
    place_of_partner = place[partner[order]]
    return [
        _chunk(order, first, partner, place_of_partner, start, min(start + chunk_rows, batch))
        for start in range(0, batch, chunk_rows)
    ]


def _chunk(order: Tensor, first: Tensor, partner: Tensor, place_of_partner: Tensor, start: int, stop: int) -> Chunk:
    own, count = order[start:stop], stop - start
    rows = torch.cat([own, partner[own[-1:]], first[own[:1]]])
    local = place_of_partner[start:stop] - start
    index = torch.arange(count, device=order.device)
    outside = (local < 0) | (local >= count)
    local = torch.where(outside, count + (index < count - 1), local)
    # The rows outside have roles of no effect here; any partners that complete the permutation will do.
    is_free = torch.ones(len(rows), dtype=torch.int8, device=order.device).index_fill_(0, local, 0)
    free = is_free.argsort(descending=True, stable=True)[:OUTSIDE]
    return Chunk(rows, torch.cat([local, free]), count)


def chunked_losses(
    head: Head, how: How, needs: tuple[bool, bool, bool], *, per_row: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of `linear_amp_cross_entropy` without activation and dropout, for B >= 1.

    Args:
        head: the tensors.
        how: the rest.
        needs: whether gradients to hidden, linear_weight and linear_bias will be asked for.
        per_row: whether losses (B,) or their sum () is wanted. The gradients of the sum are made with it; those of
            the losses in backward, from logits that are made once more: see `gradients_in_backward`.

    Returns:
        The loss, and (B,) λ', ∇λ, δ and the mask; all but the mask in the compute dtype.
    """
    loss, lam_adv, grad, delta, mask = _ChunkedLosses.apply(*head, how, needs, per_row)
    return loss, lam_adv, grad, delta, mask


class _ChunkedLosses(torch.autograd.Function):
    """Gradients are kept in the compute dtype, scaled out of place by backward, and rounded once."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, how, needs, per_row = arguments
        head = Head(*tensors)
        ones = None if per_row or not any(needs) else head.lam.new_ones(()).expand(len(head.lam))
        fields, grads = _run(head, how, ones, needs)
        ctx.how, ctx.per_row = how, per_row
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:3]]
        if any(needs):
            ctx.save_for_backward(*(tensors if per_row else grads))
        losses, lam_adv, grad, delta, takes = fields.unbind()
        mask = takes > 0
        ctx.mark_non_differentiable(lam_adv, grad, delta, mask)
        return losses.clone() if per_row else losses.sum(), lam_adv, grad, delta, mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        if ctx.per_row:
            # Compiled autograd would trace into it, and into the kernels.
            run = torch.compiler.disable(_run) if torch.compiler.is_compiling() else _run
            grads = run(Head(*ctx.saved_tensors), ctx.how, grad_loss, needs)[1]
            scaled = [None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        else:
            scaled = [
                _scaled(g, grad_loss, dtype) if need else None
                for g, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
            ]
        return (*scaled, *[None] * 8)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad·factor in `dtype`, rounded once."""
    out = torch.empty_like(grad, dtype=dtype)
    # Into a narrower dtype, a CPU first makes the product in that of the factors.
    rows = SLICE_CLASSES if grad.device.type == "cpu" else max(1, len(grad))
    for part, scaled in zip(grad.split(rows), out.split(rows), strict=True):
        torch.mul(part, factor, out=scaled)
    return out


def _run(
    head: Head, how: How, upstream: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """All rows, chunk by chunk.

    Args:
        head: the tensors.
        how: the rest.
        upstream: (B,) gradient of each row's loss; None where no gradient is wanted.
        needs: which gradients are.

    Returns:
        (5, B): losses, λ', ∇λ, δ and the mask as numbers; and the gradients to hidden, linear_weight and linear_bias in
        the compute dtype, None where not wanted.
    """
    leaves = head[:3]
    grads = [
        head.lam.new_zeros(leaf.shape) if need and upstream is not None and leaf is not None else None
        for leaf, need in zip(leaves, needs, strict=True)
    ]
    ordered, order = [], []
    with torch.autocast(head.hidden.device.type, enabled=False):
        linear_weight = head.linear_weight.to(how.dtype)
        linear_bias = None if head.linear_bias is None else head.linear_bias.to(how.dtype)
        for chunk in chunks(head.partner, how.chunk_rows):
            hidden = head.hidden.index_select(0, chunk.rows).to(how.dtype)
            chunk_upstream = None
            if upstream is not None:
                chunk_upstream = head.lam.new_zeros(len(chunk.rows))
                chunk_upstream[: chunk.own] = upstream.index_select(0, chunk.rows[: chunk.own])
            fields, dlogits = _rows(F.linear(hidden, linear_weight, linear_bias), head, how, chunk, chunk_upstream)
            ordered.append(fields[:, : chunk.own])
            order.append(chunk.rows[: chunk.own])
            if dlogits is not None:
                _accumulate(grads, dlogits, hidden, linear_weight, chunk.rows)
            del dlogits  # before the next chunk's logits
    fields = head.lam.new_empty(5, len(head.lam))
    return fields.index_copy_(1, torch.cat(order), torch.cat(ordered, 1)), grads


def _rows(logits: Tensor, head: Head, how: How, chunk: Chunk, upstream: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(5, M) fields of a chunk's rows, and the gradient (M, C) to its logits, in their dtype."""
    target = head.target.index_select(0, chunk.rows)
    lam = head.lam.index_select(0, chunk.rows)
    if how.by_triton:
        return _rows_by_kernel(logits, target, lam, head, how, chunk, upstream)
    rows = closed_form.amp_rows(
        logits,
        target,
        lam,
        chunk.partner,
        head.weight,
        how.policy,
        1.0 if head.grad_divisor is None else head.grad_divisor,
        need_grad=upstream is not None,
        all_kept=how.all_kept,
        tame=_is_tame(logits, how.policy),
    )
    dlogits = None
    if upstream is not None and rows.grad_mixed is not None:
        # Exactly 0, also where a row outside is NaN, which its partner in this chunk need not be mixed with.
        rows.grad_mixed[chunk.own :] = 0
        rows.lam[chunk.own :] = 0
        dlogits = closed_form.scatter_roles(rows.grad_mixed, rows.lam, chunk.partner, upstream).to(logits.dtype)
    fields = (rows.loss, rows.lam_adv, rows.grad, rows.delta, rows.mask.to(lam.dtype))
    return torch.stack(fields), dlogits


def _rows_by_kernel(
    logits: Tensor, target: Tensor, lam: Tensor, head: Head, how: How, chunk: Chunk, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from fastamp import kernels
    from fastamp.ops import row_policy

    # The rows outside make a chunk's partners a permutation that need not be its own inverse.
    policy = row_policy(how.policy, lam.dtype, never_rejects=how.never_rejects)._replace(matched=False)
    rows = kernels.amp_cross_entropy_forward(
        logits,
        target,
        lam,
        chunk.partner,
        head.weight,
        head.grad_divisor,
        policy=policy,
        step_size=how.policy.step_size,
        divisor=None,
        want_grad=False,
    ).rows
    dlogits = None
    if upstream is not None:
        dlogits = kernels.amp_cross_entropy_backward(
            logits, target, lam, chunk.partner, head.weight, rows, None, upstream, policy=policy
        )
    fields = (kernels.LOSS, kernels.LAM_ADV, kernels.GRAD, kernels.DELTA, kernels.MASK)
    return torch.stack([rows[field] for field in fields]), dlogits


def _is_tame(logits: Tensor, policy: Policy) -> bool:
    if logits.device.type != "cpu":
        return False
    low, high = torch.aminmax(logits)
    return closed_form.is_tame(low.item(), high.item(), policy)


def _accumulate(
    grads: list[Tensor | None], dlogits: Tensor, hidden: Tensor, linear_weight: Tensor, rows: Tensor
) -> None:
    """Add what a chunk gives to the gradients, which are in the compute dtype."""
    grad_hidden, grad_weight, grad_bias = grads
    wide = _has_wide_products(dlogits)
    # Elsewhere the factors are widened: a sum of half products may leave the range of float16.
    step = SLICE_CLASSES if dlogits.dtype.itemsize == 2 else dlogits.shape[1]
    if grad_hidden is not None:
        if wide:
            grad_rows = torch.mm(dlogits, linear_weight, out_dtype=torch.float32)
        else:
            grad_rows = grad_hidden.new_zeros(hidden.shape)
            for part, weight in zip(dlogits.split(step, 1), linear_weight.split(step), strict=True):
                grad_rows.addmm_(part.to(grad_rows.dtype), weight.to(grad_rows.dtype))
        # A row that is here twice has one addend that is not 0: the result does not depend on their order.
        grad_hidden.index_add_(0, rows, grad_rows)
    if grad_weight is not None:
        if wide and ADDS_WIDE:
            torch.addmm(grad_weight, dlogits.mT, hidden, out_dtype=torch.float32, out=grad_weight)
        elif wide:
            grad_weight.add_(torch.mm(dlogits.mT, hidden, out_dtype=torch.float32))
        else:
            hidden = hidden.to(grad_weight.dtype)
            for part, total in zip(dlogits.split(step, 1), grad_weight.split(step), strict=True):
                total.addmm_(part.mT.to(total.dtype), hidden)
    if grad_bias is not None:
        grad_bias.add_(dlogits.sum(0, dtype=grad_bias.dtype))


def _has_wide_products(factor: Tensor) -> bool:
    """Whether products of half precision are summed in float32 and can be left so: by cuBLAS."""
    if factor.dtype.itemsize != 2 or not factor.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(factor.device) >= (8, 0)
