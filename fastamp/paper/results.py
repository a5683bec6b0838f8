"""A results folder: what its runs share, and one JSON line a finished run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastamp.paper.plan import Run
from fastamp.training.checkpoint import damaged, load_json, save_json
from fastamp.training.config import unused_fields

FORMAT = 1  # of settings.json and of every line

SETTINGS = "settings.json"
LINES = "results.jsonl"
RUNS = "runs"
LOCK = ".lock"

_DATA = "data of "

# What a line must say beside its format, key and status.
_FIELDS = {
    "done": (*(field.name for field in fields(Run)), "config", "result", "history", "curves", "seconds", "machine"),
    "failed": ("error",),
}
_NAMES = ("steps", "eval_every", "threads", "overrides", "data", "vectors", "pretrained", "commands")


@dataclass(frozen=True)
class Results:
    """What a results folder holds.

    Attributes:
        settings: what all runs share, as in settings.json.
        records: the newest line of every key, in the order of the keys' first lines.
        notices: sentences for the user on what was wrong and does no harm.
    """

    settings: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    notices: tuple[str, ...] = ()


def read(folder: str | os.PathLike[str]) -> Results:
    """Reads a results folder, one that a runner works in among them; changes nothing.

    A last line without its end, one that is being written or whose writer was killed, is left out, and a notice
    says so. A run that failed and was tried again has several lines, and the newest counts.

    Raises:
        ValueError: no results folder, one of another format, a damaged line, or a second line of a run that is done.
    """
    folder = Path(folder)
    settings = _settings(folder)
    records, notices, _ = _lines(folder / LINES)
    return Results(settings, tuple(records.values()), notices)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.exists():
        raise ValueError(f"{folder} is no results folder: it has no {SETTINGS}")
    settings = load_json(path)
    if settings.get("format") != FORMAT:
        raise ValueError(f"{path} has format {settings.get('format')!r}; takes {FORMAT}")
    missing = [name for name in _NAMES if name not in settings]
    if missing:
        raise damaged(path, f"it has no {', '.join(missing)}", "put it back from a copy, or give another folder")
    return settings


def _lines(path: Path) -> tuple[dict[str, dict[str, Any]], tuple[str, ...], int]:
    """The records by key, the notices, and the offset of the end of the last whole line."""
    content = path.read_bytes() if path.exists() else b""
    *lines, torn = content.split(b"\n")
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        where, advice = f"{path}, line {number}", "delete the line: its run is made again, and the others are kept"
        try:
            record = json.loads(line)
            key, status = record["key"], record["status"]
        except (ValueError, LookupError, TypeError) as error:
            raise damaged(where, error, advice) from None
        if record.get("format") != FORMAT:
            raise ValueError(f"{where} has format {record.get('format')!r}, takes {FORMAT}: give another folder")
        if not isinstance(key, str):
            raise damaged(where, f"key {key!r}", advice)
        if status not in tuple(_FIELDS):
            raise damaged(where, f"status {status!r}", advice)
        missing = [name for name in _FIELDS[status] if name not in record]
        if missing:
            raise damaged(where, f"it has no {', '.join(missing)}", advice)
        if records.get(key, {}).get("status") == "done":
            raise ValueError(f"{where}: {key} is done in an earlier line already; delete one of the two")
        records[key] = record
    notices = (f"{path}: the last line is torn, and left out",) if torn else ()
    return records, notices, len(content) - len(torn)


class ResultsWriter:
    """A results folder that is this process's own; `claim` makes one.

    Attributes:
        path: the folder.
        settings: what all its runs share.
        records: the newest line of every key.
        notices: sentences for the user on what was mended.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        file = path / LINES
        self.records, self.notices, end = _lines(file)
        # One write to a descriptor that appends: a kill leaves the line whole, torn at the end, or absent.
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if self.notices:
            os.ftruncate(self._descriptor, end)
            self.notices = (f"{file}: the last line was torn, and is cut off; its run goes on",)

    def run_folder(self, key: str) -> Path:
        """Where a run works until its line is written."""
        return self.path / RUNS / key

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line, `record` and its format; it is durable when this returns.

        Raises:
            ValueError: the run is done already.
            OSError: the line could not be written whole; it is cut off when the folder is next opened.
        """
        key = record["key"]
        if self.records.get(key, {}).get("status") == "done":
            raise ValueError(f"{key} is done already")
        record = {"format": FORMAT, **record}
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        file = self.path / LINES
        try:
            written = os.write(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError as error:  # which does not know the name
            raise OSError(error.errno, error.strerror, str(file)) from None
        if written < len(line):
            raise OSError(f"{file}: only {written} of {len(line)} bytes could be written")
        self.records[key] = record

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


@contextmanager
def claim(folder: str | os.PathLike[str], settings: Mapping[str, Any], command: str) -> Iterator[ResultsWriter]:
    """Makes a results folder this process's own, or refuses one of another configuration.

    Settings: `steps` and `eval_every`, None for the recipes'; `overrides`, a mapping of fields of TrainConfig;
    `threads`; `data`, a digest by data set; `vectors` and `pretrained`, None where no run uses them. Data sets,
    vectors and an encoder may be added later. What both have must be the same where a run that is done used it; else
    it is replaced, a notice says so, and runs under way start over.

    Args:
        folder: made if there is none.
        settings: what all runs share.
        command: how the runs were asked for; the folder lists all such.

    Raises:
        ValueError: another process works in the folder, it has another configuration, or it is damaged.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if folder.is_dir() and not (folder / SETTINGS).exists() and (folder / LINES).exists():
        raise ValueError(f"{folder} holds a {LINES} without a {SETTINGS}; give an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process works in {folder}; wait for it, or give another folder") from None
    try:
        there = _settings(folder) if (folder / SETTINGS).exists() else None
        records, _, _ = _lines(folder / LINES)
        united, replaced = _united(folder, settings, there, command, records)
        if replaced:
            shutil.rmtree(folder / RUNS, ignore_errors=True)
        save_json(folder / SETTINGS, united)
        writer = ResultsWriter(folder, united)
        if replaced:
            writer.notices += (f"{folder}: replaced, as no run that is done used them: {', '.join(replaced)}",)
        try:
            yield writer
        finally:
            writer.close()
    finally:
        lock.release()


def _united(
    folder: Path,
    settings: Mapping[str, Any],
    there: Mapping[str, Any] | None,
    command: str,
    records: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], list[str]]:
    """The settings that hold for what is there and for what comes, and what of those there was replaced."""
    if there is None:
        return {"format": FORMAT, **settings, "commands": [command]}, []
    done = [record for record in records.values() if record["status"] == "done"]
    ours, theirs = _fixed(settings), _fixed(there)
    changed = {
        name: f"{name} {_shown(ours.get(name))} (there {_shown(theirs.get(name))})"
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    }
    ours, theirs = _growing(settings), _growing(there)
    changed |= {name: name for name in ours if theirs.get(name, ours[name]) != ours[name]}
    differences = [text for name, text in changed.items() if any(_uses(run, name) for run in done)]
    if differences:
        raise ValueError(f"{folder} holds results of another configuration; different: {', '.join(differences)}")
    # Where nothing is done, the commands of another configuration are no part of what the folder will hold.
    commands = there["commands"] if done or not changed else []
    united = {
        **there,
        **settings,
        "data": {**there["data"], **settings["data"]},
        "vectors": settings["vectors"] or there["vectors"],
        "pretrained": settings["pretrained"] or there["pretrained"],
        "commands": commands if command in commands else [*commands, command],
    }
    return united, list(changed.values())


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same, by name."""
    return {**{name: settings[name] for name in ("steps", "eval_every", "threads")}, **settings["overrides"]}


def _growing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same where both have it, by name."""
    used = {name: settings[name] for name in ("vectors", "pretrained") if settings[name] is not None}
    return {**{_DATA + name: digest for name, digest in settings["data"].items()}, **used}


def _uses(run: Mapping[str, Any], name: str) -> bool:
    """Whether a run that is done depends on what `_fixed` or `_growing` names so."""
    config = run["config"]
    if name.startswith(_DATA):
        return name == _DATA + config["dataset"]
    if name in ("vectors", "pretrained"):
        return config[name] is not None
    return name not in unused_fields(config["model"], config["method"])


def _shown(value: Any) -> str:
    return "the recipe's" if value is None else repr(value)
