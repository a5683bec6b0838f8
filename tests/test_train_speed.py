"""What a training step on a CPU is spent on, at the paper's sizes."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from statistics import median

import pytest
import torch

from fastamp.models import TextCNN
from fastamp.training import TrainConfig
from fastamp.training.batches import Batches, Examples
from fastamp.training.objectives import make_objective
from fastamp.training.updates import Updater

WORDS, SENTENCES, LENGTH, CLASSES = 8650, 4907, 37, 6  # TREC's


def seconds(body: Callable[[], object], times: int = 15) -> float:
    """Median of one call."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        body()
        found.append(time.perf_counter() - began)
    return median(found)


@pytest.fixture(scope="module")
def shares() -> dict[str, float]:
    """Of a SentMixup step's time: the batch's, and Adam's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        lengths = torch.randint(3, 15, (SENTENCES, 1))
        ids = torch.randint(1, WORDS, (SENTENCES, LENGTH)).where(torch.arange(LENGTH) < lengths, 0)
        examples = Examples.of(ids, torch.randint(CLASSES, (SENTENCES,)).tolist(), torch.device("cpu"))
        config = TrainConfig(method="sent-mixup")
        objective = make_objective(TextCNN(WORDS, CLASSES), config, torch.Generator().manual_seed(0)).train()
        optimizer = torch.optim.Adam(objective.parameters(), lr=config.lr, weight_decay=config.l2, fused=True)
        update = Updater(objective, optimizer, None)
        batches = iter(Batches(examples, config.batch_size, seed=0))
        for ids, labels in islice(batches, 5):
            update(ids, labels)
        step = seconds(lambda: update(*next(batches)))
        # An epoch's worth, so that shuffling is in it.
        epoch = -(-SENTENCES // config.batch_size)
        batch = seconds(lambda: list(islice(batches, epoch)), 5) / epoch
        return {"batch": batch / step, "adam": seconds(optimizer.step) / step}
    finally:
        torch.set_num_threads(threads)


def test_making_batches_takes_less_than_a_twentieth_of_a_step(shares):
    assert shares["batch"] < 0.05


def test_the_dense_update_of_all_word_vectors_does_not_dominate_a_step(shares):
    assert shares["adam"] < 0.4
