"""AMPLoss: the drop-in criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastamp import reference
from fastamp.autograd import refuse_torch_func
from fastamp.checks import (
    check_class_weight,
    check_context,
    check_hidden,
    check_logits,
    check_mix,
    check_outputs,
    check_row_target,
    check_target,
    checked_num_items,
)
from fastamp.layer_step import Hidden, layer_step
from fastamp.mixing import Mix, MixStats, draw
from fastamp.policy import check_choice, check_number, checked_policy
from fastamp.randomness import random_states_kept_on_error
from fastamp.reduction import divided, divisors
from fastamp.reweighting import moving_weights, new_window
from fastamp.steps import amp_cross_entropy_step, host_facts

PRESETS: dict[str, dict[str, Any]] = {
    "paper": reference.PAPER,
    "official": {**reference.OFFICIAL, "dropout": "redrawn"},
}


class AMPLoss(nn.Module):
    """The Adversarial Mixing Policy as a criterion: use it in place of nn.CrossEntropyLoss.

    In train mode the rows of a batch are mixed in pairs, and every row's mixing coefficient λ takes one step of
    size ε towards higher loss (Liu et al., EMNLP 2021, Eq. 10-21):

        λ'_r = λ_r + ε·clip(∂ℓ_r/∂λ, -1, 1),    ℓ_r = λ_r CE(·, y_r) + (1-λ_r) CE(·, y_π(r)),
        the loss at λ' where it is larger, else the loss at λ.

    In eval mode it is nn.CrossEntropyLoss. `criterion(model(x), y)` is SentAMP for any model that ends in an affine
    layer: mixing logits is mixing that layer's input. Where a dropout stands before that layer, this mixes after
    the dropout, each row under its own mask; to mix before it, as the paper's CNN does, use `step`, which mixes at any
    layer, or `fastamp.functional.linear_amp_cross_entropy`.

    Args:
        alpha: λ ~ Beta(alpha, alpha), > 0.
        step_size: ε, >= 0.
        mode: "amp", "maxop" (no comparison: always the loss at λ') or "mixup" (plain Mixup).
        loss: "cross_entropy", or "softmax_bce": binary cross-entropy of the softmax summed over classes, as in the
            published code. Eval mode is cross-entropy for both.
        grad_clip: two-sided bound on ∂ℓ/∂λ, > 0, or None.
        grad_scale: "row" differentiates each row's loss; "mean" the batch mean, which divides the step by about B.
        clamp: keep λ' inside [0, 1].
        reweight: None, or "moving": rows whose δ = ℓ' - ℓ exceeds the mean μ of the positive δ of the last five
            steps weigh 1 + (δ-μ)/σ.
        dropout: "shared": both passes of `step` drop out the same; "redrawn": each draws anew, as the published
            code does.
        tie_tol: a difference |δ| up to this counts as a tie and takes ℓ'. "auto": 4 ulp of the loss in the dtype
            it was computed in. 0.0 is Eq. 21 to the letter.
        pairing: "permutation": partners are a uniform random permutation; "matching": a random perfect matching, in
            which two rows are each other's partners. On a GPU one kernel then reads both once for their two mixtures,
            where a permutation needs three rows for one.
        weight: (C,) class weights, as in nn.CrossEntropyLoss.
        ignore_index: a class index whose side of the mixture contributes nothing.
        label_smoothing: in [0, 1], as in nn.CrossEntropyLoss.
        reduction: "mean" (over the kept, class-weighted mass Σ_r λ_r w(y_r) + (1-λ_r) w(y_π(r))), "sum", "none".
        generator: source of λ and partners; its state is part of state_dict. Default: torch's global one, from which
            the ranks of torch.distributed draw independently even if seeded alike. Your own is taken as it is: seed
            it differently on every rank that has other data, and alike on ranks that share a batch; of a CPU
            generator's seed torch takes the low 32 bits only.
            torch.compile(fullgraph=True) cannot trace a draw from a generator of your own: use the default there, or
            pass `mix`.

    Raises:
        TypeError, ValueError: an option that is not one of these, by name.
    """

    weight: Tensor | None
    window: Tensor
    window_step: Tensor

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        step_size: float = 2e-3,
        mode: str = "amp",
        loss: str = "cross_entropy",
        grad_clip: float | None = 1.0,
        grad_scale: str = "row",
        clamp: bool = False,
        reweight: str | None = None,
        dropout: str = "shared",
        tie_tol: float | str = "auto",
        pairing: str = "permutation",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.policy = checked_policy(
            mode=mode,
            loss=loss,
            step_size=step_size,
            grad_clip=grad_clip,
            grad_scale=grad_scale,
            clamp=clamp,
            tie_tol=tie_tol,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            pairing=pairing,
        )
        check_number("alpha", alpha, low=0.0, open_low=True)
        check_choice("reduction", reduction)
        check_choice("reweight", reweight)
        check_choice("dropout", dropout)
        if weight is not None:
            if not isinstance(weight, Tensor) or weight.dim() != 1:
                raise TypeError(f"weight must be a (C,) tensor or None, got {weight!r}")
            check_class_weight(weight, len(weight), weight.device)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
        self.alpha, self.reduction, self.reweight = float(alpha), reduction, reweight
        self.dropout = dropout
        self.generator = generator
        self.register_buffer("weight", weight)
        if reweight is not None:
            self.register_buffer("window", new_window())
            self.register_buffer("window_step", torch.zeros((), dtype=torch.int64))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> AMPLoss:
        """The criterion as the paper writes it ("paper") or as its published code computes it ("official").

        Args:
            name: "paper" or "official".
            **overrides: any argument of AMPLoss; these win.

        Raises:
            ValueError: an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}; got {name!r}")
        return cls(**{**PRESETS[name], **overrides})

    def sample(self, batch_size: int, *, device: torch.device | str) -> Mix:
        """Draw λ and partners for a batch.

        Args:
            batch_size: B >= 0.
            device: where the result lies; random numbers come from `generator`, on its own device, if there is one.

        Returns:
            Mix(lam (B,) float32, partner (B,) int64).

        Raises:
            TypeError, ValueError: batch_size is no int, or negative.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, torch.SymInt)):
            raise TypeError(f"batch_size must be an int, got {batch_size!r}")
        if batch_size < 0:
            raise ValueError(f"batch_size must be >= 0, got {batch_size}")
        return draw(batch_size, alpha=self.alpha, pairing=self.policy.pairing, device=device, generator=self.generator)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        mix: Mix | None = None,
        num_items: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, MixStats]:
        """The loss of a batch; train mode mixes, eval mode is nn.CrossEntropyLoss on the rows as they are.

        Args:
            logits: (B, C) float16/bfloat16/float32/float64, unmixed.
            target: (B,) int64 class indices, or (B, C) floating-point probabilities.
            mix: λ and partners; drawn if not given. Not taken in eval mode.
            num_items: replaces the divisor of the mean (gradient accumulation): a number or a 0-d tensor.
            return_stats: also return a `MixStats`; train mode only.

        Returns:
            The loss, () or (B,): float32 (float64 for float64 logits) in train mode, nn.CrossEntropyLoss's dtype in
            eval mode. With return_stats a tuple (loss, MixStats).

        Raises:
            TypeError, ValueError: wrong shapes, dtypes or devices; on the CPU also values out of range. The
                criterion's state is then as before.
        """
        check_logits("logits", logits)
        check_target(target, logits)
        check_class_weight(self.weight, logits.shape[1], logits.device)
        num_items = checked_num_items(num_items, logits.device)
        if not self.training:
            self._check_eval(mix, return_stats)
            return self._plain(logits, target, num_items)
        refuse_torch_func("AMPLoss in train mode")
        self._check_train(mix, logits.shape[0], logits.device)
        facts = host_facts(logits, target, self.policy)  # raises for a bad label, before anything is drawn
        lam, partner = self.sample(logits.shape[0], device=logits.device) if mix is None else mix
        loss, stats = amp_cross_entropy_step(
            logits,
            target,
            lam,
            partner,
            self.weight,
            self.policy,
            self.reduction if self.reweight is None else "none",
            num_items,
            facts,
            return_stats=return_stats or self.reweight is not None,
        )
        if self.reweight is not None and stats is not None:
            divisor: Tensor | float = 1.0
            if self.reduction != "none":
                divisor, _ = divisors(
                    target, stats.lam, partner, self.weight, self.policy, self.reduction, num_items, facts.all_kept
                )
            loss = self._reduced(loss, stats, divisor)
        return (loss, stats) if return_stats and stats is not None else loss

    @overload
    def step(
        self,
        f: Callable[..., Tensor],
        hidden: Hidden,
        target: Tensor,
        *,
        context: Mapping[str, Tensor | None] | None = None,
        mix: Mix | None = None,
        num_items: float | Tensor | None = None,
        plan: str = "auto",
        return_stats: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def step(
        self,
        f: Callable[..., Tensor],
        hidden: Hidden,
        target: Tensor,
        *,
        context: Mapping[str, Tensor | None] | None = None,
        mix: Mix | None = None,
        num_items: float | Tensor | None = None,
        plan: str = "auto",
        return_stats: Literal[True],
    ) -> tuple[Tensor, MixStats]: ...

    def step(
        self,
        f: Callable[..., Tensor],
        hidden: Hidden,
        target: Tensor,
        *,
        context: Mapping[str, Tensor | None] | None = None,
        mix: Mix | None = None,
        num_items: float | Tensor | None = None,
        plan: str = "auto",
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, MixStats]:
        """The loss of a batch that is mixed at any layer; eval mode is the plain cross-entropy of f(hidden).

            m_r(λ) = λ h_r + (1-λ) h_π(r),   ∂ℓ_r/∂λ = ⟨∂ℓ_r/∂m_r, h_r - h_π(r)⟩,   ℓ_r by f(m), then Eq. 14-21.

        The loss's backward reaches f's parameters and whatever made `hidden`. No `.grad` is touched before it, and
        hooks on parameters fire once; module hooks and f itself run once a pass. A pass differs from the others in
        its λ alone: it starts from the same state of torch's default generators, the CPU's and that of hidden's device
        (unless dropout="redrawn"; other devices' generators and f's own are not set back), and running statistics of
        normalisation layers are updated by the first pass only. Other state that f updates whenever it runs, such as
        that of spectral_norm or of an observer, is updated by every pass. Activation checkpoints in f need
        use_reentrant=False.

        Args:
            f: the rest of the network, a module or any callable: f(mixed, **context) gives logits (B, C). `mixed` has
                the form of `hidden` (a dict for any mapping) and may be written to; context may not. Of a module
                compiled by torch.compile, pass the module: the first pass then leaves its parameters' gradients out.
            hidden: (B, ...) float16/bfloat16/float32/float64, or a dict, tuple or list of such, each of them mixed
                with the same λ.
            target: (B,) int64 class indices, or (B, C) floating-point probabilities.
            context: tensors (B, ...) that f takes by keyword and that are not mixed (None is passed on). Giving it,
                even empty, promises that f treats rows independently at any batch size, so that rows that keep λ can
                be run again on their own.
            mix: λ and partners; drawn if not given.
            num_items: replaces the divisor of the mean: a number or a 0-d tensor.
            plan: which passes are run; the losses and gradients are the same. In units of a forward pass, where
                plain Mixup costs 3: "auto" costs 5 where every row takes λ', 5 + 3n/B where n rows that keep λ can be
                run again on their own (their backward holds a second set of parameter gradients for a while), else 6;
                it looks at the device once to decide. "merged" costs 6, in plain Mixup's memory, and looks at
                nothing. "both" costs 7 (8 with a compiled f) and keeps two graphs, and is taken, whatever is asked
                for, where rows depend on each other (BatchNorm in train mode) or dropout is redrawn. While a CUDA
                graph is captured, and inside torch.compile, "auto" is "merged"; a compiled f is given whole batches
                only. Batch normalisation by F.batch_norm, or inside a compiled or scripted function, is not noticed:
                ask for "both".
            return_stats: also return a `MixStats`, whose `plan` is "adversarial", "sub-batch", "merged", "both"
                or, for mode="mixup", "mixup".

        Returns:
            The loss, () or (B,), float32 (float64 for float64 logits or hidden); with return_stats a tuple
            (loss, MixStats). Differentiable once.

        Raises:
            TypeError, ValueError: wrong shapes, dtypes or devices; an f that returns something else than (B, C)
                logits, or NaN (on the CPU), or whose logits do not depend on hidden. Random states are then as before.
            RuntimeError: under torch.inference_mode().
            NotImplementedError: inside torch.compile or a CUDA graph, an f whose random numbers cannot be repeated;
                inside torch.compile also batch normalisation in train mode.
        """
        if not callable(f):
            raise TypeError(f"f must be callable, a module or a function from hidden to logits, got {type(f).__name__}")
        parts = check_hidden(hidden)
        batch, device = parts[0].shape[0], parts[0].device
        check_context(context, batch, device)
        check_row_target(target, batch, device)
        num_items = checked_num_items(num_items, device)
        check_choice("plan", plan)
        if not self.training:
            self._check_eval(mix, return_stats)
            logits = check_outputs(f(hidden, **(context or {})), batch)
            check_target(target, logits)
            check_class_weight(self.weight, logits.shape[1], logits.device)
            return self._plain(logits, target, num_items)
        self._check_train(mix, batch, device)
        with random_states_kept_on_error(device, self.generator):
            lam, partner = self.sample(batch, device=device) if mix is None else mix
            rows = layer_step(
                f,
                hidden,
                target,
                lam,
                partner,
                context=context,
                weight=self.weight,
                policy=self.policy,
                redrawn=self.dropout == "redrawn",
                plan=plan,
                num_items=num_items,
            )
        loss = self._reduced(rows.loss, rows.stats, rows.divisor)
        return (loss, rows.stats) if return_stats else loss

    def _reduced(self, loss: Tensor, stats: MixStats, divisor: Tensor | float) -> Tensor:
        if self.reweight is not None:
            loss = moving_weights(stats.delta, self.window, self.window_step) * loss
        if self.reduction == "none":
            return loss
        total = loss.sum()
        return total if self.reduction == "sum" else divided(total, divisor)

    def _check_eval(self, mix: Mix | None, return_stats: bool) -> None:
        if mix is not None or return_stats:
            raise ValueError("mix and return_stats need train mode: in eval mode nothing is mixed")

    def _check_train(self, mix: Mix | None, batch: int, device: torch.device) -> None:
        if mix is not None:
            if not isinstance(mix, tuple) or len(mix) != 2:
                raise TypeError(f"mix must be a fastamp.Mix(lam, partner), got {type(mix).__name__}")
            check_mix(*mix, batch, device, pairing=self.policy.pairing)
        if self.reweight is not None and self.window.device != device:
            raise ValueError(
                f"the criterion's window is on {self.window.device}, the rows are on {device}: "
                f"move it with criterion.to({str(device)!r})"
            )

    def _plain(self, logits: Tensor, target: Tensor, num_items: float | Tensor | None) -> Tensor:
        by_items = self.reduction == "mean" and num_items is not None
        loss = F.cross_entropy(
            logits,
            target if not target.is_floating_point() else target.to(logits.dtype),
            weight=None if self.weight is None else self.weight.to(logits.dtype),
            ignore_index=self.policy.ignore_index,
            reduction="sum" if by_items else self.reduction,
            label_smoothing=self.policy.label_smoothing,
        )
        if not by_items or num_items is None:
            return loss
        return loss / (num_items.to(loss.dtype) if isinstance(num_items, Tensor) else num_items)

    def get_extra_state(self) -> dict[str, Tensor | None]:
        """The generator's state, so that a resumed run draws what an uninterrupted one would have drawn."""
        return {"generator": None if self.generator is None else self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Tensor | None]) -> None:
        """Restore the generator; ValueError if exactly one of the two criteria has a generator of its own."""
        saved = state["generator"]
        if (saved is None) != (self.generator is None):
            raise ValueError(
                f"the saved criterion had {'no' if saved is None else 'a'} generator of its own, "
                f"this one has {'no generator' if self.generator is None else 'one'}"
            )
        if saved is not None and self.generator is not None:
            self.generator.set_state(saved.cpu())

    def extra_repr(self) -> str:
        """The options, those that differ from the defaults last in a readable order."""
        policy = self.policy
        shown = [f"alpha={self.alpha:g}", f"step_size={policy.step_size:g}", f"mode={policy.mode!r}"]
        defaults = checked_policy()
        shown += [
            f"{name}={getattr(policy, name)!r}"
            for name in policy._fields
            if name not in ("mode", "step_size") and getattr(policy, name) != getattr(defaults, name)
        ]
        if self.reweight is not None:
            shown.append(f"reweight={self.reweight!r}")
        if self.dropout != "shared":
            shown.append(f"dropout={self.dropout!r}")
        if self.reduction != "mean":
            shown.append(f"reduction={self.reduction!r}")
        if self.weight is not None:
            shown.append(f"weight=({len(self.weight)},)")
        return ", ".join(shown)
