"""Cases of the paper's operations one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp import functional, reference
from fastamp.conformance.case import SPOILED, Outcome, Tensors, cast, fresh, laid_out, lam_dtype, mix, normal, outputs


@dataclass(frozen=True)
class OperationCase:
    """One of the paper's operations alone: `mix`, `lambda_grad`, `remix` or `select_loss`."""

    op: str
    name: str
    shape: tuple[int, ...] = (50, 30)
    layout: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)

    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Inputs on the CPU."""
        batch = self.shape[0]
        if self.op == "select_loss":
            loss = normal(generator, batch).to(dtype).abs()
            difference = torch.randn(batch, generator=generator).to(dtype) * 0.1
            difference[::5] = 0
            return {"loss": loss, "loss_adv": loss + difference, "upstream": normal(generator, batch).to(dtype)}
        return {
            # Of a size at which rounding to bfloat16, by truncation too, stays below an absolute tolerance.
            "hidden": laid_out(normal(generator, *self.shape).to(dtype) * 0.25, self.layout),
            **mix(batch, dtype, generator),
            "grad_mixed": normal(generator, *self.shape).to(dtype) * 0.1,
            "upstream": normal(generator, *self.shape).to(dtype) * 0.25,
        }

    def ours(self, inputs: Tensors) -> Outcome:
        """Outputs and the gradients that the operation has."""
        if self.op == "select_loss":
            leaves = fresh(inputs, ("loss", "loss_adv"))
            chosen, delta, mask = functional.select_loss(leaves["loss"], leaves["loss_adv"], **self.options)
            return Outcome(outputs({"loss": chosen}, leaves, inputs["upstream"]), mask, delta, inputs["loss"])
        leaves = fresh(inputs, ("hidden",))
        hidden, lam, partner, grad_mixed = leaves["hidden"], inputs["lam"], inputs["partner"], inputs["grad_mixed"]
        if self.op == "lambda_grad":
            return Outcome({"∇λ": functional.lambda_grad(grad_mixed, hidden, partner)})
        if self.op == "mix":
            mixed = functional.mix(hidden, lam, partner)
            return Outcome(outputs({"m": mixed}, leaves, inputs["upstream"]))
        lam_adv, mixed = functional.remix(hidden, lam, partner, grad_mixed, **self.options)
        return Outcome(outputs({"λ'": lam_adv, "m(λ')": mixed}, leaves, inputs["upstream"]))

    def defined(self, inputs: Tensors, dtype: torch.dtype, mask: Tensor | None) -> Outcome:
        """The same from `fastamp.reference.mix` and autograd."""
        inputs = cast(inputs, dtype)
        if self.op == "select_loss":
            leaves = fresh(inputs, ("loss", "loss_adv"))
            delta = (leaves["loss_adv"] - leaves["loss"]).detach()
            mask = delta >= 0 if mask is None else mask
            chosen = torch.where(mask, leaves["loss_adv"], leaves["loss"])
            return Outcome(outputs({"loss": chosen}, leaves, inputs["upstream"]), mask, delta, inputs["loss"])
        leaves = fresh(inputs, ("hidden",))
        hidden, partner = leaves["hidden"], inputs["partner"]
        lam = inputs["lam"].detach().requires_grad_()
        mixed = reference.mix(hidden, lam, partner)
        if self.op == "mix":
            return Outcome(outputs({"m": mixed}, leaves, inputs["upstream"]))
        (grad,) = torch.autograd.grad(mixed, lam, inputs["grad_mixed"])
        if self.op == "lambda_grad":
            return Outcome({"∇λ": grad})
        clip = self.options.get("grad_clip", 1.0)
        step = grad if clip is None else grad.clamp(-clip, clip)
        lam_adv = lam.detach() + self.options.get("step_size", 2e-3) * step
        lam_adv = lam_adv.clamp(0, 1) if self.options.get("clamp") else lam_adv
        mixed = reference.mix(hidden, lam_adv, partner)
        return Outcome(outputs({"λ'": lam_adv, "m(λ')": mixed}, leaves, inputs["upstream"]))


@dataclass(frozen=True)
class EmbeddingCase:
    """`embedding_mix`."""

    name: str
    shape: tuple[int, int, int] = (7, 12, 10)  # B, T, D
    vocabulary: int = 30
    padding_idx: int | None = None
    layout: str = "contiguous"
    op: str = "embedding_mix"

    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Inputs on the CPU; small ids are frequent."""
        batch, length, depth = self.shape
        return {
            "ids": (torch.rand(batch, length, generator=generator, dtype=torch.float64) ** 3 * self.vocabulary).long(),
            "table": laid_out((normal(generator, self.vocabulary, depth) * 0.1).to(dtype), self.layout),
            **mix(batch, dtype, generator),
            "upstream": (normal(generator, batch, length, depth) * 0.1).to(dtype),
        }

    def ours(self, inputs: Tensors) -> Outcome:
        """Mixed embeddings and the table's gradient."""
        leaves = fresh(inputs, ("table",))
        mixed = functional.embedding_mix(
            inputs["ids"], leaves["table"], inputs["lam"], inputs["partner"], padding_idx=self.padding_idx
        )
        return Outcome(outputs({"m": mixed}, leaves, inputs["upstream"]))

    def defined(self, inputs: Tensors, dtype: torch.dtype, mask: Tensor | None) -> Outcome:
        """The same from F.embedding, `fastamp.reference.mix` and autograd."""
        inputs = cast(inputs, dtype)
        leaves = fresh(inputs, ("table",))
        hidden = F.embedding(inputs["ids"], leaves["table"], self.padding_idx)
        mixed = reference.mix(hidden, inputs["lam"], inputs["partner"])
        return Outcome(outputs({"m": mixed}, leaves, inputs["upstream"]))


@dataclass(frozen=True)
class SelectionCase:
    """`select_cross_entropy`."""

    name: str
    shape: tuple[int, int] = (30, 6)  # B, C
    change: float = 0.01  # size of logits' - logits
    soft: bool = False
    weighted: bool = False
    ignored: bool = False
    spoiled: bool = False  # one class is -inf in some rows of both
    layout: str = "contiguous"
    offset: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    op: str = "select_cross_entropy"

    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Inputs on the CPU."""
        batch, classes = self.shape
        logits = 3 * normal(generator, batch, classes) + self.offset
        logits_adv = logits + self.change * normal(generator, batch, classes)
        labels = torch.randint(classes, (batch,), generator=generator)
        if self.spoiled:
            logits[: batch // 2, SPOILED] = logits_adv[: batch // 2, SPOILED] = -torch.inf
            labels[labels == SPOILED] = 0
        if self.ignored:
            labels[::3] = -100
        inputs = {
            "logits": laid_out(logits.to(dtype), self.layout),
            "logits_adv": laid_out(logits_adv.to(dtype), self.layout),
            "target": normal(generator, batch, classes).softmax(1).to(dtype) if self.soft else labels,
            **mix(batch, dtype, generator),
            "upstream": normal(generator, batch).to(lam_dtype(dtype)),
        }
        if self.weighted:
            inputs["class_weight"] = (torch.rand(classes, generator=generator) + 0.5).to(dtype)
        return inputs

    def ours(self, inputs: Tensors) -> Outcome:
        """Losses, δ and both gradients."""
        leaves = fresh(inputs, ("logits", "logits_adv"))
        arguments = (*leaves.values(), inputs["target"], inputs["lam"], inputs["partner"])
        given: dict[str, Any] = {"weight": inputs.get("class_weight"), "tie_tol": 0.0, **self.options}
        loss, delta, mask = functional.select_cross_entropy(*arguments, **given)
        return Outcome(outputs({"loss": loss, "δ": delta}, leaves, inputs["upstream"]), mask, delta, loss.detach())

    def defined(self, inputs: Tensors, dtype: torch.dtype, mask: Tensor | None) -> Outcome:
        """The same from `fastamp.reference.row_losses` and autograd."""
        inputs = cast(inputs, dtype)
        leaves = fresh(inputs, ("logits", "logits_adv"))
        lam, partner = inputs["lam"], inputs["partner"]
        smoothing = self.options.get("label_smoothing", 0.0)
        q, kept = reference.class_mass(inputs["target"], inputs["logits"], -100, smoothing)
        q = lam[:, None] * q + (1 - lam[:, None]) * q[partner]
        kept = lam * kept + (1 - lam) * kept[partner]
        weight = inputs.get("class_weight", lam.new_ones(self.shape[1]))
        kind = self.options.get("loss", "cross_entropy")
        at_lam, at_adv = (reference.row_losses(x, q, kept, weight, kind) for x in leaves.values())
        delta = (at_adv - at_lam).detach()
        mask = delta > 0 if mask is None else mask
        loss = torch.where(mask, at_adv, at_lam)
        return Outcome(outputs({"loss": loss, "δ": delta}, leaves, inputs["upstream"]), mask, delta, loss.detach())
