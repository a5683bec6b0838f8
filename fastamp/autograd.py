"""What the autograd functions of this library share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a backward whose gradients have no derivative of their own: it refuses create_graph=True.

    torch's decorator of this name raises only where the upstream gradient has a graph, which that of a mean has not. A
    second derivative by way of the layers below would then exist, and silently lack a part.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor) -> Any:
        # Grad mode is on in a backward only for create_graph=True; torch.compile refuses that itself.
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return backward(ctx, *upstream)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fastamp's losses can be differentiated once, not twice: backward was called with create_graph=True"
            )
        return backward(ctx, *upstream)

    return wrapper


def inside_a_function() -> bool:
    """Whether the forward pass of an autograd.Function runs, such as a reentrant checkpoint: gradients come later."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        given = frame.f_locals.get(code.co_varnames[0]) if code.co_name == "forward" and code.co_argcount else None
        if isinstance(given, FunctionCtx):
            return True
        frame = frame.f_back
    return False


def refuse_torch_func(name: str) -> None:
    """NotImplementedError inside a transform of torch.func, whose own words are about autograd functions."""
    if in_torch_func():
        raise NotImplementedError(
            f"{name} does not go with the transforms of torch.func (grad, vjp, jvp, vmap, ...): use torch.autograd"
        )


def in_torch_func() -> bool:
    """Whether torch.func looks on, which takes no autograd.Function whose forward is given a context, and no kernel.

    A Function that it does take, with a setup_context, costs 40 µs more a call: torch inspects its arguments.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
