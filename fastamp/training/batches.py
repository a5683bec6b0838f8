"""Examples as tensors, batches of them, and the error of a model on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastamp.data import PAD

EVAL_BATCH = 256
_LENGTH_STEP = 8


def captured_length(length: int) -> int:
    """The length to pad a batch to whose step is captured: a multiple of 8 words, so that few graphs serve all."""
    return length + -length % _LENGTH_STEP


@dataclass(frozen=True)
class Examples:
    """One split on the device."""

    ids: Tensor  # (N, T) int64, padded on the right
    labels: Tensor  # (N,) int64
    lengths: Tensor  # (N,) int64, on the CPU: trimming a batch must not wait for the device
    places: Tensor  # (N,) int64, on the CPU: where each stood before it was sorted

    @classmethod
    def of(cls, ids: Tensor, labels: Sequence[int], device: torch.device, *, pad_id: int = PAD) -> Examples:
        """Examples from ids (N, T), int64, on the CPU, `pad_id` on the right."""
        lengths = (ids != pad_id).sum(1)
        places = torch.arange(len(lengths), device="cpu")
        return cls(ids.to(device), torch.tensor(labels, dtype=torch.int64, device=device), lengths, places)

    def by_length(self) -> Examples:
        """The same examples, the shortest first."""
        order = self.lengths.argsort(stable=True)
        on_device = order.to(self.ids.device)
        return Examples(self.ids[on_device], self.labels[on_device], self.lengths[order], self.places[order])


class Batches:
    """Endless shuffled batches, an epoch after another; the last batch of an epoch may be smaller."""

    def __init__(self, examples: Examples, batch_size: int, seed: int) -> None:
        self._examples = examples
        self._size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._shuffle()

    def _shuffle(self) -> None:
        self._before = self._generator.get_state()
        order = torch.randperm(len(self._examples.labels), device="cpu", generator=self._generator)
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
    split = (of.split(EVAL_BATCH) for of in (examples.ids, examples.labels, examples.lengths))
    for ids, labels, lengths in zip(*split, strict=True):
        wrong += (model(ids[:, : int(lengths.max())]).argmax(1) != labels).sum()
    return 100 * int(wrong) / len(examples.labels)
