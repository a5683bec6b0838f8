"""Types of options that functions read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import click

Value = TypeVar("Value")


def reading(read: Callable[[str], Value]) -> Callable[[str], Value]:
    """The type of an option that `read` reads, whose ValueError says what is wrong."""

    def convert(text: str) -> Value:
        try:
            return read(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return convert


def names(taken: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """The type of an option of names with commas between them, each one of those taken, none with a comma."""
    known = tuple(taken)

    def read(text: str) -> tuple[str, ...]:
        given = tuple(name.strip() for name in text.split(","))
        for name in given:
            if name not in known:
                raise ValueError(f"{name!r} is not one of {', '.join(known)}")
        return given

    return reading(read)
