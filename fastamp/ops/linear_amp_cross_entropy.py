"""linear_amp_cross_entropy: AMP on the hidden rows before a linear classifier, its activation and dropout."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastamp.autograd import once_differentiable, refuse_torch_func
from fastamp.backend import takes_kernels
from fastamp.checks import (
    check_class_vector,
    check_device,
    check_float_rows,
    check_head_dtypes,
    checked_class_weights,
    checked_mix,
    checked_target,
)
from fastamp.mixing import MixStats, Mixture
from fastamp.ops import amp_cross_entropy as on_logits
from fastamp.ops import chunked_head
from fastamp.ops.chunked_head import Head
from fastamp.ops.rows import (
    Rows,
    compute_dtype,
    loss_and_grad,
    loss_change,
    mixed_target,
    scaled_grad,
    scatter_roles,
    selected,
    step_lam,
)
from fastamp.policy import GradScale, Kind, Loss, Mode, Pairing, Policy, check_number, checked_policy
from fastamp.reduction import Reduction, checked_reduction, if_tensor, known_to_keep_all, reduced, upstream_of

# Up to so many classes a product in half precision costs digits and saves little: it is done in float32.
SMALL_HEAD_CLASSES = 16


def linear_amp_cross_entropy(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    *,
    activation: Literal["relu"] | None = None,
    dropout_mask: Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: Kind = "mean",
    num_items: float | Tensor | None = None,
    chunk_rows: int | None = None,
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
    """AMP on the hidden rows before a linear classifier, mixed before its activation and dropout.

    logits_r(λ) = W (k_r ∘ act(λ h_r + (1-λ) h_π(r))) + b, and from there as `amp_cross_entropy`;
    ∇λ_r = ⟨∂ℓ_r/∂m_r, h_r - h_π(r)⟩. Both passes of a row share its dropout mask k_r.

    Args:
        hidden: (B, D) float16/bfloat16/float32/float64.
        linear_weight: (C, D) W.
        linear_bias: (C,) b, or None.
        target: (B,) int64 or uint8 class indices, or (B, C) floating-point probabilities.
        lam: (B,) floating point in [0, 1], or () for all rows alike.
        partner: (B,) int64, a permutation of 0..B-1.
        activation: None or "relu".
        dropout_mask: (B, D) k: 0 where dropped, 1/(1-p) where kept, as F.dropout(torch.ones(B, D), p) makes it.
        weight: (C,) class weights; this and the options below as in `amp_cross_entropy`.
        pos_weight: (C,) weights of the positive side; "binary_cross_entropy" only.
        reduction: "mean", "sum" or "none".
        num_items: replaces the divisor of the mean.
        chunk_rows: how many rows' logits are computed at a time, so that neither (B, C) logits nor their gradient are
            ever held; at least 1, and 2 more where partners lie outside. None computes all at once, unless chunks,
            which have to sum the wanted gradients in float32, save 512 MiB at the peak (64 MiB on a CPU): then as many
            rows as take the room of the gradients, and at least 1024 (64) (outside torch.compile only: a number breaks
            the graph). Not with an activation or a dropout mask, after which logits cannot be mixed; these hold (B, C)
            whatever C is.
        return_stats: also return a `MixStats`.
        mode: "amp", "maxop" or "mixup".
        loss: "cross_entropy", "binary_cross_entropy" or "softmax_bce".
        step_size: ε.
        grad_clip: bound on ∇λ, or None.
        grad_scale: "row" or "mean".
        clamp: keep λ' inside [0, 1].
        tie_tol: "auto" or an absolute tolerance.
        ignore_index: a class index whose side of the mixture contributes nothing.
        label_smoothing: in [0, 1].
        pairing: "matching" promises that partner is its own inverse.
        sum_classes: of "binary_cross_entropy", in place of the mean over classes.

    Returns:
        The loss, () or (B,), float32 (float64 for float64 hidden); with return_stats a tuple (loss, MixStats).
        Differentiable once, to hidden, linear_weight and linear_bias. Small heads, and any with an activation or a
        dropout mask, are computed in float32 throughout; a large affine head is one matrix product in hidden's dtype.
        In chunks all products are in hidden's dtype (or autocast's), and gradients are summed over chunks in float32
        (float64 for float64). Those of a mean or sum are made in the forward pass, and kept in that dtype until
        backward; for "none", and for products in float16, whose gradients have to see the loss scale before they are
        rounded, backward computes the logits again.

    Raises:
        TypeError, ValueError: as in `amp_cross_entropy`; chunk_rows that is no int, or less than 1.
        NotImplementedError: chunk_rows together with an activation or a dropout mask; a transform of torch.func.
    """
    refuse_torch_func("linear_amp_cross_entropy")
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
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu'; got {activation!r}")
    head = Head(hidden, linear_weight, linear_bias, dropout_mask, activation == "relu")
    _check_head(head)
    classes = len(linear_weight)
    target = checked_target(target, hidden.new_empty(()).expand(len(hidden), classes))
    lam = checked_mix(lam, partner, len(hidden), hidden.device, pairing=policy.pairing)
    weight = checked_class_weights(weight, pos_weight, classes, hidden, policy.loss)
    if chunk_rows is not None:
        _check_chunk_rows(chunk_rows, head)
    how = checked_reduction(reduction, num_items, target, classes, policy)
    mixture = Mixture(target, lam, partner, weight)
    result, stats = dispatch(head, mixture, policy, step_size, how, chunk_rows=chunk_rows, return_stats=return_stats)
    return (result, stats) if stats is not None else result


def _check_head(head: Head) -> None:
    hidden, weight, bias, keep, _ = head
    check_float_rows("hidden", hidden, dims=2)
    check_float_rows("linear_weight", weight, dims=2)
    if not len(weight):
        raise ValueError(f"linear_weight must have at least one class, got shape {tuple(weight.shape)}")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"linear_weight must be (C, {hidden.shape[1]}) for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    check_device("linear_weight", weight, hidden.device)
    check_class_vector("linear_bias", bias, len(weight), hidden.device)
    check_head_dtypes(hidden, weight, bias)
    if keep is not None:
        check_float_rows("dropout_mask", keep)
        if keep.shape != hidden.shape:
            raise ValueError(f"dropout_mask must have hidden's shape {tuple(hidden.shape)}, got {tuple(keep.shape)}")
        check_device("dropout_mask", keep, hidden.device)


def _check_chunk_rows(chunk_rows: object, head: Head) -> None:
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
        raise TypeError(f"chunk_rows must be an int >= 1 or None, got {chunk_rows!r}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be an int >= 1 or None, got {chunk_rows}")
    if not head.is_affine:
        raise NotImplementedError(
            "chunk_rows takes neither an activation nor a dropout_mask: mixing does not commute with them; "
            "leave chunk_rows out, or mix behind them"
        )


def dispatch(
    head: Head,
    mixture: Mixture,
    policy: Policy,
    step_size: float,
    reduction: Reduction,
    *,
    chunk_rows: int | None,
    return_stats: bool,
) -> tuple[Tensor, MixStats | None]:
    """`linear_amp_cross_entropy` for checked arguments."""
    by_kernel = _fits_kernel(head, policy)
    if by_kernel:
        # Behind a ReLU the loss is not convex in λ.
        keeps_all = policy.mode == "maxop" or (not head.relu and known_to_keep_all(mixture, policy, reduction))
        policy = policy._replace(keeps_all=keeps_all)
        # In a comparison binary cross-entropy has two more numbers a class: more than registers hold.
        decided = not head.relu and (keeps_all or policy.mode == "mixup")
        by_kernel = policy.loss == "cross_entropy" or decided
    # A graph stays whole unless chunks are asked for.
    if chunk_rows is None and head.is_affine and not by_kernel and not torch.compiler.is_compiling():
        chunk_rows = chunked_head.automatic_rows(head)
    if chunk_rows is not None and len(head.hidden):
        run = chunked_head.in_chunks
        if torch.compiler.is_compiling():
            # Here and not by a decorator: that imports the compiler, which is slow and imports Triton. On one line,
            # since it is the line that torch shows.
            run = torch.compiler.disable(run, reason="chunk_rows breaks the graph: leave it out for fullgraph=True")
        loss, stats = run(head, mixture, policy, step_size, reduction, chunk_rows)
        return loss, stats if return_stats else None
    small_half = head.hidden.dtype.itemsize == 2 and len(head.weight) <= SMALL_HEAD_CLASSES
    if not by_kernel and head.is_affine and not small_half:
        logits = F.linear(head.hidden, head.weight, head.bias)
        return on_logits.dispatch(logits, mixture, policy, step_size, reduction, return_stats)
    mixture = mixture.computed_in(compute_dtype(head.hidden.dtype))
    if by_kernel:
        divisor, after = reduction.on_host()
        grad_divisor = reduction.kernel_grad_divisor(mixture, policy)
        loss, rows = _LinearAmpCrossEntropy.apply(
            *head[:4], *mixture, head.relu, grad_divisor, policy, step_size, divisor
        )
        loss = loss if after is None else loss / after.to(loss.dtype)
        return loss, on_logits.stats_of(rows, mixture.lam, return_stats)
    mass, divisor_of_grad = reduction.divisors(mixture, policy)
    loss, *fields = _ClosedForm.apply(
        *head[:4], *mixture, head.relu, mass, divisor_of_grad, policy, step_size, reduction.kind, reduction.all_kept
    )
    lam_adv, grad, delta, mask = fields
    return loss, MixStats(mixture.lam, lam_adv, grad, delta, mask) if return_stats else None


def _fits_kernel(head: Head, policy: Policy) -> bool:
    """Whether a head of this size is one launch; it also has to be eager: under torch.compile it is composed."""
    if policy.loss == "softmax_bce" or torch.compiler.is_compiling() or not takes_kernels(head.hidden):
        return False
    from fastamp import kernels

    classes, depth = head.weight.shape
    itemsize = compute_dtype(head.hidden.dtype).itemsize
    return kernels.linear_head_config(len(head.hidden), classes, depth, itemsize) is not None


def closed_form(
    head: Head,
    mixture: Mixture,
    policy: Policy,
    step_size: float,
    grad_divisor: Tensor | float | None,
    *,
    all_kept: bool = False,
) -> tuple[Rows, Tensor, Tensor]:
    """AMP before a linear head in plain PyTorch, all of it in the compute dtype.

    Returns:
        The rows (grad_mixed is the gradient to the logits), the head's input at λ* (B, D), and ∂ℓ/∂m (B, D).
    """
    hidden, weight, bias, keep, relu = head
    lam = mixture.lam
    target = mixed_target(mixture, len(weight), policy, all_kept=all_kept)
    other = hidden.index_select(0, mixture.partner)
    d = hidden - other

    def at(coefficient: Tensor) -> tuple[Tensor, Tensor]:
        m = torch.addcmul(other, coefficient.unsqueeze(1), d)
        slope = (m > 0).to(m.dtype) if relu else torch.ones_like(m)
        return m, slope if keep is None else slope * keep

    m, slope = at(lam)
    head_input = m * slope
    x = F.linear(head_input, weight, bias)
    loss, g = loss_and_grad(x, target)
    grad_m = (g @ weight) * slope
    grad = scaled_grad((grad_m * d).sum(1), policy, grad_divisor)
    lam_adv = step_lam(lam, grad, policy, step_size)
    m_adv, slope_adv = at(lam_adv)
    # Where the slope is that of λ the change of m is known without its rounding.
    step = torch.where(slope_adv == slope, (lam_adv - lam).unsqueeze(1) * d * slope, m_adv * slope_adv - head_input)
    u = F.linear(step, weight)
    loss_adv, g_adv = loss_and_grad(x + u, target)
    delta = loss_adv - loss if policy.loss == "softmax_bce" else loss_change(x, u, target)
    rows = selected(Rows(loss, lam, g, lam_adv, grad, None, None), delta, g_adv, policy)
    took = rows.mask.unsqueeze(1)
    grad_m_adv = (g_adv @ weight) * slope_adv
    return rows, torch.where(took, head_input + step, head_input), torch.where(took, grad_m_adv, grad_m)


class _ClosedForm(torch.autograd.Function):
    """Keeps the selected pass for backward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        leaves, mixture = arguments[:4], Mixture(*arguments[4:8])
        relu, divisor, grad_divisor, policy, step_size, kind, all_kept = arguments[8:]
        wide: list[Any] = [None if leaf is None else leaf.to(mixture.lam.dtype) for leaf in leaves]
        hidden, weight, bias, keep = wide
        with torch.autocast(leaves[0].device.type, enabled=False):
            rows, head_input, grad_m = closed_form(
                Head(hidden, weight, bias, keep, relu), mixture, policy, step_size, grad_divisor, all_kept=all_kept
            )
        ctx.save_for_backward(rows.grad_mixed, grad_m, head_input, rows.lam, mixture.partner, *if_tensor(divisor))
        ctx.divisor = divisor if isinstance(divisor, float) else None
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves[:3]]
        ctx.mark_non_differentiable(rows.lam_adv, rows.grad, rows.delta, rows.mask)
        ctx.set_materialize_grads(False)
        return reduced(rows.loss, kind, divisor), rows.lam_adv, rows.grad, rows.delta, rows.mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        g, grad_m, head_input, lam, partner, *divisor = ctx.saved_tensors
        upstream = upstream_of(grad_loss, *divisor or (ctx.divisor,))
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_hidden = grad_weight = grad_bias = None
        with torch.autocast(g.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_hidden = scatter_roles(grad_m, lam, partner, upstream).to(hidden_dtype)
            weighted = g * (upstream[:, None] if upstream.dim() else upstream)
            if ctx.needs_input_grad[1]:
                grad_weight = (weighted.mT @ head_input).to(weight_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = weighted.sum(0).to(bias_dtype)
        return (grad_hidden, grad_weight, grad_bias, *[None] * 12)


class _LinearAmpCrossEntropy(torch.autograd.Function):
    """Gradients for a reduced loss leave with the forward launch, and are scaled out of place."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Any, ...]:
        from fastamp import kernels

        hidden, weight, bias, keep, *tensors, relu = arguments[:9]
        head, mixture = Head(hidden, weight, bias, keep, relu), Mixture(*tensors)
        grad_divisor, policy, step_size, divisor = arguments[9:]
        reduces = divisor is not None
        out = kernels.linear_amp_cross_entropy_launch(
            head, mixture, policy, step_size, grad_divisor,
            divisor=divisor, want_rows=True, want_grad=reduces and any(ctx.needs_input_grad),
        )  # fmt: skip
        ctx.save_for_backward(*(arguments[:8] if out.factor is None else (*out.grads, out.factor)), grad_divisor)
        ctx.options, ctx.reduces = (head.relu, policy, step_size), out.factor is not None
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in arguments[:3]]
        ctx.mark_non_differentiable(out.rows)
        ctx.set_materialize_grads(False)  # a zero gradient of what has none would be a launch
        return (out.rows[kernels.LOSS].clone() if out.loss is None else out.loss), out.rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from fastamp import kernels

        *saved, grad_divisor = ctx.saved_tensors
        if ctx.reduces:
            dhidden, dweight, dbias, factor = saved
            factor = factor * grad_loss
            grads: Any = [dhidden * factor, *torch._foreach_mul([dweight, dbias], factor)]
        else:
            relu, policy, step_size = ctx.options
            hidden, weight, bias, keep, *tensors = saved
            head, mixture = Head(hidden, weight, bias, keep, relu), Mixture(*tensors)
            grads = kernels.linear_amp_cross_entropy_launch(
                head, mixture, policy, step_size, grad_divisor, upstream=grad_loss, want_grad=True
            ).grads
        needed = zip(ctx.needs_input_grad, grads, ctx.dtypes, strict=False)
        return (*[grad.to(dtype) if need else None for need, grad, dtype in needed], *[None] * 10)
