"""Clocks: every contender once a round, in turn, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastamp.benchmarking.workload import Runner

SLOT_SECONDS = 4e-3  # what a contender runs for in one round, at least one step
WARMUP_STEPS, WARMUP_SECONDS = 10, 0.5  # whichever is over first
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


class Sample(NamedTuple):
    """Milliseconds of one slot: forward, backward, both of them, and a training step, the optimizer's part included.

    Not a number where a clock cannot tell, or where there is no optimizer.
    """

    forward: float
    backward: float
    both: float
    step: float = math.nan


@dataclass
class Series:
    """The samples of one contender, one a round."""

    name: str
    slot: Callable[[], Sample]
    samples: list[Sample] = field(default_factory=list)

    def values(self, direction: str) -> torch.Tensor:
        """(rounds,) float64 milliseconds."""
        return torch.tensor([getattr(sample, direction) for sample in self.samples], dtype=torch.float64)


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
    cuda = runner.workload.device.type == "cuda"
    one = _cuda_slot if cuda else _cpu_slot
    took = [one(runner, 1).both]
    while len(took) < WARMUP_STEPS and sum(took) < WARMUP_SECONDS * 1e3:
        took.append(one(runner, 1).both)
    # By the least of them: a disturbed one would make for slots of a single step.
    steps = max(1, round(SLOT_SECONDS * 1e3 / min(took)))
    train = None if runner.workload.optimize is None else _training_step(runner)
    whole = _cuda_whole if cuda else _cpu_whole
    if train is not None:
        whole(train, 1)

    def slot() -> Sample:
        if steps > 1:  # the first step after another contender's finds cold caches
            one(runner, 1)
        sample = one(runner, steps)
        return sample if train is None else sample._replace(step=whole(train, steps))

    return slot


def _training_step(runner: Runner) -> Callable[[int], None]:
    optimize = runner.workload.optimize
    assert optimize is not None

    def train(i: int) -> None:
        optimize(runner.backward(i, runner.forward(i)))

    return train


def _cpu_whole(body: Callable[[int], None], steps: int) -> float:
    spans = []
    for i in range(steps):
        began = time.perf_counter()
        body(i)
        spans.append((time.perf_counter() - began) * 1e3)
    return median(spans)


def _cpu_slot(runner: Runner, steps: int) -> Sample:
    forward, backward = [], []
    for i in range(steps):
        began = time.perf_counter()
        loss = runner.forward(i)
        between = time.perf_counter()
        runner.backward(i, loss)
        backward.append((time.perf_counter() - between) * 1e3)
        forward.append((between - began) * 1e3)
    return _medians(forward, backward)


def _medians(forward: list[float], backward: list[float]) -> Sample:
    # Not means: one time slice given to another process is longer than all the steps of a slot.
    both = [first + second for first, second in zip(forward, backward, strict=True)]
    return Sample(median(forward), median(backward), median(both))


def _cuda_slot(runner: Runner, steps: int) -> Sample:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * steps + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for i in range(steps):
        loss = runner.forward(i)
        marks[2 * i + 1].record()
        runner.backward(i, loss)
        marks[2 * i + 2].record()
    torch.cuda.synchronize()
    spans = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return _medians(spans[::2], spans[1::2])


def _cuda_whole(body: Callable[[int], None], steps: int) -> float:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for i in range(steps):
        body(i)
        marks[i + 1].record()
    torch.cuda.synchronize()
    return median(before.elapsed_time(after) for before, after in pairwise(marks))


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
    copies = len(runner.workload.inputs)

    def forward() -> None:
        kept = [runner.forward(i) for i in range(copies)]
        del kept

    def both() -> None:
        for i in range(copies):
            runner.backward(i, runner.forward(i))

    bodies: list[Callable[[], object]] = [forward, both]
    if runner.workload.optimize is not None:
        train = _training_step(runner)
        bodies.append(lambda: [train(i) for i in range(copies)])
    graphs = [_captured(body, pool) for body in bodies]
    replays = max(1, round(SLOT_SECONDS * 1e3 / _replay(graphs[1], 3)))

    def slot() -> Sample:
        once, whole, *step = (_replay(graph, replays) / copies for graph in graphs)
        return Sample(once, math.nan, whole, *step)

    return slot


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
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    for _ in range(times):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / times


def peak_memory(runner: Runner) -> int:
    """Bytes that one step allocates at its peak beyond what was there before, by torch's allocator."""
    device = runner.workload.device
    runner.backward(0, runner.forward(0))
    if device.type != "cuda":
        with _quiet(), torch.profiler.profile(profile_memory=True) as profile:
            runner.backward(0, runner.forward(0))
        kineto = profile.profiler.kineto_results.events()
        # Every allocation, and every release as a negative one.
        changes = sorted((event for event in kineto if event.name() == "[memory]"), key=lambda event: event.start_ns())
        return max(accumulate(event.nbytes() for event in changes), default=0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.backward(0, runner.forward(0))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def issued(runner: Runner) -> dict[str, int | None]:
    """What one step issues: kernels launched on a GPU; operators dispatched on a CPU, None under torch.compile."""
    if runner.workload.device.type != "cuda":
        if runner.compiled:  # a dispatch mode keeps compiled code from running
            return {"operators": None}
        with _Counting() as counting:
            runner.backward(0, runner.forward(0))
        return {"operators": counting.count}
    activity = torch.profiler.ProfilerActivity
    with _quiet(), torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        runner.backward(0, runner.forward(0))
        torch.cuda.synchronize()
    return {"kernel_launches": kernel_launches(profile.events())}


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


class _Counting(TorchDispatchMode):
    """Counts the operators that reach a backend."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
