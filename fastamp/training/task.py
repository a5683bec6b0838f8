"""A corpus as tensors, batches of it, and the error of a model on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastamp.data import (
    PAD,
    Corpus,
    Coverage,
    Split,
    Vocabulary,
    WordVectors,
    embedding_table,
    load,
    read_vectors,
)
from fastamp.data.vectors import coverage
from fastamp.models import TextCNN
from fastamp.training.config import DEFAULT_EMBEDDING_DIM, TrainConfig

EVAL_BATCH = 256


@dataclass(frozen=True)
class Examples:
    """One split on the device."""

    ids: Tensor  # (N, T) int64, padded on the right
    labels: Tensor  # (N,) int64
    lengths: Tensor  # (N,) int64, on the CPU: trimming a batch must not wait for the device

    @classmethod
    def encode(cls, split: Split, vocabulary: Vocabulary, device: torch.device) -> Examples:
        """Encodes a split."""
        ids = vocabulary.encode(split.sentences)
        labels = torch.tensor(split.labels, dtype=torch.int64)
        return cls(ids.to(device), labels.to(device), (ids != PAD).sum(1))

    def by_length(self) -> Examples:
        """The same examples, the shortest first."""
        order = self.lengths.argsort(stable=True)
        on_device = order.to(self.ids.device)
        return Examples(self.ids[on_device], self.labels[on_device], self.lengths[order])


@dataclass(frozen=True)
class Task:
    """All that a run reads: data, vocabulary, vectors."""

    corpus: Corpus
    vocabulary: Vocabulary
    vectors: WordVectors | None
    coverage: Coverage | None
    train: Examples
    dev: Examples
    test: Examples

    @classmethod
    def load(cls, config: TrainConfig, device: torch.device) -> Task:
        """Loads the data of a run.

        The vocabulary is that of the training sentences; with pre-trained vectors also the words of dev and
        test that have one, as if the whole file were the vocabulary.
        """
        corpus = load(config.dataset, data_dir=config.data_dir, seed=config.seed, lower=config.lower)
        splits = (corpus.train, corpus.dev, corpus.test)
        vectors = covered = None
        vocabulary = Vocabulary.build(corpus.train.sentences)
        if config.vectors is not None:
            everything = Vocabulary.build(*(split.sentences for split in splits))
            vectors = read_vectors(config.vectors, everything.words)
            if config.embedding_dim not in (None, vectors.dim):
                raise ValueError(
                    f"embedding_dim is {config.embedding_dim}, but {config.vectors} has width {vectors.dim}"
                )
            known = [w for w in everything.words if w in vocabulary or vectors.find(w) is not None]
            vocabulary = Vocabulary(known)
            covered = coverage((s for split in splits for s in split.sentences), vectors)
        train, dev, test = (Examples.encode(split, vocabulary, device) for split in splits)
        return cls(corpus, vocabulary, vectors, covered, train, dev.by_length(), test.by_length())

    def model(self, config: TrainConfig) -> TextCNN:
        """A new model, its weights drawn from the global generator."""
        return TextCNN(
            len(self.vocabulary),
            self.corpus.num_classes,
            embedding_dim=config.embedding_dim or DEFAULT_EMBEDDING_DIM,
            vectors=None if self.vectors is None else embedding_table(self.vocabulary, self.vectors),
            dropout=config.dropout,
        )

    def fingerprint(self) -> dict[str, str | None]:
        """Digests that tell whether another run saw the same data."""
        return {
            "dataset files": self.corpus.fingerprint(),
            "word vectors": None if self.vectors is None else self.vectors.digest,
        }


class Batches:
    """Endless shuffled batches, an epoch after another; the last batch of an epoch may be smaller.

    Args:
        examples: what to draw from.
        batch_size: rows of a batch.
        seed: of the shuffling.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int) -> None:
        self._examples = examples
        self._size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._shuffle()

    def _shuffle(self) -> None:
        self._before = self._generator.get_state()
        order = torch.randperm(len(self._examples.labels), generator=self._generator)
        self._longest = [int(part.max()) for part in self._examples.lengths[order].split(self._size)]
        self._order = order.to(self._examples.ids.device).split(self._size)
        self._next = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids (B, T), trimmed to the longest sentence, and labels (B,)."""
        while True:
            if self._next == len(self._order):
                self._shuffle()
            rows, longest = self._order[self._next], self._longest[self._next]
            self._next += 1
            ids = self._examples.ids[:, :longest].index_select(0, rows)
            yield ids, self._examples.labels.index_select(0, rows)

    def state_dict(self) -> dict[str, Any]:
        """The position: the generator's state before the epoch was shuffled, and the epoch's next batch."""
        return {"generator": self._before, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Returns to a position."""
        self._generator.set_state(state["generator"])
        self._shuffle()
        self._next = state["next"]


@torch.no_grad()
def error_rate(model: Callable[[Tensor], Tensor] | nn.Module, examples: Examples) -> float:
    """Percent of misclassified examples; examples in order of length waste no work on padding."""
    wrong = torch.zeros((), dtype=torch.int64, device=examples.ids.device)
    parts = zip(
        examples.ids.split(EVAL_BATCH),
        examples.labels.split(EVAL_BATCH),
        examples.lengths.split(EVAL_BATCH),
        strict=True,
    )
    for ids, labels, lengths in parts:
        wrong += (model(ids[:, : int(lengths.max())]).argmax(1) != labels).sum()
    return 100 * int(wrong) / len(examples.labels)
