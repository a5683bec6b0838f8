"""∇λ of rows of any hidden state, the step of λ, and the rows mixed there (22, 24, 5-7).

Rows that fit in registers take one launch. For longer ones each program sums a part of the inner product, always the
same part in the same order, and the parts of a row are summed in a fixed order by whoever needs the sum: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Config, PartsConfig, cdiv, inner_product_config, mix_config, next_power_of_2, remix_config
from .launch import as_matrix, empty_rows, memory_order, on_device_of
from .mix import load_rows, mixed_tile, tile_index, tile_mask, tile_of
from .rows import OPTIONS, scaled_grad, step_lam
from .tuning import batch_class, tuned


@triton.jit
def row_sum(tile):
    """Sum of each row of a tile."""
    if len(tile.shape) == 2:
        return tl.sum(tile, 1)[:, None]
    else:
        return tl.sum(tile, 0)


@triton.jit
def _inner_product_kernel(
    grad_mixed_ptr,  # (B, N)
    hidden_ptr,  # (B, N)
    partner_ptr,  # (B,) int64
    parts_ptr,  # (B, parts) compute dtype
    B,
    N,
    part,  # columns of one part, a multiple of BLOCK_N
    parts,
    stride_gm: tl.int64,
    stride_gn,  # without a type, as stride_hn: 1 is then compiled in
    stride_hm: tl.int64,
    stride_hn,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One part of ⟨g_r, h_r - h_π(r)⟩ (24) for BLOCK_B rows."""
    dtype: tl.constexpr = parts_ptr.dtype.element_ty
    row_blocks = tl.cdiv(B, BLOCK_B)
    program = tl.program_id(0)
    at = program // row_blocks
    row, first, ok = tile_index(program % row_blocks, tl.full((), 0, tl.int64), B, BLOCK_B, BLOCK_N)
    other = tl.load(partner_ptr + row)
    products = tl.zeros((BLOCK_N,) if BLOCK_B == 1 else (BLOCK_B, BLOCK_N), dtype)
    start = at.to(tl.int64) * part
    for offset in range(0, part, BLOCK_N):
        cols = first + (start + offset)
        mask = tile_mask(ok, cols, N, BLOCK_B)
        g = load_rows(grad_mixed_ptr, row, cols, mask, stride_gm, stride_gn, dtype)
        a = load_rows(hidden_ptr, row, cols, mask, stride_hm, stride_hn, dtype)
        b = load_rows(hidden_ptr, other, cols, mask, stride_hm, stride_hn, dtype)
        products += g * (a - b)
    tl.store(parts_ptr + row * parts + at, row_sum(products), mask=ok)


@triton.jit
def _remix_kernel(
    grad_mixed_ptr,  # (B, N); None where parts_ptr holds the inner product
    parts_ptr,  # (B, parts) compute dtype, of `_inner_product_kernel`; None: whole rows fit in one tile
    hidden_ptr,  # (B, N)
    lam_ptr,  # (B,) compute dtype
    partner_ptr,  # (B,) int64
    grad_divisor_ptr,  # () divisor of ∇λ or None
    grad_ptr,  # (B,) out, compute dtype
    lam_adv_ptr,  # (B,) out, compute dtype
    mixed_ptr,  # (B, N) out, contiguous
    B,
    N,
    parts,
    stride_gm: tl.int64,
    stride_gn,  # without a type, as stride_hn: 1 is then compiled in
    stride_hm: tl.int64,
    stride_hn,
    step_size: tl.float64,
    policy: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least `parts`
):
    """∇λ, λ' and m(λ') of BLOCK_B rows (24, 5-7, 22)."""
    row, cols, ok = tile_of(N, B, BLOCK_B, BLOCK_N)
    mask = tile_mask(ok, cols, N, BLOCK_B)
    lam = tl.load(lam_ptr + row)
    a = load_rows(hidden_ptr, row, cols, mask, stride_hm, stride_hn, lam.dtype)
    b = load_rows(hidden_ptr, tl.load(partner_ptr + row), cols, mask, stride_hm, stride_hn, lam.dtype)
    if parts_ptr is None:
        g = load_rows(grad_mixed_ptr, row, cols, mask, stride_gm, stride_gn, lam.dtype)
        grad = row_sum(g * (a - b))
    else:
        # Every program of a row adds up the same numbers in the same order.
        part = tl.arange(0, BLOCK_P)
        grad = row_sum(tl.load(parts_ptr + row * parts + part, mask=part < parts, other=0.0))
    grad = scaled_grad(grad, grad_divisor_ptr)
    lam_adv = step_lam(lam, grad, step_size, policy)
    if tl.program_id(0) < tl.cdiv(B, BLOCK_B):  # the programs of the first columns
        tl.store(grad_ptr + row, grad, mask=ok)
        tl.store(lam_adv_ptr + row, lam_adv, mask=ok)
    tl.store(mixed_ptr + row * N + cols, mixed_tile(a, b, lam_adv).to(mixed_ptr.dtype.element_ty), mask=mask)


def inner_products(grad_mixed: Tensor, hidden: Tensor, partner: Tensor, dtype: torch.dtype) -> Tensor:
    """⟨g_r, h_r - h_π(r)⟩ of every row in parts that are still to be summed: (B, parts) of `dtype`.

    Args:
        grad_mixed: (B, ...), not empty, any strides.
        hidden: of the same shape, any strides.
        partner: (B,) int64 permutation.
        dtype: the compute dtype.
    """
    order = memory_order(hidden)
    g, h, partner = as_matrix(grad_mixed, order), as_matrix(hidden, order), partner.contiguous()
    batch, width = h.shape

    def launch(config: PartsConfig) -> Tensor:
        parts = cdiv(width, config.part)
        products = torch.empty(batch, parts, dtype=dtype, device=h.device)
        _inner_product_kernel[(cdiv(batch, config.block_b) * parts,)](
            g,
            h,
            partner,
            products,
            batch,
            width,
            config.part,
            parts,
            *g.stride(),
            *h.stride(),
            BLOCK_B=config.block_b,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            **OPTIONS,
        )
        return products

    config = inner_product_config(width, h.element_size())
    # Not its parts: each is some tiles long, and there are at most so many.
    with on_device_of(h):
        return tuned(
            "_inner_product_kernel",
            lambda: (h.dtype, batch_class(batch), f"N={width}", h.device),
            config,
            ("block_b", "num_warps"),
            launch,
        )


def lambda_grad(grad_mixed: Tensor, hidden: Tensor, partner: Tensor, dtype: torch.dtype) -> Tensor:
    """∇λ (B,) of `dtype`; arguments as `inner_products` takes them."""
    products = inner_products(grad_mixed, hidden, partner, dtype)
    return products.view(-1) if products.shape[1] == 1 else products.sum(1)


def remix_forward(
    hidden: Tensor, grad_mixed: Tensor, mix: Any, policy: Any, step_size: float, grad_divisor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """∇λ (B,), λ' (B,) and the rows mixed at λ', as `mix_forward` gives them.

    Args:
        hidden: (B, ...), not empty, any strides.
        grad_mixed: of the same shape, any strides.
        mix: λ (B,) compute dtype, and partner (B,).
        policy: for mode, grad_clip and clamp.
        step_size: ε.
        grad_divisor: () or None; 0 makes ∇λ zero.
    """
    lam, partner = mix
    order = memory_order(hidden)
    g, h, mixed = as_matrix(grad_mixed, order), as_matrix(hidden, order), empty_rows(hidden, order)
    lam, partner = lam.contiguous(), partner.contiguous()
    batch, width = h.shape
    grad, lam_adv = torch.empty_like(lam), torch.empty_like(lam)
    whole = remix_config(width, lam.element_size())
    products = inner_products(g, h, partner, lam.dtype) if whole is None else None
    parts = 0 if products is None else products.shape[1]

    def launch(config: Config) -> tuple[Tensor, Tensor, Tensor]:
        _remix_kernel[(cdiv(batch, config.block_b) * cdiv(width, config.block_c),)](
            g if products is None else None,
            products,
            h,
            lam,
            partner,
            grad_divisor,
            grad,
            lam_adv,
            mixed,
            batch,
            width,
            parts,
            *g.stride(),
            *h.stride(),
            step_size,
            policy=policy,
            BLOCK_B=config.block_b,
            BLOCK_N=config.block_c,
            BLOCK_P=next_power_of_2(max(1, parts)),
            num_warps=config.num_warps,
            **OPTIONS,
        )
        return grad, lam_adv, mixed

    config = whole or mix_config(width, h.element_size())
    free = ("block_b", "num_warps") if whole else ("block_b", "block_c", "num_warps")
    with on_device_of(h):
        return tuned(
            "_remix_kernel",
            lambda: (h.dtype, policy.mangle(), batch_class(batch), f"N={width}", h.device),
            config,
            free,
            launch,
        )
