"""A whole benchmark: which workloads, who may be timed, and the results as one dictionary."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastamp.benchmarking import machine, suites, timing
from fastamp.benchmarking.contenders import NAIVE, PLAIN, Contender
from fastamp.benchmarking.growth import fits
from fastamp.benchmarking.networks import NETWORKS
from fastamp.benchmarking.suites import INPUTS, SHAPES
from fastamp.benchmarking.workload import DTYPES, Runner, Work

FORMAT = 2  # of the results
SUITES = ("head", "layers", "rows", "scaling", "vocabulary")
# Options that are of some suites only.
OF_SUITES = {
    "shapes": ("head", "vocabulary"),
    "dtypes": ("head", "rows", "vocabulary"),
    "networks": ("layers",),
    "compiled": ("head", "layers", "rows"),
}
# What else rows say their ratio to, beside the plain Mixups.
RATIOS = {"ratio_to_cross_entropy": PLAIN, "ratio_to_naive": NAIVE}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Attributes:
        suite: "head", steps from the last hidden rows on; "layers", whole steps of networks that are mixed at their
            words; "rows", the operations of such a step alone; "scaling", the growth of the cost in B, C and D;
            "vocabulary", steps from the last hidden rows on where the classes are a vocabulary.
        shapes: (B, D, C) each; None for the suite's own; of the suites "head" and "vocabulary".
        dtypes: keys of DTYPES; None takes fp32 on a CPU, fp32 and bf16 on a GPU, for a vocabulary bf16 alone; of the
            suites "head", "rows" and "vocabulary".
        networks: keys of NETWORKS; None takes those for the device; of the suite "layers".
        rounds: in each of which every contender runs once.
        threads: intra-op CPU threads.
        device: as in torch.device.
        compiled: also time what goes through torch.compile; None for yes; of the suites "head", "layers" and "rows".
        autotuned: with them also what torch.compile searches the fastest products for, which takes minutes.
        inputs: "hidden" (through a linear layer) and "logits"; of the suite "head".
        notes: what the results are to say of themselves.

    Raises:
        ValueError: a value out of range, or a device that is not there.
    """

    suite: str = "head"
    shapes: tuple[tuple[int, int, int], ...] | None = None
    dtypes: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None
    rounds: int = 40
    threads: int = 1
    device: str = "cpu"
    compiled: bool | None = None
    autotuned: bool = True
    inputs: tuple[str, ...] = INPUTS
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, taken_by in OF_SUITES.items():
            if getattr(self, name) is not None and self.suite not in taken_by:
                raise ValueError(not_of(name, self.suite))
        for shape in self.shapes or ():
            if len(shape) != 3 or min(shape) < 1:
                raise ValueError(f"a shape is (B, D, C), each at least 1, got {shape}")
        for kind, given, taken in (
            ("suite", (self.suite,), SUITES),
            ("dtype", self.dtypes or (), tuple(DTYPES)),
            ("inputs", self.inputs, INPUTS),
            ("network", self.networks or (), tuple(NETWORKS)),
        ):
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


def not_of(option: str, suite: str, *, said: str | None = None) -> str:
    """That an option is of other suites.

    Args:
        option: a key of OF_SUITES.
        suite: what it was given with.
        said: how it was given; as `option` by default.
    """
    *others, last = OF_SUITES[option]
    of = f"the suites {', '.join(others)} and {last}" if others else f"the suite {last}"
    return f"{said or option} is for {of}, not for {suite}"


def run(
    config: BenchConfig,
    *,
    command: str,
    candidates: Callable[[Work], list[Contender]] | None = None,
    listener: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """Measure.

    Args:
        config: what.
        command: what gives these results again; recorded.
        candidates: contenders for a workload; None takes all there are.
        listener: hears what is under way.
        save: is given the results so far after every workload, so that an interrupted run leaves something.

    Returns:
        The results, fit for JSON; bench/README.md says what is in them.
    """
    device = config.torch_device()
    results: dict[str, Any] = {
        "format": FORMAT,
        "suite": config.suite,
        "command": command,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": machine.describe(device),
        "versions": machine.versions(),
        "checkout": machine.commit(),
        "threads": config.threads,
        "rounds": config.rounds,
        "rows": [],
        "refused": [],
        "notes": list(dict.fromkeys(config.notes)),
    }

    def note(line: str) -> None:
        if line not in results["notes"]:
            results["notes"].append(line)

    with _threads(config.threads):
        listener("copy bandwidth")
        results["copy_gb_s"] = machine.copy_bandwidth(device)
        for work in _works(config, device, note):
            given = _given(config, work, note) if candidates is None else candidates(work)
            _measure(work, given, config.rounds, results, listener, note)
            if config.suite == "scaling":
                results["fits"] = fits(results["rows"])
            save(results)
    return results


def rehearse(config: BenchConfig) -> None:
    """Compiles and checks what `run` would time, and times nothing: what it leaves are the compilers' caches.

    Args:
        config: what.
    """
    with _threads(config.threads):
        for work in _works(config, config.torch_device(), lambda line: None):
            _agreeing(work, _given(config, work, lambda line: None), [], lambda line: None)


def _given(config: BenchConfig, work: Work, note: Callable[[str], None]) -> list[Contender]:
    compiled = config.compiled is not False
    return suites.contenders_of(config.suite, work, compiled=compiled, autotuned=config.autotuned, note=note)


def reduced(device: str, *, rounds: int, threads: int) -> tuple[BenchConfig, ...]:
    """Every suite in so few shapes that all of them take some minutes on two CPU cores; `notes` say what is left out.

    Args:
        device: as in torch.device.
        rounds: of each.
        threads: intra-op CPU threads.
    """
    uncompiled = "reduced: nothing compiled"
    fewer: dict[str, dict[str, Any]] = {
        "head": {"shapes": (SHAPES[0], SHAPES[2], SHAPES[4]), "notes": (f"{uncompiled}, three shapes",)},
        "layers": {"networks": ("textcnn",), "notes": (f"{uncompiled}, the TextCNN alone",)},
        "rows": {"notes": (uncompiled,)},
    }
    for suite in OF_SUITES["compiled"]:
        fewer[suite]["compiled"] = False
    common: dict[str, Any] = {"device": device, "rounds": rounds, "threads": threads}
    return tuple(BenchConfig(suite=suite, **common, **fewer.get(suite, {})) for suite in SUITES)


def _works(config: BenchConfig, device: torch.device, note: Callable[[str], None]) -> Iterator[Work]:
    if config.suite == "head":
        return suites.heads(config.shapes, config.dtypes, config.inputs, device, note)
    if config.suite == "layers":
        return suites.networks(config.networks, device, note)
    if config.suite == "rows":
        return suites.rows(config.dtypes, device)
    if config.suite == "scaling":
        return suites.scaling(device, note)
    return suites.vocabulary(config.shapes, config.dtypes, device, note)


def _agreeing(
    work: Work, candidates: list[Contender], refused: list[dict[str, str]], listener: Callable[[str], None]
) -> tuple[list[Runner], dict[str, Contender]]:
    """Who agrees with the definition, bound to a workload and by name; the others are added to `refused`."""
    torch.compiler.reset()
    taken: dict[str, Contender] = {}
    runners = []
    for contender in candidates:
        listener(f"{work.label}: {contender.name}")
        try:
            runner = work.bind(contender)
            reason = work.disagreement(runner, contender.mode)
        except Exception as error:  # a contender that cannot run is refused with its reason, and the others go on
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if reason is not None:
            refused.append({"workload": work.label, "contender": contender.name, "reason": reason})
            continue
        runners.append(runner)
        taken[contender.name] = contender
    work.truths.clear()
    return runners, taken


def _measure(
    work: Work,
    candidates: list[Contender],
    rounds: int,
    results: dict[str, Any],
    listener: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """Adds the rows of one workload to the results."""
    runners, taken = _agreeing(work, candidates, results["refused"], listener)
    if not runners:
        return
    listener(f"{work.label}: timing")
    series = [timing.Series(runner.name, timing.eager_slot(runner)) for runner in runners]
    timing.round_robin(series, rounds)
    facts = {r.name: {"peak_memory_bytes": timing.peak_memory(r), **timing.issued(r)} for r in runners}
    results["rows"] += _rows(work, "eager", series, taken, facts, results["copy_gb_s"])
    if work.device.type == "cuda" and work.captured:
        for name in (name for name, one in taken.items() if not one.capturable):
            note(f"{name}: not in a CUDA graph, its step reads from the device")
        pool = torch.cuda.graph_pool_handle()
        series = list(captured([r for r in runners if taken[r.name].capturable], pool, note))
        timing.round_robin(series, rounds)
        results["rows"] += _rows(work, "graph", series, taken, facts, results["copy_gb_s"])


_failed: list[str] = []  # in this process: after a capture that failed, the allocator may not be fit for another


def captured(runners: list[Runner], pool: Any, note: Callable[[str], None]) -> Iterator[timing.Series]:
    """CUDA graphs of the runners' steps, until one of them cannot be captured.

    Args:
        runners: in their order.
        pool: as `timing.graph_slot` takes it.
        note: hears who cannot be captured, and that nobody is after it.
    """
    for runner in runners:
        where = f"{runner.name} at {runner.workload.label}"
        if _failed:
            note(f"no more CUDA graphs in this process after {_failed[0]}")
            return
        try:
            slot = timing.graph_slot(runner, pool)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            _failed.append(where)
            note(f"{where} cannot be captured in a CUDA graph: {reason}")
            continue
        yield timing.Series(runner.name, slot)


def _rows(
    work: Work,
    clock: str,
    series: list[timing.Series],
    taken: dict[str, Contender],
    facts: dict[str, dict[str, Any]],
    copy_gb_s: float,
) -> list[dict[str, Any]]:
    rows = []
    # A forward graph keeps what one of both lets go: their difference is no time of backward.
    directions = [name for name in work.directions if (clock, name) != ("graph", "backward")]
    others = {to: next((other for other in series if other.name == name), None) for to, name in RATIOS.items()}
    for one in series:
        mixups = [other for other in series if other.name in taken[one.name].base]
        base = min(mixups, key=lambda other: float(other.values("both").median()), default=None)
        row: dict[str, Any] = {
            "workload": work.name,
            "shape": work.sizes,
            "input": work.takes,
            "dtype": work.dtype,
            "contender": one.name,
            "mode": taken[one.name].mode,
            "clock": clock,
            "input_copies": work.copies,
            "ms": {name: timing.quantiles(one.values(name)) for name in directions},
            "ratio_to": None if base is None else base.name,
            "ratio": None
            if base is None
            else {name: timing.quantiles(one.values(name) / base.values(name)) for name in directions},
            **facts[one.name],
        }
        if base is not None:
            row["peak_memory_ratio"] = row["peak_memory_bytes"] / facts[base.name]["peak_memory_bytes"]
        for to, other in others.items():
            if other is not None:
                row[to] = timing.quantiles(one.values("both") / other.values("both"))
        if work.varies is not None:
            row["varies"] = work.varies
        if work.least_bytes is not None:
            gb_s = work.least_bytes / row["ms"]["both"]["q50"] / 1e6
            row |= {
                "bytes": work.least_bytes,
                "moves": work.moves,
                "gb_s": gb_s,
                "percent_of_copy": 100 * gb_s / copy_gb_s,
            }
        rows.append(row)
    return rows


def write(results: dict[str, Any], folder: Path) -> Path:
    """Writes the results to folder/<device>.json, or folder/<device>-<suite>.json, and says where."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if results["suite"] == "head" else f"-{results['suite']}"
    path = folder / f"{results['device']['tag']}{suffix}.json"
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
