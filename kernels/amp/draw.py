"""Who mixes with whom, from random keys: one launch of programs that each look at all keys, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import DRAW_COLUMNS, DRAW_ROWS, DRAW_WARPS, cdiv
from .launch import on_device_of
from .rows import OPTIONS

MOST_ROWS = tl.constexpr(1024)  # whose numbers are the last bits of their keys
BEYOND = tl.constexpr(2**63 - 1)  # above every key


@triton.jit
def key_of(keys_ptr, index, B):
    """What rows are ordered by, int64, no two alike: 48 or 53 random bits, then the row's number."""
    mask = index < B
    high = tl.load(keys_ptr + index, mask=mask, other=0.0)
    if keys_ptr.dtype.element_ty == tl.float64:
        random = (high * 2.0**53).to(tl.int64)
    else:
        low = tl.load(keys_ptr + B + index, mask=mask, other=0.0)
        random = (high * 2.0**24).to(tl.int64) * 2**24 + (low * 2.0**24).to(tl.int64)
    return tl.where(mask, random * MOST_ROWS + index, BEYOND)


@triton.jit
def _draw_partner_kernel(
    keys_ptr,  # (2, B) float32 or (1, B) float64, in [0, 1), rows one after the other
    partner_ptr,  # (B,) int64
    B,  # at most MOST_ROWS
    MATCHING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partner[r] = how many keys are less than that of row r; or, for a matching, its neighbour in their order."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = key_of(keys_ptr, row, B)[:, None]
    less = tl.zeros([ROWS, COLUMNS], tl.int32)
    below = tl.full([ROWS, COLUMNS], -1, tl.int64)
    above = tl.full([ROWS, COLUMNS], BEYOND, tl.int64)
    for start in range(0, B, COLUMNS):
        key = key_of(keys_ptr, start + tl.arange(0, COLUMNS), B)[None, :]
        less += (key < mine).to(tl.int32)
        if MATCHING:
            below = tl.maximum(below, tl.where(key < mine, key, -1))
            above = tl.minimum(above, tl.where(key > mine, key, BEYOND))
    rank = tl.sum(less, 1)
    other = rank
    if MATCHING:
        # The first and the second in the order are paired, and so on; the last of an odd batch stays alone.
        neighbour = tl.where(rank % 2 == 0, tl.min(above, 1), tl.max(below, 1))
        other = tl.where((rank % 2 == 0) & (rank == B - 1), row, (neighbour % MOST_ROWS).to(tl.int32))
    tl.store(partner_ptr + row, other.to(tl.int64), mask=row < B)


def draw_partner(keys: Tensor, matching: bool) -> Tensor:
    """(B,) int64: a uniform random permutation, or perfect matching, of independent uniform keys.

    Args:
        keys: (2, B) float32 or (1, B) float64, in [0, 1); 1 <= B <= 1024.
        matching: whether partner is to be its own inverse; one row of an odd batch then is its own partner.
    """
    keys, batch = keys.contiguous(), keys.shape[1]
    partner = torch.empty(batch, dtype=torch.int64, device=keys.device)
    with on_device_of(keys):
        _draw_partner_kernel[(cdiv(batch, DRAW_ROWS),)](
            keys,
            partner,
            batch,
            MATCHING=matching,
            ROWS=DRAW_ROWS,
            COLUMNS=DRAW_COLUMNS,
            num_warps=DRAW_WARPS,
            **OPTIONS,
        )
    return partner
