"""A whole benchmark: who may be timed, and the results as one dictionary."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch

from fastamp.benchmarking import machine, timing
from fastamp.benchmarking.suites import SUITES, BenchConfig
from fastamp.benchmarking.workload import Contender, Note, Runner, Work

FORMAT = 2  # of the results
FEWEST = 3  # sizes that say something of a power law
Row = dict[str, Any]


def _ignore(*_: object) -> None:
    pass


def run(
    config: BenchConfig,
    *,
    command: str,
    on_progress: Callable[[str], None] = _ignore,
    on_results: Callable[[dict[str, Any]], object] = _ignore,
) -> dict[str, Any]:
    """Measure.

    Args:
        config: what.
        command: what gives these results again; recorded.
        on_progress: called with a line on what is under way.
        on_results: called with the results so far after every workload, so that an interrupted run leaves something.

    Returns:
        The results, fit for JSON; bench/README.md says what is in them.
    """
    device = config.torch_device()
    notes = dict.fromkeys(config.notes)  # in order, each once
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
        "notes": [],
    }

    def note(line: str) -> None:
        notes.setdefault(line)

    with _threads(config.threads):
        on_progress("copy bandwidth")
        results["copy_gb_s"] = machine.copy_bandwidth(device)
        for work, given in SUITES[config.suite].works(config, device, note):
            runners = _agreeing(work, given, results["refused"], on_progress)
            if runners:
                on_progress(f"{work.label}: timing")
                results["rows"] += _timed(work, runners, config.rounds, results["copy_gb_s"], note)
            if config.suite == "scaling":
                results["fits"] = fits(results["rows"])
            results["notes"] = list(notes)
            on_results(results)
    results["notes"] = list(notes)
    return results


def rehearse(config: BenchConfig) -> None:
    """Compiles and checks what `run` would time, and times nothing: what it leaves are the compilers' caches."""
    with _threads(config.threads):
        for work, given in SUITES[config.suite].works(config, config.torch_device(), _ignore):
            _agreeing(work, given, [], _ignore)


def _agreeing(
    work: Work, candidates: list[Contender], refused: list[dict[str, str]], on_progress: Callable[[str], None]
) -> list[Runner]:
    """Who agrees with the definition, bound to a workload; the others are added to `refused`."""
    torch.compiler.reset()
    runners = []
    for contender in candidates:
        on_progress(f"{work.label}: {contender.name}")
        try:
            runner = work.bind(contender)
            reason = runner.disagreement()
        except Exception as error:  # a contender that cannot run is refused with its reason, and the others go on
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if reason is None:
            runners.append(runner)
        else:
            refused.append({"workload": work.label, "contender": contender.name, "reason": reason})
    work.forget()
    return runners


def _timed(work: Work, runners: list[Runner], rounds: int, copy_gb_s: float, note: Note) -> list[Row]:
    """The rows of one workload."""
    series = {"eager": [timing.Series(runner, timing.eager_slot(runner)) for runner in runners]}
    timing.round_robin(series["eager"], rounds)
    facts = {runner.contender.name: timing.facts(runner) for runner in runners}
    if work.device.type == "cuda" and work.captured:
        series["graph"] = list(timing.captured(runners, torch.cuda.graph_pool_handle(), note))
        timing.round_robin(series["graph"], rounds)
    return [row for clock, those in series.items() for row in _rows(work, clock, those, facts, copy_gb_s)]


def _rows(
    work: Work, clock: str, series: list[timing.Series], facts: dict[str, dict[str, Any]], copy_gb_s: float
) -> Iterator[Row]:
    """The rows of one workload and clock, given filled series, and `timing.facts` of each contender by name."""
    by_name = {one.runner.contender.name: one for one in series}
    for name, one in by_name.items():
        contender = one.runner.contender
        directions = [direction for direction in work.directions if direction in one.samples[0]]
        mixups = [by_name[other] for other in contender.base if other in by_name]
        base = min(mixups, key=lambda other: float(other.values("both").median()), default=None)
        row: Row = {
            "workload": work.name,
            "shape": work.sizes,
            "input": work.takes,
            "dtype": work.dtype,
            "contender": name,
            "mode": contender.mode,
            "clock": clock,
            "input_copies": len(work.inputs),
            "ms": {direction: timing.quantiles(one.values(direction)) for direction in directions},
            "ratio_to": None,
            "ratio": None,
            **facts[name],
        }
        if base is not None:
            row["ratio_to"] = to = base.runner.contender.name
            row["ratio"] = {way: timing.quantiles(one.values(way) / base.values(way)) for way in directions}
            row["peak_memory_ratio"] = row["peak_memory_bytes"] / facts[to]["peak_memory_bytes"]
        if work.varies is not None:
            row["varies"] = work.varies
        if work.least_bytes is not None:
            gb_s = work.least_bytes / row["ms"]["both"]["q50"] / 1e6
            row |= {"bytes": work.least_bytes, "moves": work.moves}
            row |= {"gb_s": gb_s, "percent_of_copy": 100 * gb_s / copy_gb_s}
        yield row


def fits(rows: list[Row]) -> list[dict[str, Any]]:
    """The growth in every size that varies, of every contender and clock: the exponent of a power law.

    A least-squares line through log median time against log size, over the upper half of the sizes, at least three:
    below, the time is that of the calls themselves.

    Args:
        rows: of results; those whose "varies" names a size.

    Returns:
        Of each: "clock", what "varies", "input", "dtype", "contender", the sizes fitted "from" and "to", "exponent"
        (None for fewer than three sizes), and "ms", the median by size.
    """
    kinds = ("clock", "varies", "input", "dtype", "contender")

    def kind(row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in kinds)

    found = []
    for key, group in groupby(sorted((row for row in rows if "varies" in row), key=kind), kind):
        medians = sorted((row["shape"][key[1]], row["ms"]["both"]["q50"]) for row in group)
        fitted = medians[-max(FEWEST, math.ceil(len(medians) / 2)) :]
        exponent = None
        if len(fitted) >= FEWEST:
            exponent = linear_regression(*([math.log(v) for v in side] for side in zip(*fitted, strict=True))).slope
        fit = {**dict(zip(kinds, key, strict=True)), "from": fitted[0][0], "to": fitted[-1][0], "exponent": exponent}
        found.append({**fit, "ms": {str(size): ms for size, ms in medians}})
    return found


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
