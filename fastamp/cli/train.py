"""`fastamp train`."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastamp.data import DATASETS
from fastamp.training import METHODS, MODELS, DivergedError, Listener, TrainConfig, TrainResult, train


class TrainDisplay(Listener):
    """A run's progress: a bar on a terminal, otherwise a line for every evaluation.

    Args:
        console: where to; the standard output by default.
        description: begins the bar and every line.
    """

    def __init__(self, console: Console | None = None, description: str = "") -> None:
        self._console = console or Console()
        self._description = description
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps  {task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bar: TaskID | None = None
        self._loss: Tensor | None = None
        self._rest = ""

    def __enter__(self) -> TrainDisplay:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def started(self, config: TrainConfig, step: int) -> None:
        """Shows the bar, or says where a resumed run goes on."""
        if self._console.is_terminal:
            self._bar = self._progress.add_task(
                self._description or config.method, total=config.steps, completed=step, facts=""
            )
        elif step:
            self._line(f"resuming at step {step} of {config.steps}")

    def stepped(self, step: int, loss: Tensor) -> None:
        """Moves the bar; every tenth step reads the loss."""
        if self._bar is None:
            return
        if step % 10 == 0:
            self._progress.update(self._bar, completed=step, facts=f"loss {loss.item():.3f}{self._rest}")

    def evaluated(self, record: dict[str, Any]) -> None:
        """Shows the dev error."""
        self._rest = f"  dev error {record['dev_error']:.2f}%  {record['steps_per_s']:.1f} steps/s"
        facts = f"loss {record['train_loss']:.3f}{self._rest}"
        if self._bar is not None:
            self._progress.update(self._bar, completed=record["step"], facts=facts)
        else:
            self._line(f"step {record['step']}  {facts}")

    def _line(self, text: str) -> None:
        click.echo(f"{self._description}: {text}" if self._description else text)


def summary(result: TrainResult, out: str) -> str:
    """The result in a few lines."""
    lines = [
        f"test error {result.test_error:.2f}% at step {result.best_step}, "
        f"where dev error is least ({result.best_dev_error:.2f}%)",
        f"after step {result.steps}: dev error {result.final_dev_error:.2f}%, "
        f"test error {result.final_test_error:.2f}%; {result.steps_per_s:.1f} steps/s",
    ]
    if result.types_covered is not None:
        lines.append(f"vectors cover {result.types_covered:.1f}% of words and {result.tokens_covered:.2f}% of tokens")
    return "\n".join([*lines, f"written to {out}"])


_DEFAULTS = TrainConfig()


def _option(flag: str, text: str, **settings: Any) -> Any:
    name = flag.lstrip("-").replace("-", "_")
    return click.option(flag, default=getattr(_DEFAULTS, name), help=text, **settings)


@click.command("train")
@_option("--dataset", "Corpus; questions is generated and needs no files.", type=click.Choice(DATASETS))
@_option("--data-dir", "Folder that holds trec/, sst1/, sst2/, subj/, mr/.", type=click.Path())
@_option("--model", "Classifier.", type=click.Choice(MODELS))
@_option("--method", "Cross-entropy; Mixup or AMP of sentences, or of words.", type=click.Choice(METHODS))
@_option("--seed", "Of splits, weights, shuffling, dropout and mixing.", type=int)
@_option("--steps", "Number of updates.", type=int)
@click.option("--out", required=True, type=click.Path(), help="Folder of the run; resumes a run found there.")
@_option("--vectors", "GloVe text file, plain or .gz, to start the word vectors from.", type=click.Path())
@_option("--embedding-dim", "Width of word vectors.  [default: 300, or that of --vectors]", type=int)
@_option("--lr", "Adam's learning rate.", type=float)
@_option("--l2", "Weight decay.", type=float)
@_option("--batch-size", "Sentences in a batch.", type=int)
@_option("--dropout", "Before the classifier.", type=float)
@_option("--alpha", "Mixing coefficients are drawn from Beta(alpha, alpha).", type=float)
@_option("--step-size", "The adversarial step.", type=float)
@click.option("--lower/--cased", default=_DEFAULTS.lower, help="Lower-case the text, or keep its case.")
@_option("--eval-every", "Steps between evaluations.", type=int)
@_option("--checkpoint-every", "Steps between checkpoints to resume from.", type=int)
@_option("--threads", "CPU threads.  [default: torch's]", type=int)
@_option("--device", "As in torch.device: cpu, cuda, cuda:1.")
def command(out: str, **fields: Any) -> None:
    """Train a classifier with or without mixing.

    Run the same command again to resume a run that was interrupted; it ends with the same numbers.
    """
    try:
        config = TrainConfig(**fields)
        with TrainDisplay() as display:
            result = train(config, out, listener=display)
    except (ValueError, TypeError, OSError, DivergedError) as error:
        raise click.ClickException(str(error)) from error
    if result.resumed_from == result.steps:
        click.echo(f"{out} holds this run, finished")
    click.echo(summary(result, out))
