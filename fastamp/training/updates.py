"""One update of a model: eagerly, or as a CUDA graph that is replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastamp
from fastamp.training.batches import captured_length
from fastamp.training.objectives import Objective

_WARM_UPS = 3


class Updater:
    """Runs one step of an optimiser after another; `clip_norm` bounds the norm of all gradients together."""

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> None:
        self.objective, self.optimizer, self.clip_norm = objective, optimizer, clip_norm

    def __call__(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, fastamp.MixStats | None]:
        """Updates the parameters by a batch of ids (B, T) and labels (B,), both int64.

        Returns:
            The loss before the update, (), detached, and the facts of the step where there are any.
        """
        self.optimizer.zero_grad()
        loss, stats = self.objective(ids, labels)
        loss.backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.detach(), stats


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    ids: Tensor
    labels: Tensor
    loss: Tensor
    stats: fastamp.MixStats | None


class CapturedUpdater(Updater):
    """The same on a CUDA device, by replaying a graph for every length of batch: no launch waits for Python.

    Batches are padded to `captured_length`, which does not change what a model of fastamp.models makes of them.

    Args:
        eager: updates by batches of another number of rows, as the last of an epoch; its optimiser must be capturable.
        generator: what the objective draws λ and partners from, on the device.
        pad_id: the id that pads.
        rows: number of rows of a batch whose step is captured.
    """

    def __init__(self, eager: Updater, generator: torch.Generator, pad_id: int, rows: int) -> None:
        super().__init__(eager.objective, eager.optimizer, eager.clip_norm)
        self.generator, self.pad_id, self.rows = generator, pad_id, rows
        self._captured: dict[int, _Captured] = {}
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, fastamp.MixStats | None]:
        """See `Updater`; what is returned is overwritten by the next update."""
        if len(labels) != self.rows:
            return super().__call__(ids, labels)
        ids = F.pad(ids, (0, captured_length(ids.shape[1]) - ids.shape[1]), value=self.pad_id)
        if ids.shape[1] not in self._captured:
            self._captured[ids.shape[1]] = self._capture(ids.clone(), labels.clone())
        captured = self._captured[ids.shape[1]]
        captured.ids.copy_(ids)
        captured.labels.copy_(labels)
        captured.graph.replay()
        return captured.loss, captured.stats

    def _capture(self, ids: Tensor, labels: Tensor) -> _Captured:
        restore = self._kept()
        # One stream for all graphs, or they would not share their pool's memory; torch's own for captures is of
        # whichever device was captured on first.
        self._stream = self._stream or torch.cuda.Stream(ids.device)
        # Libraries set themselves up in their first calls, which must not be captured.
        self._stream.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                super().__call__(ids, labels)
        torch.cuda.current_stream(ids.device).wait_stream(self._stream)
        restore()
        self.optimizer.zero_grad()  # the graph's own gradients are made in its memory
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        pool = next((other.graph.pool() for other in self._captured.values()), None)
        with torch.cuda.device(ids.device), torch.cuda.graph(graph, pool=pool, stream=self._stream):
            loss, stats = super().__call__(ids, labels)
        return _Captured(graph, ids, labels, loss, stats)

    def _kept(self) -> Callable[[], None]:
        """Keeps weights, moments and generators; what is returned puts them back."""
        tensors = [*self.objective.parameters(), *self.objective.buffers()]
        values = [tensor.detach().clone() for tensor in tensors]
        states = self.optimizer.state
        moments = {p: {name: value.clone() for name, value in state.items()} for p, state in states.items()}
        mixing, device = self.generator.get_state(), torch.cuda.get_rng_state(self.generator.device)

        @torch.no_grad()
        def restore() -> None:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
            for parameter, state in states.items():
                for name, value in state.items():
                    # A first warm-up makes the state, which begins at zero.
                    value.copy_(moments[parameter][name] if parameter in moments else torch.zeros_like(value))
            self.generator.set_state(mixing)
            torch.cuda.set_rng_state(device, self.generator.device)

        return restore
