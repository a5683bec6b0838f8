"""Which examples go where: held-out examples, folds of a cross-validation, and stratified subsets, by index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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


def stratified_subset(labels: Sequence[int], fraction: float, generator: torch.Generator) -> list[int]:
    """Draws a share of the examples in which every class keeps its share.

    Each class is shuffled. First comes one example of every class; then the j-th of a class of n, counted from 0, at
    (j + 1/2) / n, which is the method of Sainte-Laguë. The subset is the beginning of that order, so from one state of
    the generator a smaller subset is part of every larger one.

    Returns:
        round(fraction · N) indices in ascending order, or one a class where that is more.
    """
    sizes = Counter(labels)
    drawn: Counter[int] = Counter()
    placed = []
    for index in torch.randperm(len(labels), device="cpu", generator=generator).tolist():
        label = labels[index]
        rank = drawn[label]
        drawn[label] += 1
        placed.append(((rank + 0.5) / sizes[label] if rank else 0.0, index))
    placed.sort(key=lambda place: place[0])  # stable: ties stay in random order
    return sorted(index for _, index in placed[: max(round(fraction * len(labels)), len(sizes))])
