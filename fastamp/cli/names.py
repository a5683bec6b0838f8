"""Options that take several names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click


class Names(click.ParamType):
    """Names with commas between them, each one of those taken; converts to a tuple.

    Args:
        taken: the names, none with a comma.
        shown: what help shows in the place of the value; the names by default.
    """

    def __init__(self, taken: Iterable[str], shown: str | None = None) -> None:
        self.taken = tuple(taken)
        self.name = shown or "|".join(self.taken) + ",..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The names; a usage error for another, with the list."""
        if not isinstance(value, str):
            return value
        names = tuple(text.strip() for text in value.split(","))
        for name in names:
            if name not in self.taken:
                self.fail(f"{name!r} is not one of {', '.join(self.taken)}", param, ctx)
        return names
