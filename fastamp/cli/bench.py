"""`fastamp bench`."""

from __future__ import annotations

import shlex
import sys
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
    check_options,
    compare,
    print_comparison,
    print_results,
    read,
    reduced,
    run,
    write,
)
from fastamp.cli.reading import names, reading

ALL = "all"
ROUNDS_OF_ALL = 10


def parse_shapes(text: str) -> tuple[tuple[int, ...], ...]:
    """Shapes from "50x300x6,24x768x5"; a ValueError for another text, or a size of zero."""
    shapes = []
    for shape in text.split(","):
        sizes = shape.strip().split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
            raise ValueError(f"{shape!r} is no shape; write BxDxC, as in 50x300x6")
        shapes.append(tuple(map(int, sizes)))
    return tuple(shapes)


@click.group("bench", invoke_without_command=True)
@click.option(
    "--suite",
    type=click.Choice((*SUITES, ALL)),
    default=BenchConfig.suite,
    help="head: from the last hidden rows on. layers: whole steps of networks mixed at their words. rows: the "
    "operations of such a step. scaling: growth of the cost. vocabulary: a head of tens of thousands of classes. "
    "all: each of them in few shapes, nothing compiled, five minutes on two CPU cores.",
)
@click.option(
    "--shapes",
    type=reading(parse_shapes),
    metavar="BxDxC,...",
    show_default=",".join("x".join(map(str, shape)) for shape in SHAPES),
    help="For the suites head and vocabulary (which has its own): rows, width of the hidden state, classes.",
)
@click.option(
    "--dtype",
    "dtypes",
    type=names(DTYPES),
    metavar="|".join(DTYPES) + ",...",
    show_default="fp32 on a CPU, fp32,bf16 on a GPU",
    help="For the suites head, rows and vocabulary: parameters and rows.",
)
@click.option(
    "--networks",
    type=names(NETWORKS),
    metavar="NAME,...",
    show_default="those that suit the device",
    help=f"For the suite layers: {', '.join(NETWORKS)}.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    show_default=f"{BenchConfig.rounds}, {ROUNDS_OF_ALL} of all",
    help="Every contender runs once in each.",
)
@click.option("--threads", default=BenchConfig.threads, type=click.IntRange(1), help="CPU threads.")
@click.option(
    "--device", show_default="cuda where there is one, else cpu", help="As in torch.device: cpu, cuda, cuda:1."
)
@click.option(
    "--compiled/--no-compiled",
    default=None,
    show_default="compiled",
    help="For the suites head, layers and rows: also what goes through torch.compile.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write <device>-<suite>.json here.")
@click.pass_context
def command(
    context: click.Context, out: Path | None, device: str | None, suite: str, rounds: int | None, **fields: Any
) -> None:
    """Measure a training step against plain Mixup and against AMP as one writes it.

    Nothing is timed before it has agreed with the definition. Each suite takes two or three minutes on two cores.
    """
    if context.invoked_subcommand is not None:
        return
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    refused = False
    try:
        if suite == ALL:
            check_options(ALL, (), fields)
            configs = reduced(rounds=rounds or ROUNDS_OF_ALL, threads=fields["threads"], device=device)
        else:
            configs = (BenchConfig(suite=suite, device=device, rounds=rounds or BenchConfig.rounds, **fields),)
        for config in configs:
            refused = bool(_measure(config, out, console)["refused"]) or refused
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if refused:
        raise click.exceptions.Exit(1)


def _measure(config: BenchConfig, out: Path | None, console: Console) -> dict[str, Any]:
    with console.status(f"{config.suite}: starting") as status:
        results = run(
            config,
            command=shlex.join(["fastamp", *sys.argv[1:]]),
            on_progress=lambda line: status.update(f"{config.suite}: {line}"),
            on_results=lambda results: out and write(results, out),
        )
    print_results(results, console)
    if out is not None:
        click.echo(f"written to {write(results, out)}")
    return results


@command.command("compare")
@click.argument("first", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("second", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def compare_command(first: Path, second: Path) -> None:
    """Show what is slower or faster in SECOND than in FIRST, two files of `fastamp bench --out`.

    Judged are the ratios to plain Mixup, or to what else the suite's ratios are to; milliseconds where there are none.
    Slower and faster mean that the middle halves of the rounds do not overlap.
    """
    try:
        print_comparison(compare(read(first), read(second)), Console())
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
