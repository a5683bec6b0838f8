"""Mixed word embeddings straight from the table, and the table's dense gradient (28, 29).

The gradient sorts the ids, so that the tokens that share a row of the table lie side by side as a run. Chunks of the
sorted tokens cut the runs into pieces; every piece is summed by one program. A run within one chunk is a whole sum;
the pieces of a longer one are summed by the program of the chunk that it begins in. No two programs write to the same
memory, and every sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Config, EmbeddingConfig, cdiv, embedding_grad_config, mix_config
from .launch import inverse_permutation, on_device_of
from .mix import mixed_tile, tile_mask, tile_of
from .rows import ASSERTING, OPTIONS
from .tuning import batch_class, tuned


@triton.jit
def _known(token_id, V):
    """Whether an id has a row in the table; stops the kernel if it has none."""
    known = (token_id >= 0) & (token_id < V)
    tl.device_assert(known, "id out of range")
    return known


@triton.jit
def _embedding_mix_kernel(
    ids_ptr,  # (B, T) int64, contiguous
    table_ptr,  # (V, D)
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    mixed_ptr,  # (B, T, D) contiguous
    tokens,  # B·T
    T,
    V,
    D,
    stride_ev: tl.int64,
    stride_ed,  # unlike the other without a type: 1 is then compiled in
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """λ_r E[id_rt] + (1-λ_r) E[id_π(r)t] for BLOCK_B tokens (28)."""
    token, cols, ok = tile_of(D, tokens, BLOCK_B, BLOCK_D)
    mask = tile_mask(ok, cols, D, BLOCK_B)
    row = token // T
    lam = tl.load(lam_ptr + row)
    id_a = tl.load(ids_ptr + token)
    id_b = tl.load(ids_ptr + tl.load(partner_ptr + row) * T + token % T)
    at = table_ptr + cols * stride_ed
    # An id out of range must not become a read out of range where assertions are off.
    a = tl.load(at + id_a * stride_ev, mask=mask & _known(id_a, V), other=0.0).to(lam.dtype)
    b = tl.load(at + id_b * stride_ev, mask=mask & _known(id_b, V), other=0.0).to(lam.dtype)
    tl.store(mixed_ptr + token * D + cols, mixed_tile(a, b, lam).to(mixed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _run_pieces_kernel(
    sorted_ptr,  # (tokens,) int64 ids in ascending order
    order_ptr,  # (tokens,) int64 position r·T + t of each
    upstream_ptr,  # (B, T, D) gradient of the mixed embeddings
    lam_ptr,  # (B,) compute dtype
    inverse_ptr,  # (B,) int64 q with partner[q[r]] = r
    dtable_ptr,  # (V, D) contiguous: gets the runs within one chunk
    pieces_ptr,  # (chunks, 2, D) compute dtype: gets the others' pieces, one from a chunk's start, one up to its end
    tokens,
    T,
    D,
    padding_idx,  # id without a gradient, or -1
    stride_ub: tl.int64,
    stride_ut: tl.int64,
    stride_ud,  # unlike the others without a type: 1 is then compiled in
    PIECE: tl.constexpr,  # tokens of a chunk
    ROWS: tl.constexpr,  # tokens that are summed at a time
    BLOCK_D: tl.constexpr,
):
    """The sum of one piece of a run of equal ids, if this program's token is the first of one (29)."""
    program = tl.program_id(0)
    first = (program % tokens).to(tl.int64)
    token_id = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    in_chunk = first % PIECE
    if ((in_chunk == 0) | (before != token_id)) & (token_id != padding_idx):
        cols = (program // tokens) * BLOCK_D + tl.arange(0, BLOCK_D)
        ahead = tl.arange(0, PIECE)
        inside = (in_chunk + ahead < PIECE) & (first + ahead < tokens)
        same = tl.load(sorted_ptr + first + ahead, mask=inside, other=-1) == token_id
        length = tl.sum(same.to(tl.int32), 0)
        dtype: tl.constexpr = lam_ptr.dtype.element_ty
        total = tl.zeros((BLOCK_D,), dtype)
        for start in range(0, length, ROWS):
            index = start + tl.arange(0, ROWS)
            token = tl.load(order_ptr + first + index, mask=index < length, other=0)
            row = token // T
            source = tl.load(inverse_ptr + row)
            own_share = tl.load(lam_ptr + row)[:, None]
            their_share = 1.0 - tl.load(lam_ptr + source)[:, None]
            at = upstream_ptr + (token % T * stride_ut)[:, None] + (cols.to(tl.int64) * stride_ud)[None, :]
            mask = (index < length)[:, None] & (cols < D)[None, :]
            own = tl.load(at + (row * stride_ub)[:, None], mask=mask, other=0.0).to(dtype)
            theirs = tl.load(at + (source * stride_ub)[:, None], mask=mask, other=0.0).to(dtype)
            total += tl.sum(own_share * own + their_share * theirs, 0)
        after = tl.load(sorted_ptr + first + length, mask=first + length < tokens, other=-1)
        if (before != token_id) & (after != token_id):
            tl.store(dtable_ptr + token_id * D + cols, total.to(dtable_ptr.dtype.element_ty), mask=cols < D)
        else:
            place = first // PIECE * 2 + tl.where(in_chunk == 0, 0, 1)
            tl.store(pieces_ptr + place * D + cols, total, mask=cols < D)


@triton.jit
def _long_runs_kernel(
    sorted_ptr,  # (tokens,) int64 ids in ascending order
    pieces_ptr,  # (chunks, 2, D) compute dtype, of `_run_pieces_kernel`
    dtable_ptr,  # (V, D) contiguous: gets the runs that no chunk holds whole
    tokens,
    chunks,
    D,
    padding_idx,  # id without a gradient, or -1
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,  # pieces that are summed at a time
    BLOCK_D: tl.constexpr,
):
    """The sum of the pieces of the run that begins in this chunk and ends in a later one, if there is one (29)."""
    program = tl.program_id(0)
    chunk = (program % chunks).to(tl.int64)
    first = chunk * PIECE
    last = first + PIECE - 1
    token_id = tl.load(sorted_ptr + last, mask=last < tokens, other=-1)
    after = tl.load(sorted_ptr + last + 1, mask=last + 1 < tokens, other=-2)
    start_id = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    begins_here = (start_id != token_id) | (before != token_id)
    if (token_id == after) & begins_here & (token_id != padding_idx):
        cols = (program // chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
        place = chunk * 2 + tl.where(start_id == token_id, 0, 1)
        total = tl.load(pieces_ptr + place * D + cols, mask=cols < D, other=0.0)
        behind = chunk + 1
        going = tl.full((), 1, tl.int32)
        while going > 0:
            index = behind + tl.arange(0, ROWS)
            starts = tl.load(sorted_ptr + index * PIECE, mask=index < chunks, other=-1)
            same = starts == token_id
            at = pieces_ptr + (index * 2 * D)[:, None] + cols[None, :]
            total += tl.sum(tl.load(at, mask=same[:, None] & (cols < D)[None, :], other=0.0), 0)
            going = (tl.sum(same.to(tl.int32), 0) == ROWS).to(tl.int32)
            behind += ROWS
        tl.store(dtable_ptr + token_id * D + cols, total.to(dtable_ptr.dtype.element_ty), mask=cols < D)


def embedding_mix_forward(ids: Tensor, table: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """(B, T, D) mixed embeddings, contiguous, of the table's dtype.

    Args:
        ids: (B, T) int64, not empty, in 0..V-1.
        table: (V, D), D >= 1, any strides.
        lam: (B,) compute dtype.
        partner: (B,) int64 permutation.
    """
    size, depth = table.shape
    mixed = torch.empty(*ids.shape, depth, dtype=table.dtype, device=table.device)
    ids, lam, partner = ids.contiguous(), lam.contiguous(), partner.contiguous()
    tokens = ids.numel()

    def launch(config: Config) -> Tensor:
        _embedding_mix_kernel[(cdiv(tokens, config.block_b) * cdiv(depth, config.block_c),)](
            ids,
            table,
            lam,
            partner,
            mixed,
            tokens,
            ids.shape[1],
            size,
            depth,
            *table.stride(),
            BLOCK_B=config.block_b,
            BLOCK_D=config.block_c,
            num_warps=config.num_warps,
            **ASSERTING,
        )
        return mixed

    config = mix_config(depth, table.element_size())
    with on_device_of(table):
        return tuned(
            "_embedding_mix_kernel",
            lambda: (table.dtype, batch_class(tokens), f"D={depth}", table.device),
            config,
            ("block_b", "block_c", "num_warps"),
            launch,
        )


def embedding_mix_backward(
    upstream: Tensor, ids: Tensor, lam: Tensor, partner: Tensor, size: int, padding_idx: int | None
) -> Tensor:
    """The gradient of the table (V, D), dense, contiguous and of upstream's dtype.

    Args:
        upstream: (B, T, D) gradient of the mixed embeddings, not empty, any strides.
        ids: (B, T) int64 in 0..V-1.
        lam: (B,) compute dtype.
        partner: (B,) int64 permutation.
        size: V.
        padding_idx: an id in 0..V-1 that gets no gradient, or None.
    """
    depth = upstream.shape[2]
    dtable = torch.zeros(size, depth, dtype=upstream.dtype, device=upstream.device)
    tokens = ids.numel()
    sorted_ids, order = ids.reshape(-1).sort(stable=True)
    lam, inverse = lam.contiguous(), inverse_permutation(partner)
    padding = -1 if padding_idx is None else padding_idx

    def launch(config: EmbeddingConfig) -> Tensor:
        chunks, blocks = cdiv(tokens, config.piece), cdiv(depth, config.block_d)
        pieces = torch.empty(chunks, 2, depth, dtype=lam.dtype, device=upstream.device)
        options = {
            "PIECE": config.piece,
            "ROWS": config.rows,
            "BLOCK_D": config.block_d,
            "num_warps": config.num_warps,
            **OPTIONS,
        }
        _run_pieces_kernel[(tokens * blocks,)](
            sorted_ids,
            order,
            upstream,
            lam,
            inverse,
            dtable,
            pieces,
            tokens,
            ids.shape[1],
            depth,
            padding,
            *upstream.stride(),
            **options,
        )
        if chunks > 1:
            _long_runs_kernel[(chunks * blocks,)](sorted_ids, pieces, dtable, tokens, chunks, depth, padding, **options)
        return dtable

    config = embedding_grad_config(depth, lam.element_size())
    with on_device_of(upstream):
        return tuned(
            "_run_pieces_kernel",
            lambda: (upstream.dtype, batch_class(tokens), f"D={depth}", upstream.device),
            config,
            ("block_d", "num_warps"),
            launch,
        )
