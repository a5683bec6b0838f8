"""Which examples go where: held-out examples, folds of a cross-validation, and stratified subsets, by index."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

HELD_OUT = 0.1
FOLDS = 10
# The folds are part of a data set, as a test file is: nothing may move them. No run is likely to take this seed.
FOLD_SEED = 20210907


def hold_out(size: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Holds out a random tenth, drawn by a CPU generator: the indices that stay and those held out, both ascending.

    Raises:
        ValueError: a tenth of so few is none or all.
    """
    held = round(HELD_OUT * size)
    if not 0 < held < size:
        raise ValueError(f"{size} examples are too few to hold out {HELD_OUT:.0%}")
    order = torch.randperm(size, device="cpu", generator=generator).tolist()
    return sorted(order[held:]), sorted(order[:held])


def leave_fold_out(size: int, fold: int) -> tuple[list[int], list[int]]:
    """Splits off fold 0 to FOLDS - 1: the indices of the other folds and of this one, both ascending.

    The examples are shuffled once, by `FOLD_SEED`, whatever their classes, and cut into folds whose sizes differ by
    one at most. So the folds depend on `size` only, and partition the examples.

    Raises:
        ValueError: fewer examples than folds.
    """
    if size < FOLDS:
        raise ValueError(f"{size} examples are too few for {FOLDS} folds")
    order = torch.randperm(size, device="cpu", generator=torch.Generator().manual_seed(FOLD_SEED)).tolist()
    begin, end = fold * size // FOLDS, (fold + 1) * size // FOLDS
    return sorted(order[:begin] + order[end:]), sorted(order[begin:end])


def class_counts(labels: Iterable[int], fraction: float) -> dict[int, int]:
    """How many of each class a share of the examples holds, as the paper counts: floor(fraction · n), at least one."""
    # 0.15 · 20 is 2.9999999999999996 in float64.
    return {label: max(1, math.floor(round(fraction * n, 9))) for label, n in Counter(labels).items()}


def stratified_subset(labels: Sequence[int], counts: Mapping[int, int], generator: torch.Generator) -> list[int]:
    """Draws so many examples of each class, or all of it where it has fewer.

    Each class is shuffled and its first examples are taken: from one state of the generator the subset of smaller
    counts is part of that of larger ones.

    Returns:
        their indices in ascending order.
    """
    left = Counter(counts)
    taken = []
    for index in torch.randperm(len(labels), device="cpu", generator=generator).tolist():
        if left[labels[index]] > 0:
            left[labels[index]] -= 1
            taken.append(index)
    return sorted(taken)
