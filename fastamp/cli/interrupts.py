"""Commands that are interrupted say how to go on."""

from __future__ import annotations

import shlex
from typing import IO, Any

import click


class Interrupted(click.ClickException):
    """Ends a command as a shell expects of one that Ctrl-C ended."""

    exit_code = 130

    def show(self, file: IO[Any] | None = None) -> None:
        """Writes the message, which is of no error."""
        click.echo(self.format_message(), file=file, err=file is None)


class Recorded(click.Command):
    """A command that keeps its own text as `ctx.obj`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keeps what was typed; the program's name is always fastamp."""
        names = ctx.command_path.removeprefix(ctx.find_root().command_path).split()
        ctx.obj = shlex.join(["fastamp", *names, *args])
        return super().parse_args(ctx, args)
