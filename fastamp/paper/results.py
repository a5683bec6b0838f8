"""A results folder: one specification of how its runs are made, and one JSON line a finished run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastamp.paper.plan import EXPERIMENTS, Request, Run
from fastamp.training.checkpoint import damaged, load_json, save_json

FORMAT = 3  # of settings.json

SETTINGS = "settings.json"
LINES = "results.jsonl"
RUNS = "runs"
LOCK = ".lock"

# What a line must say beside its key and status.
_FIELDS = {
    "done": (*(field.name for field in fields(Run)), "config", "result", "history", "curves", "seconds", "machine"),
    "failed": ("error",),
}
_SAME = ("steps", "eval_every", "device", "threads")
_NAMES = (*_SAME, "overrides", "data", "requests")
_ADVICE = "put it back from a copy, or give another folder"


@dataclass(frozen=True)
class Results:
    """What a results folder holds.

    Attributes:
        specification: how its runs are made, as in settings.json. `steps` and `eval_every`, None for the recipes';
            `device`, `threads`; `overrides`, other fields of TrainConfig; `data`, a digest of each data set, of the
            "vectors" and of the "pretrained" encoder; `requests`, the fields of each `Request`.
        records: the newest line of every key, in the order of the keys' first lines.
        notices: sentences for the user on what was wrong and does no harm.
    """

    specification: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    notices: tuple[str, ...] = ()


def read(folder: str | os.PathLike[str]) -> Results:
    """Reads a results folder, even while runs are added to it; changes nothing.

    A last line without its end is left out, and a notice says so. The newest line of a run that was tried again, or
    made again for its loss against λ, counts.

    Raises:
        ValueError: no results folder, one of another format, a damaged line, or a second line of a run that is done.
    """
    specification = _specification(Path(folder))
    records, torn = _lines(Path(folder) / LINES)
    notices = (f"{Path(folder) / LINES}: the last line is torn, and left out",) if torn else ()
    return Results(specification, tuple(records.values()), notices)


def _specification(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.exists():
        raise ValueError(f"{folder} is no results folder: it has no {SETTINGS}")
    found = load_json(path)
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {found.get('format')!r}, in which tables 4 and 5, the glove models or subsets of the "
            f"training data meant others; this version takes {FORMAT}: run the commands again into another folder"
        )
    missing = [name for name in _NAMES if name not in found]
    if missing:
        raise damaged(path, f"it has no {', '.join(missing)}", _ADVICE)
    try:
        asked = [Request(**request).experiment for request in found["requests"]]
        unknown = [name for name in asked if name not in EXPERIMENTS]
    except TypeError as error:
        raise damaged(path, error, _ADVICE) from None
    if unknown:
        raise ValueError(f"{path}: unknown experiment {unknown[0]!r}; takes {', '.join(EXPERIMENTS)}")
    return found


def is_complete(record: Mapping[str, Any] | None, curves: bool) -> bool:
    """Whether a run is done, with its loss against λ where that is wanted."""
    return record is not None and record["status"] == "done" and not (curves and record["curves"] is None)


def _lines(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The records by key, and the number of bytes behind the last whole line."""
    *lines, torn = (path.read_bytes() if path.exists() else b"").split(b"\n")
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        where, advice = f"{path}, line {number}", "delete the line: its run is made again, and the others are kept"
        try:
            record = json.loads(line)
            key, missing = record["key"], [name for name in _FIELDS[record["status"]] if name not in record]
            done = is_complete(records.get(key), record.get("curves") is not None)
        except (ValueError, LookupError, TypeError) as error:
            raise damaged(where, error, advice) from None
        if missing:
            raise damaged(where, f"it has no {', '.join(missing)}", advice)
        if done:
            raise ValueError(f"{where}: {key} is done in an earlier line already; delete one of the two")
        records[key] = record
    return records, len(torn)


class ResultsWriter:
    """A results folder that belongs to this process; `claim` makes one. `notices` tell the user what was mended."""

    def __init__(self, path: Path) -> None:
        self.path, self.notices = path, list[str]()
        file = path / LINES
        self.records, torn = _lines(file)
        # One write to a descriptor that appends: a kill leaves the line whole, torn at the end, or absent.
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if torn:
            os.ftruncate(self._descriptor, file.stat().st_size - torn)
            self.notices.append(f"{file}: the last line was torn, and is cut off; its run goes on")

    def run_folder(self, key: str) -> Path:
        """Where a run works until its line is written."""
        return self.path / RUNS / key

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line; it is durable when this returns.

        Raises:
            ValueError: the run is done already.
            OSError: the line could not be written whole; it is cut off when the folder is next opened.
        """
        key = record["key"]
        if is_complete(self.records.get(key), record.get("curves") is not None):
            raise ValueError(f"{key} is done already")
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        file = self.path / LINES
        try:
            written = os.write(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError as error:  # which does not know the name
            raise OSError(error.errno, error.strerror, str(file)) from None
        if written < len(line):
            raise OSError(f"{file}: only {written} of {len(line)} bytes could be written")
        self.records[key] = dict(record)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


@contextmanager
def claim(folder: str | os.PathLike[str], specification: Mapping[str, Any]) -> Iterator[ResultsWriter]:
    """Makes a results folder this process's own, or refuses one of another specification; see `Results`.

    Requests are added to those of the folder, and so are digests of data that its runs did not read. All else must be
    the same.

    Raises:
        ValueError: another process works in the folder, it has another specification, or it is damaged.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if (folder / LINES).exists() and not (folder / SETTINGS).exists():
        raise ValueError(f"{folder} holds a {LINES} without a {SETTINGS}; give an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process works in {folder}; wait for it, or give another folder") from None
    with lock:
        there = _specification(folder) if (folder / SETTINGS).exists() else {**specification, "format": FORMAT}
        united = _united(folder, specification, there)
        writer = ResultsWriter(folder)
        try:
            save_json(folder / SETTINGS, united)
            yield writer
        finally:
            writer.close()


def _united(folder: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder holds from now on."""
    mine, there = ({**{name: of[name] for name in _SAME}, **of["overrides"]} for of in (ours, theirs))
    different = [
        f"{name} {_shown(mine.get(name))} (there {_shown(there.get(name))})"
        for name in {**mine, **there}
        if mine.get(name) != there.get(name)
    ]
    data = {**theirs["data"], **ours["data"]}
    different += [f"data of {name}" for name in data if theirs["data"].get(name, data[name]) != data[name]]
    if different:
        raise ValueError(
            f"{folder} holds results of another specification; different: {', '.join(different)}. "
            "Give another folder, or the options and data that this one was begun with"
        )
    requests = [*theirs["requests"], *(request for request in ours["requests"] if request not in theirs["requests"])]
    return {**theirs, "data": data, "requests": requests}


def _shown(value: Any) -> str:
    return "the recipe's" if value is None else repr(value)
