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
from fastamp.ops.rows import compute_dtype
from fastamp.policy import Policy
from fastamp.reduction import Reduction, divided, known_to_keep_all

# Chunks that save less are not made: it is no more than other activations of a training step take, and one product is
# simpler and usually faster. On a CPU the closed forms hold several tensors of the size of the logits, and chunks one.
SAVED_BYTES, SAVED_BYTES_CPU = 2**29, 2**26
# A chunk reads and writes the sum dW in float32, 8 bytes an element, and does 2 operations an element and row: an H100
# (700 TFLOP/s, 3.35 TB/s) takes as long for 840 rows as for the bytes. A CPU's products are slow below 64 rows.
MIN_ROWS, MIN_ROWS_CPU = 1024, 64
TILE_ROWS = 128  # of the products of a GPU
CLOSED_FORM = 6  # tensors of a batch's logits in the compute dtype that a CPU holds where it makes all at once
SLICE_BYTES = 2**20  # of a chunk's logits that a CPU makes losses of at a time: what these take fits its caches
OUTSIDE = 2  # rows of a chunk that are only partners
PAIR = 2  # rows of the longest cycle of a matching
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


class Chunks(NamedTuple):
    """Rows whose roles are computed together, and the partners they need besides: of all chunks, one after another."""

    rows: Tensor  # (M,) int64: of every chunk `outside` rows, then its own
    partner: Tensor  # (M,) int64, of every chunk a permutation of its 0..size-1, right for its own rows
    order: Tensor  # (B,) int64: the own rows alone
    size: int  # rows of a chunk; the last one is smaller where these do not suffice
    outside: int


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
    on_host = hidden.device.type == "cpu"
    wide = compute_dtype(hidden.dtype).itemsize
    # Without a gradient the logits are alone.
    row_bytes = (1 + any(wanted)) * classes * product_dtype(hidden).itemsize
    whole = batch * (CLOSED_FORM * classes * wide if on_host else row_bytes)
    sizes = (batch * depth, classes * depth, classes)
    summed = sum(size for size, need in zip(sizes, wanted, strict=True) if need)
    # Chunks sum gradients in the compute dtype, and have them beside those that backward returns; the whole way, these
    # take the place of the logits. Under autocast parameters are as wide as the sums.
    returned = wide if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype.itemsize
    # As few chunks as take no more than the returned gradients will, or as have rows enough; all alike.
    least, tile = (MIN_ROWS_CPU, 1) if on_host else (MIN_ROWS, TILE_ROWS)
    count = -(-batch // max(least, summed * returned // row_bytes))
    rows = max(least, -(-batch // count)) + OUTSIDE
    rows = -(-rows // tile) * tile
    held = summed * wide + max(rows * row_bytes, summed * returned)
    return rows - OUTSIDE if whole >= held + (SAVED_BYTES_CPU if on_host else SAVED_BYTES) else None


def gradients_in_backward(dtype: torch.dtype, *, reduces: bool) -> bool:
    """Whether gradients have to wait for the upstream gradient, and logits to be made once more.

    The gradients of a row's roles differ by the factors of the rows. And a float16 gradient has to see its factor, a
    loss scale as a rule, before it is rounded.

    Args:
        dtype: of the products.
        reduces: whether the loss is a sum or a mean.
    """
    return not reduces or dtype == torch.float16


def along_cycles(partner: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows along the cycles of a permutation, without a look at its values: by pointer doubling.

    Args:
        partner: (B,) int64 permutation.
        longest: no cycle has more rows.

    Returns:
        The rows (B,) in an order in which the partner of each is the next one, but for the last row of a cycle, whose
        partner is the first; and of each place (B,) in this order the place of its partner, and of its cycle's first.
    """
    batch = len(partner)
    span = 2 * batch  # above any number of steps
    row = torch.arange(batch, device=partner.device)
    # The smallest row within the next `steps` rows of the cycle, and how many steps away it is, in one number.
    nearest, jump, steps = row * span, partner, 1
    while steps < longest:
        nearest = torch.minimum(nearest, nearest[jump] + steps)
        steps *= 2
        jump = jump[jump] if steps < longest else jump
    leader = nearest // span
    # The leader is the last of its cycle: nearest - leader·span steps from here.
    order = (2 * leader * span - nearest).argsort()
    place = torch.empty_like(order).scatter_(0, order, row)
    return order, place[partner[order]], place[partner[leader[order]]]


def chunks(partner: Tensor, chunk_rows: int, longest: int | None = None) -> Chunks:
    """The batch in parts of `chunk_rows` own rows, the last one perhaps smaller. Only shapes are known to the host.

    Args:
        partner: (B,) int64 permutation.
        chunk_rows: at least 1.
        longest: no cycle has more rows; None for B.
    """
    batch = len(partner)
    if chunk_rows >= batch:
        every = torch.arange(batch, device=partner.device)
        return Chunks(every, partner, every, batch, 0)
    order, after, first = along_cycles(partner, longest or batch)
    # Places in the order, those of a chunk in a row (N, R); what fills up the last one is its own partner, and cut off.
    count = -(-batch // chunk_rows)
    place = torch.arange(count * chunk_rows, device=partner.device)
    after = torch.cat([after, place[batch:]])
    place = place.view(count, chunk_rows)
    start = place[:, :1]
    last = (start + (chunk_rows - 1)).clamp_(max=batch - 1)
    # Outside lie at most the partner of the last row, and the first row of a cycle that an earlier chunk began.
    outside = torch.cat([after[last], first[start]], 1)
    after = after.view(count, chunk_rows)
    inside = (after >= start) & (after < start + chunk_rows)
    local = torch.where(inside, after - start + OUTSIDE, place != last)
    # The rows outside have roles of no effect here; any partners that complete the permutation will do.
    is_free = torch.ones(count, chunk_rows + OUTSIDE, dtype=torch.int8, device=partner.device).scatter_(1, local, 0)
    free = is_free.argsort(dim=1, descending=True, stable=True)[:, :OUTSIDE]
    rows = order[torch.cat([outside, place.clamp(max=batch - 1)], 1)]
    total = batch + count * OUTSIDE
    rows, local = (values.view(-1)[:total] for values in (rows, torch.cat([free, local], 1)))
    return Chunks(rows, local, order, chunk_rows + OUTSIDE, OUTSIDE)


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
    made: list[Tensor] = []
    grads = [
        make(leaf.shape) if need and upstream is not None and leaf is not None else None
        for make, leaf, need in zip((lam.new_zeros, lam.new_empty, lam.new_zeros), head[:3], needs, strict=True)
    ]
    cut = chunks(mixture.partner, how.chunk_rows, PAIR if how.policy.pairing == "matching" else None)
    soft = mixture.target.is_floating_point()

    def parted(values: Tensor) -> tuple[Tensor, ...]:
        return values.index_select(0, cut.rows).split(cut.size)

    with torch.autocast(head.hidden.device.type, enabled=False):
        weight = head.weight.to(how.dtype)
        bias = None if head.bias is None else head.bias.to(how.dtype)
        columns = [cut.rows.split(cut.size), cut.partner.split(cut.size), parted(lam)]
        labels = columns[0] if soft else parted(mixture.target)
        ups = [None] * len(labels) if upstream is None else parted(upstream)
        for rows, partner, part_lam, label, up in zip(*columns, labels, ups, strict=True):
            hidden = head.hidden.index_select(0, rows).to(how.dtype)
            target = mixture.target.index_select(0, rows) if soft else label
            part = Mixture(target, part_lam, partner, mixture.weight)
            fields, dlogits = _rows(F.linear(hidden, weight, bias), part, how, cut.outside, up)
            if dlogits is not None:
                _accumulate(grads, dlogits, hidden, weight, rows, is_first=not made)
            made.append(fields)
            del dlogits  # before the next chunk's logits
    fields = torch.cat(made, 1)
    return fields.index_copy(1, cut.order, fields), grads


def _rows(
    logits: Tensor, mixture: Mixture, how: How, outside: int, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(5, M - outside) fields of a chunk's own rows, and the gradient (M, C) to its logits, in their dtype."""
    if upstream is not None:
        upstream = upstream.to(mixture.lam.dtype)
    if takes_kernels(logits) and how.policy.loss != "softmax_bce":
        return _rows_by_kernel(logits, mixture, how, outside, upstream)
    target, lam, partner, weight = mixture
    total, classes = logits.shape
    step = max(1, SLICE_BYTES // (classes * lam.element_size())) if logits.device.type == "cpu" else total
    dlogits = None if upstream is None else lam.new_zeros(logits.shape)
    made = []
    for start in range(outside, total, step):
        own = slice(start, min(start + step, total))
        others = partner[own]
        count = len(others)
        both = torch.cat([torch.arange(own.start, own.stop, device=partner.device), others])
        part = Mixture(
            target.index_select(0, both), lam[own], torch.arange(count, 2 * count, device=partner.device), weight
        )
        rows = on_logits.closed_form(
            logits.index_select(0, both), part, how.policy, how.step_size, how.grad_divisor,
            all_kept=how.all_kept, need_grad=upstream is not None,
        )  # fmt: skip
        made.append(torch.stack((rows.loss, rows.lam_adv, rows.grad, rows.delta, rows.mask.to(lam.dtype))))
        if dlogits is not None and upstream is not None:
            first = upstream[own] * rows.lam
            dlogits[own].addcmul_(rows.grad_mixed, first.unsqueeze(1))
            dlogits.index_add_(0, others, rows.grad_mixed.mul_((upstream[own] - first).unsqueeze(1)))
    return torch.cat(made, 1), None if dlogits is None else dlogits.to(logits.dtype)


def _rows_by_kernel(
    logits: Tensor, mixture: Mixture, how: How, outside: int, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from fastamp import kernels

    # The rows outside make a chunk's partners a permutation that need not be its own inverse.
    policy = how.policy._replace(pairing="permutation")
    rows = kernels.amp_cross_entropy_forward(
        logits, mixture, policy, how.step_size, how.grad_divisor, divisor=None, want_grad=False
    ).rows
    dlogits = None
    if upstream is not None:
        upstream[:outside].zero_()
        dlogits = kernels.amp_cross_entropy_backward(logits, mixture, policy, rows, None, upstream)
    fields = (kernels.LOSS, kernels.LAM_ADV, kernels.GRAD, kernels.DELTA, kernels.MASK)
    return torch.stack([rows[field, outside:] for field in fields]), dlogits


def _accumulate(
    grads: list[Tensor | None],
    dlogits: Tensor,
    hidden: Tensor,
    linear_weight: Tensor,
    rows: Tensor,
    *,
    is_first: bool,
) -> None:
    """Add what a chunk gives to the gradients, which are in the compute dtype; that of W the first one writes."""
    grad_hidden, grad_weight, grad_bias = grads
    wide = _has_wide_products(dlogits)
    beta = 0 if is_first else 1
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
            torch.addmm(grad_weight, dlogits.mT, hidden, beta=beta, out_dtype=torch.float32, out=grad_weight)
        elif wide:
            product = torch.mm(dlogits.mT, hidden, out_dtype=torch.float32)
            grad_weight.copy_(product) if is_first else grad_weight.add_(product)
        else:
            hidden = hidden.to(grad_weight.dtype)
            for part, total in zip(dlogits.split(step, 1), grad_weight.split(step), strict=True):
                total.addmm_(part.mT.to(total.dtype), hidden, beta=beta)
    if grad_bias is not None:
        grad_bias.add_(dlogits.sum(0, dtype=grad_bias.dtype))


def _has_wide_products(factor: Tensor) -> bool:
    """Whether products of half precision are summed in float32 and can be left so: by cuBLAS."""
    if factor.dtype.itemsize != 2 or not factor.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(factor.device) >= (8, 0)
