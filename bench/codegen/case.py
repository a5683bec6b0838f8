"""One specialisation of one kernel, and what the cases share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import triton

from fastamp.policy import Policy

PLAIN = Policy(keeps_all=True)
MASKED = Policy(tie_tol=0.0, clamp=True, label_smoothing=0.1)
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
        """Those of a program."""
        warps: int = self.launch.num_warps if self.warps is None else self.warps
        return warps


def variants(*, matched: bool = False, binary: bool = False) -> Iterator[tuple[str, Policy, bool, bool]]:
    """Name, policy, soft targets, class weights: the lightest and the heaviest, and several labels a row."""
    pairing = "matching" if matched else "permutation"
    loss = "binary_cross_entropy" if binary else "cross_entropy"
    suffix = ", binary" * binary + ", matched" * matched
    yield f"plain{suffix}", PLAIN._replace(pairing=pairing, loss=loss), False, False
    if binary:
        yield f"soft{suffix}", PLAIN._replace(pairing=pairing, loss=loss), True, False
    yield f"all{suffix}", MASKED._replace(pairing=pairing, loss=loss), True, True


def data_type(itemsize: int, weighted: bool) -> tuple[int, str]:
    """Bytes and pointer type of logits: bfloat16, where registers are fewest; float32, where they are most."""
    width = 2 if itemsize == 4 and not weighted else itemsize
    return width, DTYPES[width]


def tiles(width: int, block: int) -> int:
    """Columns of the tiles that cover `width` columns."""
    return triton.cdiv(width, block) * block
