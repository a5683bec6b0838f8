"""What gpu.sh runs in Python. Without the command line, for click may be missing there."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from codegen.budget import over_predicted
from rich.console import Console

from fastamp.benchmarking import NETWORKS, SHAPES, SUITES, BenchConfig, machine, print_results, rehearse, run, write
from fastamp.conformance import Case, Report, Row, StepCase, cases, places, print_report
from fastamp.conformance.contract import check_op
from fastamp.training import TrainConfig, train

ROUNDS = {"head": 24, "layers": 12, "rows": 16, "scaling": 10, "vocabulary": 10}
STEPS = {"ops" if suite == "rows" else suite: suite for suite in SUITES}
LARGE = SHAPES[5:]  # a step of which takes gigabytes: so many processes at once have room on one GPU
LARGE_WORKERS = 4
# A case of the check runs in one of each.
WIDE, NARROW = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
CASES_A_PART = 4  # about ten kernels
AUTOTUNED = SHAPES[2:5:2]
TUNED_LOGITS = (
    (4096, 32000, "bfloat16", "matching"),
    (4096, 32000, "bfloat16", "permutation"),
    (4096, 1000, "bfloat16", "permutation"),
    (4096, 4096, "bfloat16", "matching"),
    (50, 6, "float32", "permutation"),
)
TUNED_HIDDEN = ((256, 128, 768),)
TUNED_HEADS = ((50, 300, 6), (24, 768, 2))
QUICK_NETWORKS = ("textcnn",)
QUICK = {
    "head": {"shapes": SHAPES[:1], "dtypes": ("fp32",), "compiled": False},
    "rows": {"dtypes": ("fp32",)},
    "layers": {"networks": QUICK_NETWORKS},
    "vocabulary": {"shapes": ((64, 32, 2000),)},
}
# Products are searched for only where nothing else has the GPU: in the step "autotune".
OPTIONS = {
    "head": {"autotuned": False},
    "rows": {"compiled": False},  # the compiler's time would be most of the step's
}
CARRIED = Path(__file__).parents[1] / "carry" / "data"
RECORD = Path(__file__).parent / "results" / "codegen.json"


def describe(device: str) -> bool:
    """Device, versions, commit; and that the kernels can be imported."""
    import fastamp.kernels  # noqa: F401

    facts = {"device": machine.device_name(torch.device(device)), "checkout": machine.commit(), **machine.versions()}
    if device == "cuda":
        facts["properties"] = str(torch.cuda.get_device_properties(device))
    print(json.dumps(facts, indent=1))
    return True


def _workers(most: int | None = None) -> ProcessPoolExecutor:
    # A process that has used the GPU must not be forked. A quarter of the cores is left to what runs beside.
    count = max(1, 3 * (os.cpu_count() or 1) // 4)
    return ProcessPoolExecutor(min(count, most or count), mp_context=multiprocessing.get_context("spawn"))


class Part(NamedTuple):
    """What one process checks at a time."""

    op: str
    dtype: torch.dtype
    cases: list[Case]

    @property
    def cost(self) -> int:
        """A guess at what its kernels take to compile, for which the check's time goes."""
        of_cases = sum((3 if isinstance(case, StepCase) else 1) * (1 + ("bce" in case.name)) for case in self.cases)
        return of_cases * (1 + (self.dtype == torch.float64))


def check_parts(quick: bool) -> list[Part]:
    """All cases of the check in small parts, the largest first, so that no process is left with one at the end.

    Dtypes take turns: in two of the four a case takes half as many kernels, and every kernel meets all of them.
    """
    runs: dict[tuple[str, torch.dtype], list[Case]] = {}
    numbers: defaultdict[str, int] = defaultdict(int)
    for case in cases(quick=quick):
        number = numbers[case.op]
        numbers[case.op] += 1
        for dtype in (WIDE[number % 2], NARROW[(number + number // 2) % 2]):
            runs.setdefault((case.op, dtype), []).append(case)
    parts = [
        Part(op, dtype, its[first : first + CASES_A_PART])
        for (op, dtype), its in runs.items()
        for first in range(0, len(its), CASES_A_PART)
    ]
    return sorted(parts, key=lambda part: part.cost, reverse=True)


def _check_part(device: str, part: Part) -> list[Row]:
    found, _ = places([device])
    return [check_op(part.op, part.cases, place, part.dtype) for place in found]


def check_all(out: Path, device: str, quick: bool) -> bool:
    """The check in many processes, since nearly all its time is Triton compiling."""
    parts = check_parts(quick)
    _, absent = places([device])
    rows: list[Row] = []
    with _workers() as pool:
        jobs = {pool.submit(_check_part, device, part): part for part in parts}
        for job in as_completed(jobs):
            rows += job.result()
            print("checked", jobs[job].op, jobs[job].dtype, *(case.name for case in jobs[job].cases), flush=True)
            report = Report(tuple(united(rows)), tuple(absent))
            (out / "check.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    print_report(report, Console(width=120))
    return report.ok


def united(rows: list[Row]) -> list[Row]:
    """The rows of all parts, those of one operation, place and dtype as one."""
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.op, row.device, row.backend, row.dtype)):
        together.setdefault((row.op, row.device, row.backend, row.dtype), []).append(row)
    return [
        Row(
            *key,
            sum(row.cases for row in of_key),
            max(row.worst for row in of_key),
            max(row.worst_pytorch for row in of_key),
            tuple(line for row in of_key for line in row.failures),
        )
        for key, of_key in together.items()
    ]


def warm(device: str, quick: bool, *, large: bool = False) -> bool:
    """Fills the compilers' caches on disk with what the benchmarks need, a process for every part; times nothing.

    Args:
        device: as in torch.device.
        quick: only one network and one shape.
        large: those shapes that take gigabytes, a few at a time; else all others, and the networks that are compiled.
    """
    common = {"device": device, "autotuned": False}
    if large:
        parts = [
            BenchConfig(shapes=(shape,), dtypes=(dtype,), inputs=(takes,), **common)
            for shape in LARGE
            for dtype in ("fp32", "bf16")
            for takes in BenchConfig.inputs
        ]
    else:
        networks = QUICK_NETWORKS if quick else [name for name, spec in NETWORKS.items() if not spec.large]
        # BERT, which takes longest, first.
        parts = [BenchConfig(suite="layers", networks=(name,), **common) for name in reversed(networks)]
        parts += [BenchConfig(shapes=(shape,), **common) for shape in SHAPES[: 1 if quick else -len(LARGE)]]
    with _workers(LARGE_WORKERS if large else None) as pool:
        jobs = {pool.submit(rehearse, part): part for part in parts}
        for job in as_completed(jobs):
            job.result()
            part = jobs[job]
            print("compiled for", part.networks or (*part.shapes, *(part.dtypes or ()), *part.inputs), flush=True)
    return True


def bench(out: Path, device: str, suite: str, quick: bool) -> bool:
    """A suite of the benchmark; what is done is in the JSON file also if time runs out."""
    config = BenchConfig(suite=suite, rounds=ROUNDS[suite], device=device, **OPTIONS.get(suite, {}))
    if quick:
        config = replace(config, rounds=2, **QUICK.get(suite, {}))
    return _measure(config, out)


def autotune(out: Path, device: str) -> bool:
    """The head in two shapes once more, with what torch.compile searches the fastest products for; to DIR/autotuned."""
    config = BenchConfig(shapes=AUTOTUNED, dtypes=("bf16",), inputs=("hidden",), rounds=ROUNDS["head"], device=device)
    return _measure(config, out / "autotuned")


def _measure(config: BenchConfig, out: Path) -> bool:
    results = run(
        config,
        command="bench/gpu.sh DIR",
        on_progress=lambda line: print(line, flush=True),
        on_results=lambda results: write(results, out),
    )
    print_results(results, Console(width=120))
    write(results, out)
    return not results["refused"]


def launches(out: Path, device: str, quick: bool) -> bool:
    """Every launch of some operations searched for among its neighbours: all times are in DIR/launches-*.json.

    To be run with FASTAMP_AUTOTUNE=1 and FASTAMP_CACHE=DIR, on a CPU with TRITON_INTERPRET=1.
    """
    import fastamp
    from fastamp import functional
    from fastamp.kernels import tuning

    if not tuning.ENABLED or tuning.folder() != out:
        raise SystemExit(f"{tuning.SWITCH} must be 1 and FASTAMP_CACHE {out}")
    with fastamp.set_backend("triton"), torch.device(device):
        for batch, classes, dtype, pairing in ((5, 6, "float32", "permutation"),) if quick else TUNED_LOGITS:
            logits = torch.randn(batch, classes, dtype=getattr(torch, dtype), requires_grad=True)
            loss = fastamp.AMPLoss(pairing=pairing)(logits, torch.randint(classes, (batch,)))
            loss.backward()
            print("searched for", batch, classes, dtype, pairing, flush=True)
        for shape in ((5, 3, 8),) if quick else TUNED_HIDDEN:
            hidden, grad = torch.randn(2, *shape, dtype=torch.bfloat16)
            mix = fastamp.AMPLoss().sample(shape[0], device=device)
            functional.mix(hidden.requires_grad_(), *mix).backward(grad)
            functional.lambda_grad(grad, hidden.detach(), mix.partner)
            functional.remix(hidden.detach(), *mix, grad)
            print("searched for", *shape, flush=True)
        for batch, depth, classes in ((5, 8, 3),) if quick else TUNED_HEADS:
            leaves = [torch.randn(size, requires_grad=True) for size in ((batch, depth), (classes, depth), (classes,))]
            mix = fastamp.AMPLoss().sample(batch, device=device)
            functional.linear_amp_cross_entropy(*leaves, torch.randint(classes, (batch,)), *mix).backward()
            print("searched for", batch, depth, classes, flush=True)
    return True


def predicted(out: Path) -> bool:
    """For the launches that the step `launches` has timed: measured over predicted for an H200, from compiled code."""
    rows = [row for row in json.loads(RECORD.read_text())["rows"] if row["target"] == "sm_90"]
    for file in sorted(out.glob("launches-*.json")):
        print(*over_predicted(json.loads(file.read_text()), rows), sep="\n", flush=True)
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
    parser.add_argument(
        "step",
        choices=["machine", "check", "warm", "warm-large", *STEPS, "training", "launches", "predicted", "autotune"],
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer cases of check, rounds and networks")
    given = parser.parse_args()
    steps = {
        "machine": lambda: describe(given.device),
        "check": lambda: check_all(given.out, given.device, given.quick),
        "warm": lambda: warm(given.device, given.quick),
        "warm-large": lambda: warm(given.device, given.quick, large=True),
        "training": lambda: training(given.out, given.device, given.quick),
        "launches": lambda: launches(given.out, given.device, given.quick),
        "predicted": lambda: predicted(given.out),
        "autotune": lambda: autotune(given.out, given.device),
        **{step: partial(bench, given.out, given.device, suite, given.quick) for step, suite in STEPS.items()},
    }
    good = steps[given.step]()
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
