"""`fastamp bench`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from fastamp.benchmarking import (
    DTYPES,
    NETWORKS,
    SHAPES,
    SUITES,
    BenchConfig,
    draw_png,
    draw_terminal,
    print_results,
    run,
    write,
)


class _Shapes(click.ParamType):
    name = "BxDxC,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        shapes = []
        for text in value.split(","):
            sizes = text.strip().split("x")
            if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
                self.fail(f"{text!r} is no shape; write BxDxC, as in 50x300x6", param, ctx)
            shapes.append(tuple(map(int, sizes)))
        return tuple(shapes)


class _Names(click.ParamType):
    def __init__(self, taken: Iterable[str]) -> None:
        self.taken = tuple(taken)
        self.name = "|".join(self.taken) + ",..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        names = tuple(text.strip() for text in value.split(","))
        for name in names:
            if name not in self.taken:
                self.fail(f"{name!r} is not one of {', '.join(self.taken)}", param, ctx)
        return names


@click.command("bench")
@click.option(
    "--suite",
    type=click.Choice(SUITES),
    default=BenchConfig.suite,
    help="head: from the last hidden rows on. layers: whole steps of networks mixed at their words.",
)
@click.option(
    "--shapes",
    type=_Shapes(),
    show_default=",".join("x".join(map(str, shape)) for shape in SHAPES),
    help="Of the suite head: rows, width of the hidden state, classes.",
)
@click.option(
    "--dtype",
    "dtypes",
    type=_Names(DTYPES),
    show_default="fp32 on a CPU, fp32,bf16 on a GPU",
    help="Of the suite head: parameters and rows.",
)
@click.option(
    "--networks",
    type=_Names(NETWORKS),
    show_default="those that suit the device",
    help="Of the suite layers.",
)
@click.option("--rounds", default=BenchConfig.rounds, type=click.IntRange(1), help="Every contender runs once in each.")
@click.option("--threads", default=BenchConfig.threads, type=click.IntRange(1), help="CPU threads.")
@click.option(
    "--device", show_default="cuda where there is one, else cpu", help="As in torch.device: cpu, cuda, cuda:1."
)
@click.option("--compiled/--no-compiled", default=True, help="Also what goes through torch.compile.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write <device>.json and .png here.")
def command(out: Path | None, device: str | None, **fields: Any) -> None:
    """Measure a training step against plain Mixup and against AMP as one writes it.

    Nothing is timed before it has agreed with the definition. Each suite takes two or three minutes on two cores.
    """
    console = Console()
    try:
        config = BenchConfig(device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **fields)
        with console.status("starting") as status:
            results = run(
                config,
                command=shlex.join(["fastamp", *sys.argv[1:]]),
                listener=status.update,
                save=lambda results: out and write(results, out),
            )
        print_results(results, console)
        if out is not None:
            path = write(results, out)
            click.echo(f"written to {path}")
            _draw(results, path.with_suffix(".png"))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if results["refused"]:
        raise click.exceptions.Exit(1)


def _draw(results: dict[str, Any], path: Path) -> None:
    if not any(row["ratio"] for row in results["rows"]):
        return
    try:
        draw_png(results, path)
        click.echo(f"drawn in {path}")
    except ImportError:
        click.echo("matplotlib is not installed (pip install fastamp[plot]): drawn here instead of in a PNG")
        click.echo(draw_terminal(results))
