"""One AMP step at any layer of any network, on checked arguments: which passes are run, and what they share.

In units of a forward pass of f (a backward pass to activations costs 1, to parameters 1 more) plain Mixup costs 3. The
plans, all exact:

    adversarial  5        forward at λ, backward to hidden, forward at λ', backward: every row took λ'
    sub-batch    5+3n/B   the same, and the n rows that keep λ go through f once more, alone
    merged       6        forward at λ, backward to hidden, forward at λ' without a graph, then one pass at λ*
    both         7        forward at λ, backward to hidden, forward at λ', backward through both graphs
                 8        of a compiled f, whose graph may be gone through once: a second forward at λ for the backward
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastamp.checks import check_outputs, checked_class_weights, checked_target, is_dtensor
from fastamp.mixing import Mix, MixStats, Mixture
from fastamp.ops import mix as mix_op
from fastamp.ops import remix as remix_op
from fastamp.ops import select_cross_entropy as select_op
from fastamp.ops.rows import compute_dtype, per_row, scaled_grad, step_lam
from fastamp.ops.select_cross_entropy import Selected, Ties, with_graph
from fastamp.policy import Policy
from fastamp.reduction import Reduction, checked_reduction
from fastamp.step.batch_statistics import BatchStatistics
from fastamp.step.randomness import RandomStates, RecordedMasks, capturing

Hidden = Tensor | Mapping[str, Tensor] | Sequence[Tensor]

# A float16 network's gradients underflow without a loss scale; a power of two leaves no trace in ∇λ. Times a row's
# gradient it is about what torch.amp.GradScaler starts with on a batch of 64.
FLOAT16_SCALE = 1024.0


class Step(NamedTuple):
    """What a step is given, checked."""

    f: Callable[..., Tensor]
    hidden: Hidden
    mixture: Mixture  # its weight is known only with the classes
    weights: tuple[Tensor | None, Tensor | None]  # weight and pos_weight
    context: Mapping[str, Tensor | None] | None
    policy: Policy
    step_size: float
    num_items: float | Tensor | None
    redrawn: bool  # each pass draws its own dropout masks
    plan: str

    @property
    def parts(self) -> list[Tensor]:
        """The tensors of the hidden state, in order."""
        if isinstance(self.hidden, Tensor):
            return [self.hidden]
        return list(self.hidden.values() if isinstance(self.hidden, Mapping) else self.hidden)

    def with_parts(self, parts: list[Tensor]) -> Any:
        """The hidden state with other tensors in it."""
        if isinstance(self.hidden, Tensor):
            return parts[0]
        if isinstance(self.hidden, Mapping):
            return dict(zip(self.hidden, parts, strict=True))
        if isinstance(self.hidden, tuple):
            return type(self.hidden)(*parts) if hasattr(self.hidden, "_fields") else tuple(parts)
        return parts

    def logits(self, mixed: list[Tensor]) -> Tensor:
        """Run f on the whole batch."""
        return self.f(self.with_parts(mixed), **(self.context or {}))

    def mixed(self, lam: Tensor) -> list[Tensor]:
        """The hidden state mixed at λ."""
        return [mix_op.dispatch(part, Mix(lam, self.mixture.partner)) for part in self.parts]

    def logits_of(self, rows: Tensor) -> Tensor:
        """Run f on some rows alone, mixed at λ."""
        other, lam = self.mixture.partner[rows], self.mixture.lam[rows]
        mixed = []
        for part in self.parts:
            wide = compute_dtype(part.dtype)
            # By indexing, as index_select would lose the memory format.
            values = torch.lerp(part[other].to(wide), part[rows].to(wide), per_row(lam.to(wide), part))
            mixed.append(values.to(part.dtype))
        context = {name: value if value is None else value[rows] for name, value in (self.context or {}).items()}
        return check_outputs(self.f(self.with_parts(mixed), **context), len(rows), sub_batch=True)


class RowLosses(NamedTuple):
    """What a step came to, before reduction."""

    loss: Tensor  # (B,) the selected losses, with their graph
    stats: MixStats
    divisor: Tensor | float  # of the mean


class Answered(NamedTuple):
    """A step of which f's first logits are known, and what follows from their classes and dtype."""

    step: Step
    reduction: Reduction
    divisor: Tensor | float  # of the mean
    grad_divisor: Tensor | float
    ties: Ties
    in_float16: bool

    @classmethod
    def by(cls, step: Step, logits: object) -> tuple[Tensor, Answered]:
        """The checked logits, and the step with what they tell."""
        mixture, policy = step.mixture, step.policy
        checked = check_outputs(logits, len(mixture.lam))
        checked_target(mixture.target, checked)
        weight = checked_class_weights(*step.weights, checked.shape[1], checked, policy.loss)
        mixture = mixture._replace(weight=weight)
        step = step._replace(mixture=mixture)
        reduction = checked_reduction("mean", step.num_items, mixture.target, checked.shape[1], policy)
        ran_in = [checked.dtype, *(part.dtype for part in step.parts)]
        device = checked.device.type
        if torch.is_autocast_enabled(device):
            ran_in.append(torch.get_autocast_dtype(device))
        ties = policy.tie_bounds(max(ran_in, key=lambda dtype: torch.finfo(dtype).eps))
        return checked, cls(step, reduction, *reduction.divisors(mixture, policy), ties, torch.float16 in ran_in)

    def select(self, logits: Tensor, logits_adv: Tensor | None) -> Selected:
        """Losses, and the choice between them."""
        mixture = self.step.mixture
        dtype = torch.promote_types(mixture.lam.dtype, compute_dtype(logits.dtype))
        return select_op.dispatch(
            logits.detach(),
            None if logits_adv is None else logits_adv.detach(),
            mixture.computed_in(dtype),
            self.step.policy,
            self.ties,
            self.reduction.all_kept,
        )

    def upstream(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the first pass's backward starts from: of the summed row losses, scaled in float16; and the scale."""
        grad = self.select(logits, None).grad
        if not self.in_float16:
            return grad.to(logits.dtype), None
        # Class weights make gradients above 1, which leave less room.
        scale = (FLOAT16_SCALE / grad.abs().amax().clamp(min=1)).log2().floor().exp2()
        return (grad * scale).to(logits.dtype), scale

    def remix(self, grads: Sequence[Tensor | None], scale: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """∇λ, λ' and the hidden state mixed at λ', from what reached the mixed parts."""
        step, policy = self.step, self.step.policy
        parts, (_, lam, partner, _) = step.parts, step.mixture
        if len(grads) == 1 and grads[0] is not None and scale is None:
            slope, lam_adv, mixed = remix_op.dispatch(
                parts[0], grads[0], Mix(lam, partner), policy, step.step_size, self.grad_divisor
            )
            return slope, lam_adv, [mixed]
        slope = torch.zeros_like(lam)
        for part, grad in zip(parts, grads, strict=True):
            if grad is not None:
                slope = slope + remix_op.dispatch_grad(grad, part, partner).to(lam.dtype)
        if scale is not None:
            # What overflowed under the scale makes no step: λ' = λ.
            slope = torch.where(slope.isfinite(), slope / scale, 0)
        slope = scaled_grad(slope, policy, self.grad_divisor)
        lam_adv = step_lam(lam, slope, policy, step.step_size)
        return slope, lam_adv, step.mixed(lam_adv)

    def losses(self, loss: Tensor, chosen: Selected, slope: Tensor, lam_adv: Tensor, plan: str) -> RowLosses:
        """What the step came to."""
        stats = MixStats(self.step.mixture.lam, lam_adv, slope, chosen.delta, chosen.mask, plan)
        return RowLosses(loss, stats, self.divisor)


def layer_step(step: Step) -> RowLosses:
    """`AMPLoss.step` for arguments that have been checked, up to the reduction."""
    wide = any(part.dtype == torch.float64 for part in step.parts)
    step = step._replace(mixture=step.mixture.computed_in(torch.float64 if wide else torch.float32))
    if step.policy.mode == "mixup":
        return _mixup(step)
    return _traced(step) if torch.compiler.is_compiling() else _eager(step)


def _mixup(step: Step) -> RowLosses:
    logits, answered = Answered.by(step, step.logits(step.mixed(step.mixture.lam)))
    at_lam = answered.select(logits, None)
    unknown = torch.full_like(step.mixture.lam, torch.nan)
    loss = with_graph(logits, at_lam.loss, at_lam.grad)
    return answered.losses(loss, at_lam, unknown, step.mixture.lam, "mixup")


def _eager(step: Step) -> RowLosses:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "step differentiates by λ, which torch.inference_mode() rules out: for validation call criterion.eval(), "
            "else use torch.no_grad()"
        )
    # Rows that a frozen encoder made under inference_mode take no part in autograd.
    parts = [part.clone() if part.is_inference() else part for part in step.parts]
    step = step._replace(hidden=step.with_parts(parts))
    lam, amp, redrawn = step.mixture.lam, step.policy.mode == "amp", step.redrawn
    device = lam.device
    in_capture = capturing(device)
    plan = "merged" if in_capture and step.plan == "auto" else step.plan
    random: RandomStates | RecordedMasks = RecordedMasks() if in_capture else RandomStates(device)
    statistics = BatchStatistics(step.f)
    both = amp and (plan == "both" or statistics.couple_rows or (redrawn and in_capture))
    repeats = not (redrawn and in_capture)  # whether a pass with the same random numbers can be had

    with (
        torch.enable_grad(),
        statistics.watch(),
        _without_parameters(step.f) if statistics.is_compiled and repeats else nullcontext(),
        random if repeats else nullcontext(),
    ):
        mixed, edges = _mixed_with_edges(step)
        logits, answered = Answered.by(step, step.logits(mixed))
    del mixed
    both = both or (amp and (statistics.couple_rows or (redrawn and random.drew)))
    upstream, scale = answered.upstream(logits)
    grads, kept = _pull(logits, edges, upstream, retain=both and not (statistics.is_compiled and repeats))
    if both and not kept:
        with torch.enable_grad(), statistics.frozen(), random.again():
            logits = check_outputs(step.logits(step.mixed(lam)), len(lam), classes=logits.shape[1])
    elif not both:
        logits = logits.detach().clone()  # f may be a CUDA graph, whose next run writes over what it returned
    slope, lam_adv, mixed_adv = answered.remix(grads, scale)
    del grads, edges

    def again(parts: list[Tensor]) -> Tensor:
        with statistics.frozen(), nullcontext() if redrawn else random.again():
            return check_outputs(step.logits(parts), len(lam), classes=logits.shape[1])

    merge = amp and plan == "merged" and not both
    with torch.no_grad() if merge else nullcontext():
        logits_adv = again(mixed_adv)
    del mixed_adv
    chosen = answered.select(logits, logits_adv)
    if both:
        return answered.losses(select_op.chosen_loss(chosen, logits, logits_adv), chosen, slope, lam_adv, "both")
    rejected = ~chosen.mask & (lam_adv != lam)  # a row whose λ did not move is right in either pass
    rows = rejected[:0] if not amp or merge else rejected.nonzero().squeeze(1)  # the one look at the device
    # A compiled f would be compiled once more for every number of rows.
    independent = step.context is not None and not random.drew and not statistics.is_compiled
    alone = independent and 3 * len(rows) <= len(rejected)
    if merge or (len(rows) and not alone):
        if torch.is_autocast_enabled(device.type):
            # Weights that were cast without a graph must not be found in the cache.
            torch.clear_autocast_cache()
        del logits_adv
        logits_sel = again(step.mixed(torch.where(chosen.mask, lam_adv, lam)))
        loss = with_graph(logits_sel, chosen.loss, chosen.grad_chosen)
        return answered.losses(loss, chosen, slope, lam_adv, "merged")
    loss = with_graph(logits_adv, chosen.loss, chosen.grad_adv)
    if not len(rows):
        return answered.losses(loss, chosen, slope, lam_adv, "adversarial")
    with statistics.frozen():
        logits_sub = step.logits_of(rows)
    redone = with_graph(logits_sub, chosen.loss[rows], chosen.grad[rows])
    return answered.losses(loss.index_put((rows,), redone), chosen, slope, lam_adv, "sub-batch")


def _mixed_with_edges(step: Step) -> tuple[list[Tensor], list[GradientEdge]]:
    """The hidden state mixed at λ, and where its gradient will arrive, even if f writes to its input."""
    leaves = [part if part.requires_grad else part.detach().requires_grad_() for part in step.parts]
    mix = Mix(step.mixture.lam, step.mixture.partner)
    mixed = [mix_op.dispatch(leaf, mix) for leaf in leaves]
    return mixed, [get_gradient_edge(part) for part in mixed]


def _pull(
    logits: Tensor, edges: list[GradientEdge], upstream: Tensor, *, retain: bool
) -> tuple[Sequence[Tensor | None], bool]:
    """The gradient of the summed row losses to the mixed parts; no `.grad` is touched.

    And whether the graph was kept, which that of a compiled function inside f may refuse.
    """
    unreached = "f's logits do not depend on hidden, so no gradient reaches λ"
    if not logits.requires_grad:
        raise ValueError(f"{unreached}: does f detach it, or run under torch.no_grad()?")
    try:
        grads = torch.autograd.grad([logits], edges, [upstream], retain_graph=retain, allow_unused=True)
    except RuntimeError as error:
        if not (retain and "donated buffer" in str(error)):
            raise
        # A compiled function that f calls, which nothing shows; torch refuses before it has touched a buffer.
        retain = False
        grads = torch.autograd.grad([logits], edges, [upstream], allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError(unreached)
    return grads, retain


def _traced(step: Step) -> RowLosses:
    """The step inside a compiled region, where nothing can be decided by values."""
    amp, redrawn, lam = step.policy.mode == "amp", step.redrawn, step.mixture.lam
    if step.plan == "both" or BatchStatistics(step.f).couple_rows:
        raise NotImplementedError(
            "inside torch.compile step runs the plan 'merged' only, which batch normalisation in train mode does "
            "not allow: compile f alone and call step outside"
        )
    masks = RecordedMasks(batch_norm=False)

    def forward(*mixed: Tensor) -> tuple[Tensor, list[Tensor]]:
        with masks:
            logits = step.logits([part.clone() for part in mixed])
        return logits, list(masks.masks)

    # Without gradients outside the transformation, f's parameters are constants to it.
    with torch.no_grad():
        logits, pull, masks.masks = torch.func.vjp(forward, *step.mixed(lam), has_aux=True)  # type: ignore[misc]
        logits, answered = Answered.by(step, logits)
        if redrawn and amp and masks.drew:
            raise NotImplementedError(
                "dropout='redrawn' cannot be traced, since a row that keeps λ keeps its mask: use "
                "dropout='shared', or compile f alone and call step outside"
            )
        upstream, scale = answered.upstream(logits)
        grads = pull(upstream)
    slope, lam_adv, mixed_adv = answered.remix(grads, scale)
    again = RecordedMasks(batch_norm=False) if redrawn else masks.again()
    with torch.no_grad() if amp else nullcontext(), again:
        logits_adv = step.logits(mixed_adv)
    chosen = answered.select(logits, logits_adv)
    if not amp:
        loss = with_graph(logits_adv, chosen.loss, chosen.grad_adv)
        return answered.losses(loss, chosen, slope, lam_adv, "adversarial")
    with masks.again():
        logits_sel = step.logits(step.mixed(torch.where(chosen.mask, lam_adv, lam)))
    loss = with_graph(logits_sel, chosen.loss, chosen.grad_chosen)
    return answered.losses(loss, chosen, slope, lam_adv, "merged")


@contextmanager
def _without_parameters(f: Any) -> Iterator[None]:
    """Within a compiled module, whose backward would compute their gradients too; eager autograd never does."""
    # FSDP decides once, from the sharded parameters, what the gathered ones require: they are left alone.
    every = f.parameters() if isinstance(f, nn.Module) else ()
    parameters = [p for p in every if p.requires_grad and not is_dtensor(p)]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
