"""How far runs are, and how long the rest will take."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastamp.paper.plan import METHODS, Run
from fastamp.paper.worker import Job

_TAIL_BYTES = 4096  # of metrics.jsonl, more than a line


class Active(NamedTuple):
    """A run under way, as its last evaluation tells; step 0 and None before the first."""

    key: str
    step: int
    steps: int
    dev_error: float | None
    rate: float | None  # updates a second


@dataclass
class Progress:
    """How far a command has come.

    Attributes:
        total: number of runs asked for.
        done: how many of them are in the results, those that failed included.
        failed: how many of them failed.
        steps: updates still to be made when the command began.
        steps_done: updates made since, those that a failed run left out included.
        active: the runs under way.
        seconds_left: of the runs whose rate is known.
        unknown: how many runs are left of whose backbone nothing yet tells a rate.
    """

    total: int
    done: int
    failed: int
    steps: int
    steps_done: int = 0
    active: tuple[Active, ...] = ()
    seconds_left: float = 0.0
    unknown: int = 0


def _kinds(model: str, method: str, loss: str) -> tuple[tuple[str, ...], ...]:
    """Whose rate tells a run's, the nearest first: the same method's, one's that differs in α or ε, the backbone's."""
    return (model, method, loss), (model, loss), (model,)


class Rates:
    """Updates a second, of runs of a kind.

    Args:
        records: lines of results.jsonl.
        device: only those of runs on it count.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]], device: str) -> None:
        self._device = device
        self._finished: dict[tuple[str, ...], float] = {}
        for line in records:
            self.keep(line)

    def keep(self, line: Mapping[str, Any]) -> None:
        """Takes over the rate of a run that is done, evaluations and all else included."""
        if line["status"] != "done" or line["config"]["device"] != self._device:
            return
        steps = line["result"]["steps"] - line["result"]["resumed_from"]
        if steps:
            kinds = _kinds(line["model"], line["method"], line["config"]["method"])
            self._finished |= dict.fromkeys(kinds, steps / line["seconds"])

    def left(self, active: Collection[tuple[Run, Active]], waiting: Mapping[Run, int], jobs: int) -> tuple[float, int]:
        """Seconds left of the runs of known rate, and the number of the others.

        A run's rate is that of the last that is done of its kind: of the same method; else of one that differs in α or
        ε; else of its backbone.

        Args:
            active: the runs under way, whose own rates stand in where none of their kind is done.
            waiting: steps of the runs to come.
            jobs: number of runs at a time.
        """
        rates = {kind: at.rate for run, at in active if at.rate for kind in _kinds_of(run)} | self._finished
        left = [*((run, at.steps - at.step) for run, at in active), *waiting.items()]
        known = [(steps, [rates[kind] for kind in _kinds_of(run) if kind in rates]) for run, steps in left]
        seconds = [steps / near[0] for steps, near in known if near]
        return max([sum(seconds) / jobs, *seconds]), len(left) - len(seconds)


def _kinds_of(run: Run) -> tuple[tuple[str, ...], ...]:
    return _kinds(run.model, run.method, METHODS[run.method].fields["method"])


def last_evaluation(job: Job) -> Active:
    """How far a run is."""
    step, dev_error, rate = 0, None, None
    path = job.folder / "metrics.jsonl"
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            *lines, _ = file.read().split(b"\n")
    except OSError:  # none yet
        lines = []
    for line in reversed(lines):
        with suppress(ValueError):  # the first of the tail is cut
            last = json.loads(line)
            if "step" in last:
                step, dev_error, rate = last["step"], last["dev_error"], last["steps_per_s"]
                break
    return Active(job.run.key, step, job.config.steps, dev_error, rate)
