"""Runs in parallel processes; what is finished stays finished, whatever is killed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from fastamp.data import load
from fastamp.data.files import blocks
from fastamp.paper.plan import METHODS, Run
from fastamp.paper.progress import Progress, Rates, last_evaluation
from fastamp.paper.results import SETTINGS, ResultsWriter, read
from fastamp.paper.worker import Job, record, work
from fastamp.training.config import TrainConfig, unused_fields, usable_device
from fastamp.training.recipes import RECIPES, recipe
from fastamp.training.task import Task

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Options:
    """What a command says of all its runs.

    Attributes:
        steps, eval_every: None takes the recipe's.
        overrides: fields of TrainConfig, given to the runs that use them; those that make a method what it is win.
        data_dir, vectors, pretrained: as in TrainConfig, given to the models that use them.
        device: as in torch.device.
        threads: CPU threads of a run.

    Raises:
        ValueError: a device that this machine does not have.
    """

    steps: int | None = None
    eval_every: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    data_dir: str | None = None
    vectors: str | None = None
    pretrained: str | None = None
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        usable_device(self.device)

    def config(self, run: Run) -> TrainConfig:
        """The configuration of a run.

        Raises:
            TypeError: a field of another type.
            ValueError: a value out of range, fields that do not go together, or something missing that the model
                needs.
        """
        backbone = RECIPES[run.model]
        if backbone.needs is not None and getattr(self, backbone.needs) is None:
            raise ValueError(f"{run.model} needs {backbone.needs}: give --{backbone.needs}, or choose by --models")
        if run.model == "bert" and find_spec("transformers") is None:
            raise ValueError("bert needs the package transformers: pip install fastamp[hf], or choose by --models")
        fields = {
            "data_dir": self.data_dir,
            "steps": self.steps,
            "eval_every": self.eval_every,
            "device": self.device,
            "threads": self.threads,
            **{name: value for name, value in self.overrides.items() if name not in _unused(run)},
            **METHODS[run.method].fields,
            "dataset": run.dataset,
            "fraction": run.ratio,
            "seed": run.seed,
        }
        if backbone.needs is not None:
            fields[backbone.needs] = getattr(self, backbone.needs)
        if run.model == "bert":
            fields["pretrained"] = self.pretrained
        return recipe(run.model, **fields)

    def notices(self, runs: Collection[Run]) -> list[str]:
        """Sentences for the user on overrides that none of the runs uses; other runs in the folder may."""
        return [
            f"no run here uses {name}, which is for {_unused(next(iter(runs)))[name]}"
            for name in self.overrides
            if all(name in _unused(run) for run in runs)
        ]

    def settings(self, runs: Iterable[Run]) -> dict[str, Any]:
        """What the runs share, as a results folder keeps it.

        Reads the data, and makes the model, of every data set and backbone: what a run would fail at must not take the
        folder.

        Raises:
            ValueError: data, vectors or an encoder that are missing, malformed or do not fit the other options.
        """
        configs = {(run.dataset, run.model): self.config(run) for run in runs}
        vectors = encoder = None
        for config in configs.values():
            task = Task.load(config, torch.device("cpu"))
            task.model(config)
            vectors = vectors or config.vectors
            encoder = encoder or task.encoder
        datasets = dict.fromkeys(dataset for dataset, _ in configs)
        return {
            "steps": self.steps,
            "eval_every": self.eval_every,
            "threads": self.threads,
            "overrides": dict(self.overrides),
            "data": {name: load(name, data_dir=self.data_dir).text_fingerprint() for name in datasets},
            "vectors": None if vectors is None else _file_digest(vectors),
            "pretrained": None if encoder is None else encoder.digest,
        }


def _unused(run: Run) -> dict[str, str]:
    """`unused_fields` of a run."""
    return unused_fields(RECIPES[run.model].fields["model"], METHODS[run.method].fields["method"])


def _file_digest(path: str) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    for block in blocks(Path(path)):
        digest.update(block)
    return digest.hexdigest()


class Display:
    """Hears of progress; override what is of interest."""

    def polled(self, progress: Progress) -> None:
        """A second has passed, or a run has ended."""

    def ended(self, line: Mapping[str, Any], progress: Progress) -> None:
        """A run's record was added to the results."""


class _Worker:
    """A process and the run that it works at."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other,), daemon=True)
        self.process.start()
        other.close()  # so that the connection ends with the process
        self.job: Job
        self.began: float

    def give(self, job: Job) -> None:
        """Starts a run."""
        job.folder.mkdir(parents=True, exist_ok=True)
        self.job, self.began = job, time.monotonic()
        with suppress(OSError):  # of a process that is gone, as `take` will find
            self.connection.send(job)

    def take(self) -> dict[str, Any]:
        """The record of the run, which has ended, or whose process has."""
        try:
            line: dict[str, Any] = self.connection.recv()
            if "key" in line:
                return line
        except (EOFError, OSError):
            self.process.join()
            line = {"error": f"its process {_end(self.process.exitcode or 0)}", "traceback": ""}
        return record(self.job, "failed", time.monotonic() - self.began, **line)

    def end(self) -> None:
        """Ends the process at once."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _end(code: int) -> str:
    """How a process ended, by its exit code."""
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")


class _Execution:
    """A command's runs and how far they are."""

    def __init__(
        self,
        runs: Sequence[Run],
        options: Options,
        writer: ResultsWriter,
        jobs: int,
        retry_failed: bool,
        display: Display,
    ) -> None:
        self.writer, self.jobs, self.display = writer, jobs, display
        kept = [writer.records[run.key] for run in runs if is_kept(run, writer.records, retry_failed)]
        self.waiting = deque(
            Job(run, options.config(run), writer.run_folder(run.key))
            for run in runs
            if not is_kept(run, writer.records, retry_failed)
        )
        _remove_leftovers(writer, {job.run.key for job in self.waiting})
        # What an earlier command left of a run is not this command's work.
        self.before = {job.run.key: last_evaluation(job).step for job in self.waiting}
        self.progress = Progress(
            total=len(runs),
            done=len(kept),
            failed=sum(line["status"] == "failed" for line in kept),
            steps=sum(job.config.steps - self.before[job.run.key] for job in self.waiting),
        )
        self.ended_steps = 0
        self.workers: list[_Worker] = []
        self.rates = Rates(writer.records.values(), options.device)

    def finish(self) -> Progress:
        """Runs all, `jobs` at a time."""
        try:
            while self.waiting or self.workers:
                while self.waiting and len(self.workers) < self.jobs:
                    self.workers.append(_Worker())
                    self.workers[-1].give(self.waiting.popleft())
                ready = wait([worker.connection for worker in self.workers], POLL_SECONDS)
                for worker in [worker for worker in self.workers if worker.connection in ready]:
                    self._end_run(worker)
                self._measure()
                self.display.polled(self.progress)
        finally:
            for worker in self.workers:
                worker.end()
        return self.progress

    def _end_run(self, worker: _Worker) -> None:
        line, job = worker.take(), worker.job
        self.writer.append(line)
        _remove(job.folder)
        failed = line["status"] == "failed"
        # What broke a run may have broken its process too: a CUDA error stays until the process ends.
        if failed or not self.waiting:
            worker.end()
            self.workers.remove(worker)
        else:
            worker.give(self.waiting.popleft())
        self.ended_steps += job.config.steps - self.before[job.run.key]
        self.progress.done += 1
        self.progress.failed += failed
        self.rates.keep(line)
        self._measure()
        self.display.ended(line, self.progress)

    def _measure(self) -> None:
        active = tuple(last_evaluation(worker.job) for worker in self.workers)
        under_way = sum(max(run.step - self.before[run.key], 0) for run in active)
        self.progress.active, self.progress.steps_done = active, self.ended_steps + under_way
        runs = [worker.job.run for worker in self.workers]
        waiting = {job.run: job.config.steps - self.before[job.run.key] for job in self.waiting}
        self.progress.seconds_left, self.progress.unknown = self.rates.left(
            list(zip(runs, active, strict=True)), waiting, self.jobs
        )


def execute_all(
    runs: Iterable[Run],
    options: Options,
    writer: ResultsWriter,
    *,
    jobs: int = 1,
    retry_failed: bool = False,
    display: Display | None = None,
) -> Progress:
    """Runs what a results folder does not hold yet, every run in one of `jobs` processes.

    A run that raises, or whose process is killed, is recorded as failed and the others go on. Numbers do not depend
    on `jobs`. When this process is killed its workers end too, and the same call goes on: runs that are in the
    results are not repeated, one that was under way resumes from its checkpoint. Its folder is removed once its line
    is written.

    Args:
        runs: what to run; of several with the same key one is run.
        options: what is common to them.
        writer: the results folder.
        jobs: number of processes.
        retry_failed: run again what is recorded as failed; a new line then stands for it.
        display: hears of progress.

    Returns:
        the progress at the end.

    Raises:
        ValueError, TypeError: a run whose configuration is refused; nothing was run.
        OSError: the results could not be written; the workers are ended.
    """
    unique = list({run.key: run for run in runs}.values())
    return _Execution(unique, options, writer, jobs, retry_failed, display or Display()).finish()


def threads_for(folder: Path, jobs: int) -> int:
    """CPU threads of a run where none are given: those of the results folder, else its share of the cores."""
    if (folder / SETTINGS).exists():
        return int(read(folder).settings["threads"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


def is_kept(run: Run, records: Mapping[str, Mapping[str, Any]], retry_failed: bool) -> bool:
    """Whether a run is in the results and not to be run again."""
    line = records.get(run.key)
    return line is not None and not (retry_failed and line["status"] == "failed")


def _remove(folder: Path) -> None:
    """Removes a run's folder and the folders above that it leaves empty; what cannot go is left for the next time."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        os.removedirs(folder.parent)


def _remove_leftovers(writer: ResultsWriter, waiting: Container[str]) -> None:
    """Removes the folders of runs whose line is written."""
    for key in writer.records:
        folder = writer.run_folder(key)
        if key not in waiting and folder.exists():
            _remove(folder)
