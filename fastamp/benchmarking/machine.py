"""Where numbers come from: device, versions, commit, and how fast this machine copies memory."""

from __future__ import annotations

import platform
import re
import shutil
import statistics
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastamp

COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}


def device_name(device: torch.device) -> str:
    """The processor as it names itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def device_tag(device: torch.device) -> str:
    """A file name for results of this device."""
    name = device_name(device) if device.type == "cuda" else f"cpu {device_name(device)}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str | None]:
    """Of Python and the packages that decide the numbers; None where one is not installed."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "fastamp": fastamp.__version__,
        "cuda": torch.version.cuda,
    }


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


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, bytes read and bytes written counted, the median of ten."""
    size = COPY_BYTES[device.type]
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            target.copy_(source)
            ended.record()
            torch.cuda.synchronize()
            seconds.append(began.elapsed_time(ended) / 1e3)
        else:
            start = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds[2:]) / 1e9
