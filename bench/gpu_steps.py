"""What gpu.sh runs in Python. Without the command line, for click may be missing there."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.benchmark import Timer
from triton.testing import do_bench_cudagraph

from fastamp import functional
from fastamp.benchmarking import DTYPES, NETWORKS, SHAPES, BenchConfig, machine, print_results, run, write
from fastamp.conformance import TOLERANCES, Report, Row, cases, check, print_report
from fastamp.training import TrainConfig, train

ROUNDS = {"head": 40, "layers": 20}
QUICK_NETWORKS = ("textcnn",)
CARRIED = Path(__file__).parents[1] / "carry" / "data"
# Hidden rows of 100 MB in bf16 to 800 MB in fp32: beyond any cache.
HIDDEN_SHAPES, QUICK_HIDDEN_SHAPES = ((512, 128, 768), (2048, 128, 768)), ((16, 128, 768),)


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
    config = BenchConfig(suite=suite, rounds=ROUNDS[suite], device=device)
    if quick:
        only = {"shapes": SHAPES[:1]} if suite == "head" else {"networks": QUICK_NETWORKS}
        config = replace(config, rounds=2, **only)
    results = run(
        config,
        command="bench/gpu.sh DIR",
        listener=lambda line: print(line, flush=True),
        save=lambda results: write(results, out),
    )
    print_results(results, console)
    write(results, out)
    return not results["refused"]


def _milliseconds(device: str, body: Callable[[], object]) -> float:
    """The device's time alone: by replays of a CUDA graph, where there is a GPU."""
    if device == "cuda":
        return do_bench_cudagraph(body, return_mode="median")
    return 1e3 * Timer("body()", globals={"body": body}).blocked_autorange(min_run_time=0.1).median


def _operations(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, tuple[int, Callable[[], object]]]:
    """What to time on hidden rows of a shape, each with how many times as many bytes it has to move."""
    hidden, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    lam, partner = torch.rand(shape[0], device=device), torch.randperm(shape[0], device=device)
    target, leaf = torch.empty_like(grad), hidden.detach().requires_grad_()
    mixed = functional.mix(hidden, lam, partner)
    expected = torch.lerp(hidden[partner].float(), hidden.float(), lam[:, None, None])
    torch.testing.assert_close(mixed.float(), expected, rtol=1e-2, atol=1e-2)
    return {
        "copy": (2, lambda: target.copy_(grad)),
        "mix": (2, lambda: functional.mix(hidden, lam, partner)),
        "mix, with backward": (4, lambda: torch.autograd.grad(functional.mix(leaf, lam, partner), leaf, grad)),
        "remix": (4, lambda: functional.remix(hidden, lam, partner, grad)),
    }


def ops(out: Path, device: str, quick: bool) -> bool:
    """How near mix and remix of large hidden rows are to a copy of as many bytes."""
    rows = []
    for shape in QUICK_HIDDEN_SHAPES if quick else HIDDEN_SHAPES:
        for name in ("fp32", "bf16"):
            copied = 0.0
            for op, (times, body) in _operations(shape, DTYPES[name], device).items():
                moved, ms = times * math.prod(shape) * DTYPES[name].itemsize, _milliseconds(device, body)
                gb_s = moved / ms / 1e6
                copied = copied or gb_s
                row = {"op": op, "shape": shape, "dtype": name, "ms": ms, "bytes": moved, "gb_s": gb_s}
                rows.append(row | {"percent_of_copy": 100 * gb_s / copied})
                print(f"{op:20} {shape} {name}: {ms:.3f} ms, {100 * gb_s / copied:.1f}% of a copy", flush=True)
    facts = {"device": machine.device_name(torch.device(device)), "checkout": machine.commit(), **machine.versions()}
    (out / "ops.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return True


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
    parser.add_argument("step", choices=["machine", "check", "warm", "ops", "head", "layers", "training"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer cases of check, rounds and networks")
    given = parser.parse_args()
    steps = {
        "machine": lambda: describe(given.device),
        "check": lambda: check_all(given.out, given.device, given.quick),
        "warm": lambda: warm(given.device, given.quick),
        "ops": lambda: ops(given.out, given.device, given.quick),
        "head": lambda: bench(given.out, given.device, "head", given.quick),
        "layers": lambda: bench(given.out, given.device, "layers", given.quick),
        "training": lambda: training(given.out, given.device, given.quick),
    }
    good = steps[given.step]()
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
