"""`fastamp train`."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastamp.cli.interrupts import Interrupted, Recorded
from fastamp.data import DATASETS
from fastamp.training import METHODS, MODELS, DivergedError, Listener, TrainConfig, TrainResult, recipe, train
from fastamp.training.config import PASS_DROPOUTS, PRESETS, REWEIGHTS


class TrainDisplay(Listener):
    """A run's progress: a bar on a terminal, otherwise a line for every evaluation.

    Args:
        console: where to; the standard output by default.
        description: begins the bar and every line.

    Attributes:
        kept: the step of the last checkpoint, which an interrupted run goes on from.
    """

    def __init__(self, console: Console | None = None, description: str = "") -> None:
        self.kept = 0
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

    def on_start(self, config: TrainConfig, step: int) -> None:
        """Shows the bar, or says where a resumed run goes on."""
        self.kept = step
        if self._console.is_terminal:
            self._bar = self._progress.add_task(
                self._description or config.method, total=config.steps, completed=step, facts=""
            )
        elif step:
            self._line(f"resuming at step {step} of {config.steps}")

    def on_step(self, step: int, loss: Tensor) -> None:
        """Moves the bar; every tenth step reads the loss."""
        if self._bar is None:
            return
        if step % 10 == 0:
            self._progress.update(self._bar, completed=step, facts=f"loss {loss.item():.3f}{self._rest}")

    def on_evaluate(self, record: dict[str, Any]) -> None:
        """Shows the dev error."""
        self._rest = f"  dev error {record['dev_error']:.2f}%  {record['steps_per_s']:.1f} steps/s"
        facts = f"loss {record['train_loss']:.3f}{self._rest}"
        if self._bar is not None:
            self._progress.update(self._bar, completed=record["step"], facts=facts)
        else:
            self._line(f"step {record['step']}  {facts}")

    def on_save(self, step: int) -> None:
        """Keeps the step."""
        self.kept = step

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
_RECIPES = {"textcnn": "cnn-rand", "bilstm": "lstm-rand", "bert": "bert"}


def _option(flag: str, text: str, **settings: Any) -> Any:
    name = flag.lstrip("-").replace("-", "_")
    return click.option(flag, default=getattr(_DEFAULTS, name), help=text, **settings)


def _recipe_option(flag: str, text: str, **settings: Any) -> Any:
    """An option whose default is that of the model's recipe."""
    name = flag.lstrip("-").replace("-", "_")
    values = {model: getattr(recipe(of), name) for model, of in _RECIPES.items()}
    shown = dict.fromkeys(f"{value} for {model}" for model, value in values.items() if value is not None)
    if len(set(values.values())) == 1:
        shown = {str(values["textcnn"]): None}
    return click.option(flag, help=f"{text}  [default: {', '.join(shown)}]", **settings)


@click.command("train", cls=Recorded)
@_option("--dataset", "Corpus; questions is generated and needs no files.", type=click.Choice(DATASETS))
@_option("--data-dir", "Folder that holds trec/, sst1/, ...; without it the Hugging Face hub.", type=click.Path())
@_option("--fold", "Of subj and mr: the tenth to test on.  [default: seed % 10]", type=int)
@_option("--fraction", "Share of each class of the training sentences to train on.", type=float)
@_option("--model", "Classifier.", type=click.Choice(MODELS))
@_recipe_option("--pretrained", "Of bert: name or folder of an encoder.")
@_option("--method", "Cross-entropy; or what is mixed, words or sentences, and how.", type=click.Choice(METHODS))
@_option("--preset", "Options of AMPLoss.", type=click.Choice(PRESETS))
@_option("--pass-dropout", "Dropout of AMP's two passes.", type=click.Choice(PASS_DROPOUTS))
@_option("--reweight", "Re-weighting by the change of the loss.", type=click.Choice(REWEIGHTS))
@_option("--seed", "Of splits, weights, shuffling, dropout and mixing.", type=int)
@_recipe_option("--steps", "Number of updates; a larger one continues a finished run.", type=int)
@click.option("--out", required=True, type=click.Path(), help="Folder of the run; resumes a run found there.")
@_option("--vectors", "GloVe text file, plain or .gz, to start the word vectors from.", type=click.Path())
@click.option("--freeze-vectors", is_flag=True, default=_DEFAULTS.freeze_vectors, help="Do not train the word vectors.")
@_option("--embedding-dim", "Width of word vectors.  [default: 300, or that of --vectors]", type=int)
@_option("--hidden-size", "Of bilstm: width of its states, both directions.", type=int)
@_recipe_option("--lr", "Adam's learning rate.", type=float)
@_recipe_option("--l2", "Weight decay.", type=float)
@_option("--clip-norm", "Bound on the norm of the gradients.  [default: none]", type=float)
@_recipe_option("--batch-size", "Sentences in a batch.", type=int)
@_recipe_option("--dropout", "Before the classifier.", type=float)
@_option("--alpha", "Mixing coefficients are drawn from Beta(alpha, alpha).", type=float)
@_option("--step-size", "The adversarial step.", type=float)
@click.option("--lower/--cased", default=None, help="Lower-case the text, or keep its case.  [default: cased for trec]")
@_option("--eval-every", "Steps between evaluations.", type=int)
@_option("--checkpoint-every", "Steps between checkpoints to resume from.", type=int)
@_option("--threads", "CPU threads.  [default: torch's]", type=int)
@_option("--device", "As in torch.device: cpu, cuda, cuda:1.")
@click.option("--capture", is_flag=True, help="On cuda: replay training steps as CUDA graphs.")
@click.pass_obj
def command(text: str, out: str, model: str, **fields: Any) -> None:
    """Train a classifier with or without mixing, by the paper's recipe.

    Run the same command again to resume a run that was interrupted; it ends with the same numbers. With a larger
    --steps it continues a run that is finished.
    """
    display = TrainDisplay()
    try:
        config = recipe(_RECIPES[model], **fields)
        with display:
            result = train(config, out, listener=display)
    except KeyboardInterrupt:
        goes_on = f"this goes on from step {display.kept}" if display.kept else "this begins again, from step 0"
        raise Interrupted(f"interrupted; {goes_on}: {text}") from None
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError, DivergedError) as error:
        raise click.ClickException(str(error)) from error
    if result.resumed_from == result.steps:
        click.echo(f"{out} holds this run, finished")
    click.echo(summary(result, out))
