"""One specialisation of one kernel, and what the cases share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import triton

from fastamp.kernels import RowPolicy

PLAIN = RowPolicy("amp", False, 1.0, False, -100, 0.0, 0.0, 4.8e-7, True)
MASKED = PLAIN._replace(tie_rel=0.0, never_rejects=False, clamp=True, label_smoothing=0.1)
DTYPES = {2: "*bf16", 4: "*fp32", 8: "*fp64"}


class Case(NamedTuple):
    """One specialisation of one kernel."""

    name: str  # options, dtype of the data and shape
    kernel: Any
    launch: Any  # the configuration that the heuristic gives
    signature: dict[str, str]  # of the arguments that are not constants
    constants: dict[str, Any]
    aligned: tuple[str, ...]  # arguments divisible by 16
    elements: int  # of the tiles that a program takes, or of one turn of a loop whose length only the device knows
    floor: float  # bytes an element that have to move
    row_bytes: int = 0  # bytes of a row in one tile, to be read in vectors; 0: too short to ask
    sizes: Mapping[str, int] = MappingProxyType({})  # integer arguments that loops run to
    warps: int | None = None  # where the launch does not say

    @property
    def num_warps(self) -> int:
        """Of a program."""
        warps: int = self.launch.num_warps if self.warps is None else self.warps
        return warps


def variants(itemsize: int, *, matched: bool = False) -> Iterator[tuple[str, RowPolicy, bool, bool]]:
    """Name, policy, soft targets, class weights: the lightest and the heaviest of each loss."""
    plain, masked = (policy._replace(matched=matched) for policy in (PLAIN, MASKED))
    suffix = ", matched" if matched else ""
    yield f"cross_entropy{suffix}", plain, False, False
    yield f"cross_entropy+all{suffix}", masked, True, True
    if itemsize == 4:
        yield f"softmax_bce{suffix}", plain._replace(bce=True, never_rejects=False), False, False
    yield f"softmax_bce+all{suffix}", masked._replace(bce=True), True, True


def data_type(itemsize: int, weighted: bool) -> tuple[int, str]:
    """Bytes and pointer type of logits: bfloat16, where registers are fewest; float32, where they are most."""
    width = 2 if itemsize == 4 and not weighted else itemsize
    return width, DTYPES[width]


def tiles(width: int, block: int) -> int:
    """Columns of the tiles that cover `width` columns."""
    return triton.cdiv(width, block) * block
