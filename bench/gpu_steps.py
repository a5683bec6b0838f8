"""What gpu.sh runs in Python: machine, check, warm, bench. Without the command line, for click may be missing there."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console

from fastamp.benchmarking import SHAPES, BenchConfig, draw_png, machine, print_results, run, write
from fastamp.conformance import TOLERANCES, Report, Row, cases, check, print_report


def describe(device: str) -> bool:
    """Device, versions, commit; and that the kernels can be imported."""
    import fastamp.kernels  # noqa: F401

    facts = {"device": machine.device_name(torch.device(device)), "checkout": machine.commit(), **machine.versions()}
    if device == "cuda":
        facts["properties"] = str(torch.cuda.get_device_properties(device))
    print(json.dumps(facts, indent=1))
    return True


def _workers() -> ProcessPoolExecutor:
    # A process that has used the GPU must not be forked.
    return ProcessPoolExecutor(max(1, (os.cpu_count() or 1) // 2), mp_context=multiprocessing.get_context("spawn"))


def _check_part(device: str, op: str, dtype: torch.dtype, quick: bool) -> Report:
    return check([device], ops=[op], dtypes=[dtype], quick=quick)


def check_all(out: Path, device: str, quick: bool) -> bool:
    """The whole check in many processes, since nearly all its time is Triton compiling."""
    ops = dict.fromkeys(case.op for case in cases(quick=quick))
    parts: dict[tuple[str, str], Report] = {}
    with _workers() as pool:
        jobs = {
            pool.submit(_check_part, device, op, dtype, quick): (op, str(dtype)) for op in ops for dtype in TOLERANCES
        }
        for job in as_completed(jobs):
            parts[jobs[job]] = job.result()
            print("checked", *jobs[job], flush=True)
            rows = [row for op in ops for dtype in TOLERANCES for row in _rows(parts, op, dtype)]
            report = Report(tuple(rows), parts[jobs[job]].absent)
            (out / "check.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    print_report(report, Console(width=120))
    return report.ok


def _rows(parts: dict[tuple[str, str], Report], op: str, dtype: torch.dtype) -> list[Row]:
    part = parts.get((op, str(dtype)))
    return [] if part is None else list(part.rows)


def _warm_part(device: str, shape: tuple[int, int, int]) -> None:
    run(BenchConfig(shapes=(shape,), rounds=1, device=device), command="")


def warm(device: str) -> bool:
    """Fills the compilers' caches on disk with what the benchmark needs, a process for every shape."""
    with _workers() as pool:
        jobs = {pool.submit(_warm_part, device, shape): shape for shape in SHAPES}
        for job in as_completed(jobs):
            job.result()
            print("compiled for", jobs[job], flush=True)
    return True


def bench(out: Path, device: str) -> bool:
    """The benchmark; what is done is in the JSON file also if time runs out."""
    console = Console(width=120)
    results = run(
        BenchConfig(device=device),
        command="bench/gpu.sh DIR",
        listener=lambda line: print(line, flush=True),
        save=lambda results: write(results, out),
    )
    print_results(results, console)
    try:
        draw_png(results, write(results, out).with_suffix(".png"))
    except ImportError:
        print("matplotlib is not installed: no PNG")
    return not results["refused"]


def main() -> None:
    """Runs one step; code 1 if it found something wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["machine", "check", "warm", "bench"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer cases of check")
    given = parser.parse_args()
    steps = {
        "machine": lambda: describe(given.device),
        "check": lambda: check_all(given.out, given.device, given.quick),
        "warm": lambda: warm(given.device),
        "bench": lambda: bench(given.out, given.device),
    }
    good = steps[given.step]()
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
