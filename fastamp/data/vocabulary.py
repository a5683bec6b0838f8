"""Words to integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PAD = 0
UNK = 1


class Vocabulary:
    """The words a model has rows for: id 0 pads, id 1 stands for every other word, words follow.

    Args:
        words: distinct words, in the order of their ids from 2 on.

    Raises:
        ValueError: a word occurs twice.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: number for number, word in enumerate(self.words, start=UNK + 1)}
        if len(self._ids) != len(self.words):
            word, count = Counter(self.words).most_common(1)[0]
            raise ValueError(f"words of a vocabulary must be distinct, got {word!r} {count} times")

    @classmethod
    def build(cls, *splits: Iterable[Sequence[str]]) -> Vocabulary:
        """The words of tokenised sentences, the most frequent first, ties in code-point order."""
        counts: Counter[str] = Counter()
        for sentences in splits:
            for tokens in sentences:
                counts.update(tokens)
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        """Number of ids, padding and unknown included."""
        return len(self.words) + UNK + 1

    def __contains__(self, word: str) -> bool:
        """Whether the word has an id of its own."""
        return word in self._ids

    def encode(self, sentences: Sequence[Sequence[str]]) -> Tensor:
        """Ids (N, T), int64, on the CPU, of tokenised sentences, padded on the right; T is at least 1.

        A sentence without tokens becomes a single unknown word.
        """
        rows = [[self._ids.get(token, UNK) for token in tokens] or [UNK] for tokens in sentences]
        longest = max(map(len, rows), default=1)
        padded = [row + [PAD] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device="cpu").reshape(len(rows), longest)
