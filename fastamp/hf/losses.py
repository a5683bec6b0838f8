"""AMP on a model's logits inside transformers' Trainer, and what the Trainer must know of a criterion."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from fastamp.loss import AMPLoss
from fastamp.mixing import MixStats

LOG_KEYS = ("mix/lam_shift", "mix/mask_rate", "mix/grad_abs", "mix/delta")


def row_sums(stats: MixStats) -> Tensor:
    """Sums over the rows of a step of |λ'-λ|, mask, |∇λ| and δ, and the number of rows: (5,) float32, on the device."""
    rows = [(stats.lam_adv - stats.lam).abs(), stats.mask, stats.grad.abs(), stats.delta, torch.ones_like(stats.lam)]
    return torch.stack([row.float() for row in rows]).sum(1)


class SentLoss(TrainerCallback):
    """What `sent_loss` returns: a loss function for the Trainer, and a callback for logs and checkpoints."""

    def __init__(self, criterion: AMPLoss) -> None:
        if not isinstance(criterion, AMPLoss):
            raise TypeError(f"criterion must be a fastamp.AMPLoss, got {type(criterion).__name__}")
        check_counts(criterion)
        self.criterion = criterion
        self.resume_from: str | None = None
        self.reached = False  # by a step of the training that runs
        self._is_callback = self._has_warned = False
        self._sums: Tensor | None = None

    # As compute_loss_func

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a batch: AMP where gradients are recorded, plain cross-entropy under torch.no_grad().

        Args:
            outputs: the model's outputs; their logits are (B, C).
            labels: (B,) integer class indices; for loss="binary_cross_entropy" also (B, C) floating point in [0, 1].
            num_items_in_batch: labels of all batches whose gradients are added up; divides the summed losses, a
                C-th of it where labels are (B, C).

        Returns:
            (), float32.

        Raises:
            TypeError, ValueError: labels or logits that are not those of a classification by the criterion's loss.
        """
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        labels = checked_labels(labels, self.criterion)
        num_items = checked_items(num_items_in_batch, labels)
        if logits.dim() != 2 or (logits.shape[1] == 1 and not is_binary(self.criterion)):
            raise ValueError(
                f"AMP needs logits (B, C) of a classification with C > 1 labels, got {tuple(logits.shape)}"
                + ("; num_labels=1 is a regression head" if logits.shape[-1] == 1 else "")
            )
        self.criterion.to(logits.device)
        if not torch.is_grad_enabled():
            with mode_of(self.criterion, False):
                return self.criterion(logits, labels, num_items=num_items)
        self.reached = True
        if not self._is_callback and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "the loss is not among the Trainer's callbacks, so arguments are not checked, nothing is logged and no "
                "state of the criterion is saved: pass callbacks=[loss] beside compute_loss_func=loss",
                UserWarning,
                stacklevel=2,
            )
        with mode_of(self.criterion, True):
            loss, stats = self.criterion(logits, labels, num_items=num_items, return_stats=True)
        self.record(row_sums(stats))
        return loss

    # Logs

    def record(self, sums: Tensor) -> None:
        """Add a step's `row_sums`; nothing is read back."""
        self._sums = sums if self._sums is None else self._sums + sums

    def pop_logs(self) -> dict[str, float]:
        """Means over the rows of all processes since the last call; empty if there were none. Collective."""
        if self._sums is None:
            return {}
        sums, self._sums = self._sums, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        *totals, count = sums.tolist()
        means = {key: total / count for key, total in zip(LOG_KEYS, totals, strict=True)} if count else {}
        if self.criterion.policy.mode == "mixup":
            means.pop("mix/grad_abs", None)  # plain Mixup at a layer does not compute ∇λ
        return means

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the means to the log of a training step, for the history and for callbacks that come later."""
        if logs is not None and "loss" in logs and LOG_KEYS[0] not in logs:
            means = self.pop_logs()
            logs.update(means)
            if state.log_history:
                state.log_history[-1].update(means)

    # Checks and checkpoints

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the arguments and the model; when training resumes, restore the criterion."""
        self._is_callback, self.reached = True, False
        check_counts(self.criterion)
        check_arguments(args, self.criterion)
        check_head(model, self.criterion)
        self.criterion.to(args.device)
        self._sums = None
        if state.global_step > 0:
            self._restore(args, state.global_step)
        check_generators(self.criterion)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """RuntimeError if the criterion took no part in the training: nothing else would show that."""
        if not self.reached:
            raise RuntimeError(
                "a training step has ended without the criterion: give the Trainer compute_loss_func=loss beside "
                "callbacks=[loss]; a Trainer whose own compute_loss does not call that function cannot train with it"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the criterion's generator and window beside the Trainer's checkpoint, on every process its own."""
        folder = _checkpoint(args, state.global_step)
        if self._has_state() and os.path.isdir(folder):
            torch.save(self.criterion.state_dict(), os.path.join(folder, _file_name(args)))

    def _has_state(self) -> bool:
        return self.criterion.generator is not None or self.criterion.reweight is not None

    def _restore(self, args: TrainingArguments, step: int) -> None:
        folders = [self.resume_from, args.resume_from_checkpoint, _checkpoint(args, step)]
        paths = [os.path.join(folder, _file_name(args)) for folder in folders if isinstance(folder, str)]
        path = next((path for path in paths if os.path.isfile(path)), None)
        if not self._has_state():
            if path is not None:
                warnings.warn(
                    f"{path} holds the state of a generator or of a window, which this criterion has not: it is left "
                    "aside, and training does not continue as it would have",
                    UserWarning,
                    stacklevel=2,
                )
            return
        if path is not None:
            from fastamp.training.checkpoint import load_tensors

            state = load_tensors(Path(path), "delete it to start the criterion over")
            try:
                self.criterion.load_state_dict(state)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"{path} holds the state of another criterion than {self.criterion!r}: {error}. Resume with the "
                    "generator, reweight and weight that the checkpoint was made with, or delete the file to start the "
                    "criterion over"
                ) from error
            return
        warnings.warn(
            f"no state of the criterion in {', '.join(paths)}: its generator starts over. It is saved where "
            "callbacks=[loss] was given; pass TrainingArguments(resume_from_checkpoint=...) if it lies elsewhere",
            UserWarning,
            stacklevel=2,
        )


def sent_loss(criterion: AMPLoss) -> SentLoss:
    """AMP on the logits (SentAMP) for transformers' Trainer, with no subclass.

        loss = fastamp.hf.sent_loss(fastamp.AMPLoss())
        trainer = Trainer(model, args, compute_loss_func=loss, callbacks=[loss], ...)

    In training it is AMP on the model's logits, which for a model that ends in a linear layer is mixing that layer's
    input, after its dropout. In evaluation and prediction it is plain cross-entropy, whatever mode the criterion is
    in. The summed losses are divided by the Trainer's count of rows, so that accumulated gradients are right. A model
    of several labels a row (problem_type="multi_label_classification") takes AMPLoss(loss="binary_cross_entropy").

    As a callback it checks the arguments, adds mix/lam_shift (mean |λ'-λ|), mix/mask_rate, mix/grad_abs (not for
    mode="mixup") and mix/delta to the training logs, and saves and restores a criterion with a generator or a window
    of its own.
    Reporters such as TensorBoard come before it and do not see these logs; `AMPTrainer(mix_at="logits")`, which does
    the same, has them everywhere. Both arguments are needed: a callback alone is an error after the first step, and
    a loss function alone a warning.

    Accumulated batches are one batch, but for reweight="moving": its window moves at every one of them.

    Args:
        criterion: with reduction="mean". Label smoothing is the criterion's: TrainingArguments.label_smoothing_factor
            has no effect on a loss function of one's own, so the callback refuses one that differs. With class
            weights the divisor is still the number of rows.

    Returns:
        A callable (outputs, labels, num_items_in_batch) that is a TrainerCallback as well.

    Raises:
        TypeError, ValueError: no AMPLoss, or one whose reduction or ignore_index the Trainer does not count by.
    """
    return SentLoss(criterion)


def is_binary(criterion: AMPLoss) -> bool:
    """Whether every class is a question of its own, as in multi-label classification."""
    return criterion.policy.loss == "binary_cross_entropy"


def checked_labels(labels: Any, criterion: AMPLoss) -> Tensor:
    """(B,) int64 of the Trainer's labels, or (B, C) floating point; errors say why others would be wrong."""
    if not isinstance(labels, Tensor):
        raise ValueError("AMP needs labels in every training batch, under the key 'labels'")
    if labels.is_floating_point() and is_binary(criterion):
        return labels
    if labels.is_floating_point():
        rows = labels.shape[0] if labels.dim() > 0 else 1
        counted = f"the Trainer would count {labels.numel()} items for {rows} rows, and " * (labels.numel() != rows)
        raise TypeError(
            f"labels are {labels.dtype}: {counted}transformers' models take float labels for multi-label "
            "classification and change to a sigmoid loss, which is AMPLoss(loss='binary_cross_entropy'). Give that, or "
            "integer class indices; for other soft labels call fastamp.AMPLoss in a loop of your own"
        )
    if labels.dim() != 1 and labels.shape[1:].numel() != 1:
        raise ValueError(f"labels must be (B,) class indices, got shape {tuple(labels.shape)}")
    return labels.reshape(-1).long()


def checked_items(num_items: Any, labels: Tensor) -> Any:
    """The Trainer's count as one of rows: it counts every class of (B, C). A ValueError for nn.DataParallel's."""
    if isinstance(num_items, Tensor) and num_items.dim() > 0:
        raise ValueError(
            f"num_items_in_batch has shape {tuple(num_items.shape)}, as under nn.DataParallel, which is not supported: "
            "launch one process per device with torchrun"
        )
    return num_items / labels.shape[1] if num_items is not None and labels.dim() == 2 else num_items


def check_counts(criterion: AMPLoss) -> None:
    """ValueError for options by which the criterion would not count rows as the Trainer does."""
    if criterion.reduction != "mean":
        raise ValueError(
            "the Trainer needs a criterion with reduction='mean': it accumulates gradients by dividing by its own "
            f"count of rows; got reduction={criterion.reduction!r}"
        )
    if criterion.ignore_index != -100:
        raise ValueError(
            "the Trainer counts the labels that are not -100, so the criterion must ignore -100 as well; got "
            f"ignore_index={criterion.ignore_index}"
        )


def check_arguments(args: TrainingArguments, criterion: AMPLoss, *, at_a_layer: bool = False) -> None:
    """ValueError for a Trainer's arguments that would be ignored or are not supported, a warning for some others.

    Those change the method. `at_a_layer`: mixing is done inside the model, by `AMPLoss.step`.
    """
    smoothing = criterion.policy.label_smoothing
    if args.label_smoothing_factor not in (0, smoothing):
        raise ValueError(
            f"TrainingArguments.label_smoothing_factor={args.label_smoothing_factor} would not be applied, since the "
            f"criterion smooths labels (by {smoothing}): set AMPLoss(label_smoothing=...) instead"
        )
    if args.n_gpu > 1:
        raise ValueError(f"nn.DataParallel over {args.n_gpu} devices is not supported: launch with torchrun")
    if at_a_layer:
        _check_checkpointing(args)
    if criterion.reweight is not None and args.gradient_accumulation_steps > 1:
        # This very line, wherever the check is called from, so that Python shows the warning once.
        warnings.warn(
            f"reweight={criterion.reweight!r} moves its window at each of the {args.gradient_accumulation_steps} "
            "batches whose gradients are added up, so that they are not weighted as one large batch would be",
            UserWarning,
            stacklevel=1,
        )


def _check_checkpointing(args: TrainingArguments) -> None:
    """ValueError for activation checkpoints that the step's backward pass to the hidden state cannot go through."""
    # The name was changed within transformers 5.
    kind = "activation" if hasattr(args, "activation_checkpointing") else "gradient"
    options = getattr(args, f"{kind}_checkpointing_kwargs", None)
    if not getattr(args, f"{kind}_checkpointing", False) or not isinstance(options, dict):
        return  # transformers' own default is use_reentrant=False
    passed_on = options.keys() - {"every_n_layers", "offload"}
    if passed_on and options.get("use_reentrant") in (None, True):  # torch takes None for True
        raise ValueError(
            f"mixing at a layer needs checkpoints that are not reentrant: set {kind}_checkpointing_kwargs="
            f"{ {**options, 'use_reentrant': False} } in TrainingArguments"
        )


def check_generators(criterion: AMPLoss) -> None:
    """ValueError if two processes would draw the same λ from generators of their own. Collective."""
    distributed = torch.distributed
    if criterion.generator is None or not (distributed.is_available() and distributed.is_initialized()):
        return
    states: list[bytes] = [b""] * distributed.get_world_size()
    distributed.all_gather_object(states, bytes(criterion.generator.get_state().tolist()))
    if len(set(states)) < len(states):
        raise ValueError(
            "the criterion's generator has the same state in two processes, which would mix with the same λ: seed it "
            "with the process's number as well, or leave it out: from the default generator every process draws its own"
        )


def check_head(model: Any, criterion: AMPLoss) -> None:
    """ValueError for a model that is configured for something else than the criterion's kind of classification."""
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    binary = is_binary(criterion)
    if problem not in (None, "single_label_classification", "multi_label_classification" if binary else None):
        advice = "; give AMPLoss(loss='binary_cross_entropy')" * (problem == "multi_label_classification")
        raise ValueError(f"AMP mixes single-label classifications; the model is configured for {problem!r}{advice}")
    if getattr(config, "num_labels", 2) == 1 and not binary:
        raise ValueError("AMP mixes classifications; a model with num_labels=1 is a regression")


@contextlib.contextmanager
def mode_of(criterion: AMPLoss, training: bool) -> Iterator[None]:
    """Put the criterion into train or eval mode, and back."""
    before = criterion.training
    criterion.train(training)
    try:
        yield
    finally:
        criterion.train(before)


def _checkpoint(args: TrainingArguments, step: int) -> str:
    return os.path.join(str(args.output_dir), f"checkpoint-{step}")


def _file_name(args: TrainingArguments) -> str:
    return "mixing_state.pt" if args.world_size <= 1 else f"mixing_state_{args.process_index}.pt"
