"""Triton operations of a step at any layer as PyTorch sees them: autograd functions in eager mode, registered
operators under torch.compile, as in `fastamp.ops`. Arguments are checked, and not empty.

Mixing is linear in the rows, so its gradient is an operation of the same kind, whose gradient is mixing again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastamp.kernels as kernels
from fastamp import closed_form
from fastamp.kernels import RowPolicy
from fastamp.ops import row_policy
from fastamp.policy import Policy


def mixed(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """`fastamp.hidden.mixed` on Triton, for lam of the compute dtype."""
    return (_mix_operator if torch.compiler.is_compiling() else _Mix.apply)(hidden, lam, partner)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
        ctx.save_for_backward(lam, partner)
        return kernels.mix_forward(hidden, lam, partner)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _MixGrad.apply(upstream, *ctx.saved_tensors), None, None


class _MixGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, upstream: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
        ctx.save_for_backward(lam, partner)
        return kernels.mix_backward(upstream, lam, partner)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _Mix.apply(upstream, *ctx.saved_tensors), None, None


@torch.library.custom_op("fastamp::mix", mutates_args=())
def _mix_operator(hidden: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    return kernels.mix_forward(hidden, lam, partner)


@torch.library.custom_op("fastamp::mix_backward", mutates_args=())
def _mix_grad_operator(upstream: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    return kernels.mix_backward(upstream, lam, partner)


@_mix_operator.register_fake
@_mix_grad_operator.register_fake
def _(rows: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    return kernels.empty_rows(rows, kernels.memory_order(rows))


def _keep_mix(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


_mix_operator.register_autograd(
    lambda ctx, upstream: (_mix_grad_operator(upstream, *ctx.saved_tensors), None, None), setup_context=_keep_mix
)
_mix_grad_operator.register_autograd(
    lambda ctx, upstream: (_mix_operator(upstream, *ctx.saved_tensors), None, None), setup_context=_keep_mix
)


def lambda_grad(grad_mixed: Tensor, hidden: Tensor, partner: Tensor) -> Tensor:
    """`fastamp.hidden.lambda_grad` on Triton."""
    if torch.compiler.is_compiling():
        return _lambda_grad_operator(grad_mixed.detach(), hidden.detach(), partner)
    return kernels.lambda_grad(grad_mixed.detach(), hidden.detach(), partner, closed_form.compute_dtype(hidden.dtype))


@torch.library.custom_op("fastamp::lambda_grad", mutates_args=())
def _lambda_grad_operator(grad_mixed: Tensor, hidden: Tensor, partner: Tensor) -> Tensor:
    return kernels.lambda_grad(grad_mixed, hidden, partner, closed_form.compute_dtype(hidden.dtype))


@_lambda_grad_operator.register_fake
def _(grad_mixed: Tensor, hidden: Tensor, partner: Tensor) -> Tensor:
    return torch.empty(hidden.shape[0], dtype=closed_form.compute_dtype(hidden.dtype), device=hidden.device)


def remixed(
    hidden: Tensor, grad_mixed: Tensor, lam: Tensor, partner: Tensor, policy: Policy, grad_divisor: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastamp.hidden.remixed` on Triton, for lam of the compute dtype."""
    divisor = None
    if policy.grad_scale == "mean":
        # A number is filled in on the device, for a copy from the host would wait for it.
        divisor = grad_divisor.to(lam) if isinstance(grad_divisor, Tensor) else lam.new_full((), grad_divisor)
    step = (policy.mode, policy.grad_clip, policy.clamp, policy.step_size)
    arguments = (hidden, grad_mixed.detach(), lam, partner, divisor, *step)
    if torch.compiler.is_compiling():
        grad, lam_adv, rows = _remix_operator(*arguments)
        return grad.detach(), lam_adv.detach(), rows
    return _Remix.apply(*arguments)


def _remix(
    hidden: Tensor,
    grad_mixed: Tensor,
    lam: Tensor,
    partner: Tensor,
    grad_divisor: Tensor | None,
    mode: str,
    grad_clip: float | None,
    clamp: bool,
    step_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # Fields that a remix has no use for are always the same: a kernel is compiled for every combination.
    policy = RowPolicy(mode, False, grad_clip, clamp, -100, 0.0, 0.0, 0.0, False)
    return kernels.remix_forward(hidden, grad_mixed, lam, partner, grad_divisor, policy=policy, step_size=step_size)


class _Remix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad, lam_adv, rows = _remix(*arguments)
        ctx.mark_non_differentiable(grad, lam_adv)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lam_adv, arguments[3])
        return grad, lam_adv, rows

    @staticmethod
    def backward(ctx: Any, _: Tensor, __: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (_MixGrad.apply(upstream, *ctx.saved_tensors), *[None] * 8)


_remix_operator = torch.library.custom_op("fastamp::remix", _remix, mutates_args=())


@_remix_operator.register_fake
def _(hidden: Tensor, grad_mixed: Tensor, lam: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = kernels.empty_rows(hidden, kernels.memory_order(hidden))
    return lam.new_empty(lam.shape), lam.new_empty(lam.shape), rows


def _keep_remix(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[3])


def _remix_gradient(ctx: Any, _: Tensor, __: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return (_mix_grad_operator(upstream, *ctx.saved_tensors), *[None] * 8)


_remix_operator.register_autograd(_remix_gradient, setup_context=_keep_remix)


def selected(
    logits: Tensor,
    logits_adv: Tensor | None,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    policy: Policy,
    ties: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`fastamp.hidden.selected` on Triton: the fields of its `Selected`, detached."""
    compiled_for = row_policy(policy, lam.dtype)._replace(
        # Fields that a selection has no use for are always the same: a kernel is compiled for every combination.
        grad_clip=None,
        clamp=False,
        tie_abs=ties[0] if policy.mode == "amp" else 0.0,
        tie_rel=ties[1] if policy.mode == "amp" else 0.0,
        never_rejects=False,
        matched=False,
    )
    logits, logits_adv = logits.detach(), None if logits_adv is None else logits_adv.detach()
    tensors = (logits, logits_adv, target.detach(), lam, partner, weight if weight is None else weight.detach())
    if not torch.compiler.is_compiling():
        return tuple(kernels.select_cross_entropy_forward(*tensors, policy=compiled_for))
    *fields, grad_adv = _select_operator(*tensors, *compiled_for[:-2])
    return (*fields, None if logits_adv is None else grad_adv)


@torch.library.custom_op("fastamp::select_cross_entropy", mutates_args=())
def _select_operator(
    logits: Tensor,
    logits_adv: Tensor | None,
    target: Tensor,
    lam: Tensor,
    partner: Tensor,
    weight: Tensor | None,
    mode: str,
    bce: bool,
    grad_clip: float | None,
    clamp: bool,
    ignore_index: int,
    label_smoothing: float,
    tie_abs: float,
    tie_rel: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    policy = RowPolicy(mode, bce, grad_clip, clamp, ignore_index, label_smoothing, tie_abs, tie_rel, False)
    *fields, grad_adv = kernels.select_cross_entropy_forward(
        logits, logits_adv, target, lam, partner, weight, policy=policy
    )
    # An operator returns tensors: an empty one stands for none.
    return (*fields, lam.new_empty(0) if grad_adv is None else grad_adv)


@_select_operator.register_fake
def _(logits: Tensor, logits_adv: Tensor | None, target: Tensor, lam: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows, grad = (lam.new_empty(lam.shape) for _ in range(2)), lam.new_empty(logits.shape)
    grad_adv = lam.new_empty(0) if logits_adv is None else lam.new_empty(logits.shape)
    return (*rows, lam.new_empty(lam.shape, dtype=torch.bool), grad, grad_adv)


def embedding_mixed(ids: Tensor, table: Tensor, lam: Tensor, partner: Tensor, padding_idx: int | None) -> Tensor:
    """`fastamp.hidden.embedding_mixed` on Triton, for lam of the compute dtype."""
    mix = _embedding_operator if torch.compiler.is_compiling() else _EmbeddingMix.apply
    return mix(table, ids, lam, partner, padding_idx)


def _embedding(table: Tensor, ids: Tensor, lam: Tensor, partner: Tensor, padding_idx: int | None) -> Tensor:
    return kernels.embedding_mix_forward(ids, table, lam, partner)


def _embedding_grad(
    upstream: Tensor, ids: Tensor, lam: Tensor, partner: Tensor, size: int, padding_idx: int | None
) -> Tensor:
    return kernels.embedding_mix_backward(upstream, ids, lam, partner, size, padding_idx)


class _EmbeddingMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        mixed = _embedding(*arguments)
        _keep_embedding(ctx, arguments, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _EmbeddingMixGrad.apply(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 4


class _EmbeddingMixGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        grad = _embedding_grad(*arguments)
        _keep_embedding_grad(ctx, arguments, grad)
        return grad

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        table = _without_row(upstream, ctx.padding_idx)
        return _EmbeddingMix.apply(table, *ctx.saved_tensors, None), *[None] * 5


_embedding_operator = torch.library.custom_op("fastamp::embedding_mix", _embedding, mutates_args=())


@_embedding_operator.register_fake
def _(table: Tensor, ids: Tensor, *_: Any) -> Tensor:
    return torch.empty(*ids.shape, table.shape[1], dtype=table.dtype, device=table.device)


_embedding_grad_operator = torch.library.custom_op("fastamp::embedding_mix_backward", _embedding_grad, mutates_args=())


@_embedding_grad_operator.register_fake
def _(upstream: Tensor, ids: Tensor, lam: Tensor, partner: Tensor, size: int, padding_idx: int | None) -> Tensor:
    return torch.empty(size, upstream.shape[2], dtype=upstream.dtype, device=upstream.device)


def _keep_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, *tensors, padding_idx = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = table.shape[0], padding_idx


def _keep_embedding_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, _, ctx.padding_idx = inputs
    ctx.save_for_backward(*tensors)


def _embedding_gradient(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return _embedding_grad_operator(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 4


def _embedding_second(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    table = _without_row(upstream, ctx.padding_idx)
    return _embedding_operator(table, *ctx.saved_tensors, None), *[None] * 5


def _without_row(table: Tensor, padding_idx: int | None) -> Tensor:
    if padding_idx is None:
        return table
    row = torch.arange(table.shape[0], device=table.device) == padding_idx
    return table.masked_fill(row.unsqueeze(1), 0)


_embedding_operator.register_autograd(_embedding_gradient, setup_context=_keep_embedding)
_embedding_grad_operator.register_autograd(_embedding_second, setup_context=_keep_embedding_grad)
