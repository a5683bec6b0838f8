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

from fastamp import closed_form
from fastamp import hidden as hidden_ops
from fastamp.batch_statistics import BatchStatistics
from fastamp.checks import check_class_weight, check_outputs, check_target, is_dtensor
from fastamp.hidden import Selected, with_graph
from fastamp.mixing import MixStats
from fastamp.policy import Policy
from fastamp.randomness import RandomStates, RecordedMasks, capturing
from fastamp.steps import divisors, labels_facts

Hidden = Tensor | Mapping[str, Tensor] | Sequence[Tensor]

# A float16 network's gradients underflow without a loss scale; a power of two leaves no trace in ∇λ. Times a row's
# gradient it is about what torch.amp.GradScaler starts with on a batch of 64.
FLOAT16_SCALE = 1024.0


class RowLosses(NamedTuple):
    """What a step came to, before reduction."""

    loss: Tensor  # (B,) the selected losses, with their graph
    stats: MixStats
    divisor: Tensor | float  # of the mean


def hidden_parts(hidden: Hidden) -> list[Tensor]:
    """The tensors of a hidden state, in order."""
    if isinstance(hidden, Tensor):
        return [hidden]
    return list(hidden.values() if isinstance(hidden, Mapping) else hidden)


def with_parts(hidden: Hidden, parts: list[Tensor]) -> Any:
    """`hidden` with other tensors in it."""
    if isinstance(hidden, Tensor):
        return parts[0]
    if isinstance(hidden, Mapping):
        return dict(zip(hidden, parts, strict=True))
    if isinstance(hidden, tuple):
        return type(hidden)(*parts) if hasattr(hidden, "_fields") else tuple(parts)
    return parts


def layer_step(
    f: Callable[..., Tensor],
    hidden: Hidden,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    *,
    context: Mapping[str, Tensor | None] | None,
    weight: Tensor | None,
    policy: Policy,
    redrawn: bool,
    plan: str,
    num_items: float | Tensor | None,
) -> RowLosses:
    """`AMPLoss.step` for arguments that have been checked, up to the reduction."""
    step = _Step(f, hidden, target, lam, partner, context, weight, policy, num_items)
    if torch.compiler.is_compiling():
        loss, stats = step.traced(redrawn=redrawn, plan=plan)
    else:
        loss, stats = step.run(redrawn=redrawn, plan=plan)
    return RowLosses(loss, stats, step.divisor)


class _Step:
    """A step's inputs, and the passes over them."""

    def __init__(
        self,
        f: Callable[..., Tensor],
        hidden: Hidden,
        target: Tensor,
        lam: Tensor,
        partner: Tensor,
        context: Mapping[str, Tensor | None] | None,
        weight: Tensor | None,
        policy: Policy,
        num_items: float | Tensor | None,
    ) -> None:
        self.f, self.hidden, self.target, self.partner = f, hidden, target, partner
        self.context, self.weight, self.policy, self.num_items = context, weight, policy, num_items
        self.parts = hidden_parts(hidden)
        wide = any(part.dtype == torch.float64 for part in self.parts)
        self.lam = lam.detach().to(torch.float64 if wide else torch.float32)
        self.divisor: Tensor | float = 1.0
        self._grad_divisor: Tensor | float = 1.0
        self._all_kept = False
        self._ties = (0.0, 0.0)
        self._in_float16 = False
        self._scale: Tensor | None = None  # of the gradients of the first pass

    # Passes

    def logits(self, mixed: list[Tensor]) -> Tensor:
        """Run f on the whole batch."""
        return self.f(with_parts(self.hidden, mixed), **(self.context or {}))

    def mixed(self, lam: Tensor) -> list[Tensor]:
        """The hidden state mixed at λ."""
        return [hidden_ops.mixed(part, lam, self.partner) for part in self.parts]

    def select(self, logits: Tensor, logits_adv: Tensor | None) -> Selected:
        """Losses, and the choice between them."""
        lam = self.lam.to(torch.promote_types(self.lam.dtype, closed_form.compute_dtype(logits.dtype)))
        return hidden_ops.selected(
            logits.detach(),
            None if logits_adv is None else logits_adv.detach(),
            self.target,
            lam,
            self.partner,
            self.weight,
            self.policy,
            self._ties,
            all_kept=self._all_kept,
        )

    def learn(self, logits: object) -> Tensor:
        """Check f's first answer, and keep what follows from the number of classes and the dtype."""
        checked = check_outputs(logits, self.lam.shape[0])
        check_target(self.target, checked)
        check_class_weight(self.weight, checked.shape[1], checked.device)
        self._all_kept = labels_facts(self.target, checked.shape[1], self.policy)
        self.divisor, self._grad_divisor = divisors(
            self.target, self.lam, self.partner, self.weight, self.policy, "mean", self.num_items, self._all_kept
        )
        ran_in = [checked.dtype, *(part.dtype for part in self.parts)]
        device = checked.device.type
        if torch.is_autocast_enabled(device):
            ran_in.append(torch.get_autocast_dtype(device))
        self._ties = self.policy.tie_bounds(max(ran_in, key=lambda dtype: torch.finfo(dtype).eps))
        self._in_float16 = torch.float16 in ran_in
        return checked

    def upstream(self, at_lam: Selected, logits: Tensor) -> Tensor:
        """What the first pass's backward starts from: of the summed row losses, scaled in float16."""
        if not self._in_float16:
            return at_lam.grad.to(logits.dtype)
        # Class weights make gradients above 1, which leave less room.
        room = FLOAT16_SCALE / at_lam.grad.abs().amax().clamp(min=1)
        self._scale = room.log2().floor().exp2()
        return (at_lam.grad * self._scale).to(logits.dtype)

    def remix(self, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """∇λ, λ' and the hidden state mixed at λ', from what reached the mixed parts."""
        policy, lam = self.policy, self.lam
        if len(grads) == 1 and grads[0] is not None and self._scale is None:
            slope, lam_adv, mixed = hidden_ops.remixed(
                self.parts[0], grads[0], lam, self.partner, policy, self._grad_divisor
            )
            return slope, lam_adv, [mixed]
        slope = torch.zeros_like(lam)
        for part, grad in zip(self.parts, grads, strict=True):
            if grad is not None:
                slope = slope + hidden_ops.lambda_grad(grad, part, self.partner).to(lam.dtype)
        if self._scale is not None:
            # What overflowed under the scale makes no step: λ' = λ.
            slope = torch.where(slope.isfinite(), slope / self._scale, 0)
        slope = closed_form.scaled_grad(slope, policy, self._grad_divisor)
        lam_adv = closed_form.step_lam(lam, slope, policy)
        return slope, lam_adv, self.mixed(lam_adv)

    # Eager

    def run(self, *, redrawn: bool, plan: str) -> tuple[Tensor, MixStats]:
        """The step in eager mode."""
        if self.policy.mode == "mixup":
            return self._mixup()
        if torch.is_inference_mode_enabled():
            raise RuntimeError("step differentiates by λ, which torch.inference_mode() rules out; use torch.no_grad()")
        # Of a frozen encoder under inference_mode; such tensors take no part in autograd.
        self.parts = [part.clone() if part.is_inference() else part for part in self.parts]
        device, amp = self.lam.device, self.policy.mode == "amp"
        in_capture = capturing(device)
        plan = "merged" if in_capture and plan == "auto" else plan
        random: RandomStates | RecordedMasks = RecordedMasks() if in_capture else RandomStates(device)
        statistics = BatchStatistics(self.f)
        both = amp and (plan == "both" or statistics.couple_rows or (redrawn and in_capture))
        repeats = not (redrawn and in_capture)  # whether a pass with the same random numbers can be had

        with (
            torch.enable_grad(),
            statistics.watch(),
            _without_parameters(self.f) if statistics.is_compiled and repeats else nullcontext(),
            random if repeats else nullcontext(),
        ):
            mixed, edges = self._mixed_with_edges()
            logits = self.learn(self.logits(mixed))
        del mixed
        both = both or (amp and (statistics.couple_rows or (redrawn and random.drew)))
        grads, kept = self._pull(logits, edges, retain=both and not (statistics.is_compiled and repeats))
        if both and not kept:
            with torch.enable_grad(), statistics.frozen(), random.again():
                logits = check_outputs(self.logits(self.mixed(self.lam)), len(self.lam), classes=logits.shape[1])
        elif not both:
            logits = logits.detach().clone()  # f may be a CUDA graph, whose next run writes over what it returned
        slope, lam_adv, mixed_adv = self.remix(grads)
        del grads, edges

        def again(parts: list[Tensor]) -> Tensor:
            with statistics.frozen(), nullcontext() if redrawn else random.again():
                return check_outputs(self.logits(parts), self.lam.shape[0], classes=logits.shape[1])

        merge = amp and plan == "merged" and not both
        with torch.no_grad() if merge else nullcontext():
            logits_adv = again(mixed_adv)
        del mixed_adv
        chosen = self.select(logits, logits_adv)
        if both:
            return hidden_ops.chosen_loss(chosen, logits, logits_adv), self._stats(chosen, slope, lam_adv, "both")
        rejected = ~chosen.mask & (lam_adv != self.lam)  # a row whose λ did not move is right in either pass
        rows = rejected[:0] if not amp or merge else rejected.nonzero().squeeze(1)  # the one look at the device
        # A compiled f would be compiled anew for every number of rows.
        independent = self.context is not None and not random.drew and not statistics.is_compiled
        alone = independent and 3 * len(rows) <= len(rejected)
        if merge or (len(rows) and not alone):
            if torch.is_autocast_enabled(device.type):
                # Weights that were cast without a graph must not be found in the cache.
                torch.clear_autocast_cache()
            del logits_adv
            logits_sel = again(self.mixed(torch.where(chosen.mask, lam_adv, self.lam)))
            loss = with_graph(logits_sel, chosen.loss, _at_choice(chosen))
            return loss, self._stats(chosen, slope, lam_adv, "merged")
        loss = with_graph(logits_adv, chosen.loss, chosen.grad_adv)
        if not len(rows):
            return loss, self._stats(chosen, slope, lam_adv, "adversarial")
        with statistics.frozen():
            logits_sub = self._logits_of(rows)
        redone = with_graph(logits_sub, chosen.loss[rows], chosen.grad[rows])
        return loss.index_put((rows,), redone), self._stats(chosen, slope, lam_adv, "sub-batch")

    def _mixup(self) -> tuple[Tensor, MixStats]:
        logits = self.learn(self.logits(self.mixed(self.lam)))
        at_lam = self.select(logits, None)
        unknown = torch.full_like(self.lam, torch.nan)
        return with_graph(logits, at_lam.loss, at_lam.grad), self._stats(at_lam, unknown, self.lam, "mixup")

    def _mixed_with_edges(self) -> tuple[list[Tensor], list[GradientEdge]]:
        """The hidden state mixed at λ, and where its gradient will arrive, even if f writes to its input."""
        leaves = [part if part.requires_grad else part.detach().requires_grad_() for part in self.parts]
        mixed = [hidden_ops.mixed(leaf, self.lam, self.partner) for leaf in leaves]
        return mixed, [get_gradient_edge(part) for part in mixed]

    def _pull(self, logits: Tensor, edges: list[GradientEdge], *, retain: bool) -> tuple[Sequence[Tensor | None], bool]:
        """The scaled gradient of the summed row losses to the mixed parts; nobody's `.grad` is touched.

        And whether the graph was kept, which that of a compiled function inside f may refuse.
        """
        unreached = "f's logits do not depend on hidden, so no gradient reaches λ"
        if not logits.requires_grad:
            raise ValueError(f"{unreached}: does f detach it, or run under torch.no_grad()?")
        upstream = self.upstream(self.select(logits, None), logits)
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

    def _logits_of(self, rows: Tensor) -> Tensor:
        """Run f on some rows alone, mixed at λ."""
        other, lam = self.partner[rows], self.lam[rows]
        mixed = []
        for part in self.parts:
            wide = closed_form.compute_dtype(part.dtype)
            coefficient = lam.to(wide).view(-1, *[1] * (part.dim() - 1))
            # By indexing, as index_select would lose the memory format.
            mixed.append(torch.lerp(part[other].to(wide), part[rows].to(wide), coefficient).to(part.dtype))
        context = {name: value if value is None else value[rows] for name, value in (self.context or {}).items()}
        logits = self.f(with_parts(self.hidden, mixed), **context)
        return check_outputs(logits, len(rows), sub_batch=True)

    def _stats(self, chosen: Selected, slope: Tensor, lam_adv: Tensor, plan: str) -> MixStats:
        return MixStats(self.lam, lam_adv, slope, chosen.delta, chosen.mask, plan)

    # Under torch.compile

    def traced(self, *, redrawn: bool, plan: str) -> tuple[Tensor, MixStats]:
        """The step inside a compiled region, where nothing can be decided by values."""
        if self.policy.mode == "mixup":
            return self._mixup()
        amp = self.policy.mode == "amp"
        if plan == "both" or BatchStatistics(self.f).couple_rows:
            raise NotImplementedError(
                "inside torch.compile step runs the plan 'merged' only, which batch normalisation in train mode does "
                "not allow: compile f alone and call step outside"
            )
        masks = RecordedMasks(batch_norm=False)

        def forward(*mixed: Tensor) -> tuple[Tensor, list[Tensor]]:
            with masks:
                logits = self.logits([part.clone() for part in mixed])
            return logits, list(masks.masks)

        # Without gradients outside the transformation, f's parameters are constants to it.
        with torch.no_grad():
            logits, pull, masks.masks = torch.func.vjp(forward, *self.mixed(self.lam), has_aux=True)  # type: ignore[misc]
            self.learn(logits)
            if redrawn and amp and masks.drew:
                raise NotImplementedError(
                    "dropout='redrawn' cannot be traced, since a row that keeps λ keeps its mask: use "
                    "dropout='shared', or compile f alone and call step outside"
                )
            grads = pull(self.upstream(self.select(logits, None), logits))
        slope, lam_adv, mixed_adv = self.remix(grads)
        again = RecordedMasks(batch_norm=False) if redrawn else masks.again()
        with torch.no_grad() if amp else nullcontext(), again:
            logits_adv = self.logits(mixed_adv)
        chosen = self.select(logits, logits_adv)
        if not amp:
            loss = with_graph(logits_adv, chosen.loss, chosen.grad_adv)
            return loss, self._stats(chosen, slope, lam_adv, "adversarial")
        with masks.again():
            logits_sel = self.logits(self.mixed(torch.where(chosen.mask, lam_adv, self.lam)))
        return with_graph(logits_sel, chosen.loss, _at_choice(chosen)), self._stats(chosen, slope, lam_adv, "merged")


def _at_choice(chosen: Selected) -> Tensor:
    """The gradient of every row at its λ*."""
    assert chosen.grad_adv is not None
    return torch.where(chosen.mask[:, None], chosen.grad_adv, chosen.grad)


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
