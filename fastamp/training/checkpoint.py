"""Files of a run that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

# What zipfile and torch.load raise on a file that is not, or no longer, a checkpoint.
_DAMAGE = (ValueError, TypeError, RuntimeError, EOFError, LookupError, zipfile.BadZipFile, pickle.UnpicklingError)

START_OVER = "delete it to start over"


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replaces `path` by what `write` puts into a file object; durable when this returns."""
    # A fixed name in the same folder: same file system, and what a kill leaves is overwritten next time.
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def damaged(path: Path | str, reason: object, advice: str) -> ValueError:
    """The error for a file of ours that cannot be read: which it is, why, and what to do."""
    text = (str(reason).splitlines() or [""])[0]
    named = f"{type(reason).__name__}: {text}" if isinstance(reason, Exception) else text
    return ValueError(f"{path} is damaged ({named}); {advice}")


def load_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError where it is none."""
    advice = "put it back from a copy, or give another folder"
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise damaged(path, error, advice) from None
    if not isinstance(value, dict):
        raise damaged(path, "not a JSON object", advice)
    return value


def load_lines(path: Path, advice: str) -> list[dict[str, Any]]:
    """Reads JSON lines; ValueError, with the line and what to do then, where one is damaged."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise damaged(f"{path}, line {number}", error, advice) from None
    return found


def save_tensors(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a checkpoint of tensors and plain values atomically."""
    write_atomically(path, lambda file: torch.save(dict(value), file))


def load_tensors(path: Path, advice: str = START_OVER) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; ValueError, with what to do then, where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()  # torch.load does not look at the checksums
        if wrong is not None:
            raise ValueError(f"wrong checksum of {wrong}")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except _DAMAGE as error:
        raise damaged(f"checkpoint {path}", error, advice) from None


class MetricsLog:
    """JSON lines appended to a file, which is made if there is none, from the end of the last line to keep on.

    Raises:
        ValueError: the file is shorter than `offset`, in bytes.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._file = open(path, "ab")  # noqa: SIM115 (open for the length of the run)
        size = self._file.seek(0, os.SEEK_END)
        if size < offset:
            self._file.close()
            reason = f"{size} bytes, fewer than the {offset} of its checkpoint"
            raise damaged(path, reason, f"delete {path.with_name('last.pt')} to start over")
        self._file.truncate(offset)
        self._file.seek(offset)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line, at once visible to readers."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Makes all lines durable; returns the offset of the end."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
