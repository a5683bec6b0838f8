"""What a training step on a CPU is spent on: operators, counted, for clocks tell how busy the machine is."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastamp.training import TrainConfig
from fastamp.training.loop import _Run
from fastamp.training.task import Task


class Operators(TorchDispatchMode):
    """The names of operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith("profiler."):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def run(tmp_path) -> _Run:
    """A SentMixup run, a step of which has been made: the optimizer makes its state in the first."""
    config = TrainConfig(method="sent-mixup", embedding_dim=8)
    made = _Run(config, tmp_path, torch.device("cpu"), Task.load(config, torch.device("cpu")))
    made.objective.train()
    made.update(*next(iter(made.batches)))
    return made


def test_making_batches_takes_less_than_a_twentieth_of_a_steps_operators(run):
    epoch = -(-len(run.task.train.labels) // run.config.batch_size)
    with Operators() as making:
        batches = list(islice(run.batches, epoch))  # with the shuffling for the next
    with Operators() as step:
        run.update(*batches[0])
    assert len(making.names) / epoch < len(step.names) / 20


def test_the_update_of_all_weights_is_one_operator(run):
    with Operators() as updating:
        run.optimizer.step()
    assert sorted(updating.names) == ["aten._foreach_add_.Scalar", "aten._fused_adam_.default"]  # of steps, of weights
