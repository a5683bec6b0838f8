"""What `fastamp check` runs: every operation beside its definition, on inputs that are ordinary and on some that hurt.

A case knows how to draw its inputs, how to run ours on them, and how to run the definition on them in any dtype. The
definition in float64 is the truth; in the inputs' own dtype it is what a user would compose in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastamp import functional, reference
from fastamp.conformance.case import Case, OfClasses, Outcome, Tensors, normal
from fastamp.conformance.operations import EmbeddingCase, OperationCase, SelectionCase


@dataclass(frozen=True)
class StepCase(OfClasses):
    """A whole AMP step: `amp_cross_entropy`, or with a width `linear_amp_cross_entropy`."""

    batch: int = 50
    classes: int = 6
    width: int | None = None  # D of the hidden rows
    activation: str | None = None
    dropout: float = 0.0
    scale: float = 1.0
    chunk_rows: int | None = None  # with a width and no activation
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> str:  # type: ignore[override]
        """The operation's name in fastamp.functional."""
        return "amp_cross_entropy" if self.width is None else "linear_amp_cross_entropy"

    @property
    def leaves(self) -> tuple[str, ...]:  # type: ignore[override]
        """Logits, or hidden rows and the layer behind them."""
        return ("hidden",) if self.width is None else ("hidden", "weight", "bias")

    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Inputs on the CPU."""
        batch, classes, width = self.batch, self.classes, self.width or self.classes
        inputs = {"hidden": self.rows(normal(generator, batch, width) * self.scale, dtype)}
        inputs |= self.beside(batch, classes, dtype, generator, pairing=self.options.get("pairing", "permutation"))
        if self.width is not None:
            inputs["weight"] = (normal(generator, classes, width) / width**0.5).to(dtype)
            inputs["bias"] = normal(generator, classes).to(dtype)
        if self.dropout:
            keep = torch.rand(batch, width, generator=generator) >= self.dropout
            inputs["keep"] = (keep / (1 - self.dropout)).to(dtype)
        return inputs

    def run(self, x: Tensors) -> Outcome:
        """Row losses, their mean, and λ'."""
        given = {"weight": x.get("class_weight"), "return_stats": True, **self.options}
        if self.width is not None:
            given |= {"activation": self.activation, "dropout_mask": x.get("keep"), "chunk_rows": self.chunk_rows}
        step = getattr(functional, self.op)
        arguments = [x[name] for name in (*self.leaves, "target", "lam", "partner")]
        rows, stats = step(*arguments, reduction="none", **given)
        mean, _ = step(*arguments, reduction="mean", **given)
        values = {"row losses": rows, "mean loss": mean, "λ'": stats.lam_adv}
        return Outcome(values, stats.mask, stats.delta, rows.detach())

    def define(self, x: Tensors, given: Tensors, mask: Tensor | None) -> Outcome:
        """By `fastamp.reference.amp`."""

        def head(mixed: Tensor) -> Tensor:
            if self.width is None:
                return mixed
            active = mixed.relu() if self.activation == "relu" else mixed
            return (active * x["keep"] if "keep" in x else active) @ x["weight"].mT + x["bias"]

        def run(mode: str) -> reference.Result:
            options = {**self.options, "mode": mode, "reduction": "none", "weight": given.get("class_weight")}
            options.pop("pairing", None)  # a promise, that the definition has no use for
            return reference.amp(head, x["hidden"], given["target"], given["lam"], given["partner"], **options)

        at_lam, at_adv, selected = run("mixup"), run("maxop"), run(self.options.get("mode", "amp"))
        mask = selected.mask if mask is None else mask
        # By hand, so that a run in a narrow dtype can be made to take the same branch as the truth.
        rows = torch.where(mask, at_adv.loss, at_lam.loss)
        mean = rows.sum() / _divisor(given, self.options.get("loss")).to(x["hidden"].dtype)
        values = {"row losses": rows, "mean loss": mean, "λ'": selected.lam_adv}
        return Outcome(values, mask, selected.delta, selected.row_loss)


def _divisor(inputs: Tensors, loss: str | None) -> Tensor:
    """What the sum of the rows' losses is divided by, float64."""
    target, lam, partner = inputs["target"], inputs["lam"].double(), inputs["partner"]
    mass = torch.ones_like(lam)
    if not target.is_floating_point():
        kept = target != -100
        mass = mass * kept
        if "class_weight" in inputs and loss != "binary_cross_entropy":
            mass = mass * inputs["class_weight"].double()[torch.where(kept, target, 0)]
    return (lam * mass + (1 - lam) * mass[partner]).sum()


def cases(*, quick: bool) -> Iterator[Case]:
    """All cases; the quick ones are a part of them."""
    for loss in ("cross_entropy", "binary_cross_entropy", "softmax_bce"):
        options: dict[str, Any] = {"loss": loss}
        yield from (StepCase(f"{loss} {mode}", options={**options, "mode": mode}) for mode in ("amp", "maxop", "mixup"))
        yield StepCase(f"{loss} confident", batch=7, scale=20.0, options=options)
        yield StepCase(f"{loss} -inf, strided", batch=9, spoiled=True, layout="strided", options=options)
        marked: dict[str, Any] = {"weighted": True, "ignored": True, "options": {**options, "label_smoothing": 0.1}}
        yield StepCase(f"{loss} weight, ignored, smoothing", batch=33, **marked)
        heads: dict[str, dict[str, Any]] = {
            "plain": {},
            "relu": {"activation": "relu"},
            "relu, dropout": {"activation": "relu", "dropout": 0.5},
        }
        for kind, head in heads.items():
            yield StepCase(f"{loss} {kind}", batch=24, width=20, **head, options=options)
        # Few and small rows: gradients to logits are rounded to bfloat16, by truncation too, before they are summed.
        small: dict[str, Any] = {"batch": 9, "classes": 37, "width": 20, "scale": 0.25, "chunk_rows": 4}
        yield StepCase(f"{loss} chunks", **small, options=options)
        if quick:
            continue
        yield StepCase(f"{loss} one class", batch=5, classes=1, options=options)
        yield StepCase(f"{loss} one row", batch=1, classes=7, options=options)
        yield StepCase(f"{loss} probabilities", soft=True, weighted=True, options=options)
        yield StepCase(f"{loss} common offset", offset=1000.0, options=options)
        yield StepCase(f"{loss} misaligned", classes=37, layout="misaligned", options=options)
        yield StepCase(f"{loss} many rows", batch=700, classes=5, options=options)
        yield StepCase(f"{loss} grad of the mean", options={**options, "grad_scale": "mean"})
        yield StepCase(f"{loss} no clip", scale=4.0, options={**options, "grad_clip": None, "step_size": 0.05})
        yield StepCase(f"{loss} clamp", options={**options, "clamp": True, "step_size": 0.4})
        yield StepCase(f"{loss} to the letter", options={**options, "tie_tol": 1e-3, "step_size": 0.1})
        yield StepCase(f"{loss} 300 classes", batch=12, classes=300, options=options)
        yield StepCase(f"{loss} pairs", batch=13, classes=300, options={**options, "pairing": "matching"})
        yield StepCase(f"{loss} TextCNN head", batch=50, width=300, activation="relu", dropout=0.5, options=options)
        yield StepCase(f"{loss} BERT head", batch=24, classes=5, width=768, options=options)
        yield StepCase(f"{loss} chunks of marked rows", **small, **marked)
        yield StepCase(f"{loss} chunks of one", **{**small, "chunk_rows": 1}, soft=True, options=options)
    summed = {"loss": "binary_cross_entropy", "sum_classes": True, "label_smoothing": 0.1}
    yield StepCase("binary_cross_entropy several labels, summed", soft=True, options=summed)
    if not quick:
        yield StepCase("binary_cross_entropy 5000 classes", batch=6, classes=5000, options={"loss": summed["loss"]})
        yield StepCase("cross_entropy 5000 classes", batch=6, classes=5000)
        yield StepCase("cross_entropy 20000 classes", batch=4, classes=20000)
        yield StepCase("cross_entropy chunks of 5000 classes", batch=5, classes=5000, width=9, soft=True, chunk_rows=2)
        yield StepCase("cross_entropy pairs of 20000 classes", batch=5, classes=20000, options={"pairing": "matching"})
    yield OperationCase("mix", "rows of 30")
    yield OperationCase("mix", "words, strided", shape=(7, 5, 12), layout="strided")
    yield OperationCase("lambda_grad", "rows of 30")
    yield OperationCase("lambda_grad", "words, strided", shape=(7, 5, 12), layout="strided")
    yield OperationCase("remix", "rows of 30")
    yield OperationCase("remix", "clamp, no clip", options={"step_size": 0.5, "grad_clip": None, "clamp": True})
    yield OperationCase("select_loss", "a fifth of ties")
    if not quick:
        yield OperationCase("mix", "long rows", shape=(3, 40_000))
        yield OperationCase("lambda_grad", "long rows", shape=(3, 40_000))
        yield OperationCase("remix", "long rows", shape=(3, 40_000))
    yield EmbeddingCase("words")
    yield EmbeddingCase("padding, strided", padding_idx=0, layout="strided")
    for loss in ("cross_entropy", "binary_cross_entropy", "softmax_bce"):
        options = {"loss": loss}
        yield SelectionCase(loss, options=options)
        yield SelectionCase(f"{loss} -inf, strided", spoiled=True, layout="strided", options=options)
        smooth = {**options, "label_smoothing": 0.1}
        yield SelectionCase(f"{loss} weight, ignored, smoothing", weighted=True, ignored=True, options=smooth)
        if quick:
            continue
        yield SelectionCase(f"{loss} probabilities", soft=True, weighted=True, options=options)
        yield SelectionCase(f"{loss} far apart", change=2.0, options=options)
        yield SelectionCase(f"{loss} common offset", offset=1000.0, options=options)
        yield SelectionCase(f"{loss} one class", shape=(5, 1), options=options)
        yield SelectionCase(f"{loss} misaligned", shape=(12, 300), layout="misaligned", options=options)
    if not quick:
        yield SelectionCase("cross_entropy 5000 classes", shape=(6, 5000))
        yield EmbeddingCase("one word", shape=(20, 30, 5), vocabulary=1)
        yield EmbeddingCase("wide", shape=(3, 20, 768), vocabulary=20)
