"""Where numbers come from: device, versions, commit; its clock, and how fast it copies memory."""

from __future__ import annotations

import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import fastamp

COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
# What decides the numbers besides Python and torch: the compiler, and whose networks and losses are timed.
PACKAGES = ("triton", "transformers", "liger_kernel")
CPUINFO = Path("/proc/cpuinfo")


def device_name(device: torch.device) -> str:
    """The processor as it names itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """What the system says of the first processor; empty where it has no such file."""
    try:
        first = CPUINFO.read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def describe(device: torch.device) -> dict[str, Any]:
    """The device, for results: "type", "name" and "tag", a file name; of a CPU also "family", "model" and "stepping".

    These, None where the system does not say, tell one CPU from another of the same name, as cloud hosts give
    "AMD EPYC" to several generations; a CPU's tag ends in the first two.
    """
    name, info = device_name(device), _cpuinfo()
    numbers: dict[str, Any] = {}
    if device.type != "cuda":
        keys = {"family": "cpu family", "model": "model", "stepping": "stepping"}
        numbers = {field: int(info[key]) if key in info else None for field, key in keys.items()}
    parts = [name] if device.type == "cuda" else ["cpu", name, numbers["family"], numbers["model"]]
    tag = re.sub(r"[^a-z0-9]+", "-", " ".join(str(part) for part in parts if part is not None).lower()).strip("-")
    return {"type": device.type, "name": name, "tag": tag, **numbers}


def versions() -> dict[str, str | None]:
    """Python, the driver and the packages that decide the numbers; None for what is not there."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastamp": fastamp.__version__,
        **{package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The first GPU's, as nvidia-smi says."""
    smi = shutil.which("nvidia-smi") if torch.cuda.is_available() else None
    if smi is None:
        return None
    asked = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def commit() -> dict[str, Any] | None:
    """The commit of the checkout that fastamp is imported from, and whether it has changes; None outside one."""
    root = Path(fastamp.__file__).resolve().parents[1]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None

    def run(*arguments: str) -> str | None:
        done = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head, changes = run("rev-parse", "HEAD"), run("status", "--porcelain", "--untracked-files=no")
    return None if head is None else {"commit": head, "changed": changes != ""}


def timed(device: torch.device, calls: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of each of the calls in turn, the host's time included: between CUDA events, or by perf_counter."""
    if device.type != "cuda":
        times = [time.perf_counter()]
        for call in calls:
            call()
            times.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in pairwise(times)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, bytes read and bytes written counted, the median of ten."""
    source = torch.randint(0, 255, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = timed(device, [lambda: target.copy_(source)] * 12)
    return 2 * len(source) / statistics.median(ms[2:]) / 1e6
