"""A whole benchmark: which shapes, who may be timed, and the results as one dictionary."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastamp.benchmarking import machine, timing
from fastamp.benchmarking.contenders import MIXUP, Contender, contenders
from fastamp.benchmarking.workload import DTYPES, Runner, Workload, copies_to_exceed_cache, disagreement

FORMAT = 1  # of the results
# (B, D, C): the paper's CNN on TREC, its LSTM on two classes, BERT-base on five and on two, a thousand classes, and a
# vocabulary.
SHAPES = ((50, 300, 6), (50, 1024, 2), (24, 768, 5), (24, 768, 2), (256, 768, 1000), (4096, 1024, 32000))
GPU_ONLY = 1 << 24  # logits of a batch beyond which a CPU would take minutes
INPUTS = ("hidden", "logits")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Attributes:
        shapes: (B, D, C) each.
        dtypes: keys of DTYPES; None takes fp32 on a CPU, fp32 and bf16 on a GPU.
        rounds: in each of which every contender runs once.
        threads: intra-op CPU threads.
        device: as in torch.device.
        compiled: also time what goes through torch.compile.
        inputs: "hidden" (through a linear layer) and "logits".

    Raises:
        ValueError: a value out of range, or a device that is not there.
    """

    shapes: tuple[tuple[int, int, int], ...] = SHAPES
    dtypes: tuple[str, ...] | None = None
    rounds: int = 40
    threads: int = 1
    device: str = "cpu"
    compiled: bool = True
    inputs: tuple[str, ...] = INPUTS

    def __post_init__(self) -> None:
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for shape in self.shapes:
            if len(shape) != 3 or min(shape) < 1:
                raise ValueError(f"a shape is (B, D, C), each at least 1, got {shape}")
        for kind, given, taken in (("dtype", self.dtypes or (), tuple(DTYPES)), ("inputs", self.inputs, INPUTS)):
            for one in given:
                if one not in taken:
                    raise ValueError(f"unknown {kind} {one!r}; takes {', '.join(taken)}")
        self.torch_device()

    def torch_device(self) -> torch.device:
        """The device, found to be there."""
        try:
            device = torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {self.device!r} cannot be used: {str(error).splitlines()[0]}") from None
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device must be a CPU or a CUDA/ROCm GPU, got {self.device!r}")
        return device


def run(
    config: BenchConfig,
    *,
    command: str,
    candidates: Callable[[str], list[Contender]] | None = None,
    listener: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """Measure.

    Args:
        config: what.
        command: what gives these results again; recorded.
        candidates: contenders for an input kind; None takes all of `contenders`.
        listener: hears what is under way.
        save: is given the results so far after every workload, so that an interrupted run leaves something.

    Returns:
        The results, fit for JSON; bench/README.md says what is in them.
    """
    device = config.torch_device()
    dtypes = config.dtypes or (("fp32",) if device.type == "cpu" else ("fp32", "bf16"))
    candidates = candidates or (lambda takes: contenders(takes, compiled=config.compiled))
    results: dict[str, Any] = {
        "format": FORMAT,
        "command": command,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": {"type": device.type, "name": machine.device_name(device), "tag": machine.device_tag(device)},
        "versions": machine.versions(),
        "checkout": machine.commit(),
        "threads": config.threads,
        "rounds": config.rounds,
        "rows": [],
        "refused": [],
        "notes": [],
    }
    with _threads(config.threads):
        listener("copy bandwidth")
        results["copy_gb_s"] = machine.copy_bandwidth(device)
        for takes in config.inputs:
            for dtype in dtypes:
                for shape in config.shapes:
                    if device.type == "cpu" and shape[0] * shape[2] > GPU_ONLY:
                        results["notes"].append(f"{shape} {dtype} {takes}: not run, it takes a GPU")
                        continue
                    copies = copies_to_exceed_cache(shape, dtype, takes, device)
                    work = Workload(shape, dtype, takes, device, copies)
                    _measure(work, candidates(takes), config.rounds, results, listener)
                    save(results)
    return results


def _measure(
    work: Workload, candidates: list[Contender], rounds: int, results: dict[str, Any], listener: Callable[[str], None]
) -> None:
    """Adds the rows of one workload to the results."""
    torch.compiler.reset()
    modes = {}
    runners = []
    for contender in candidates:
        listener(f"{work.label}: {contender.name}")
        try:
            runner = work.bind(contender)
            reason = disagreement(runner, contender.mode)
        except Exception as error:  # a contender that cannot run is refused with its reason, and the others go on
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if reason is not None:
            results["refused"].append({"workload": work.label, "contender": contender.name, "reason": reason})
            continue
        runners.append(runner)
        modes[contender.name] = contender.mode
    if not runners:
        return
    work.truths.clear()
    listener(f"{work.label}: timing")
    series = [timing.Series(runner.name, timing.eager_slot(runner)) for runner in runners]
    timing.round_robin(series, rounds)
    facts = {r.name: {"peak_memory_bytes": timing.peak_memory(r), **timing.issued(r)} for r in runners}
    results["rows"] += _rows(work, "eager", series, modes, facts, results["copy_gb_s"])
    if work.device.type == "cuda":
        series = list(_captured(runners, results["notes"]))
        timing.round_robin(series, rounds)
        results["rows"] += _rows(work, "graph", series, modes, facts, results["copy_gb_s"])


def _captured(runners: list[Runner], notes: list[str]) -> Iterator[timing.Series]:
    for runner in runners:
        try:
            slot = timing.graph_slot(runner)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            notes.append(f"{runner.workload.label}: {runner.name} cannot be captured in a CUDA graph: {reason}")
            torch.cuda.synchronize()
            continue
        yield timing.Series(runner.name, slot)


def _rows(
    work: Workload,
    clock: str,
    series: list[timing.Series],
    modes: dict[str, str],
    facts: dict[str, dict[str, Any]],
    copy_gb_s: float,
) -> list[dict[str, Any]]:
    mixups = [one for one in series if one.name in MIXUP]
    base = min(mixups, key=lambda one: float(one.values("both").median()), default=None)
    batch, width, classes = work.shape
    rows = []
    for one in series:
        row: dict[str, Any] = {
            "shape": {"B": batch, "D": width if work.takes == "hidden" else None, "C": classes},
            "input": work.takes,
            "dtype": work.dtype,
            "contender": one.name,
            "mode": modes[one.name],
            "clock": clock,
            "input_copies": work.copies,
            "ms": {name: timing.quantiles(one.values(name)) for name in timing.DIRECTIONS},
            "ratio_to": None if base is None else base.name,
            "ratio": None
            if base is None
            else {name: timing.quantiles(one.values(name) / base.values(name)) for name in timing.DIRECTIONS},
            **facts[one.name],
        }
        if work.takes == "logits":
            gb_s = work.logits_bytes / row["ms"]["both"]["q50"] / 1e6
            row |= {"bytes": work.logits_bytes, "gb_s": gb_s, "percent_of_copy": 100 * gb_s / copy_gb_s}
        rows.append(row)
    return rows


def write(results: dict[str, Any], folder: Path) -> Path:
    """Writes the results to folder/<device>.json and says where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results['device']['tag']}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
