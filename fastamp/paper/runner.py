"""Runs in parallel processes; what is finished stays finished, whatever is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastamp.data import load
from fastamp.data.files import file_digest
from fastamp.paper.plan import METHODS, Request, Run, in_figure2
from fastamp.paper.results import ResultsWriter, is_complete
from fastamp.paper.worker import Job, execute, prepare, record
from fastamp.training.config import TrainConfig, unused_fields, usable_device
from fastamp.training.recipes import RECIPES, recipe
from fastamp.training.task import Task

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Options:
    """What a command says of all its runs: fields of `TrainConfig`, given to the runs that use them.

    Raises:
        ValueError: a device that this machine does not have.
    """

    steps: int | None = None  # None takes the recipe's
    eval_every: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)  # other fields; those that make a method what it is win
    data_dir: str | None = None
    vectors: str | None = None
    pretrained: str | None = None
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        usable_device(self.device)

    def config(self, run: Run) -> TrainConfig:
        """The configuration of a run; errors as of `recipe`."""
        shared = {name: getattr(self, name) for name in ("data_dir", "steps", "eval_every", "device", "threads")}
        given = {"vectors": self.vectors, "pretrained": self.pretrained, **self.overrides}
        used = {name: value for name, value in given.items() if name not in _unused(run)}
        if not RECIPES[run.model].vectors:
            used.pop("vectors", None)
        own = {**METHODS[run.method].fields, "dataset": run.dataset, "fraction": run.ratio, "seed": run.seed}
        return recipe(run.model, **{**shared, **used, **own})

    def notices(self, runs: Collection[Run]) -> list[str]:
        """Sentences for the user on overrides that none of the runs uses; other runs in the folder may."""
        return [
            f"no run here uses {name}, which is for {_unused(next(iter(runs)))[name]}"
            for name in self.overrides
            if all(name in _unused(run) for run in runs)
        ]

    def specification(self, request: Request) -> dict[str, Any]:
        """What a results folder says of these runs, see `Results`.

        Reads the data, and makes the model, of every data set and backbone: what a run would fail at must not take the
        folder.

        Raises:
            ValueError: data, vectors or an encoder that are missing, malformed or do not fit the other options.
        """
        data = {}
        for config in {(run.dataset, run.model): self.config(run) for run in request.runs()}.values():
            task = Task.load(config, torch.device("cpu"))
            task.model(config)
            if config.dataset not in data:
                data[config.dataset] = load(config.dataset, data_dir=self.data_dir).text_fingerprint()
            if config.vectors is not None and "vectors" not in data:
                data["vectors"] = file_digest(config.vectors)
            if task.encoder is not None:
                data["pretrained"] = task.encoder.digest
        for dataset, ratio in product(request.datasets, request.ratios):
            if ratio < 1:
                load(dataset, data_dir=self.data_dir, fraction=ratio)  # which warns of classes that it leaves empty
        asked = {name: value if isinstance(value, str) else list(value) for name, value in vars(request).items()}
        same = {name: getattr(self, name) for name in ("steps", "eval_every", "device", "threads")}
        return {**same, "overrides": dict(self.overrides), "data": data, "requests": [asked]}


def _unused(run: Run) -> dict[str, str]:
    """`unused_fields` of a run."""
    return unused_fields(RECIPES[run.model].fields["model"], METHODS[run.method].fields["method"])


class Active(NamedTuple):
    """A run under way, as its last evaluation tells; step 0 and None before the first."""

    run: Run
    step: int
    steps: int
    dev_error: float | None
    rate: float | None  # updates a second


@dataclass(frozen=True)
class Progress:
    """How far a command has come."""

    total: int  # number of runs asked for
    done: int  # how many of them are in the results, those that failed included
    failed: int
    active: tuple[Active, ...] = ()
    seconds_left: float = 0.0  # of the runs of whose backbone a rate is known
    unknown: int = 0  # how many other runs are left


class Display:
    """Shows progress; override what is of interest."""

    def on_poll(self, progress: Progress) -> None:
        """A second has passed, or a run has ended."""

    def on_end(self, line: Mapping[str, Any], progress: Progress) -> None:
        """A run's record was added to the results."""


def execute_all(
    runs: Iterable[Run],
    options: Options,
    writer: ResultsWriter,
    *,
    jobs: int = 1,
    retry_failed: bool = False,
    curves: bool = False,
    display: Display | None = None,
) -> Progress:
    """Runs what a results folder does not hold yet, `jobs` at a time, each in a process of its own.

    A run that raises, or whose process is killed, is recorded as failed and the others go on. Numbers do not depend
    on `jobs`. When this process is killed the others end too, and the same call goes on: runs that are in the results
    are not repeated, unless they failed and `retry_failed` is set, or `curves` are wanted, the loss against λ, and are
    not there; one that was under way resumes from its checkpoint.
    Its folder is removed once its line is written.

    Returns:
        the progress at the end.

    Raises:
        ValueError, TypeError: a run whose configuration is refused; nothing was run.
        OSError: the results could not be written; the processes are ended.
    """
    runs, display = list(runs), display or Display()
    ended = {run.key for run in runs if is_kept(run, writer.records, retry_failed, curves)}
    waiting = deque(
        Job(run, options.config(run), writer.run_folder(run.key), curves or in_figure2(run))
        for run in runs
        if run.key not in ended
    )
    for key in ended:
        _remove(writer.run_folder(key))  # which a kill may have left
    others = multiprocessing.active_children()
    running: dict[Future[dict[str, Any]], tuple[Job, ProcessPoolExecutor, float]] = {}

    def progress() -> Progress:
        active = tuple(last_evaluation(job) for job, _, _ in running.values())
        failed = sum(writer.records[key]["status"] == "failed" for key in ended)
        left = time_left(writer.records.values(), active, waiting, jobs)
        return Progress(len(runs), len(ended), failed, active, *left)

    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.popleft()
                job.folder.mkdir(parents=True, exist_ok=True)
                # A process for each run: its memory, and whatever it broke, goes with it. Spawned: a forked one could
                # not use CUDA.
                pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=prepare)
                running[pool.submit(execute, job)] = job, pool, time.monotonic()
            for future in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
                job, pool, began = running.pop(future)
                pool.shutdown()
                try:
                    line = future.result()
                except BrokenProcessPool:
                    error = "its process ended without a result; it was killed, perhaps for want of memory"
                    line = record(job, "failed", time.monotonic() - began, error=error, traceback="")
                writer.append(line)
                _remove(job.folder)
                ended.add(job.run.key)
                display.on_end(line, progress())
            display.on_poll(progress())
    finally:
        for process in {*multiprocessing.active_children()} - {*others}:
            process.kill()
        for _, pool, _ in running.values():
            pool.shutdown()
    return progress()


def is_kept(run: Run, records: Mapping[str, Mapping[str, Any]], retry_failed: bool, curves: bool = False) -> bool:
    """Whether a run is in the results and not to be run again."""
    line = records.get(run.key)
    failed = line is not None and line["status"] == "failed"
    return not retry_failed if failed else is_complete(line, curves)


def last_evaluation(job: Job) -> Active:
    """How far a run is."""
    path = job.folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for line in reversed(lines):
        with suppress(ValueError):  # a damaged line: the run's record will tell
            last = json.loads(line)
            if "step" in last:
                return Active(job.run, last["step"], job.config.steps, last["dev_error"], last["steps_per_s"])
    return Active(job.run, 0, job.config.steps, None, None)


def time_left(
    records: Iterable[Mapping[str, Any]], active: Iterable[Active], waiting: Iterable[Job], jobs: int
) -> tuple[float, int]:
    """Seconds left of the runs of known rate, and the number of the others.

    A run's rate is that of the nearest kind: of runs of the same backbone and method; else of one that differs in α or
    ε; else of the backbone. A kind's rate is that of the last run that is done, evaluations and all else included, or
    of one under way.
    """
    rates = {kind: at.rate for at in active if at.rate for kind in _kinds(at.run.model, at.run.method)}
    for line in records:
        if line["status"] == "done" and (steps := line["result"]["steps"] - line["result"]["resumed_from"]):
            rates |= dict.fromkeys(_kinds(line["model"], line["method"]), steps / line["seconds"])
    left = [*((at.run, at.steps - at.step) for at in active), *((job.run, job.config.steps) for job in waiting)]
    known = [(steps, [rates[kind] for kind in _kinds(run.model, run.method) if kind in rates]) for run, steps in left]
    seconds = [steps / near[0] for steps, near in known if near]
    return max([sum(seconds) / jobs, *seconds], default=0.0), len(left) - len(seconds)


def _kinds(model: str, method: str) -> tuple[tuple[str, str], ...]:
    """What else runs about as fast, the nearest first; α, ε and the like are named behind an "@"."""
    return (model, method), (model, f"{method.partition('@')[0]}@"), (model, "")


def _remove(folder: Path) -> None:
    """Removes a run's folder and the folders above that it leaves empty; what cannot go is left for the next time."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        os.removedirs(folder.parent)
