"""The loss of mixed test sentences against λ, as in the paper's Figure 2."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastamp.mixing import Mix
from fastamp.models import Model
from fastamp.training.batches import EVAL_BATCH, Examples
from fastamp.training.checkpoint import damaged, load_tensors
from fastamp.training.config import TrainConfig
from fastamp.training.objectives import LEVELS
from fastamp.training.task import Task

POINTS = 21  # values of λ
PAIRS = 2  # single pairs that are followed


@torch.no_grad()
def mixed_losses(
    f: Callable[..., Tensor],
    hidden: Tensor,
    labels: Tensor,
    partner: Tensor,
    lam: Tensor,
    context: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Cross-entropy of every mixed pair against its mixed label, λ CE(·, y_r) + (1-λ) CE(·, y_π(r)).

    Args:
        f: mixed hidden states, **context, to logits (N, C).
        hidden: (N, ...), floating point.
        labels: (N,), int64.
        partner: (N,), int64; row r is mixed with row partner[r].
        lam: (L,), coefficients in [0, 1].
        context: what f takes beside the mixed rows.

    Returns:
        (L, N), float64, nats.
    """
    losses = []
    for coefficient in lam.tolist():
        logits = f(torch.lerp(hidden[partner], hidden, coefficient), **(context or {}))
        log_p = logits.double().log_softmax(1)
        own = log_p.gather(1, labels[:, None])[:, 0]
        other = log_p.gather(1, labels[partner][:, None])[:, 0]
        losses.append(-(coefficient * own + (1 - coefficient) * other))
    return torch.stack(losses)


def best_model(config: TrainConfig, run: str | os.PathLike[str], task: Task) -> nn.Module:
    """The model of least dev error of the run in a folder, in eval mode and on the CPU.

    The global generators are left as they were. `task` is what the run was trained on.

    Raises:
        ValueError: its best.pt is damaged.
    """
    advice = f"delete {run} to start the run over"
    path = Path(run) / "best.pt"
    saved = load_tensors(path, advice)
    with torch.random.fork_rng([]):
        model = task.model(config)
    try:
        model.load_state_dict(saved["model"])
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise damaged(path, error, advice) from None
    return model.eval()


def loss_curves(config: TrainConfig, run: str | os.PathLike[str]) -> dict[str, Any]:
    """Figure 2's curves of the best model of a finished run, which is in the folder `run`.

    The test set is mixed with its reversal, x_1 with x_n, as the paper does: every pair is there from both sides, and
    the mean is symmetric in λ. The single pairs are the first whose labels differ. The global generators are left as
    they were.

    Returns:
        `lam`, L values from 0 to 1, and under "word" or "sentence", where the method mixes, `mean` (L values, over the
        test set) and `pairs` (of `PAIRS` single pairs L values each), in nats. Nothing for a method that mixes at
        neither.
    """
    level = LEVELS.get(config.method.partition("-")[0])
    if level is None:
        return {}
    device = torch.device(config.device)
    task = Task.load(config, device)
    model = best_model(config, run, task).to(device)
    lam = torch.linspace(0, 1, POINTS, dtype=torch.float64, device="cpu")
    losses, pairs = _curves(model, level, task.test, lam)
    return {"lam": lam.tolist(), level: {"mean": losses.mean(1).tolist(), "pairs": losses[:, pairs].T.tolist()}}


@torch.no_grad()
def _curves(model: nn.Module, level: str, examples: Examples, lam: Tensor) -> tuple[Tensor, list[int]]:
    """Losses (L, N) of N test sentences in their file's order, and the first whose labels are not their partners'."""
    g, f = cast("Model", model).split(level)
    where, size = examples.places.argsort(), len(examples.labels)
    losses = torch.empty(len(lam), size, dtype=torch.float64)
    for half in torch.arange((size + 1) // 2).split(EVAL_BATCH // 2):
        places = torch.cat([half, size - 1 - half])
        rows = where[places].to(examples.ids.device)
        ids = examples.ids[rows, : int(examples.lengths[where[places]].max())]
        partner = torch.arange(len(rows), device=ids.device).roll(len(half))
        mix = Mix(torch.ones(len(rows), dtype=torch.float32, device=ids.device), partner)
        losses[:, places] = mixed_losses(f, g(ids), examples.labels[rows], partner, lam, f.context(ids, mix)).cpu()
    labels = examples.labels.cpu()[where]
    return losses, (labels != labels.flip(0)).nonzero()[:PAIRS, 0].tolist()
