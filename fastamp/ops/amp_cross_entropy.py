"""amp_cross_entropy: AMP on the logits of unmixed rows (SentAMP)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastamp.autograd import once_differentiable, refuse_torch_func
from fastamp.backend import takes_kernels
from fastamp.checks import check_logits, checked_class_weights, checked_mix, checked_target
from fastamp.mixing import MixStats, Mixture
from fastamp.ops.operator import operator
from fastamp.ops.rows import (
    Rows,
    Target,
    compute_dtype,
    loss_and_grad,
    loss_change,
    mixed_rows,
    mixed_target,
    scaled_grad,
    scatter_roles,
    selected,
    step_lam,
)
from fastamp.policy import GradScale, Kind, Loss, Mode, Pairing, Policy, check_number, checked_policy
from fastamp.reduction import Reduction, checked_reduction, if_tensor, known_to_keep_all, reduced, upstream_of


def amp_cross_entropy(
    logits: Tensor,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: Kind = "mean",
    num_items: float | Tensor | None = None,
    return_stats: bool = False,
    mode: Mode = "amp",
    loss: Loss = "cross_entropy",
    step_size: float = 2e-3,
    grad_clip: float | None = 1.0,
    grad_scale: GradScale = "row",
    clamp: bool = False,
    tie_tol: float | str = "auto",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    pairing: Pairing = "permutation",
    sum_classes: bool = False,
) -> Tensor | tuple[Tensor, MixStats]:
    """AMP on the logits of unmixed rows (SentAMP): mixing commutes with the affine layer that made them.

    With z(λ) = λ z_r + (1-λ) z_π(r) and t_r = λ_r y_r + (1-λ_r) y_π(r):
    ℓ_r = CE(z_r(λ*_r), t_r), λ*_r = λ_r or λ'_r = λ_r + ε·clip(∂ℓ_r/∂λ) by the paper's Eq. 10-21.
    for loss="binary_cross_entropy" that with logits in place of CE: each class is then a question of its own.
    One pass, closed forms, the complete gradient to the unmixed logits; a class that is -inf in either row of a
    pair is excluded from it.

    Args:
        logits: (B, C) float16/bfloat16/float32/float64, any strides.
        target: (B,) int64 or uint8 class indices, or (B, C) floating-point probabilities: of one class out of C, or for
            "binary_cross_entropy" of each class on its own.
        lam: (B,) floating point in [0, 1], or () for all rows alike.
        partner: (B,) int64, a permutation of 0..B-1.
        weight: (C,) class weights, as nn.CrossEntropyLoss (nn.BCEWithLogitsLoss) has them.
        pos_weight: (C,) weights of the positive side, as nn.BCEWithLogitsLoss has them; "binary_cross_entropy" only.
        reduction: "mean" (divides by Σ_r λ_r w(y_r) + (1-λ_r) w(y_π(r)) over kept sides; by B for probabilities;
            for "binary_cross_entropy" by the kept share of entries times B), "sum" or "none".
        num_items: replaces the divisor of the mean; a number or a 0-d tensor.
        return_stats: also return a `MixStats`.
        mode: as the options below, see `fastamp.AMPLoss`.
        loss: "cross_entropy", "binary_cross_entropy" (the mean over classes) or "softmax_bce".
        step_size: ε.
        grad_clip: bound on ∇λ, or None.
        grad_scale: "row" or "mean".
        clamp: keep λ' inside [0, 1].
        tie_tol: "auto" or an absolute tolerance.
        ignore_index: a class index whose side of the mixture contributes nothing; for "binary_cross_entropy" also an
            entry of a (B, C) target that does.
        label_smoothing: in [0, 1]; towards 1/C, or 1/2 for the entries of a (B, C) target of "binary_cross_entropy".
        pairing: "matching" promises that partner is its own inverse.
        sum_classes: "binary_cross_entropy" is the sum over classes in place of the mean.

    Returns:
        The loss, () or (B,), float32 (float64 for float64 logits); with return_stats a tuple (loss, MixStats).
        Differentiable once, to the logits.

    Raises:
        TypeError, ValueError: wrong options, dtypes, shapes or devices; on the CPU also labels out of range, λ
            outside [0, 1] and a partner that is no permutation. On a GPU a label out of range stops the kernel
            by a device-side assertion; λ and partner are taken as they are.
        NotImplementedError: inside a transform of torch.func.
    """
    refuse_torch_func("amp_cross_entropy")
    policy = checked_policy(
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
    check_number("step_size", step_size, low=0.0)
    target, weight, how = check(logits, target, weight, pos_weight, policy, reduction, num_items)
    lam = checked_mix(lam, partner, len(logits), logits.device, pairing=pairing)
    result, stats = dispatch(logits, Mixture(target, lam, partner, weight), policy, step_size, how, return_stats)
    return (result, stats) if stats is not None else result


def check(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    policy: Policy,
    reduction: str,
    num_items: float | Tensor | None,
) -> tuple[Tensor, Tensor | None, Reduction]:
    """The checked target, its weights, and how its losses are reduced; ValueError for a CPU's label out of range."""
    check_logits("logits", logits)
    target = checked_target(target, logits)
    weights = checked_class_weights(weight, pos_weight, logits.shape[1], logits, policy.loss)
    return target, weights, checked_reduction(reduction, num_items, target, logits.shape[1], policy)


def dispatch(
    logits: Tensor,
    mixture: Mixture,
    policy: Policy,
    step_size: float,
    reduction: Reduction,
    return_stats: bool,
    *,
    weighs_delta: bool = False,
) -> tuple[Tensor, MixStats | None]:
    """`amp_cross_entropy` for checked arguments; `weighs_delta` asks for every digit of δ."""
    mixture = mixture.computed_in(compute_dtype(logits.dtype))
    policy = policy._replace(keeps_all=not weighs_delta and known_to_keep_all(mixture, policy, reduction))
    need_grad = logits.requires_grad and torch.is_grad_enabled()  # inside a Function grad mode is always off
    if takes_kernels(logits) and policy.loss != "softmax_bce":
        by_kernel, after = reduction.on_host()
        grad_divisor = reduction.kernel_grad_divisor(mixture, policy)
        loss, rows = _AmpCrossEntropy.apply(
            logits,
            *mixture,
            grad_divisor,
            policy,
            step_size,
            by_kernel,
            need_grad and not torch.compiler.is_compiling() and not _saved_tensors_are_hooked(),
        )
        return loss if after is None else loss / after.to(loss.dtype), stats_of(rows, mixture.lam, return_stats)
    divisor, divisor_of_grad = reduction.divisors(mixture, policy)
    loss, *fields = _ClosedForm.apply(
        logits, *mixture, divisor, divisor_of_grad, policy, step_size, reduction.kind, reduction.all_kept, need_grad,
        return_stats,
    )  # fmt: skip
    if not return_stats:
        return loss, None
    lam_adv, grad, delta, mask = fields
    return loss, MixStats(mixture.lam, lam_adv, grad, delta, mask)


def stats_of(rows: Tensor, lam: Tensor, wanted: bool) -> MixStats | None:
    """The statistics in a kernel's buffer; the mask costs a launch, so it is made on request only."""
    if not wanted:
        return None
    from fastamp import kernels

    return MixStats(lam, rows[kernels.LAM_ADV], rows[kernels.GRAD], rows[kernels.DELTA], rows[kernels.MASK] > 0)


# Closed form

TAME_LOGIT = 32.0
ROW_FIELDS, LOSS_FIELD = 12, 0  # of a kernel's buffer: see kernels/amp/rows.py


def closed_form(
    logits: Tensor,
    mixture: Mixture,
    policy: Policy,
    step_size: float,
    grad_divisor: Tensor | float | None,
    *,
    all_kept: bool = False,
    need_grad: bool = True,
    need_stats: bool = True,
) -> Rows:
    """AMP on logits (B, C) in plain PyTorch; everything returned is in the compute dtype, that of λ.

    Rows after those with a λ are only partners. A class whose logit is -inf in either row is excluded from the pair:
    it stays -inf, d is 0 there, and no gradient reaches it unless it carries target mass, when the loss is +inf.
    """
    lam, partner = mixture.lam, mixture.partner
    target = mixed_target(mixture, logits.shape[1], policy, all_kept=all_kept)
    z = logits.to(lam.dtype)
    if _is_lean(logits, policy, step_size):
        return _lean_rows(z, mixture, target, policy, step_size, grad_divisor, need_grad, need_stats)
    if policy.loss != "binary_cross_entropy":
        # A common offset of a row changes nothing in exact arithmetic, and costs digits in the mixture.
        z = z - z.amax(1, keepdim=True)
    other, z = z.index_select(0, partner), mixed_rows(z, lam)
    excluded = (z == -torch.inf) | (other == -torch.inf)
    d = (z - other).masked_fill(excluded, 0)
    x = (other + lam.unsqueeze(1) * d).masked_fill(excluded, -torch.inf)
    loss, g = loss_and_grad(x, target)
    grad = scaled_grad((g * d).sum(1), policy, grad_divisor)
    rows = Rows(loss, lam, g, step_lam(lam, grad, policy, step_size), grad, None, None)
    u = (rows.lam_adv - lam).unsqueeze(1) * d
    g_adv: Tensor | None
    if policy.loss == "softmax_bce":
        loss_adv, g_adv = loss_and_grad(x + u, target)
        return selected(rows, loss_adv - loss, g_adv, policy)
    g_adv = loss_and_grad(x + u, target)[1] if need_grad else None
    return selected(rows, loss_change(x, u, target), g_adv, policy)


def _is_lean(logits: Tensor, policy: Policy, step_size: float) -> bool:
    """Whether one of the two losses is enough for every row, and its logits are finite and small.

    Only a CPU's values are looked at.
    """
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or policy.loss != "cross_entropy":
        return False
    if not policy.keeps_all and policy.mode != "mixup":
        return False
    if not logits.numel():
        return True
    low, high = (bound.item() for bound in torch.aminmax(logits.detach()))
    reach = 0.0 if policy.mode == "mixup" else torch.inf if policy.grad_clip is None else step_size * policy.grad_clip
    return -low <= TAME_LOGIT and high <= TAME_LOGIT and (high - low) * reach <= 1.0


def _lean_rows(
    z: Tensor,
    mixture: Mixture,
    target: Target,
    policy: Policy,
    step_size: float,
    grad_divisor: Tensor | float | None,
    need_grad: bool,
    need_stats: bool,
) -> Rows:
    """The same in the fewest operations: the loss at λ' (at λ for plain Mixup), and of λ the softmax alone.

    Statistics are made beside it, so that they change no bit of loss or gradient.
    """
    lam, on = mixture.lam, target.on
    other = z.index_select(0, mixture.partner)
    d = mixed_rows(z, lam) - other
    lam_sel = lam
    grad: Tensor | None = None
    delta: Tensor | None = None
    if policy.mode != "mixup" or need_stats:
        p = torch.addcmul(other, lam.unsqueeze(1), d).softmax(1)
        kept = p.clone() if need_stats else None
        p = p if target.total is None else p.mul_(target.total.unsqueeze(1))
        grad = scaled_grad(p.sub_(on).mul_(d).sum(1), policy, grad_divisor)
        del p  # each of these is large where there are many classes
        lam_sel = step_lam(lam, grad, policy, step_size)
        if kept is not None:
            eta = lam_sel - lam
            change = kept.mul_(torch.expm1(eta.unsqueeze(1) * d)).sum(1).log1p_()
            change = change if target.total is None else change.mul_(target.total)
            delta = change.sub_(eta * (on * d).sum(1))
            del kept
    x = other.addcmul_(lam_sel.unsqueeze(1), d)
    del other, d
    logp = x.log_softmax(1)
    del x
    loss = (on * logp).sum(1).neg_()
    mask = torch.full_like(lam, policy.mode != "mixup", dtype=torch.bool) if need_stats else None
    if not need_grad:
        return Rows(loss, lam_sel, None, lam_sel, grad, delta, mask)
    g = logp.exp_()
    g = (g if target.total is None else g.mul_(target.total.unsqueeze(1))).sub_(on)
    return Rows(loss, lam_sel, g, lam_sel, grad, delta, mask)


class _ClosedForm(torch.autograd.Function):
    """Keeps g for backward; nothing saved is ever written to."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
        mixture = Mixture(*arguments[:4])
        divisor, grad_divisor, policy, step_size, kind, all_kept, need_grad, need_stats = arguments[4:]
        rows = closed_form(
            logits, mixture, policy, step_size, grad_divisor,
            all_kept=all_kept, need_grad=need_grad, need_stats=need_stats,
        )  # fmt: skip
        if need_grad:
            ctx.save_for_backward(rows.grad_mixed, rows.lam, mixture.partner, *if_tensor(divisor))
            ctx.divisor, ctx.dtype = divisor if isinstance(divisor, float) else None, logits.dtype
        fields = (rows.lam_adv, rows.grad, rows.delta, rows.mask) if need_stats else ()
        ctx.mark_non_differentiable(*fields)
        ctx.set_materialize_grads(False)
        return reduced(rows.loss, kind, divisor), *fields

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_mixed, lam, partner, *divisor = ctx.saved_tensors
        upstream = upstream_of(grad_loss, *divisor or (ctx.divisor,))
        return scatter_roles(grad_mixed, lam, partner, upstream).to(ctx.dtype), *[None] * 12


# Kernels


class _AmpCrossEntropy(torch.autograd.Function):
    """The gradient of the forward launch is handed out once, scaled in place by the first backward; a later one
    computes it again, so that no gradient that was given out is ever written to.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Any, Tensor]:
        mixture = Mixture(*arguments[:4])
        grad_divisor, policy, step_size, divisor, want_grad = arguments[4:]
        if want_grad:
            from fastamp import kernels

            made = kernels.amp_cross_entropy_forward(
                logits, mixture, policy, step_size, grad_divisor, divisor=divisor, want_grad=True
            )
            # Not the record: its loss is an output, and would keep itself alive.
            ctx.dlogits, ctx.assumed = made.dlogits, made.assumed
            rows, loss, used = made.rows, made.loss, made.divisor
        else:
            ctx.dlogits = None
            rows, loss, used = forward(logits, mixture, policy, step_size, grad_divisor, divisor)
        reduces = divisor is not None
        ctx.save_for_backward(logits, *mixture, rows, used if reduces else None)
        ctx.policy = policy
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)  # a zero gradient of what has none would be a launch
        return loss if reduces else rows[LOSS_FIELD].clone(), rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, *mixture, rows, divisor = ctx.saved_tensors
        dlogits, ctx.dlogits = ctx.dlogits, None
        if dlogits is not None:
            from fastamp import kernels

            return kernels.rescaled(dlogits, grad_loss, divisor, ctx.assumed), *[None] * 9
        return backward(logits, Mixture(*mixture), rows, divisor, grad_loss, ctx.policy), *[None] * 9


def _saved_tensors_are_hooked() -> bool:
    """Whether what is kept for backward is offloaded or made again: the gradient itself is then left to backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _rows_like(_: Tensor, mixture: Mixture, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    lam, shape = mixture.lam, (0,) if options[-1] is None else ()
    # Not len(lam): it would make a number of a size that is a symbol, and a graph for every batch size.
    return lam.new_empty(ROW_FIELDS, lam.shape[0]), lam.new_empty(shape), lam.new_empty(shape)


@operator("fastamp::amp_cross_entropy", _rows_like)
def forward(
    logits: Tensor,
    mixture: Mixture,
    policy: Policy,
    step_size: float,
    grad_divisor: Tensor | None,
    divisor: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of every row, the reduced loss and what it was divided by; without reduction these two are empty."""
    from fastamp import kernels

    made = kernels.amp_cross_entropy_forward(
        logits, mixture, policy, step_size, grad_divisor, divisor=divisor, want_grad=False
    )
    if made.loss is None or made.divisor is None:
        return made.rows, made.rows.new_empty(0), made.rows.new_empty(0)
    return made.rows, made.loss, made.divisor


@operator(
    "fastamp::amp_cross_entropy_backward",
    lambda logits, *_: torch.empty(logits.shape, dtype=logits.dtype, device=logits.device),
)
def backward(
    logits: Tensor, mixture: Mixture, rows: Tensor, divisor: Tensor | None, upstream: Tensor, policy: Policy
) -> Tensor:
    """The complete gradient (B, C) from the fields of a forward, for an upstream gradient () or (B,)."""
    from fastamp import kernels

    return kernels.amp_cross_entropy_backward(logits, mixture, policy, rows, divisor, upstream)
