"""Files of data: tab-separated tables, and digests of large files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_INTEGER = re.compile(r"-?[0-9]+")  # int() would also take " 1", "1_0" and digits of other scripts


def read_table(path: str | os.PathLike[str], columns: Sequence[str], parse: Callable[..., T]) -> list[T]:
    r"""Reads a tab-separated file: UTF-8, `\n` line ends only, a header line, no quoting.

    Args:
        path: the file.
        columns: the names in its header.
        parse: what makes a row of a line's fields; its ValueError says what is wrong with them.

    Returns:
        the rows, at least one.

    Raises:
        ValueError: the file is missing, unreadable, empty or malformed; names the file and the line.
    """
    path, header = Path(path), "\t".join(columns)
    try:
        raw = path.read_bytes()
        content = raw.decode("utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason})") from None
    # str.splitlines would also split on the control and separator characters that some texts hold.
    first, *lines = content.removesuffix("\n").split("\n")
    if first != header:
        absent = [name for name in columns if name not in first.split("\t")]
        raise ValueError(
            f"{path}:1: the header must be {header!r}, got {first[:80]!r}"
            + (f"; there is no column {', '.join(absent)}" if absent else "")
        )
    if not lines:
        raise ValueError(f"{path}: a header but no lines below it")
    rows = []
    for number, text in enumerate(lines, start=2):
        fields = text.split("\t")
        try:
            if len(fields) != len(columns):
                raise ValueError(f"{len(fields)} tab-separated columns; takes {len(columns)} ({', '.join(columns)})")
            rows.append(parse(*fields))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return rows


def read_tsv(path: str | os.PathLike[str], num_classes: int) -> tuple[list[str], list[int]]:
    """Reads texts and their labels, 0 to num_classes - 1, from a file with the header `label<TAB>text`.

    Raises:
        ValueError: as of `read_table`.
    """

    def example(label: str, text: str) -> tuple[str, int]:
        if not _INTEGER.fullmatch(label):
            raise ValueError(f"label {label!r} is not an integer")
        if not 0 <= int(label) < num_classes:
            raise ValueError(f"label {label} is out of range; takes 0 to {num_classes - 1}")
        if not text.strip():
            raise ValueError("the text is empty")
        return text, int(label)

    texts, labels = zip(*read_table(path, ("label", "text"), example), strict=True)
    return list(texts), list(labels)


def update_digest(digest: Any, path: Path) -> None:
    """Adds a file's content to a digest of hashlib, without holding it whole."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    update_digest(digest, Path(path))
    return digest.hexdigest()
