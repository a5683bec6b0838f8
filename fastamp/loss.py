"""AMPLoss: the drop-in criterion."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastamp import reference
from fastamp.autograd import inside_a_function, refuse_torch_func
from fastamp.checks import (
    check_class_weight,
    check_context,
    check_hidden,
    check_outputs,
    checked_mix,
    checked_num_items,
    checked_row_target,
)
from fastamp.mixing import Mix, MixStats, Mixture, draw
from fastamp.ops import amp_cross_entropy
from fastamp.ops.rows import compute_dtype, loss_and_grad, mixed_target
from fastamp.policy import (
    Dropout,
    GradScale,
    Kind,
    Loss,
    Mode,
    Pairing,
    Plan,
    Policy,
    check_choice,
    check_number,
    checked_policy,
)
from fastamp.reduction import Reduction, divided
from fastamp.reweighting import moving_weights, new_window
from fastamp.step.plans import Hidden, Step, layer_step
from fastamp.step.randomness import check_drawn_once, random_states_kept_on_error, recomputes

PRESETS: dict[str, dict[str, Any]] = {
    "paper": reference.PAPER,
    "official": {**reference.OFFICIAL, "dropout": "redrawn"},
}


OPTIONS = [name for name in Policy._fields if name != "keeps_all"]  # those that the policy holds


class AMPLoss(nn.Module):
    """The Adversarial Mixing Policy as a criterion: use it in place of nn.CrossEntropyLoss.

    In train mode the rows of a batch are mixed in pairs, and every row's mixing coefficient λ takes one step of
    size ε towards higher loss (Liu et al., EMNLP 2021, Eq. 10-21):

        λ'_r = λ_r + ε·clip(∂ℓ_r/∂λ, -1, 1),    ℓ_r = λ_r CE(·, y_r) + (1-λ_r) CE(·, y_π(r)),
        the loss at λ' where it is larger, else the loss at λ.

    In eval mode it is nn.CrossEntropyLoss, or nn.BCEWithLogitsLoss for loss="binary_cross_entropy", with which every
    class is a question of its own: for several labels a row, and for image recipes that train so.

    `criterion(model(x), y)` is SentAMP for any model that ends in an affine layer: mixing logits is mixing that layer's
    input. Where a dropout stands before that layer, this mixes after the dropout, each row under its own mask; to mix
    before it, as the paper's CNN does, use `step`, which mixes at any layer, or
    `fastamp.functional.linear_amp_cross_entropy`.

    Every argument is an attribute that may be set at any time, `criterion.step_size = 0.01`: it is checked, and acts
    from the next call on. Under torch.compile every new value is compiled for, and after torch's recompile limit none
    (by the closed forms, a step_size is compiled for twice): for a schedule compile the model, and call the criterion
    outside.

    In an activation checkpoint the criterion may stand as long as λ is drawn from torch's default generator and the
    checkpoint preserves its state, or `mix` is given; otherwise, and with reweight="moving", its recomputation is a
    RuntimeError.

    Args:
        weight: (C,) class weights, as in nn.CrossEntropyLoss or nn.BCEWithLogitsLoss.
        alpha: λ ~ Beta(alpha, alpha), > 0.
        step_size: ε, >= 0.
        mode: "amp", "maxop" (no comparison: always the loss at λ') or "mixup" (plain Mixup).
        loss: "cross_entropy"; "binary_cross_entropy": with logits, the mean over classes; or "softmax_bce": binary
            cross-entropy of the softmax summed over classes, as in the published code, in eval mode cross-entropy.
        grad_clip: two-sided bound on ∂ℓ/∂λ, > 0, or None.
        grad_scale: "row" differentiates each row's loss; "mean" the batch mean, which divides the step by about B.
        clamp: keep λ' inside [0, 1].
        reweight: None, or "moving": rows whose δ = ℓ' - ℓ exceeds the mean μ of the positive δ of the last five
            steps weigh 1 + (δ-μ)/σ, σ their unbiased standard deviation. Setting it again forgets them.
        dropout: "shared": both passes of `step` drop out the same; "redrawn": each draws its own, as the published
            code does.
        tie_tol: a difference |δ| up to this counts as a tie and takes ℓ'. "auto": 4 ulp of the loss in the dtype
            it was computed in. 0.0 is Eq. 21 to the letter.
        pairing: "permutation": partners are a uniform random permutation; "matching": a random perfect matching, in
            which two rows are each other's partners. On a GPU one kernel then reads both once for their two mixtures,
            where a permutation needs three rows for one.
        ignore_index: a class index whose side of the mixture contributes nothing; for "binary_cross_entropy" also an
            entry of a (B, C) target that does.
        label_smoothing: in [0, 1], as in nn.CrossEntropyLoss; the entries of a (B, C) target of "binary_cross_entropy"
            move towards 1/2.
        reduction: "mean" (over the kept, class-weighted mass Σ_r λ_r w(y_r) + (1-λ_r) w(y_π(r)); over all kept entries
            for "binary_cross_entropy"), "sum", "none".
        pos_weight: (C,) weights of the positive side, as in nn.BCEWithLogitsLoss; "binary_cross_entropy" only.
        sum_classes: "binary_cross_entropy" is the sum over classes in place of the mean.
        generator: source of λ and partners; its state is part of state_dict, generator_state, uint8. Default: torch's
            global one, from which the ranks of torch.distributed draw independently even if seeded alike. Your own is
            taken as it is: seed it differently on every rank that has other data, and alike on ranks that share a
            batch; of a CPU generator's seed torch takes the low 32 bits only. The workers of a DataLoader have copies
            of it that all draw the same λ: seed it in worker_init_fn by the worker's number, or draw in the loop.
            torch.compile(fullgraph=True) cannot trace a draw from a generator of your own, and a CUDA graph cannot
            capture one on the CPU: use the default there, or pass `mix`.

    Raises:
        TypeError, ValueError: an option that is not one of these, by name.
    """

    # The options of the policy, which holds them
    mode: str
    loss: str
    grad_clip: float | None
    grad_scale: str
    clamp: bool
    tie_tol: float | str
    ignore_index: int
    label_smoothing: float
    pairing: str
    sum_classes: bool

    alpha: float
    step_size: float
    weight: Tensor | None
    pos_weight: Tensor | None
    generator: torch.Generator | None
    generator_state: Tensor  # as it was when state_dict was last made or loaded
    window: Tensor
    window_step: Tensor
    _has_warned = False

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        alpha: float = 1.0,
        step_size: float = 2e-3,
        mode: Mode = "amp",
        loss: Loss = "cross_entropy",
        grad_clip: float | None = 1.0,
        grad_scale: GradScale = "row",
        clamp: bool = False,
        reweight: str | None = None,
        dropout: Dropout = "shared",
        tie_tol: float | str = "auto",
        pairing: Pairing = "permutation",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Kind = "mean",
        generator: torch.Generator | None = None,
        pos_weight: Tensor | None = None,
        sum_classes: bool = False,
    ) -> None:
        super().__init__()
        self.policy = checked_policy(
            mode=mode,
            loss=loss,
            grad_clip=grad_clip,
            grad_scale=grad_scale,
            clamp=clamp,
            tie_tol=tie_tol,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            pairing=pairing,
            sum_classes=sum_classes,
        )
        self.alpha, self.step_size = alpha, step_size
        self.reduction, self.reweight, self.dropout = reduction, reweight, dropout
        self.generator = generator
        self.register_buffer("weight", None)
        self.register_buffer("pos_weight", None)
        self.weight, self.pos_weight = weight, pos_weight

    def __setattr__(self, name: str, value: Any) -> None:
        """Options are checked, here and nowhere else."""
        if name in OPTIONS:
            options = {option: getattr(self, option) for option in OPTIONS}
            name, value = "policy", checked_policy(**{**options, name: value})
        elif name in ("alpha", "step_size"):
            check_number(name, value, low=0.0, open_low=name == "alpha")
            value = float(value)
        elif name in ("reduction", "reweight", "dropout"):
            check_choice(name, value)
        elif name in ("weight", "pos_weight") and value is not None:
            if not isinstance(value, Tensor) or value.dim() != 1:
                raise TypeError(f"{name} must be a (C,) tensor or None, got {value!r}; other options go by name")
            check_class_weight(value, len(value), value.device, name=name)
        elif name == "generator" and value is not None and not isinstance(value, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {value!r}")
        elif name == "generator_state" and self.generator is not None and not value.is_meta:
            self.generator.set_state(value.to("cpu", torch.uint8))
        super().__setattr__(name, value)
        if name == "generator":
            self._buffers.pop("generator_state", None)
            if value is not None:
                self.register_buffer("generator_state", value.get_state())
        elif name == "reweight":
            self._buffers.pop("window", None)
            self._buffers.pop("window_step", None)
            if value is not None:
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

    def sample(self, batch_size: int, *, device: torch.device | str | None = None) -> Mix:
        """Draw λ and partners for a batch.

        A λ is drawn for every row. One λ for the whole batch, as image recipes have it, is
        `mix = Mix(mix.lam[0], mix.partner)`; AMP still moves it by a step of each row's own.

        Args:
            batch_size: B >= 0.
            device: where the result lies: that of the rows. Default: the generator's, or torch's default device.
                Random numbers come from `generator`, on its own device, if there is one.

        Returns:
            Mix(lam (B,) float32, partner (B,) int64).

        Raises:
            TypeError, ValueError: batch_size is no int, or negative; a generator on a device without float64, where
                alpha is not 1.
            RuntimeError: in the recomputation of an activation checkpoint, where other numbers would be drawn; a CPU
                generator while a CUDA graph is captured.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, torch.SymInt)):
            raise TypeError(f"batch_size must be an int, got {batch_size!r}")
        if batch_size < 0:
            raise ValueError(f"batch_size must be >= 0, got {batch_size}")
        check_drawn_once(self.generator)
        return draw(batch_size, alpha=self.alpha, pairing=self.policy.pairing, device=device, generator=self.generator)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        mix: Mix | None = None,
        num_items: float | Tensor | None = None,
        return_stats: bool = False,
        **unexpected: Any,
    ) -> Tensor | tuple[Tensor, MixStats]:
        """The loss of a batch; train mode mixes, eval mode is nn.CrossEntropyLoss on the rows as they are.

        Args:
            logits: (B, C) float16/bfloat16/float32/float64, unmixed.
            target: (B,) int64 or uint8 class indices, or (B, C) floating-point probabilities.
            mix: λ and partners; drawn if not given. Not taken in eval mode.
            num_items: replaces the divisor of the mean (gradient accumulation): a number or a 0-d tensor.
            return_stats: also return a `MixStats`; train mode only.
            **unexpected: nothing; transformers' Trainer would pass num_items_in_batch, see `fastamp.hf.sent_loss`.

        Returns:
            The loss, () or (B,), float32 (float64 for float64 logits) in train mode, nn.CrossEntropyLoss's dtype in
            eval mode. With return_stats a tuple (loss, MixStats).

        Raises:
            TypeError, ValueError: wrong shapes, dtypes or devices; on the CPU also values out of range. The
                criterion's state is then as before.
            RuntimeError: in the recomputation of an activation checkpoint, see `AMPLoss`.

        A UserWarning, once, says so where train mode is called without gradients.
        """
        if unexpected:
            name = next(iter(unexpected))
            advice = "; for transformers' Trainer give compute_loss_func=fastamp.hf.sent_loss(criterion)"
            raise TypeError(
                f"AMPLoss got an unexpected keyword argument {name!r}" + advice * (name == "num_items_in_batch")
            )
        kind = self.reduction if self.reweight is None else "none"
        # Raises for a bad label, before anything is drawn.
        target, weights, how = amp_cross_entropy.check(
            logits, target, self.weight, self.pos_weight, self.policy, kind, num_items
        )
        if not self.training:
            self._check_eval(mix, return_stats)
            return self._plain(logits, target, weights, how)
        refuse_torch_func("AMPLoss in train mode")
        mix = self._checked_train(mix, logits.shape[0], logits.device, stacklevel=5)
        mixture = Mixture(target, *(mix or self.sample(logits.shape[0], device=logits.device)), weights)
        wants_stats = return_stats or self.reweight is not None
        weighs = self.reweight is not None
        loss, stats = amp_cross_entropy.dispatch(
            logits, mixture, self.policy, self.step_size, how, wants_stats, weighs_delta=weighs
        )
        if self.reweight is not None and stats is not None:
            divisor: Tensor | float = 1.0
            if self.reduction != "none":
                mixture = mixture._replace(lam=stats.lam)
                divisor, _ = how._replace(kind=self.reduction).divisors(mixture, self.policy)
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
        plan: Plan = "auto",
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
        plan: Plan = "auto",
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
        plan: Plan = "auto",
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
                the form of `hidden` (a dict for any mapping) and may be written to; context may not. If a module
                is compiled by torch.compile, pass the module: the first pass then leaves its parameters' gradients out.
            hidden: (B, ...) float16/bfloat16/float32/float64, or a dict, tuple or list of such, each of them mixed
                with the same λ.
            target: (B,) int64 or uint8 class indices, or (B, C) floating-point probabilities.
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
            RuntimeError: under torch.inference_mode(); in the recomputation of an activation checkpoint, see `AMPLoss`.
            NotImplementedError: inside torch.compile or a CUDA graph, an f whose random numbers cannot be repeated;
                inside torch.compile also batch normalisation in train mode.
        """
        if not callable(f):
            raise TypeError(f"f must be callable, a module or a function from hidden to logits, got {type(f).__name__}")
        parts = check_hidden(hidden)
        batch, device = parts[0].shape[0], parts[0].device
        check_context(context, batch, device)
        target = checked_row_target(target, batch, device)
        num_items = checked_num_items(num_items, device)
        check_choice("plan", plan)
        if not self.training:
            self._check_eval(mix, return_stats)
            logits = check_outputs(f(hidden, **(context or {})), batch)
            target, weights, how = amp_cross_entropy.check(
                logits, target, self.weight, self.pos_weight, self.policy, self.reduction, num_items
            )
            return self._plain(logits, target, weights, how)
        mix = self._checked_train(mix, batch, device, stacklevel=3)
        with random_states_kept_on_error(device, self.generator):
            mixture = Mixture(target, *(mix or self.sample(batch, device=device)), None)
            step = Step(
                f=f,
                hidden=hidden,
                mixture=mixture,
                weights=(self.weight, self.pos_weight),
                context=context,
                policy=self.policy,
                step_size=self.step_size,
                num_items=num_items,
                redrawn=self.dropout == "redrawn",
                plan=plan,
            )
            rows = layer_step(step)
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

    def _checked_train(self, mix: Mix | None, batch: int, device: torch.device, *, stacklevel: int) -> Mix | None:
        """The mix, with a λ for every row."""
        if mix is not None:
            if not isinstance(mix, tuple) or len(mix) != 2:
                raise TypeError(f"mix must be a fastamp.Mix(lam, partner), got {type(mix).__name__}")
            lam = checked_mix(*mix, batch, device, pairing=self.policy.pairing)
            mix = mix if lam is mix[0] else Mix(lam, mix[1])
        if self.reweight is not None:
            if self.window.device != device:
                raise ValueError(
                    f"the criterion's window is on {self.window.device}, the rows are on {device}: "
                    f"move it with criterion.to({str(device)!r})"
                )
            if recomputes():
                raise RuntimeError(
                    "an activation checkpoint runs the criterion again in its backward pass, which would move the "
                    "window of reweight='moving' a second time: leave the criterion out of the checkpoint"
                )
        if not torch.is_grad_enabled() and not self._has_warned and not torch.compiler.is_compiling():
            self._warn_of_train_mode(stacklevel + 1)
        return mix

    def _warn_of_train_mode(self, stacklevel: int) -> None:
        if inside_a_function():
            return
        self._has_warned = True
        warnings.warn(
            "AMPLoss is in train mode and no gradients are recorded: this is the loss of mixed rows. For validation "
            "call criterion.eval(); model.eval() reaches a criterion only if it is a submodule of the model",
            UserWarning,
            stacklevel=stacklevel,
        )

    def _plain(self, logits: Tensor, target: Tensor, weights: Tensor | None, how: Reduction) -> Tensor:
        how = how._replace(kind=self.reduction)  # in training, re-weighting takes the losses of rows
        if self.policy.loss == "binary_cross_entropy":
            # Rows mixed with themselves: the same is ignored and smoothed, with the same divisor, as in training.
            x = logits.to(compute_dtype(logits.dtype))
            rows = torch.arange(x.shape[0], device=x.device)
            mixture = Mixture(target, x.new_ones(x.shape[0]), rows, weights)
            losses, _ = loss_and_grad(x, mixed_target(mixture, x.shape[1], self.policy, all_kept=how.all_kept))
            divisor, _ = how.divisors(mixture, self.policy)
            return (losses if how.kind == "none" else divided(losses.sum(), divisor)).to(logits.dtype)
        num_items = how.num_items
        by_items = self.reduction == "mean" and num_items is not None
        loss = F.cross_entropy(
            logits,
            target if not target.is_floating_point() else target.to(logits.dtype),
            weight=None if weights is None else weights.to(logits.dtype),
            ignore_index=self.policy.ignore_index,
            reduction="sum" if by_items else self.reduction,
            label_smoothing=self.policy.label_smoothing,
        )
        if not by_items or num_items is None:
            return loss
        return loss / (num_items.to(loss.dtype) if isinstance(num_items, Tensor) else num_items)

    def _save_to_state_dict(self, *args: Any) -> None:
        self._read_generator()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        old = state_dict.pop(f"{prefix}_extra_state", None)  # as fastamp 0.1.0 saved it, with a generator or without
        if isinstance(old, dict) and old["generator"] is not None:
            state_dict[f"{prefix}generator_state"] = old["generator"]
        self._read_generator()  # what is not in state_dict, or does not fit, is to stay
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.generator is not None:
            self.generator_state = self.generator_state  # which sets the generator

    def _read_generator(self) -> None:
        if self.generator is not None:
            # A new tensor: a state_dict that was taken before keeps what it has.
            self._buffers["generator_state"] = self.generator.get_state().to(self.generator_state.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AMPLoss:
        """Moves and casts, which leave the window in float32."""
        window = self._buffers.get("window")
        super()._apply(fn, recurse)
        if window is not None and self.window.dtype != window.dtype:
            self.window = window.to(self.window.device)
        return self

    def extra_repr(self) -> str:
        """The options, those that differ from the defaults last in a readable order."""
        shown = [f"alpha={self.alpha:g}", f"step_size={self.step_size:g}", f"mode={self.mode!r}"]
        shown += [
            f"{name}={getattr(self, name)!r}"
            for name in OPTIONS
            if name != "mode" and getattr(self.policy, name) != Policy._field_defaults[name]
        ]
        if self.reweight is not None:
            shown.append(f"reweight={self.reweight!r}")
        if self.dropout != "shared":
            shown.append(f"dropout={self.dropout!r}")
        if self.reduction != "mean":
            shown.append(f"reduction={self.reduction!r}")
        for name in ("weight", "pos_weight"):
            if getattr(self, name) is not None:
                shown.append(f"{name}=({len(getattr(self, name))},)")
        return ", ".join(shown)


for _name in OPTIONS:
    setattr(AMPLoss, _name, property(attrgetter(f"policy.{_name}")))
AMPLoss.tie_tol = property(lambda self: "auto" if self.policy.tie_tol is None else self.policy.tie_tol)  # type: ignore
