"""`fastamp demo`: the check, three ways to train, and the paper's Figure 2c from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median

import click
import torch
from rich.console import Console
from torch import Tensor

from fastamp.cli.interrupts import Interrupted, Recorded
from fastamp.cli.train import TrainDisplay
from fastamp.conformance import check, print_report
from fastamp.tables import print_table
from fastamp.training import DivergedError, TrainConfig, TrainResult, train
from fastamp.training.curves import best_model, mixed_losses
from fastamp.training.task import Task

METHODS = ("none", "sent-mixup", "sent-amp")
GRID = 41  # values of λ
PAIRINGS = 20  # random pairings of the test sentences
# The paper's 2e-4 needs thousands of steps; this is for a demonstration of minutes.
LEARNING_RATE = 1e-3
_MARKERS = dict(zip(METHODS, "ox+", strict=True))


def loss_against_lambda(logits: Tensor, labels: Tensor, lam: Tensor, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy of mixed pairs against their mixed labels (the paper's Figure 2c).

    Sentences are mixed in their features; the classifier is affine, so mixing their logits is the same.

    Args:
        logits: (N, C) of unmixed sentences, floating point.
        labels: (N,) int64.
        lam: (L,) coefficients in [0, 1].
        generator: of the random pairs, `PAIRINGS` of them a sentence.

    Returns:
        (L,) float64, nats.
    """
    pairings = [torch.randperm(len(labels), device=generator.device, generator=generator) for _ in range(PAIRINGS)]
    curves = [mixed_losses(lambda mixed: mixed, logits.double(), labels, pairing, lam).mean(1) for pairing in pairings]
    return torch.stack(curves).mean(0)


def _curve(config: TrainConfig, run: Path, lam: Tensor) -> list[float]:
    task = Task.load(config, torch.device("cpu"))
    model = best_model(config, run, task)
    with torch.no_grad():
        logits = model(task.test.ids)
    generator = torch.Generator().manual_seed(config.seed)
    curve: list[float] = loss_against_lambda(logits, task.test.labels, lam, generator).tolist()
    return curve


def _draw(lam: Sequence[float], curves: Mapping[str, Sequence[Sequence[float]]], title: str) -> str:
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.plot_size(78, 22)
    figure.title(title)
    figure.label("λ")
    for method, seeds in curves.items():
        points = [mean(values) for values in zip(*seeds, strict=True)]
        signal = figure.signal(list(lam), points, marker=_MARKERS[method])
        signal.label(method)
        figure.draw(signal)
    drawn: str = figure.build().string(colorless=True)
    return drawn


@click.command("demo", cls=Recorded)
@click.option("--seed", default=0, type=click.IntRange(0, 2**32 - 100), help="The first seed.")
@click.option("--seeds", default=3, type=click.IntRange(1, 100), help="How many seeds a method is trained with.")
@click.option("--steps", default=400, type=click.IntRange(1), help="Updates of each model.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
@click.option(
    "--out",
    default=Path("runs/demo"),
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the runs and the numbers; finished runs found there are not repeated.",
)
@click.pass_obj
def command(text: str, seed: int, seeds: int, steps: int, threads: int, out: Path) -> None:
    """Compare plain training, Mixup and AMP in one go, in about two minutes.

    Checks the operations, trains a TextCNN on the generated corpus with each method, and draws the loss of mixed
    test pairs against the mixing coefficient, the paper's Figure 2c.
    """
    console = Console()
    with console.status("checking") as status:
        report = check(["cpu"], quick=True, listener=status.update)
    print_report(report, console)
    if not report.ok:
        raise click.ClickException("the operations do not do here what they should, so nothing is trained")
    lam = torch.linspace(0, 1, GRID)
    results: dict[str, list[TrainResult]] = {method: [] for method in METHODS}
    curves: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    try:
        for number in range(seed, seed + seeds):
            for method in METHODS:
                config = TrainConfig(method=method, seed=number, steps=steps, lr=LEARNING_RATE, threads=threads)
                run = out / f"{method}-seed{number}-steps{steps}-threads{threads}"
                with TrainDisplay(console, f"{method}, seed {number}") as display:
                    results[method].append(train(config, run, listener=display))
                curves[method].append(_curve(config, run, lam))
        _show(console, out, lam.tolist(), results, curves)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what is trained is kept, and this goes on: {text}") from None
    except (ValueError, OSError, DivergedError) as error:
        raise click.ClickException(str(error)) from error


def _show(
    console: Console,
    out: Path,
    lam: list[float],
    results: Mapping[str, Sequence[TrainResult]],
    curves: Mapping[str, Sequence[Sequence[float]]],
) -> None:
    errors = {method: [run.test_error for run in runs] for method, runs in results.items()}
    ms = {method: [1e3 / run.steps_per_s for run in runs] for method, runs in results.items()}
    rows = []
    for method in METHODS:
        each = " ".join(f"{error:.1f}" for error in errors[method])
        half = mean(curve[GRID // 2] for curve in curves[method])
        rows.append((method, f"{mean(errors[method]):.1f}", each, f"{half:.3f}", f"{median(ms[method]):.1f}"))
    count = len(results[METHODS[0]])
    seeds = f"{count} seed{'s' * (count != 1)}"
    print_table(
        console,
        ("method", "test error %", "each seed", "loss at λ = 0.5", "ms a step"),
        rows,
        caption=f"{seeds}, {results[METHODS[0]][0].steps} steps each; test error where dev error is least. With 500 "
        "test sentences one error is 0.2 points, and a difference of 2 between two runs is within chance. One seed "
        "decides nothing. Runs were timed one after the other; fastamp bench takes turns.",
    )
    click.echo(_draw(lam, curves, f"loss of mixed test pairs, {seeds}"))
    record = {"test_error": errors, "ms_per_step": ms, "lam": lam, "loss": curves}
    (out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    click.echo(f"written to {out / 'demo.json'}")
