"""How kernels are called: directly in eager mode, as registered operators where torch.compile traces.

Eager mode goes past the dispatcher, whose cost is of the order of the kernels' own at small shapes; a compiled graph
needs operators that it can trace by their shapes. Gradients are the business of the autograd functions around them,
which torch.compile traces through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Operator(Generic[P, R]):
    """A function of tensors, numbers and records of them (named tuples), and the operator that stands for it.

    An operator's schema knows no records: it takes their fields one by one.
    """

    def __init__(self, name: str, run: Callable[P, R], fake: Callable[..., Any]) -> None:
        hints = get_type_hints(run)
        result = hints.pop("return")
        call: Callable[..., Any] = run
        self._run = call
        self._sizes = [(kind, len(_fields(argument, kind))) for argument, kind in hints.items()]
        parameters = [
            inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
            for argument, record in hints.items()
            for field, kind in _fields(argument, record)
        ]

        def flat(*fields: Any) -> Any:
            return call(*self._packed(fields))

        flat.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
        self.registered = torch.library.custom_op(name, flat, mutates_args=())
        self.registered.register_fake(lambda *fields: fake(*self._packed(fields)))

    def __call__(self, *arguments: P.args, **_: P.kwargs) -> R:
        """Run; arguments by position only."""
        if not torch.compiler.is_compiling():
            return self._run(*arguments)
        return self.registered(*self.unpacked(*arguments))

    def unpacked(self, *arguments: Any) -> list[Any]:
        """The arguments of the registered operator."""
        fields: list[Any] = []
        for argument, (kind, _) in zip(arguments, self._sizes, strict=True):
            fields.extend(argument) if _is_record(kind) else fields.append(argument)
        return fields

    def _packed(self, fields: tuple[Any, ...]) -> list[Any]:
        arguments, start = [], 0
        for kind, size in self._sizes:
            part = fields[start : start + size]
            arguments.append(kind(*part) if _is_record(kind) else part[0])
            start += size
        return arguments


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Decorate the function that launches kernels; `fake` gives empty results of the same shapes and strides."""
    return lambda run: Operator(name, run, fake)


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple)


def _fields(argument: str, kind: Any) -> list[tuple[str, Any]]:
    if not _is_record(kind):
        return [(argument, kind)]
    return [(f"{argument}_{field}", hint) for field, hint in get_type_hints(kind).items()]
