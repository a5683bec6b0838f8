"""Mixing rows of any hidden state, and the gradient of it: elementwise, one launch each (22, 23)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .config import Config, cdiv, mix_config
from .launch import as_matrix, empty_rows, inverse_permutation, memory_order, on_device_of
from .rows import OPTIONS
from .tuning import batch_class, tuned


@triton.jit
def tile_index(block_row, block_col, B, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row numbers (int64), column numbers and which rows exist, for one tile of a (B, C) matrix."""
    cols = block_col * BLOCK_C + tl.arange(0, BLOCK_C)
    if BLOCK_B == 1:
        row = block_row.to(tl.int64)
        return row, cols, row < B  # the grid is exact: every row exists
    else:
        index = (block_row.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
        # A row too many repeats the last one, and is not written.
        return tl.where(index < B, index, B - 1), cols[None, :], index < B


@triton.jit
def tile_mask(ok, cols, C, BLOCK_B: tl.constexpr):
    """Which elements of a tile exist."""
    if BLOCK_B == 1:
        return cols < C
    else:
        return ok & (cols < C)


@triton.jit
def load_rows(
    rows_ptr,  # (B, N)
    row,  # int64, per row
    cols,
    mask,
    stride_m,
    stride_n,
    dtype: tl.constexpr,
):
    """A tile of rows in `dtype`, 0 where the mask is off."""
    return tl.load(rows_ptr + row * stride_m + cols * stride_n, mask=mask, other=0.0).to(dtype)


@triton.jit
def mixed_tile(a, b, lam):
    """λa + (1-λ)b, exactly b where a equals it (22)."""
    return b + lam * (a - b)


@triton.jit
def tile_of(N, B, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column numbers of this program's tile, and which rows exist; all int64.

    Programs of the same columns follow each other, so that a row read as somebody's partner comes from the cache.
    """
    row_blocks = tl.cdiv(B, BLOCK_B)
    program = tl.program_id(0)
    return tile_index(program % row_blocks, (program // row_blocks).to(tl.int64), B, BLOCK_B, BLOCK_N)


@triton.jit
def _mix_kernel(
    hidden_ptr,  # (B, N)
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    mixed_ptr,  # (B, N) contiguous
    B,
    N,
    stride_hm: tl.int64,
    stride_hn,  # unlike the other without a type: 1 is then compiled in
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """m_r = λ_r h_r + (1-λ_r) h_π(r) (22)."""
    row, cols, ok = tile_of(N, B, BLOCK_B, BLOCK_N)
    mask = tile_mask(ok, cols, N, BLOCK_B)
    lam = tl.load(lam_ptr + row)
    a = load_rows(hidden_ptr, row, cols, mask, stride_hm, stride_hn, lam.dtype)
    b = load_rows(hidden_ptr, tl.load(partner_ptr + row), cols, mask, stride_hm, stride_hn, lam.dtype)
    tl.store(mixed_ptr + row * N + cols, mixed_tile(a, b, lam).to(mixed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mix_grad_kernel(
    upstream_ptr,  # (B, N) gradient of the mixed rows
    lam_ptr,  # (B,) compute dtype
    inverse_ptr,  # (B,) int64 q with partner[q[r]] = r
    dhidden_ptr,  # (B, N) contiguous
    B,
    N,
    stride_um: tl.int64,
    stride_un,  # unlike the other without a type: 1 is then compiled in
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dh_r = λ_r g_r + (1-λ_q) g_q (23)."""
    row, cols, ok = tile_of(N, B, BLOCK_B, BLOCK_N)
    mask = tile_mask(ok, cols, N, BLOCK_B)
    source = tl.load(inverse_ptr + row)
    lam = tl.load(lam_ptr + row)
    own = load_rows(upstream_ptr, row, cols, mask, stride_um, stride_un, lam.dtype)
    theirs = load_rows(upstream_ptr, source, cols, mask, stride_um, stride_un, lam.dtype)
    dhidden = lam * own + (1.0 - tl.load(lam_ptr + source)) * theirs
    tl.store(dhidden_ptr + row * N + cols, dhidden.to(dhidden_ptr.dtype.element_ty), mask=mask)


def mix_forward(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """The mixed rows, of hidden's shape and dtype, each row dense and in hidden's memory order.

    Args:
        hidden: (B, ...), not empty, any strides.
        lam: (B,) compute dtype.
        partner: (B,) int64 permutation.
    """
    return _launch(_mix_kernel, hidden, lam, partner.contiguous())


def mix_backward(upstream: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """The gradient of the unmixed rows, of upstream's shape and dtype, each row dense and in upstream's memory order.

    Args:
        upstream: (B, ...) gradient of the mixed rows, not empty, any strides.
        lam: (B,) compute dtype.
        partner: (B,) int64 permutation.
    """
    return _launch(_mix_grad_kernel, upstream, lam, inverse_permutation(partner))


def _launch(kernel: triton.JITFunction, rows: Tensor, lam: Tensor, index: Tensor) -> Tensor:
    order = memory_order(rows)
    flat, out, lam = as_matrix(rows, order), empty_rows(rows, order), lam.contiguous()
    batch, width = flat.shape

    def launch(config: Config) -> Tensor:
        kernel[(cdiv(batch, config.block_b) * cdiv(width, config.block_c),)](
            flat,
            lam,
            index,
            out,
            batch,
            width,
            *flat.stride(),
            BLOCK_B=config.block_b,
            BLOCK_N=config.block_c,
            num_warps=config.num_warps,
            **OPTIONS,
        )
        return out

    config = mix_config(width, rows.element_size())
    with on_device_of(rows):
        return tuned(
            kernel.__name__,
            lambda: (rows.dtype, batch_class(batch), f"N={width}", rows.device),
            config,
            ("block_b", "block_c", "num_warps"),
            launch,
        )
