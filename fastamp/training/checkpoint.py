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


def load_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError where it is none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: not a JSON object")
    return value


def save_tensors(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a checkpoint of tensors and plain values atomically."""
    write_atomically(path, lambda file: torch.save(dict(value), file))


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; ValueError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except _DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} is damaged ({reason}); delete it to start over") from None


class MetricsLog:
    """JSON lines appended to a file, from a byte offset on; what stood behind it is cut off.

    Args:
        path: the file; made if there is none.
        offset: end of the last line to keep.

    Raises:
        ValueError: the file is shorter than `offset`.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._file = open(path, "ab")  # noqa: SIM115 (open for the length of the run)
        size = self._file.seek(0, os.SEEK_END)
        if size < offset:
            self._file.close()
            raise ValueError(f"{path} holds {size} bytes, fewer than the {offset} of its checkpoint")
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
