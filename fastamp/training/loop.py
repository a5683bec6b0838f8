"""The training loop."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastamp
from fastamp.checks import NonFiniteError
from fastamp.training import checkpoint
from fastamp.training.batches import Batches, error_rate
from fastamp.training.checkpoint import START_OVER, MetricsLog, damaged
from fastamp.training.config import TrainConfig, usable_device
from fastamp.training.objectives import make_objective
from fastamp.training.task import Task
from fastamp.training.updates import CapturedUpdater, Updater

FORMAT = 4  # of last.pt


def seed_for(purpose: str, seed: int) -> int:
    """A seed of 32 bits for one source of a run's randomness, so that no two sources repeat each other's numbers.

    Not a sum of the run's seed and a large offset: of a seed, torch's CPU generator takes the low 32 bits only.
    """
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:4], "big")


class DivergedError(RuntimeError):
    """The training loss, the logits, or a weight are no longer finite."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; errors are percentages of misclassified sentences."""

    best_step: int  # the first step of least dev error
    best_dev_error: float  # dev error at that step
    test_error: float  # test error at that step: the result to report
    final_dev_error: float  # after the last step
    final_test_error: float
    # Least test error over all evaluations. It selects the model by test data, as the published code does, and is not
    # an estimate of the error on new data.
    least_test_error: float
    steps: int  # number of updates
    steps_per_s: float  # updates a second, evaluations and checkpoints excluded
    types_covered: float | None  # percent of the corpus's words that have a pre-trained vector; None without vectors
    tokens_covered: float | None  # the same for its tokens
    train_size: int  # sentences trained on
    dev_size: int  # that select the step
    test_size: int
    embedding_dim: int  # width of the word vectors
    resumed_from: int  # the step that this call began at: 0, or a checkpoint's, or `steps` if all was done


class Listener:
    """Is called as a run goes on; override what is of interest."""

    def on_start(self, config: TrainConfig, step: int) -> None:
        """Training begins, or goes on, at `step`."""

    def on_step(self, step: int, loss: Tensor) -> None:
        """A step is done; reading `loss`, a 0-d tensor, waits for the device."""

    def on_evaluate(self, record: dict[str, Any]) -> None:
        """A record was added to metrics.jsonl."""

    def on_save(self, step: int) -> None:
        """last.pt was written; a run that ends now goes on from `step`."""


def train(config: TrainConfig, out: str | os.PathLike[str], *, listener: Listener | None = None) -> TrainResult:
    """Trains a model, or resumes a run, or reports one that is done.

    `out` receives config.json; metrics.jsonl, one record an evaluation and a final one; best.pt, the model of
    least dev error; last.pt, from which the same call resumes. A run that was killed at any time and resumed
    gives bit for bit the weights and metrics (but for times) of one that was not, on the same machine's CPU with
    the same number of threads; on a GPU up to the order in which its kernels sum. A larger `steps` continues a run,
    also a finished one: its weights become those of a run that was this long from the start, and the evaluation after
    what was its last step stays among the records.

    The records: `step`; `train_loss`, the mean since the last evaluation; `dev_error` and `test_error` in
    percent; `steps_per_s`; and of the evaluated step's batch, where rows are mixed, `mix/lam`, the mean
    coefficient, `mix/lam_shift`, the mean of |λ' - λ|, `mix/mask`, the share of rows that take the loss at λ', and
    where there is an adversarial step `mix/grad_abs`, the mean of |∂ℓ/∂λ| before the clip, and `mix/delta`, the mean
    change of the loss.

    The global generators and the number of threads are set for the run and put back.

    Args:
        config: the run.
        out: its folder; made if there is none.
        listener: is called as it goes on.

    Returns:
        the result.

    Raises:
        ValueError: malformed data, a damaged checkpoint, or an `out` that holds another run.
        DivergedError: the loss or the logits became NaN or infinite; nothing of that is in the checkpoints.
    """
    out = Path(out)
    device = usable_device(config.device)
    with _own_randomness(device, config.threads):
        task = Task.load(config, device)
        run = _Run(config, out, device, task)
        _claim(out, config, task)  # after all that can be refused: a mistake must not take the folder
        saved = out / "last.pt"
        if saved.exists():
            run.restore(checkpoint.load_tensors(saved), saved)
        described = checkpoint.load_json(out / "config.json")
        if described["steps"] != config.steps:
            checkpoint.save_json(out / "config.json", {**described, "steps": config.steps})
        return run.finish(listener or Listener())


@contextmanager
def _own_randomness(device: torch.device, threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    # fork_rng counts devices by number; "cuda" alone is the current one.
    devices = [torch.empty(0, device=device).get_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _claim(out: Path, config: TrainConfig, task: Task) -> None:
    """Makes `out` this run's folder, or refuses another run's."""
    described = out / "config.json"
    if described.exists():
        there = checkpoint.load_json(described)
        steps = there.get("steps")
        longer = isinstance(steps, int) and steps < config.steps  # which is the same run
        differences = config.differences({**there, "steps": config.steps} if longer else there)
        digests = there.get("data") or {}
        differences += [name for name, digest in task.fingerprint().items() if digest != digests.get(name)]
        if differences:
            raise ValueError(f"{out} holds another run; different: {', '.join(differences)}")
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder")
    for name in ("metrics.jsonl", "best.pt", "last.pt"):
        if (out / name).exists():
            raise ValueError(f"{out} holds a {name} without a config.json; give an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    versions = {"fastamp": fastamp.__version__, "torch": torch.__version__}
    checkpoint.save_json(described, {**config.to_dict(), "data": task.fingerprint(), "versions": versions})


class _Run:
    """All state of a run between two steps."""

    def __init__(self, config: TrainConfig, out: Path, device: torch.device, task: Task) -> None:
        torch.manual_seed(seed_for("weights and dropout", config.seed))
        self.config, self.out, self.device, self.task = config, out, device, task
        self.mixing = torch.Generator(device).manual_seed(seed_for("mixing", config.seed))
        self.model = task.model(config, self.mixing).to(device)
        self.objective = make_objective(self.model, config, self.mixing)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        # One dense, fused update of the whole embedding costs less than finding out which rows need one, a tenth of
        # a CNN's step on a CPU; and rows that did not occur do move, by their momentum and the L2 term.
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=config.lr, weight_decay=config.l2, fused=True, capturable=config.capture
        )
        self.update = Updater(self.objective, self.optimizer, config.clip_norm)
        if config.capture:
            # Not the first batch's number of rows: a resumed run may begin with the last batch of an epoch.
            rows = min(config.batch_size, len(task.train.labels))
            self.update = CapturedUpdater(self.update, self.mixing, task.pad_id, rows)
        self.batches = Batches(task.train, config.batch_size, seed_for("shuffling", config.seed))
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # since the last evaluation
        self.resumed_from = 0
        self.at: dict[str, Any] = {
            "step": 0,
            "evaluated": {"step": 0},  # the last record
            "best": {"dev_error": math.inf},  # the record of least dev error
            "least_test_error": math.inf,
            "seconds": 0.0,  # of training, up to the last evaluation
            "window_seconds": 0.0,  # and since
            "offset": 0,  # of the end of the metrics
        }

    def state(self) -> dict[str, Any]:
        """What last.pt holds."""
        return {
            "format": FORMAT,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mixing": self.mixing.get_state(),
            "batches": self.batches.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_device": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "loss_sum": self.loss_sum,
            "at": self.at,
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Continues from what last.pt holds."""
        if state.get("format") != FORMAT:
            raise ValueError(
                f"checkpoint {path} has format {state.get('format')!r}, of another version of fastamp; takes {FORMAT}: "
                "give another folder, or delete this one to start over"
            )
        try:
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.mixing.set_state(state["mixing"])
            self.batches.load_state_dict(state["batches"])
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng_device"], self.device)
            self.loss_sum.copy_(state["loss_sum"])
            self.at = {name: state["at"][name] for name in self.at}
            self.resumed_from = self.at["step"]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise damaged(f"checkpoint {path}", error, START_OVER) from None

    def finish(self, listener: Listener) -> TrainResult:
        """Trains to the end."""
        if self.at["step"] < self.config.steps:
            metrics = MetricsLog(self.out / "metrics.jsonl", self.at["offset"])
            listener.on_start(self.config, self.at["step"])
            try:
                self._train(metrics, listener)
            finally:
                metrics.close()
        return self._result()

    def _train(self, metrics: MetricsLog, listener: Listener) -> None:
        config, at = self.config, self.at
        self.objective.train()
        batches = iter(self.batches)
        began = time.perf_counter()
        for step in range(at["step"] + 1, config.steps + 1):
            at["step"] = step
            ids, labels = next(batches)
            try:
                loss, stats = self.update(ids, labels)
            except NonFiniteError as error:  # where rows are mixed, which is told before the loss is
                raise DivergedError(f"the logits became NaN or infinite at step {step}; lr is {config.lr}") from error
            self.loss_sum += loss
            listener.on_step(step, loss)
            last = step == config.steps
            evaluate = last or step % config.eval_every == 0
            save = last or step % config.checkpoint_every == 0
            if not (evaluate or save):
                continue
            self._check_finite()
            at["window_seconds"] += time.perf_counter() - began
            if evaluate:
                self._evaluate(stats, metrics, listener)
            if save:
                at["offset"] = metrics.sync()
                if last:
                    # Behind the offset, so that more steps cut it off.
                    result = {k: v for k, v in asdict(self._result()).items() if k != "resumed_from"}
                    metrics.append({"final": True, **result})
                    metrics.sync()
                checkpoint.save_tensors(self.out / "last.pt", self.state())
                listener.on_save(step)
            began = time.perf_counter()

    def _check_finite(self) -> None:
        loss = self.loss_sum.item()
        if math.isfinite(loss) and torch.stack([p.isfinite().all() for p in self.parameters]).all():
            return
        what = "a weight is not finite" if math.isfinite(loss) else f"the training loss became {loss}"
        begin, end = self.at["evaluated"]["step"] + 1, self.at["step"]
        raise DivergedError(f"{what} between steps {begin} and {end}; lr is {self.config.lr}")

    def _evaluate(self, stats: fastamp.MixStats | None, metrics: MetricsLog, listener: Listener) -> None:
        at = self.at
        steps = at["step"] - at["evaluated"]["step"]
        self.objective.eval()
        record = {
            "step": at["step"],
            "train_loss": self.loss_sum.item() / steps,
            "dev_error": error_rate(self.model, self.task.dev),
            "test_error": error_rate(self.model, self.task.test),
            "steps_per_s": steps / at["window_seconds"],
            **_mixing_facts(stats),
        }
        self.objective.train()
        at["seconds"] += at["window_seconds"]
        at["window_seconds"] = 0.0
        self.loss_sum.zero_()
        at["evaluated"] = record
        at["least_test_error"] = min(at["least_test_error"], record["test_error"])
        metrics.append(record)
        if record["dev_error"] < at["best"]["dev_error"]:
            at["best"] = record
            # Before last.pt: a resumed run either has this file already or comes by here once more.
            checkpoint.save_tensors(
                self.out / "best.pt",
                {
                    "model": self.model.state_dict(),
                    "config": self.config.to_dict(),
                    "words": None if self.task.vocabulary is None else list(self.task.vocabulary.words),
                    "label_names": list(self.task.corpus.label_names),
                    "record": record,
                },
            )
        listener.on_evaluate(record)

    def _result(self) -> TrainResult:
        at, covered = self.at, self.task.coverage
        return TrainResult(
            best_step=at["best"]["step"],
            best_dev_error=at["best"]["dev_error"],
            test_error=at["best"]["test_error"],
            final_dev_error=at["evaluated"]["dev_error"],
            final_test_error=at["evaluated"]["test_error"],
            least_test_error=at["least_test_error"],
            steps=at["step"],
            steps_per_s=at["step"] / at["seconds"],
            types_covered=None if covered is None else covered.types,
            tokens_covered=None if covered is None else covered.tokens,
            train_size=len(self.task.train.labels),
            dev_size=len(self.task.dev.labels),
            test_size=len(self.task.test.labels),
            embedding_dim=next(m for m in self.model.modules() if isinstance(m, nn.Embedding)).embedding_dim,
            resumed_from=self.resumed_from,
        )


def _mixing_facts(stats: fastamp.MixStats | None) -> dict[str, float]:
    if stats is None:
        return {}
    facts = {
        "mix/lam": stats.lam.mean(),
        "mix/lam_shift": (stats.lam_adv - stats.lam).abs().mean(),
        "mix/mask": stats.mask.float().mean(),
    }
    if stats.plan != "mixup":  # which knows neither
        facts |= {"mix/grad_abs": stats.grad.abs().mean(), "mix/delta": stats.delta.mean()}
    return {name: value.item() for name, value in facts.items()}
