"""FASTAMP_AUTOTUNE=1: every launch is searched for on the device it runs on, once, and remembered on disk.

Without it the launches of config.py are taken, and nothing here is done but one comparison. Candidates are the
neighbours of that launch: some of its numbers halved and doubled. A kernel that is tuned writes all of its outputs anew
whenever it runs, so running it often does no harm; the one that works in place is not tuned.
"""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from .config import next_power_of_2
from .launch import is_captured

FORMAT = 1
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
    store = _store(device)
    key = " ".join(map(str, (kernel, *facts)))
    with store.lock:
        chosen = store.chosen.get(key)
        if chosen is None:
            chosen = store.chosen[key] = _search(launch, free, run, device, store, key)
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


@dataclass
class _Store:
    """What is known of one device."""

    path: Path | None  # None once it could not be written
    chosen: dict[str, Launch]
    times: dict[str, dict[str, Any]]  # what the file holds: by kernel and facts the launch, and milliseconds of each
    head: dict[str, Any]
    lock: threading.RLock


_stores: dict[str, _Store] = {}
_stores_lock = threading.Lock()


def _store(device: torch.device) -> _Store:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    with _stores_lock:
        if name not in _stores:
            slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
            head = {"format": FORMAT, "device": name, "triton": triton.__version__, "kernels": _source()}
            path = folder() / f"launches-{slug}.json"
            _stores[name] = _Store(path, {}, _read(path, head), head, threading.RLock())
        return _stores[name]


def folder() -> Path:
    """Where launches are remembered: $FASTAMP_CACHE, or fastamp in the user's cache."""
    own = os.environ.get("FASTAMP_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastamp"


def _source() -> str:
    """Of the kernels: another version of them is tuned anew."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _read(path: Path, head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        held = json.loads(path.read_text())
        if all(held[name] == value for name, value in head.items()):
            return dict(held["launches"])
    except OSError:
        pass  # if it cannot be written either, that is said then
    except (ValueError, KeyError, TypeError):
        warnings.warn(f"{path} is not a file of launches; they are searched for anew", stacklevel=4)
    return {}


def _search(
    launch: Launch, free: tuple[str, ...], run: Callable[[Launch], Any], device: torch.device, store: _Store, key: str
) -> Launch:
    candidates = {_text(candidate): candidate for candidate in neighbours(launch, free)}
    known = store.times.get(key)
    if known is not None and known["launch"] in candidates:
        return candidates[known["launch"]]
    times: dict[str, float | None] = {}
    for text, candidate in candidates.items():
        try:
            times[text] = round(_milliseconds(run, candidate, device), 6)
        except (OutOfResources, PTXASError):
            times[text] = None  # more than this device has
    fits = {text: ms for text, ms in times.items() if ms is not None}
    best = min(fits, key=fits.__getitem__)
    store.times[key] = {"launch": best, "ms": times}
    _write(store)
    return candidates[best]


def _text(launch: Launch) -> str:
    return " ".join(f"{name}={value}" for name, value in launch._asdict().items())


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


def _write(store: _Store) -> None:
    """Replace the file as a whole, with what another process has found since it was read."""
    path = store.path
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = {**_read(path, store.head), **store.times}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({**store.head, "launches": dict(sorted(merged.items()))}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        # A step does not end for want of a file that only saves the next process a search.
        store.path = None
        warnings.warn(
            f"{path} cannot be written ({error}): the launches that are found are lost with this process. "
            f"FASTAMP_CACHE names another folder",
            stacklevel=4,
        )
