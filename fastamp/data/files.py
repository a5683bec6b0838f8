"""Large files, without holding them whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def blocks(path: Path) -> Iterator[bytes]:
    """A file's content, at most a MiB at a time."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block
