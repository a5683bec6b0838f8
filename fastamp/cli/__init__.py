"""The command line; a subcommand is imported when it is asked for, so that `fastamp --help` stays quick."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from fastamp import __version__
from fastamp.cli.interrupts import Interrupted

_COMMANDS = {  # each in a module of that name, as `command`
    "train": "Train a classifier with or without mixing.",
    "check": "Check this installation: kernels against the definition.",
    "bench": "Measure speed and memory on this machine.",
    "paper": "Make the paper's tables and figures.",
    "demo": "Compare plain training, Mixup and AMP in one go.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        try:
            command: click.Command = import_module(f"fastamp.cli.{cmd_name}").command
        except ModuleNotFoundError as error:
            if error.name != "filelock":
                raise
            raise click.ClickException(f'{error}; pip install "fastamp[paper]"') from error
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """Adversarial Mixing Policy: Mixup whose coefficient is pushed towards higher loss."""
