"""The corpora by name, and their splits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastamp.data import questions
from fastamp.data.tokens import clean_str, clean_str_sst
from fastamp.data.tsv import read_tsv

HELD_OUT = 0.1


@dataclass(frozen=True)
class Split:
    """Tokenised sentences and their labels, of equal length."""

    sentences: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.sentences)

    def take(self, indices: Sequence[int]) -> Split:
        """The sentences at `indices`, in that order."""
        return Split(tuple(self.sentences[i] for i in indices), tuple(self.labels[i] for i in indices))


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

    def fingerprint(self) -> str:
        """SHA-256 of all sentences, labels and splits, to tell whether two runs saw the same data."""
        digest = hashlib.sha256()
        for split in (self.train, self.dev, self.test):
            for tokens, label in zip(split.sentences, split.labels, strict=True):
                digest.update(f"{label}\t{' '.join(tokens)}\n".encode())
            digest.update(b"\n")
        return digest.hexdigest()


@dataclass(frozen=True)
class _Source:
    label_names: tuple[str, ...]
    files: tuple[str, ...] = ()  # none: generated
    tokenise: Callable[..., list[str]] = clean_str


_POLARITY = ("negative", "positive")
_SOURCES = {
    "questions": _Source(questions.LABELS),
    "trec": _Source(questions.LABELS, ("train", "test")),
    "sst1": _Source(
        ("very negative", "negative", "neutral", "positive", "very positive"),
        ("train", "dev", "test"),
        clean_str_sst,
    ),
    "sst2": _Source(_POLARITY, ("train", "dev", "test"), clean_str_sst),
    "subj": _Source(("subjective", "objective"), ("all",)),
    "mr": _Source(_POLARITY, ("all",)),
}
DATASETS = tuple(_SOURCES)


def load(name: str, *, data_dir: str | os.PathLike[str] | None = None, seed: int = 0, lower: bool = True) -> Corpus:
    """Loads a corpus by name.

    `questions` is generated and the same whatever the seed. The others are read from `data_dir`/`name`/: trec
    has train.tsv and test.tsv, sst1 and sst2 also dev.tsv, subj and mr only all.tsv. What has no file is
    drawn by `seed`: 10% of all as test, then 10% of the rest as dev.

    Args:
        name: one of `DATASETS`.
        data_dir: the folder that holds the corpora; not used by `questions`.
        seed: of the splits that have no file.
        lower: lower-case the tokens.

    Returns:
        the tokenised corpus.

    Raises:
        ValueError: an unknown name, no `data_dir` where one is needed, a missing or malformed file, or too
            few examples to hold some out.
    """
    if name not in _SOURCES:
        raise ValueError(f"unknown dataset {name!r}; takes one of {', '.join(DATASETS)}")
    source = _SOURCES[name]

    def split(texts: Sequence[str], labels: Sequence[int]) -> Split:
        return Split(tuple(tuple(source.tokenise(text, lower=lower)) for text in texts), tuple(labels))

    if not source.files:
        train, dev, test = (split(texts, labels) for texts, labels in questions.generate())
        return Corpus(name, source.label_names, train, dev, test)
    if data_dir is None:
        raise ValueError(f"dataset {name!r} is read from files: give data_dir, the folder that holds {name}/")
    folder = Path(data_dir) / name
    parts = {part: split(*read_tsv(folder / f"{part}.tsv", len(source.label_names))) for part in source.files}
    generator = torch.Generator().manual_seed(seed)
    if "all" in parts:  # one seeded split; a cross-validation over folds would replace this branch
        parts["train"], parts["test"] = _hold_out(parts["all"], generator, folder)
    if "dev" not in parts:
        parts["train"], parts["dev"] = _hold_out(parts["train"], generator, folder)
    return Corpus(name, source.label_names, parts["train"], parts["dev"], parts["test"])


def _hold_out(split: Split, generator: torch.Generator, folder: Path) -> tuple[Split, Split]:
    held = round(HELD_OUT * len(split))
    if not 0 < held < len(split):
        raise ValueError(f"{folder}: {len(split)} examples are too few to hold out {HELD_OUT:.0%}")
    order = torch.randperm(len(split), generator=generator).tolist()
    return split.take(sorted(order[held:])), split.take(sorted(order[:held]))
