"""FASTAMP_AUTOTUNE=1: every launch is searched for on the device it runs on, once, and remembered on disk.

Without it the launches of config.py are taken, and nothing here is done but one comparison. Candidates are the
neighbours of that launch: some of its numbers halved and doubled. A kernel that is tuned writes all of its outputs
whenever it runs, so running it often does no harm; the one that works in place is not tuned. `triton.autotune` is of no
use here: its configurations stand fixed at import, where these follow from the shape, and outputs follow from them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from .config import next_power_of_2
from .launch import is_captured

MAX_WARPS = 32
WARMUP_MS, TIMED_MS = 5, 25  # of each candidate on a GPU; elsewhere it runs INTERPRETED times
INTERPRETED = 3
SWITCH = "FASTAMP_AUTOTUNE"
Made = TypeVar("Made")
Launch = Any  # one of config.py's named tuples


def _is_on() -> bool:
    value = os.environ.get(SWITCH, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} must be 0 or 1, got {value!r}")
    return value == "1"


ENABLED = _is_on()
_chosen: dict[tuple[Path, str], Launch] = {}  # in this process, by the file of the device and what decides
_unwritable: set[Path] = set()
_lock = threading.RLock()


def tuned(
    kernel: str,
    about: Callable[[], tuple[Any, ...]],
    launch: Launch,
    free: tuple[str, ...],
    run: Callable[[Launch], Made],
) -> Made:
    """`run` with the frozen launch, or with the one that is known to be the fastest on this device.

    Args:
        kernel: its name.
        about: gives what else decides which launch is the fastest: dtypes, sizes, options, and the device last.
        launch: what config.py gives.
        free: the fields of it that may change.
        run: launches, and gives what was made.
    """
    if not ENABLED:
        return run(launch)
    *facts, device = about()
    if is_captured(device):
        return run(launch)  # a captured stream cannot be waited for
    file, key = _file(device), " ".join(map(str, (kernel, *facts)))
    with _lock:
        if (file, key) not in _chosen:
            candidates = {_text(candidate): candidate for candidate in neighbours(launch, free)}
            _chosen[file, key] = candidates[_fastest(candidates, run, device, file, key)]
        chosen = _chosen[file, key]
    return run(chosen)


def batch_class(batch: int) -> str:
    """Batches of one class share a launch: up to a power of two."""
    return f"B<={next_power_of_2(batch)}"


def neighbours(launch: Launch, free: tuple[str, ...]) -> Iterator[Launch]:
    """The launch, first, and all with some of its free numbers halved or doubled."""
    choices = []
    for name in free:
        given = getattr(launch, name)
        most = MAX_WARPS if name == "num_warps" else 2 * given
        choices.append([value for value in (given, given // 2, 2 * given) if 1 <= value <= most])
    for values in itertools.product(*choices):
        yield launch._replace(**dict(zip(free, values, strict=True)))


def folder() -> Path:
    """Where launches are remembered: $FASTAMP_CACHE, or fastamp in the user's cache."""
    own = os.environ.get("FASTAMP_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastamp"


def _file(device: torch.device) -> Path:
    """A file for every device, version of Triton and version of the kernels."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    return folder() / f"launches-{slug}-triton-{triton.__version__}-{_kernels()}.json"


@functools.cache
def _kernels() -> str:
    sources = (file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def _text(launch: Launch) -> str:
    return " ".join(f"{name}={value}" for name, value in launch._asdict().items())


def _fastest(
    candidates: dict[str, Launch], run: Callable[[Launch], Any], device: torch.device, file: Path, key: str
) -> str:
    known = _read(file).get(key)
    if known is not None and known["launch"] in candidates:
        return str(known["launch"])
    times: dict[str, float | None] = {}
    for text, candidate in candidates.items():
        try:
            times[text] = round(_milliseconds(run, candidate, device), 6)
        except (OutOfResources, PTXASError):
            times[text] = None  # more than this device has
    fits = {text: ms for text, ms in times.items() if ms is not None}
    best = min(fits, key=fits.__getitem__)
    _add(file, key, {"launch": best, "ms": times})
    return best


def _milliseconds(run: Callable[[Launch], Any], launch: Launch, device: torch.device) -> float:
    run(launch)  # compiles
    if device.type == "cuda":
        with torch.cuda.device(device):
            return float(
                triton.testing.do_bench(lambda: run(launch), warmup=WARMUP_MS, rep=TIMED_MS, return_mode="median")
            )
    seconds = []
    for _ in range(INTERPRETED):
        began = time.perf_counter()
        run(launch)
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def _read(file: Path) -> dict[str, Any]:
    """By kernel and facts the launch, and milliseconds of each candidate."""
    try:
        held = json.loads(file.read_text())
        if all("launch" in entry for entry in held.values()):
            return dict(held)
    except OSError:
        return {}  # if it cannot be written either, that is said then
    except (ValueError, AttributeError, TypeError):
        pass
    warnings.warn(f"{file} is not a file of launches; they are searched for again", stacklevel=5)
    return {}


def _add(file: Path, key: str, entry: dict[str, Any]) -> None:
    """Replaces the file as a whole, with what other processes have found since."""
    if file in _unwritable:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = {**_read(file), key: entry}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as scratch:
            json.dump(dict(sorted(held.items())), scratch, indent=1)
        os.replace(scratch.name, file)
    except OSError as error:
        # A step does not end for want of a file that only saves the next process a search.
        _unwritable.add(file)
        warnings.warn(
            f"{file} cannot be written ({error}): the launches that are found are lost with this process. "
            f"FASTAMP_CACHE names another folder",
            stacklevel=5,
        )
