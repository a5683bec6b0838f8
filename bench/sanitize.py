"""Small cases of every kernel, for compute-sanitizer, and the run of them under it.

    python bench/sanitize.py DIR                 # memcheck, racecheck and initcheck; DIR/sanitize.json
    python bench/sanitize.py DIR --device cpu    # the cases alone, in Triton's interpreter

Without the tool, or without a GPU, the cases run by themselves and the summary says so. Sizes are no multiples of any
tile, and rows are longer than fit in registers where another kernel takes them. tests/test_memory_safety.py runs
the same cases in the interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND_ERRORS = 86  # the code that the tool ends in then
LIMIT_S = 120  # of the cases and all tools, which run side by side
GRACE_S = 5  # of it, to end in
LOG_LINES = 40  # of an error report that go into the summary
DTYPES = ("float32", "bfloat16")


def small_cases(*, interpreted: bool) -> list[Any]:
    """Cases of `fastamp.conformance` that together launch every kernel, in every way that it can be launched.

    Args:
        interpreted: leave out what takes the interpreter long, heads of more than 128 rows.
    """
    from fastamp.conformance import EmbeddingCase, OperationCase, SelectionCase, StepCase

    marked = {"weighted": True, "ignored": True, "options": {"label_smoothing": 0.1, "tie_tol": 0.0}}
    relu = {"width": 19, "activation": "relu", "dropout": 0.5, **marked}
    paired = {**marked, "options": {**marked["options"], "pairing": "matching"}}
    binary = {"loss": "binary_cross_entropy"}
    cases: list[Any] = [
        StepCase("one program", batch=5, classes=3),
        StepCase("groups of rows", batch=67, classes=5, layout="strided", **marked),
        StepCase("probabilities", batch=5, classes=141, soft=True, weighted=True),
        StepCase("long rows", batch=2, classes=4099, layout="misaligned", **marked),
        StepCase("pairs", batch=5, classes=141, options={"pairing": "matching"}),
        StepCase("marked pairs, long", batch=3, classes=4099, layout="misaligned", **paired),
        StepCase("binary", batch=5, classes=141, options=binary),
        StepCase("several labels, pairs", batch=5, classes=141, soft=True, options={**binary, "pairing": "matching"}),
        StepCase("binary, few classes", batch=67, classes=5, soft=True, weighted=True, options=binary),
        StepCase("binary, long", batch=3, classes=4099, layout="misaligned", options=binary),
        StepCase("head", batch=5, classes=5, width=37, layout="strided"),
        StepCase("relu, dropout", batch=5, classes=3, **relu),
        StepCase("chunks", batch=5, classes=19, width=7, scale=0.25, chunk_rows=2, **marked),
        SelectionCase("groups of rows", shape=(37, 5), layout="strided"),
        SelectionCase("marked rows", shape=(7, 77), **marked),
        SelectionCase("long rows", shape=(2, 4099), layout="misaligned"),
        SelectionCase("binary", shape=(7, 77), options=binary),
    ]
    cases += [] if interpreted else [StepCase("two rows a program", batch=131, classes=3, **relu)]
    cases.append(StepCase("pairs, long", batch=3, classes=4099, options={"pairing": "matching"}))
    cases.append(StepCase("chunks, long", batch=3, classes=4099, width=5, scale=0.25, chunk_rows=1))
    for op in ("mix", "lambda_grad", "remix"):
        cases += [
            OperationCase(op, "words, strided", shape=(7, 5, 13), layout="strided"),
            OperationCase(op, "long rows", shape=(3, 9001), layout="misaligned"),
        ]
    cases += [
        EmbeddingCase("words, strided", shape=(7, 5, 13), layout="strided"),
        EmbeddingCase("one word", shape=(9, 11, 5), vocabulary=1),
        EmbeddingCase("wide", shape=(3, 7, 601), vocabulary=5, padding_idx=0),
    ]
    return cases


def run_cases(device: str) -> int:
    """Run ours on every case, without its definition, and give how many were run.

    Memory that is not written stays as it was allocated, so that initcheck can tell.
    """
    import torch

    from fastamp import AMPLoss, set_backend

    count = 0
    with set_backend("triton"):
        for case in small_cases(interpreted=device == "cpu"):
            for dtype in DTYPES:
                drawn = case.draw(getattr(torch, dtype), torch.Generator().manual_seed(count))
                case.ours({name: value.to(device) for name, value in drawn.items()})
                count += 1
        for options in ({}, {"pairing": "matching"}, {"alpha": 0.5}):
            AMPLoss(**options).sample(37, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    return count


def find_tool() -> str | None:
    """compute-sanitizer on PATH or in a CUDA toolkit."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(home) / "bin") for home in (*homes, "/usr/local/cuda") if home]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def summarise(tool: str, code: int | None, output: str, seconds: float) -> dict[str, Any]:
    """What one tool found.

    Args:
        tool: its name.
        code: of its end; None where it ran out of time.
        output: all that was printed.
        seconds: how long it took.
    """
    errors = re.search(r"ERROR SUMMARY: (\d+)|RACECHECK SUMMARY: (\d+)", output)
    reported = None if errors is None else int(errors[1] or errors[2])
    # As "at 0x1d0 in NAME" or "at NAME+0x1d0", by version.
    kernels = sorted(set(re.findall(r"\bat (?:0x[0-9a-f]+ in )?([A-Za-z_]\w*)", output)))
    outcome = {0: "clean", FOUND_ERRORS: "errors", None: f"ran out of its {seconds:.0f} s"}.get(
        code, f"failed, code {code}"
    )
    if outcome == "clean" and reported is None:
        outcome = "failed, no summary"
    found = {"tool": tool, "outcome": outcome, "errors": reported, "kernels": kernels, "seconds": round(seconds, 1)}
    if outcome != "clean":
        lines = [line for line in output.splitlines() if line.strip("= ")]
        found["log"] = lines[:LOG_LINES] if outcome == "errors" else lines[-LOG_LINES:]
    return found


def run_tools(path: str, seconds: float = LIMIT_S) -> Iterator[dict[str, Any]]:
    """Every tool over all cases, side by side: each of them leaves the GPU idle most of the time.

    Args:
        path: of compute-sanitizer.
        seconds: what all of them have.

    Yields:
        What one of them found, as soon as it and those before it have ended.
    """
    # An allocation for every tensor: within the caching allocator's blocks nothing is out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    left = str(max(1, round(seconds - GRACE_S)))
    cases = [sys.executable, str(Path(__file__).resolve()), "--seconds", left, "--cases", "--device", "cuda"]
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        logs = {tool: stack.enter_context(tempfile.TemporaryFile("w+")) for tool in TOOLS}
        running = {}
        for tool, log in logs.items():
            command = [path, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), *cases]
            running[tool] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        for tool, process in running.items():
            try:
                code: int | None = process.wait(max(1.0, seconds - (time.perf_counter() - start)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
            logs[tool].seek(0)
            yield summarise(tool, code, logs[tool].read(), time.perf_counter() - start)


def sanitize(out: Path, device: str, seconds: float = LIMIT_S) -> bool:
    """Run the cases, then each tool over them where it can be; write DIR/sanitize.json after each of these.

    Args:
        out: the folder for the summary.
        device: "cuda", or in a process that interprets kernels "cpu".
        seconds: for all of it; the tools have what the cases leave.

    Returns:
        Whether nothing was found; also True where the tool is missing.
    """
    start = time.perf_counter()
    import torch

    from fastamp.benchmarking import machine

    facts = {"device": machine.device_name(torch.device(device)), "checkout": machine.commit(), **machine.versions()}
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {**facts, "cases": run_cases(device), "tools": []}

    def save() -> None:
        (out / "sanitize.json").write_text(json.dumps(results, indent=1) + "\n")

    path = find_tool() if device == "cuda" else None
    if path is None:
        results["note"] = "no GPU: the cases were interpreted" if device == "cpu" else "compute-sanitizer was not found"
        print(results["note"])
        save()
    else:
        results["version"] = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        save()
        for tool in run_tools(path, seconds - (time.perf_counter() - start)):
            results["tools"].append(tool)
            save()
            kernels = ", ".join(tool["kernels"]) or "no kernel"
            print(f"{tool['tool']}: {tool['outcome']}, {tool['errors']} errors in {kernels}", flush=True)
    print(f"{results['cases']} cases ran")
    return all(tool["outcome"] == "clean" for tool in results["tools"])


def main() -> None:
    """The cases under all tools, or, as each of them calls it, the cases alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="folder for sanitize.json")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--cases", action="store_true", help="only run the cases")
    parser.add_argument("--seconds", default=LIMIT_S, type=int, help="for all of it")
    given = parser.parse_args()
    if given.cases:
        signal.alarm(given.seconds)  # a tool that is killed would leave what it runs behind
        print(run_cases(given.device))
        return
    if given.out is None:
        parser.error("DIR is missing")
    if given.device == "cpu":
        # Here, where this is the whole process, and before anything imports a kernel.
        os.environ["TRITON_INTERPRET"] = "1"
    raise SystemExit(0 if sanitize(given.out, given.device, given.seconds) else 1)


if __name__ == "__main__":
    main()
