"""The corpora by name, and their splits."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fastamp.data.sources import SOURCES, read
from fastamp.data.splits import FOLDS, class_counts, hold_out, leave_fold_out, stratified_subset

T = TypeVar("T")

DATASETS = tuple(SOURCES)


@dataclass(frozen=True)
class Split:
    """Tokenised sentences, their labels, and the sentences as they were read, for another tokeniser."""

    sentences: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.sentences)

    def take(self, indices: Sequence[int]) -> Split:
        """The sentences at `indices`, in that order."""

        def taken(of: Sequence[T]) -> tuple[T, ...]:
            return tuple(of[i] for i in indices)

        return Split(taken(self.sentences), taken(self.labels), taken(self.texts))


@dataclass(frozen=True)
class Corpus:
    """A classification corpus; `label_names[y]` names class y."""

    name: str
    label_names: tuple[str, ...]
    train: Split
    dev: Split
    test: Split

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """Train, dev and test."""
        return self.train, self.dev, self.test

    def fingerprint(self) -> str:
        """SHA-256 of all sentences, labels and splits, to tell whether two runs saw the same data."""
        return self._digest(lambda split: [" ".join(tokens) for tokens in split.sentences])

    def text_fingerprint(self) -> str:
        """The same of the texts as they were read, of which the tokens keep neither case nor all characters."""
        return self._digest(lambda split: split.texts)

    def _digest(self, lines: Callable[[Split], Sequence[str]]) -> str:
        digest = hashlib.sha256()
        for split in self.splits:
            for line, label in zip(lines(split), split.labels, strict=True):
                digest.update(f"{label}\t{line}\n".encode())
            digest.update(b"\n")
        return digest.hexdigest()


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    lower: bool = True,
    fold: int | None = None,
    fraction: float = 1.0,
) -> Corpus:
    """Loads a corpus by name.

    `questions` is generated and the same whatever the seed. The others are read from `data_dir`/`name`/: trec
    has train.tsv and test.tsv, sst1 and sst2 also dev.tsv, subj and mr only all.tsv.

    Without `data_dir` they come from the Hugging Face hub, at a fixed revision, through the package `datasets`, which
    downloads them once. The hub's sentences may be tokenised otherwise than the files', and SUBJ's come in another
    order and so in other folds; `Corpus.fingerprint` tells such data apart.

    subj and mr are for 10-fold cross-validation: the test examples are those of `fold`. Which examples make up a fold
    is fixed by their number and the constant FOLD_SEED of `fastamp.data.splits`, whatever `seed` is.

    Where there is no dev file, 10% of the training examples are drawn as dev by `seed`, whatever the `fraction`. Below
    1 that leaves, of the others, floor(fraction · n) of each class, at least one, drawn by `seed` as well: n counts dev
    in, as the paper's numbers of labels do. A warning names a class whose one example is more than its share. The
    subset of a smaller fraction is part of that of a larger one. Near 1 a class may hold fewer, all that are not dev.

    Args:
        name: one of `DATASETS`.
        data_dir: the folder that holds the corpora; None reads from the hub. Not used by `questions`.
        seed: of what is drawn.
        lower: lower-case the tokens.
        fold: the fold to test on, 0 to 9, for subj and mr only; None takes seed % 10.
        fraction: share of the training examples to keep, in (0, 1].

    Returns:
        the tokenised corpus.

    Raises:
        TypeError: a `fold` or `fraction` of another type.
        ValueError: an unknown name, a `fold` out of range or of a set that has test examples of its own, a `fraction`
            out of range, a missing or malformed file, too few examples to hold some out, a class without a training
            example, or, with `data_dir` None, a hub that cannot be read.
    """
    check_part(name, fold, fraction)
    source = SOURCES[name]

    def split(texts: Sequence[str], labels: Sequence[int]) -> Split:
        sentences = tuple(tuple(source.tokenise(text, lower=lower)) for text in texts)
        return Split(sentences, tuple(labels), tuple(texts))

    parts = {part: split(*examples) for part, examples in read(name, data_dir).items()}
    generator = torch.Generator().manual_seed(seed)
    try:
        if "all" in parts:
            kept, held = leave_fold_out(len(parts["all"]), seed % FOLDS if fold is None else fold)
            parts["train"], parts["test"] = parts["all"].take(kept), parts["all"].take(held)
        train = whole = parts["train"]
        if "dev" not in parts:
            kept, held = hold_out(len(train), generator)
            train, parts["dev"] = train.take(kept), train.take(held)
    except ValueError as error:
        raise ValueError(f"dataset {name!r}: {error}") from None
    for label, label_name in enumerate(source.label_names):
        if label not in train.labels:
            raise ValueError(f"dataset {name!r}: no training example of class {label} ({label_name})")
    if fraction < 1:
        for label, n in sorted(Counter(whole.labels).items()):
            if fraction * n < 1:
                what = f"dataset {name!r}: a share of {fraction:g} leaves no example of class {label}"
                # Told of this place, not of the caller's: once, however often the data are read.
                warnings.warn(f"{what} ({source.label_names[label]}); one is kept", stacklevel=1)
        train = train.take(stratified_subset(train.labels, class_counts(whole.labels, fraction), generator))
    return Corpus(name, source.label_names, train, parts["dev"], parts["test"])


def check_part(name: str, fold: int | None, fraction: float) -> None:
    """Raises for a name, fold or fraction that `load` does not take."""
    if name not in SOURCES:
        raise ValueError(f"unknown dataset {name!r}; takes one of {', '.join(DATASETS)}")
    if fold is not None:
        if isinstance(fold, bool) or not isinstance(fold, int):
            raise TypeError(f"fold must be an int or None, got {fold!r}")
        if "all" not in SOURCES[name].sizes:
            raise ValueError(
                f"dataset {name!r} has test examples of its own, and no folds; fold must be None, got {fold}"
            )
        if not 0 <= fold < FOLDS:
            raise ValueError(f"fold must be from 0 to {FOLDS - 1}, got {fold}")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(f"fraction must be a number, got {fraction!r}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
