"""`fastamp paper`."""

from __future__ import annotations

import os
import shlex
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import click

from fastamp.cli.interrupts import Interrupted, Recorded
from fastamp.cli.reading import names, reading
from fastamp.data import DATASETS
from fastamp.paper.display import RunsDisplay, overview
from fastamp.paper.plan import EXPERIMENTS, METHODS, Request
from fastamp.paper.results import SETTINGS, claim, read
from fastamp.paper.runner import Options, execute_all, is_kept
from fastamp.training import RECIPES, TrainConfig

# Fields of TrainConfig that other options set, and which.
_ELSEWHERE = {"dataset": "datasets", "model": "models", "method": "methods", "seed": "seeds", "fraction": "ratios"}
_ELSEWHERE |= {
    name: name.replace("_", "-")
    for name in ("data_dir", "vectors", "pretrained", "steps", "eval_every", "device", "threads")
}


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from "5" (0 to 4), "0-9" or "3,7"; a ValueError for another text, or no seeds."""
    seeds: list[int] = []
    try:
        if text.strip().isdecimal():
            seeds += range(int(text))
        else:
            for part in text.split(","):
                first, dash, last = part.strip().partition("-")
                seeds += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        seeds = []
    if not seeds:
        raise ValueError(f"{text!r} are no seeds; write 5 for 0 to 4, 0-9, or 3,7")
    return tuple(dict.fromkeys(seeds))


def parse_ratios(text: str) -> tuple[float, ...]:
    """Shares of the data from "0.03,0.1,1"; a ValueError for another text, or a number outside (0, 1]."""
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers; write shares of the data, as in 0.03,0.1,1") from None
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise ValueError(f"{text!r}: a share of the data is above 0 and at most 1")
    return ratios


def parse_setting(text: str) -> tuple[str, Any]:
    """Name and value from "FIELD=VALUE", the value as the field of TrainConfig is annotated; else a ValueError."""
    name, equals, value = text.partition("=")
    fields = get_type_hints(TrainConfig)
    if not equals:
        raise ValueError(f"{text!r} is no FIELD=VALUE")
    if name in _ELSEWHERE:
        raise ValueError(f"{name} is set by --{_ELSEWHERE[name]}")
    if name not in fields:
        taken = ", ".join(field for field in fields if field not in _ELSEWHERE)
        raise ValueError(f"{name!r} is no field of TrainConfig; takes {taken}")
    # A field that may be None is left at None by not setting it.
    kinds = get_args(fields[name]) if get_origin(fields[name]) in (Union, types.UnionType) else (fields[name],)
    kind = next(kind for kind in kinds if kind is not type(None))
    try:
        return name, {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (ValueError, LookupError):
        raise ValueError(f"{name} takes {kind.__name__}, not {value!r}") from None


_NAMES = "NAME,..."
_OPTIONS = (
    click.option(
        "--datasets",
        type=names(DATASETS),
        metavar=_NAMES,
        help=f"{', '.join(DATASETS)}; questions is generated and needs no files.",
    ),
    click.option("--models", type=names(RECIPES), metavar=_NAMES, help=f"{', '.join(RECIPES)}."),
    click.option(
        "--methods", type=names(METHODS), metavar=_NAMES, help="Names as --dry-run lists them, in the middle of a key."
    ),
    click.option("--ratios", type=reading(parse_ratios), metavar="SHARE,...", help="Shares of the training data."),
    click.option(
        "--seeds",
        type=reading(parse_seeds),
        metavar="N|A-B|A,B,...",
        default="10",
        help="A number of seeds from 0 on, a range 0-9, or a list 3,7.",
    ),
    click.option("--steps", type=click.IntRange(1), show_default="the recipe's", help="Updates of every run."),
    click.option(
        "--eval-every", type=click.IntRange(1), show_default="the recipe's", help="Steps between evaluations."
    ),
    click.option(
        "--data-dir",
        type=click.Path(file_okay=False),
        help="Folder with trec/, sst1/, sst2/, subj/, mr/; without it from the Hugging Face hub.",
    ),
    click.option(
        "--vectors", type=click.Path(dir_okay=False), help="GloVe text file, plain or .gz, for the glove models."
    ),
    click.option("--pretrained", show_default="the recipe's", help="Name or folder of the encoder, of bert."),
    click.option("--device", default="cpu", help="As in torch.device: cpu, cuda, cuda:1."),
    click.option("--jobs", type=click.IntRange(1), default=1, help="Runs at a time, each in a process."),
    click.option(
        "--threads",
        type=click.IntRange(1),
        show_default="the folder's, else cores / jobs",
        help="CPU threads of a run. Other threads, other roundings.",
    ),
    click.option(
        "--set",
        "overrides",
        type=reading(parse_setting),
        metavar="FIELD=VALUE",
        multiple=True,
        help="Any other field of fastamp.training.TrainConfig, as in --set embedding_dim=50.",
    ),
    click.option("--retry-failed", is_flag=True, help="Run again what is recorded as failed."),
    click.option("--dry-run", is_flag=True, help="List the runs and what is done of them; run nothing."),
    click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The results folder."),
)


@click.group("paper", context_settings={"show_default": True})
def command() -> None:
    """Make the paper's tables and figures.

    A table's runs are added to a results folder, where tables share what they have in common. All runs of a folder
    are made with the same settings and data; a command with others is refused. `report` turns the folder into tables
    and plots. A command that was interrupted or killed goes on when it is given again, to the same numbers.
    """


def _add(name: str) -> None:
    """The subcommand of an experiment."""

    @click.pass_obj
    def subcommand(text: str, **given: Any) -> None:
        _run(name, text, **given)

    experiment = EXPERIMENTS[name]
    extent = f"By default {', '.join(experiment.datasets)} by {', '.join(experiment.models)}"
    methods = f"{len(experiment.methods)} methods"
    ratios = f" and {len(experiment.ratios)} shares of the data" if len(experiment.ratios) > 1 else ""
    subcommand.__doc__ = f"{experiment.title}.\n\n{extent}, with {methods}{ratios}."
    for option in reversed(_OPTIONS):
        subcommand = option(subcommand)
    command.command(name, cls=Recorded, short_help=experiment.title)(subcommand)


for _name in EXPERIMENTS:
    _add(_name)


def _run(
    name: str,
    text: str,
    *,
    seeds: Sequence[int],
    jobs: int,
    threads: int | None,
    overrides: Sequence[tuple[str, Any]],
    retry_failed: bool,
    dry_run: bool,
    out: Path,
    **given: Any,
) -> None:
    kept, curves = "", name == "figure2"
    extent = {field: given.pop(field) or getattr(EXPERIMENTS[name], field) for field in _EXTENT}
    request = Request(name, **extent, seeds=seeds)
    runs = request.runs(dict(overrides))
    if not runs:
        raise click.ClickException("nothing to run: the paper has nonlinear-mixup with cnn-glove only")
    try:
        options = Options(overrides=dict(overrides), threads=threads or _threads(out, jobs), **given)
        for run in runs:
            options.config(run)  # refuses before anything is written
        if dry_run:
            records = {line["key"]: line for line in read(out).records} if (out / SETTINGS).exists() else {}
            done = {run.key: records[run.key]["status"] for run in runs if is_kept(run, records, retry_failed, curves)}
            for run in runs:
                click.echo(f"{run.key}: {done.get(run.key, 'to do')}")
            click.echo(f"{len(runs) - len(done)} to do")
            return
        with claim(out, options.specification(request)) as writer:
            kept = f"what is finished is in {out}, and runs under way are kept as of their last checkpoints; "
            for notice in (*options.notices(runs), *writer.notices):
                click.echo(notice, err=True)
            with RunsDisplay() as display:
                progress = execute_all(
                    runs, options, writer, jobs=jobs, retry_failed=retry_failed, curves=curves, display=display
                )
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {kept}this goes on: {text}") from None
    click.echo(f"{overview(progress)}, in {out}; for tables and plots: fastamp paper report {shlex.quote(str(out))}")
    if progress.failed:
        click.echo("what failed is recorded with its error, and tried again only with --retry-failed", err=True)
        raise click.exceptions.Exit(1)


_EXTENT = ("datasets", "models", "methods", "ratios")


def _threads(folder: Path, jobs: int) -> int:
    """CPU threads of a run where none are given: those of the results folder, else its share of the cores."""
    if (folder / SETTINGS).exists():
        return int(read(folder).specification["threads"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


@command.command("report", short_help="Tables and plots of a results folder")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--published",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Other cells than the paper's, tab-separated: experiment, dataset, model, method, ratio, error, std, "
    "improvement.",
)
def report_command(folder: Path, published: Path | None) -> None:
    """Tables and plots of a results folder, with the paper's cells beside them.

    Writes report.md and its plots into the folder, whatever of it is finished.
    """
    try:
        # Here, because they need scipy and matplotlib, which the runs do not.
        from fastamp.paper.published import read_published
        from fastamp.paper.report import write

        results = read(folder)
        for notice in results.notices:
            click.echo(notice, err=True)
        path = write(folder, results, None if published is None else read_published(published))
        click.echo(path.read_text(encoding="utf-8"))
        click.echo(f"written to {path}")
    except ImportError as error:
        raise click.ClickException(f"{error}; pip install fastamp[paper]") from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
