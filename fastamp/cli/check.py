"""`fastamp check`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from fastamp import functional
from fastamp.conformance import check, print_report


@click.command("check")
@click.option("--quick", is_flag=True, help="Fewer cases, a few seconds.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    help="As in torch.device; repeatable.  [default: the CPU and the first GPU]",
    show_default=False,
)
@click.option(
    "--op",
    "ops",
    multiple=True,
    type=click.Choice(functional.__all__),
    help="An operation; repeatable.  [default: all]",
    show_default=False,
)
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 1), help="Draws the inputs.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows as JSON here.")
def command(quick: bool, devices: tuple[str, ...], ops: tuple[str, ...], seed: int, out: Path | None) -> None:
    """Check this installation: every operation against its definition.

    On every device, backend and dtype: no element of a loss, a gradient or λ' may be further from the definition in
    float64 than the same definition written in PyTorch is, but for a small tolerance. Ends with code 1 if one is.
    """
    console = Console()
    try:
        with console.status("checking") as status:
            report = check(devices or None, ops=ops or None, quick=quick, seed=seed, listener=status.update)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    print_report(report, console)
    if not report.ok:
        raise click.exceptions.Exit(1)
