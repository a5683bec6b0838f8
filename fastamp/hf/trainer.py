"""transformers' Trainer with AMP at any layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fastamp.hf import losses
from fastamp.hf.losses import SentLoss
from fastamp.hf.splitting import split
from fastamp.hf.views import unwrapped
from fastamp.loss import AMPLoss
from fastamp.mixing import Mix


class _MixedLoss(SentLoss):
    """The loss function of `AMPTrainerMixin`: a mixed pass has put the loss into the outputs already."""

    mixed_pass: MixedPass | None = None

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if self.mixed_pass is None or "mixing_sums" not in outputs:
            return super().__call__(outputs, labels, num_items_in_batch)
        outputs = self.mixed_pass.pop_uncast() or outputs
        self.record(outputs["mixing_sums"])
        return outputs["loss"]


class MixedPass:
    """A training step's whole computation, to be run as the forward pass of a model that may be wrapped.

    FSDP2's mixed precision casts the arguments and the results of a forward pass, and bfloat16 can hold neither λ'
    nor a count of rows. So the λ, labels and count of the step are attributes, not arguments, and the results are kept
    as they were; its hooks are on those.
    """

    def __init__(self, criterion: AMPLoss, model: nn.Module, mix_at: str | int) -> None:
        self.criterion, self.model, self.inner = criterion, model, unwrapped(model)
        self.g, self.f = split(model, mix_at)
        self.sharded = hasattr(model, "unshard")
        # torch.compile cannot trace the gathering of sharded parameters in the middle of a pass.
        apart = self.sharded and self.inner is not model
        self.run = torch.compiler.disable(self.forward) if apart else self.forward
        self._uncast: dict[str, Tensor] | None = None

    def prepare(self, labels: Tensor, mix: Mix, num_items: Any) -> None:
        """Take what the next pass needs beside the model's inputs."""
        self.labels, self.mix, self.num_items = labels, mix, num_items

    def pop_uncast(self) -> dict[str, Tensor] | None:
        """The results of the last pass as they were, if something may have cast them since."""
        uncast, self._uncast = self._uncast, None
        return uncast

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """The loss and the sums for the logs, of the model's inputs (B, ...)."""
        loss, stats = self.criterion.step(
            self.f,
            self.g(**inputs),
            self.labels,
            mix=self.mix,
            context=self.f.context(inputs, self.mix),
            num_items=self.num_items,
            return_stats=True,
        )
        # A plain dict: wrappers do not find the tensors in any other.
        results = {"loss": loss, "mixing_sums": losses.row_sums(stats)}
        if self.sharded:
            self._uncast = dict(results)
        return results


class AMPTrainerMixin:
    """Gives a transformers.Trainer AMP at any layer: class MyTrainer(AMPTrainerMixin, Trainer).

    A training step is one call of the (wrapped) model, whose forward pass is g, then `AMPLoss.step` on f of
    `split(model, mix_at)`; so DistributedDataParallel, FSDP2, torch.compile and autocast see one forward pass, as
    always. Evaluation and prediction run the model as it is, with plain cross-entropy. Logs, checkpoints and label
    smoothing are as in `sent_loss`; reporters see the logs as well.

    A training step that mixes at a layer has no logits of the rows as they are: the outputs of
    `compute_loss(..., return_outputs=True)` are then "loss" and "mixing_sums" and nothing else. `log` is collective: of
    a training step it adds up the sums of all processes, so all of them have to call it, as the Trainer does.

    Args:
        *args: as Trainer has them.
        criterion: with reduction="mean".
        mix_at: where to mix, as in `split`, or "logits", which is `sent_loss`.
        **kwargs: as Trainer has them; compute_loss_func is taken by the criterion.

    Raises:
        TypeError, ValueError: a model or a place that `split` does not take, a head that is no
            classification by the criterion's loss, arguments that would be ignored, parallelism that is not by whole
            rows.
    """

    criterion: AMPLoss
    mix_at: str | int

    def __init__(self, *args: Any, criterion: AMPLoss, mix_at: str | int = "embeddings", **kwargs: Any) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func and criterion are both a loss: give one of them")
        self._loss = _MixedLoss(criterion)
        trainer: Any = self
        super().__init__(*args, compute_loss_func=self._loss, **kwargs)  # type: ignore[call-arg]
        losses.check_arguments(trainer.args, criterion, at_a_layer=mix_at != "logits")
        losses.check_head(unwrapped(trainer.model), criterion)
        parallelism = getattr(trainer.accelerator, "parallelism_config", None)
        if any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")):
            raise ValueError("AMPTrainer does not run under tensor, context or sequence parallelism")
        if mix_at != "logits":
            split(trainer.model, mix_at)
        self.criterion, self.mix_at = criterion, mix_at
        self._pass: MixedPass | None = None
        trainer.add_callback(self._loss)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train; a criterion with a state of its own is restored as well."""
        self._loss.resume_from = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        # Modules of the model may have been replaced since the last call, and a pass holds those that it was made of.
        self._pass = self._loss.mixed_pass = None
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As Trainer.compute_loss; where gradients are recorded the model's pass is the mixed one."""
        trainer: Any = super()
        if self.mix_at == "logits" or not torch.is_grad_enabled():
            return trainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = losses.checked_labels(inputs.get("labels"), self.criterion)
        if self._pass is None or self._pass.model is not model:
            self._pass = self._loss.mixed_pass = MixedPass(self.criterion, model, self.mix_at)
        mix = self.criterion.sample(len(labels), device=labels.device)
        self._pass.prepare(labels, mix, losses.checked_items(num_items_in_batch, labels))
        self._loss.reached = True
        # accelerate puts autocast into the forward that the mixed pass stands in for.
        autocast = self.accelerator.autocast()  # type: ignore[attr-defined]
        with losses.mode_of(self.criterion, True), autocast, forward_of(self._pass.inner, self._pass.run):
            return trainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer.log, with mix/... in the logs of training steps. Collective for these."""
        if "loss" in logs and losses.LOG_KEYS[0] not in logs:
            logs.update(self._loss.pop_logs())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class AMPTrainer(AMPTrainerMixin, Trainer):
    """transformers.Trainer with AMP at any layer; see `AMPTrainerMixin`.

    trainer = AMPTrainer(model, args, criterion=fastamp.AMPLoss(), mix_at="embeddings", train_dataset=...)
    """


@contextlib.contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of the module, and of its wrappers, run another forward for a while."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
