"""What a model is trained on: each method of the paper as a module that gives a loss."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastamp
from fastamp.models import Model, NonlinearMixup
from fastamp.training.config import TrainConfig

LEVELS = {"word": "word", "sent": "sentence"}  # how a method's name begins, to where it cuts the model


class Objective(nn.Module):
    """A model and the loss that it is trained on: cross-entropy, or what a subclass makes of it.

    Args:
        model: ids (B, T) to scores (B, C), whose largest is the prediction.
        double_softmax: take the softmax of the logits for the logits, as the published code's baseline does.
    """

    def __init__(self, model: nn.Module, *, double_softmax: bool = False) -> None:
        super().__init__()
        self.model, self.double_softmax = model, double_softmax

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, fastamp.MixStats | None]:
        """The loss (), and the facts of the step where rows are mixed by AMPLoss, of ids (B, T) and labels (B,)."""
        scores = self.model(ids)
        return F.cross_entropy(scores.softmax(1) if self.double_softmax else scores, labels), None


class Mixing(Objective):
    """Mixup or AMP at one layer.

    Args:
        model: a model of fastamp.models.
        at: where to cut it, see its `split`.
        criterion: in train mode.
    """

    def __init__(self, model: nn.Module, at: str, criterion: fastamp.AMPLoss) -> None:
        super().__init__(model)
        self.criterion = criterion
        self.parts = cast("Model", model).split(at)  # a tuple: its modules are not registered twice

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, fastamp.MixStats]:
        """See `Objective`."""
        g, f = self.parts
        mix = self.criterion.sample(len(labels), device=labels.device)
        return self.criterion.step(f, g(ids), labels, mix=mix, context=f.context(ids, mix), return_stats=True)


class Nonlinear(Objective):
    """Guo's Non-linear Mixup, whose model gives cosines in place of logits."""

    model: NonlinearMixup

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        """See `Objective`."""
        return self.model.loss(ids, labels), None


def make_objective(model: nn.Module, config: TrainConfig, generator: torch.Generator) -> Objective:
    """The objective of a run.

    Args:
        model: a model of fastamp.models; for "nonlinear-mixup" a `NonlinearMixup`.
        config: the run.
        generator: draws λ and partners.
    """
    if isinstance(model, NonlinearMixup):
        return Nonlinear(model)
    if config.method in ("none", "double-softmax"):
        return Objective(model, double_softmax=config.method == "double-softmax")
    level, _, mode = config.method.partition("-")
    options: dict[str, Any] = {"alpha": config.alpha, "step_size": config.step_size, "mode": mode}
    if config.pass_dropout is not None:
        options["dropout"] = config.pass_dropout
    if config.reweight is not None:
        options["reweight"] = None if config.reweight == "none" else config.reweight
    if config.preset == "default":
        criterion = fastamp.AMPLoss(generator=generator, **options)
    else:
        criterion = fastamp.AMPLoss.preset(config.preset, generator=generator, **options)
    return Mixing(model, LEVELS[level], criterion)
