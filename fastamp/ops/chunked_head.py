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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp.autograd import once_differentiable
from fastamp.backend import takes_kernels
from fastamp.mixing import MixStats, Mixture
from fastamp.ops import amp_cross_entropy as on_logits
from fastamp.ops.rows import compute_dtype, scatter_roles
from fastamp.policy import Policy
from fastamp.reduction import Reduction, divided, known_to_keep_all

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
    """A linear head, and what stands between the mixture and it: logits = W (keep ∘ act(m)) + b."""

    hidden: Tensor  # (B, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)
    keep: Tensor | None = None  # (B, D) dropout mask, scaling included
    relu: bool = False  # whether act is ReLU or the identity

    @property
    def is_affine(self) -> bool:
        """Whether mixing its logits is mixing its input."""
        return self.keep is None and not self.relu

    @property
    def wanted(self) -> list[bool]:
        """Whether gradients to hidden, weight and bias will be asked for."""
        return [leaf is not None and leaf.requires_grad and torch.is_grad_enabled() for leaf in self[:3]]


class How(NamedTuple):
    """What a chunk's rows are computed by."""

    policy: Policy
    step_size: float
    grad_divisor: Tensor | None  # () divisor of ∇λ; None for the row's own
    chunk_rows: int
    dtype: torch.dtype  # of the products
    all_kept: bool  # promises that no label equals ignore_index


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


def automatic_rows(head: Head) -> int | None:
    """Rows of a chunk, or None where chunks would not save `SAVED_BYTES` of what is held at most."""
    hidden, wanted = head.hidden, head.wanted
    (batch, depth), classes = hidden.shape, len(head.weight)
    # Without a gradient the logits are alone.
    row_bytes = (1 + any(wanted)) * classes * product_dtype(hidden).itemsize
    sizes = (batch * depth, classes * depth, classes)
    summed = sum(size for size, need in zip(sizes, wanted, strict=True) if need)
    # Chunks sum gradients in the compute dtype, and have them beside those that backward returns; the whole way, these
    # take the place of the logits. Under autocast parameters are as wide as the sums.
    wide = compute_dtype(hidden.dtype).itemsize
    returned = wide if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype.itemsize
    rows = max(MIN_ROWS, max(CHUNK_BYTES, summed * wide // CHUNK_SHARE) // row_bytes)
    # A power of two suits the products; it counts the rows outside as well.
    rows = min(2 ** (rows.bit_length() - 1) - OUTSIDE, -(-batch // MIN_CHUNKS))
    held = summed * wide + max((rows + OUTSIDE) * row_bytes, summed * returned)
    return rows if batch * row_bytes >= held + SAVED_BYTES else None


def gradients_in_backward(dtype: torch.dtype, *, reduces: bool) -> bool:
    """Whether gradients have to wait for the upstream gradient, and logits to be made once more.

    The gradients of a row's roles differ by the factors of the rows. And a float16 gradient has to see its factor, a
    loss scale as a rule, before it is rounded.

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


def in_chunks(
    head: Head, mixture: Mixture, policy: Policy, step_size: float, reduction: Reduction, chunk_rows: int
) -> tuple[Tensor, MixStats]:
    """`linear_amp_cross_entropy` of an affine head, `chunk_rows` rows at a time; B >= 1.

    The gradients of a sum are made with it; those of the losses of rows in backward, from logits that are made once
    more: see `gradients_in_backward`.
    """
    dtype = product_dtype(head.hidden)
    mixture = mixture.computed_in(compute_dtype(dtype))
    divisor, _ = reduction.divisors(mixture, policy)
    grad_divisor = reduction.kernel_grad_divisor(mixture, policy)
    per_row = gradients_in_backward(dtype, reduces=reduction.kind != "none")
    policy = policy._replace(keeps_all=known_to_keep_all(mixture, policy, reduction))
    how = How(policy, step_size, grad_divisor, chunk_rows, dtype, reduction.all_kept)
    loss, *fields = _InChunks.apply(*head[:3], *mixture, how, head.wanted, per_row)
    if per_row and reduction.kind != "none":
        loss = loss.sum()
    return divided(loss, divisor), MixStats(mixture.lam, *fields)


class _InChunks(torch.autograd.Function):
    """Gradients are kept in the compute dtype, scaled out of place by backward, and rounded once."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, how, needs, per_row = arguments
        head, mixture = Head(*tensors[:3]), Mixture(*tensors[3:])
        ones = None if per_row or not any(needs) else mixture.lam.new_ones(()).expand(len(mixture.lam))
        fields, grads = _run(head, mixture, how, ones, needs)
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
            head, mixture = Head(*ctx.saved_tensors[:3]), Mixture(*ctx.saved_tensors[3:])
            grads = run(head, mixture, ctx.how, grad_loss, needs)[1]
            scaled = [None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        else:
            scaled = [
                _scaled(g, grad_loss, dtype) if need else None
                for g, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
            ]
        return (*scaled, *[None] * 7)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad·factor in `dtype`, rounded once."""
    out = torch.empty_like(grad, dtype=dtype)
    # Into a narrower dtype, a CPU first makes the product in that of the factors.
    rows = SLICE_CLASSES if grad.device.type == "cpu" else max(1, len(grad))
    for part, scaled in zip(grad.split(rows), out.split(rows), strict=True):
        torch.mul(part, factor, out=scaled)
    return out


def _run(
    head: Head, mixture: Mixture, how: How, upstream: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """All rows, chunk by chunk.

    Args:
        head: without activation and dropout.
        mixture: of all rows.
        how: the rest.
        upstream: (B,) gradient of each row's loss; None where no gradient is wanted.
        needs: which gradients are.

    Returns:
        (5, B): losses, λ', ∇λ, δ and the mask as numbers; and the gradients to hidden, weight and bias in the compute
        dtype, None where not wanted.
    """
    lam = mixture.lam
    grads = [
        lam.new_zeros(leaf.shape) if need and upstream is not None and leaf is not None else None
        for leaf, need in zip(head[:3], needs, strict=True)
    ]
    ordered, order = [], []
    with torch.autocast(head.hidden.device.type, enabled=False):
        weight = head.weight.to(how.dtype)
        bias = None if head.bias is None else head.bias.to(how.dtype)
        for chunk in chunks(mixture.partner, how.chunk_rows):
            hidden = head.hidden.index_select(0, chunk.rows).to(how.dtype)
            chunk_upstream = None
            if upstream is not None:
                chunk_upstream = lam.new_zeros(len(chunk.rows))
                chunk_upstream[: chunk.own] = upstream.index_select(0, chunk.rows[: chunk.own])
            target, part_lam = (tensor.index_select(0, chunk.rows) for tensor in (mixture.target, lam))
            part = Mixture(target, part_lam, chunk.partner, mixture.weight)
            fields, dlogits = _rows(F.linear(hidden, weight, bias), part, how, chunk.own, chunk_upstream)
            ordered.append(fields[:, : chunk.own])
            order.append(chunk.rows[: chunk.own])
            if dlogits is not None:
                _accumulate(grads, dlogits, hidden, weight, chunk.rows)
            del dlogits  # before the next chunk's logits
    fields = lam.new_empty(5, len(lam))
    return fields.index_copy_(1, torch.cat(order), torch.cat(ordered, 1)), grads


def _rows(
    logits: Tensor, mixture: Mixture, how: How, own: int, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(5, M) fields of a chunk's rows, and the gradient (M, C) to its logits, in their dtype."""
    policy = how.policy
    if takes_kernels(logits) and policy.loss != "softmax_bce":
        return _rows_by_kernel(logits, mixture, how, upstream)
    rows = on_logits.closed_form(
        logits, mixture, policy, how.step_size, how.grad_divisor,
        all_kept=how.all_kept, need_grad=upstream is not None,
    )  # fmt: skip
    dlogits = None
    if upstream is not None:
        # Exactly 0, also where a row outside is NaN, which its partner in this chunk need not be mixed with.
        grad_mixed, lam = rows.grad_mixed, rows.lam.clone()
        grad_mixed[own:].zero_()
        lam[own:].zero_()
        dlogits = scatter_roles(grad_mixed, lam, mixture.partner, upstream).to(logits.dtype)
    fields = (rows.loss, rows.lam_adv, rows.grad, rows.delta, rows.mask.to(rows.loss.dtype))
    return torch.stack(fields), dlogits


def _rows_by_kernel(
    logits: Tensor, mixture: Mixture, how: How, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from fastamp import kernels

    # The rows outside make a chunk's partners a permutation that need not be its own inverse.
    policy = how.policy._replace(pairing="permutation")
    rows = kernels.amp_cross_entropy_forward(
        logits, mixture, policy, how.step_size, how.grad_divisor, divisor=None, want_grad=False
    ).rows
    dlogits = None
    if upstream is not None:
        dlogits = kernels.amp_cross_entropy_backward(logits, mixture, policy, rows, None, upstream)
    fields = (kernels.LOSS, kernels.LAM_ADV, kernels.GRAD, kernels.DELTA, kernels.MASK)
    return torch.stack([rows[field] for field in fields]), dlogits


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
