"""What gpu.sh runs in Python. Without the command line, for click may be missing there."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from fastamp.benchmarking import NETWORKS, SHAPES, SUITES, BenchConfig, machine, print_results, run, write
from fastamp.conformance import TOLERANCES, Report, Row, cases, check, print_report
from fastamp.training import TrainConfig, train

ROUNDS = {"head": 24, "layers": 20, "rows": 20, "scaling": 10, "vocabulary": 10}
STEPS = {"ops" if suite == "rows" else suite: suite for suite in SUITES}
UNCOMPILED = ("rows",)  # where the compiler's time would be most of the step's
QUICK_NETWORKS = ("textcnn",)
QUICK = {
    "head": {"shapes": SHAPES[:1]},
    "layers": {"networks": QUICK_NETWORKS},
    "vocabulary": {"shapes": ((64, 32, 2000),)},
}
CARRIED = Path(__file__).parents[1] / "carry" / "data"


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


def _warm_part(config: BenchConfig) -> None:
    run(config, command="")


def warm(device: str, quick: bool) -> bool:
    """Fills the compilers' caches on disk with what the benchmarks need, a process for every workload."""
    networks = QUICK_NETWORKS if quick else tuple(NETWORKS)
    # The large networks, which take longest, first.
    parts = [BenchConfig(suite="layers", networks=(name,), rounds=1, device=device) for name in reversed(networks)]
    parts += [BenchConfig(shapes=(shape,), rounds=1, device=device) for shape in SHAPES[: 1 if quick else None]]
    with _workers() as pool:
        jobs = {pool.submit(_warm_part, part): part.networks or part.shapes for part in parts}
        for job in as_completed(jobs):
            job.result()
            print("compiled for", *jobs[job], flush=True)
    return True


def bench(out: Path, device: str, suite: str, quick: bool) -> bool:
    """A suite of the benchmark; what is done is in the JSON file also if time runs out."""
    console = Console(width=120)
    config = BenchConfig(suite=suite, rounds=ROUNDS[suite], device=device, compiled=suite not in UNCOMPILED)
    if quick:
        config = replace(config, rounds=2, **QUICK.get(suite, {}))
    results = run(
        config,
        command="bench/gpu.sh DIR",
        listener=lambda line: print(line, flush=True),
        save=lambda results: write(results, out),
    )
    print_results(results, console)
    write(results, out)
    return not results["refused"]


def training(out: Path, device: str, quick: bool) -> bool:
    """Updates a second of the paper's TextCNN at batch 50, eagerly and captured; TREC's where carry/data has it."""
    trec = CARRIED / "trec"
    data = {"dataset": "trec", "data_dir": str(CARRIED), "lower": False} if trec.is_dir() else {"dataset": "questions"}
    steps = 20 if quick else 1000
    rows = []
    for method in ("none", "sent-mixup", "sent-amp", "word-mixup", "word-amp"):
        for capture in (False, True)[: 1 if device == "cpu" else 2]:
            config = TrainConfig(
                **data,
                method=method,
                steps=steps,
                eval_every=steps,
                checkpoint_every=steps,
                device=device,
                capture=capture,
            )
            with tempfile.TemporaryDirectory() as scratch:
                result = train(config, Path(scratch) / "run")
            row = {"dataset": config.dataset, "method": method, "capture": capture, "steps_per_s": result.steps_per_s}
            rows.append(row | {"test_error": result.test_error})
            print(json.dumps(rows[-1]), flush=True)
            facts = {"device": machine.device_name(torch.device(device)), **machine.versions()}
            (out / "training.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return True


def main() -> None:
    """Runs one step; code 1 if it found something wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["machine", "check", "warm", *STEPS, "training"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer cases of check, rounds and networks")
    given = parser.parse_args()
    steps = {
        "machine": lambda: describe(given.device),
        "check": lambda: check_all(given.out, given.device, given.quick),
        "warm": lambda: warm(given.device, given.quick),
        "training": lambda: training(given.out, given.device, given.quick),
        **{step: partial(bench, given.out, given.device, suite, given.quick) for step, suite in STEPS.items()},
    }
    good = steps[given.step]()
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
