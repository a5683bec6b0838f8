"""Cases of the paper's operations one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp import functional, reference
from fastamp.conformance.case import Case, OfClasses, Outcome, Tensors, laid_out, mix, normal


@dataclass(frozen=True)
class OperationCase(Case):
    """One of the paper's operations alone: `mix`, `lambda_grad`, `remix` or `select_loss`."""

    op: str
    name: str
    shape: tuple[int, ...] = (50, 30)
    layout: str = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the operation differentiates by."""
        return ("loss", "loss_adv") if self.op == "select_loss" else ("hidden",)

    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Inputs on the CPU."""
        batch = self.shape[0]
        if self.op == "select_loss":
            loss = normal(generator, batch).to(dtype).abs()
            difference = torch.randn(batch, generator=generator).to(dtype) * 0.1
            difference[::5] = 0
            return {"loss": loss, "loss_adv": loss + difference, "upstream": normal(generator, batch).to(dtype)}
        return {
            # Small enough for rounding to bfloat16, by truncation as well, to stay below an absolute tolerance.
            "hidden": laid_out(normal(generator, *self.shape).to(dtype) * 0.25, self.layout),
            **mix(batch, dtype, generator),
            "grad_mixed": normal(generator, *self.shape).to(dtype) * 0.1,
            "upstream": normal(generator, *self.shape).to(dtype) * 0.25,
        }

    def run(self, x: Tensors) -> Outcome:
        """Runs it."""
        if self.op == "select_loss":
            chosen, delta, mask = functional.select_loss(x["loss"], x["loss_adv"], **self.options)
            return Outcome({"loss": chosen}, mask, delta, x["loss"])
        if self.op == "lambda_grad":
            return Outcome({"∇λ": functional.lambda_grad(x["grad_mixed"], x["hidden"], x["partner"])})
        if self.op == "mix":
            return Outcome({"m": functional.mix(x["hidden"], x["lam"], x["partner"])})
        lam_adv, mixed = functional.remix(x["hidden"], x["lam"], x["partner"], x["grad_mixed"], **self.options)
        return Outcome({"λ'": lam_adv, "m(λ')": mixed})

    def define(self, x: Tensors, given: Tensors, mask: Tensor | None) -> Outcome:
        """By `fastamp.reference.mix` and autograd."""
        if self.op == "select_loss":
            delta = (x["loss_adv"] - x["loss"]).detach()
            mask = delta >= 0 if mask is None else mask
            return Outcome({"loss": torch.where(mask, x["loss_adv"], x["loss"])}, mask, delta, x["loss"])
        lam = x["lam"].detach().requires_grad_()
        mixed = reference.mix(x["hidden"], lam, x["partner"])
        if self.op == "mix":
            return Outcome({"m": mixed})
        (grad,) = torch.autograd.grad(mixed, lam, x["grad_mixed"])
        if self.op == "lambda_grad":
            return Outcome({"∇λ": grad})
        clip = self.options.get("grad_clip", 1.0)
        step = grad if clip is None else grad.clamp(-clip, clip)
        lam_adv = lam.detach() + self.options.get("step_size", 2e-3) * step
        lam_adv = lam_adv.clamp(0, 1) if self.options.get("clamp") else lam_adv
        return Outcome({"λ'": lam_adv, "m(λ')": reference.mix(x["hidden"], lam_adv, x["partner"])})


@dataclass(frozen=True)
class EmbeddingCase(Case):
    """`embedding_mix`."""

    name: str
    shape: tuple[int, int, int] = (7, 12, 10)  # B, T, D
    vocabulary: int = 30
    padding_idx: int | None = None
    layout: str = "contiguous"
    op = "embedding_mix"
    leaves = ("table",)

    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Inputs on the CPU; small ids are frequent."""
        batch, length, depth = self.shape
        return {
            "ids": (torch.rand(batch, length, generator=generator, dtype=torch.float64) ** 3 * self.vocabulary).long(),
            "table": laid_out((normal(generator, self.vocabulary, depth) * 0.1).to(dtype), self.layout),
            **mix(batch, dtype, generator),
            "upstream": (normal(generator, batch, length, depth) * 0.1).to(dtype),
        }

    def run(self, x: Tensors) -> Outcome:
        """Runs it."""
        given = (x["ids"], x["table"], x["lam"], x["partner"])
        return Outcome({"m": functional.embedding_mix(*given, padding_idx=self.padding_idx)})

    def define(self, x: Tensors, given: Tensors, mask: Tensor | None) -> Outcome:
        """By F.embedding, `fastamp.reference.mix` and autograd."""
        hidden = F.embedding(x["ids"], x["table"], self.padding_idx)
        return Outcome({"m": reference.mix(hidden, x["lam"], x["partner"])})


@dataclass(frozen=True)
class SelectionCase(OfClasses):
    """`select_cross_entropy`."""

    shape: tuple[int, int] = (30, 6)  # B, C
    change: float = 0.01  # size of logits' - logits
    options: dict[str, Any] = field(default_factory=dict)
    op = "select_cross_entropy"
    leaves = ("logits", "logits_adv")

    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Inputs on the CPU."""
        logits = 3 * normal(generator, *self.shape)
        logits_adv = logits + self.change * normal(generator, *self.shape)
        rows = {"logits": self.rows(logits, dtype), "logits_adv": self.rows(logits_adv, dtype)}
        return {**rows, **self.beside(*self.shape, dtype, generator)}

    def run(self, x: Tensors) -> Outcome:
        """Losses and δ."""
        given: dict[str, Any] = {"weight": x.get("class_weight"), "tie_tol": 0.0, **self.options}
        arguments = (x["logits"], x["logits_adv"], x["target"], x["lam"], x["partner"])
        loss, delta, mask = functional.select_cross_entropy(*arguments, **given)
        return Outcome({"loss": loss, "δ": delta}, mask, delta, loss.detach())

    def define(self, x: Tensors, given: Tensors, mask: Tensor | None) -> Outcome:
        """By `fastamp.reference.row_losses` and autograd."""
        lam, partner = x["lam"], x["partner"]
        kind, smoothing = self.options.get("loss", "cross_entropy"), self.options.get("label_smoothing", 0.0)
        masses = reference.class_mass(x["target"], x["logits"], -100, smoothing, kind)
        q, kept = (lam[:, None] * mass + (1 - lam[:, None]) * mass[partner] for mass in masses)
        weight = x.get("class_weight", lam.new_ones(self.shape[1]))
        at_lam, at_adv = (reference.row_losses(x[name], q, kept, weight, kind) for name in self.leaves)
        delta = (at_adv - at_lam).detach()
        mask = delta > 0 if mask is None else mask
        loss = torch.where(mask, at_adv, at_lam)
        return Outcome({"loss": loss, "δ": delta}, mask, delta, loss.detach())
