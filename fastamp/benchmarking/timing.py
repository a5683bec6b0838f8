"""The engine: every contender once a round, in turn, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any

import torch

from fastamp.benchmarking.machine import timed
from fastamp.benchmarking.workload import Note, Runner

SLOT_MS = 4.0  # what a contender runs for in one round, at least one step
WARMUP_STEPS, WARMUP_MS = 10, 500.0  # whichever is over first
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
# Milliseconds of a step by direction: "forward", "backward", "both", and "step", the optimizer's part included.
Sample = dict[str, float]


@dataclass
class Series:
    """The samples of one contender, one a round."""

    runner: Runner
    slot: Callable[[], Sample]
    samples: list[Sample] = field(default_factory=list)

    def values(self, direction: str) -> torch.Tensor:
        """(rounds,) float64 milliseconds."""
        return torch.tensor([sample[direction] for sample in self.samples], dtype=torch.float64)


def round_robin(series: Sequence[Series], rounds: int) -> None:
    """Fills the series: in every round each slot once, in a new order, lest a scheduler's period fall on one."""
    generator = torch.Generator().manual_seed(rounds)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for i in torch.randperm(len(series), generator=generator).tolist():
                series[i].samples.append(series[i].slot())
    finally:
        if collecting:
            gc.enable()


def quantiles(values: torch.Tensor) -> dict[str, float]:
    """Quantiles by name ("q50" is the median) of (rounds,) values."""
    found = torch.quantile(values, torch.tensor(QUANTILES, dtype=torch.float64))
    return {f"q{round(100 * q)}": float(value) for q, value in zip(QUANTILES, found, strict=True)}


def eager_slot(runner: Runner) -> Callable[[], Sample]:
    """A slot of steps as Python issues them, host time included; warms up."""
    took = [_steps(runner, 1)["both"]]
    while len(took) < WARMUP_STEPS and sum(took) < WARMUP_MS:
        took.append(_steps(runner, 1)["both"])
    # By the least of them: a disturbed one would make for slots of a single step.
    steps = max(1, round(SLOT_MS / min(took)))
    train = _training_step(runner)
    if train is not None:
        train(0)

    def slot() -> Sample:
        if steps > 1:  # the first step after another contender's finds cold caches
            _steps(runner, 1)
        sample = _steps(runner, steps)
        if train is not None:
            sample["step"] = median(timed(runner.work.device, [partial(train, i) for i in range(steps)]))
        return sample

    return slot


def _steps(runner: Runner, steps: int) -> Sample:
    """Medians over so many steps; not means: a time slice given to another process is longer than all of them."""
    losses: list[Any] = []

    def forward_of(i: int) -> None:
        losses.append(runner.forward(i))

    def backward_of(i: int) -> None:
        runner.backward(i, losses.pop())

    spans = timed(runner.work.device, [partial(way, i) for i in range(steps) for way in (forward_of, backward_of)])
    forward, backward = spans[::2], spans[1::2]
    both = [first + second for first, second in zip(forward, backward, strict=True)]
    return {"forward": median(forward), "backward": median(backward), "both": median(both)}


def _training_step(runner: Runner) -> Callable[[int], None] | None:
    optimize = runner.work.optimize
    return None if optimize is None else lambda i: optimize(runner.backward(i, runner.forward(i)))


def graph_slot(runner: Runner, pool: Any) -> Callable[[], Sample]:
    """A slot of CUDA graph replays: the device's time alone. A graph holds one step for every input copy.

    No time of backward: a graph of both lets go of memory early that one of the forward keeps.

    Args:
        runner: what is captured.
        pool: `torch.cuda.graph_pool_handle()`. Graphs that are replayed in turns, none of which reads what another
            made, can share their memory.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    copies = range(len(runner.work.inputs))

    def forward() -> None:
        kept = [runner.forward(i) for i in copies]
        del kept

    def both() -> None:
        for i in copies:
            runner.backward(i, runner.forward(i))

    bodies: dict[str, Callable[[], object]] = {"forward": forward, "both": both}
    train = _training_step(runner)
    if train is not None:
        bodies["step"] = lambda: [train(i) for i in copies]
    graphs = {name: _captured(body, pool) for name, body in bodies.items()}
    replays = max(1, round(SLOT_MS / _replay(graphs["both"], 3)))
    return lambda: {name: _replay(graph, replays) / len(copies) for name, graph in graphs.items()}


def _captured(body: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                body()
        current.wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            body()
    finally:  # a capture that fails at its end leaves its own stream behind
        torch.cuda.set_stream(current)
    _replay(graph, 3)
    return graph


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Milliseconds a replay."""

    def replays() -> None:
        for _ in range(times):
            graph.replay()

    return timed(torch.device("cuda"), [replays])[0] / times


_failed: list[str] = []  # in this process: after a capture that failed, the allocator may not be fit for another


def captured(runners: Iterable[Runner], pool: Any, note: Note) -> Iterator[Series]:
    """CUDA graphs of the runners' steps, until one of them cannot be captured, which is noted.

    Args:
        runners: in their order; those whose steps are known to read from the device are left out.
        pool: as `graph_slot` takes it.
        note: is called with a line each.
    """
    for runner in runners:
        where = f"{runner.contender.name} at {runner.work.label}"
        if not runner.contender.capturable:
            note(f"{runner.contender.name}: not in a CUDA graph, its step reads from the device")
            continue
        if _failed:
            note(f"no more CUDA graphs in this process after {_failed[0]}")
            return
        try:
            slot = graph_slot(runner, pool)
        except RuntimeError as error:
            _failed.append(where)
            note(f"{where} cannot be captured in a CUDA graph: {(str(error).strip().splitlines() or [''])[0]}")
            continue
        yield Series(runner, slot)


def facts(runner: Runner) -> dict[str, Any]:
    """What a step takes besides time: the bytes it holds at most, and on a GPU how many kernels it launches.

    The bytes are those that torch's allocator gives beyond what was there before.
    """
    device = runner.work.device
    runner.backward(0, runner.forward(0))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        runner.backward(0, runner.forward(0))
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(device) - before
    with _quiet(), torch.profiler.profile(profile_memory=device.type == "cpu") as profile:
        runner.backward(0, runner.forward(0))
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda":
        return {"peak_memory_bytes": peak, "kernel_launches": kernel_launches(profile.events())}
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    # Every allocation, and every release as a negative one.
    changes = sorted(events, key=lambda event: event.start_ns())
    return {"peak_memory_bytes": max(accumulate(event.nbytes() for event in changes), default=0)}


def kernel_launches(events: Iterable[Any]) -> int:
    """How many events of a profile are kernels on a GPU: no copies, and no regions that compiled code is marked by."""
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.is_user_annotation and not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler of torch 2.13 writes two lines of its own to the standard error, below Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
