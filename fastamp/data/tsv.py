"""Reader of `label<TAB>text` files."""

from __future__ import annotations

import os
import re
from pathlib import Path

HEADER = "label\ttext"
_INTEGER = re.compile(r"-?[0-9]+")  # int() would also take " 1", "1_0" and digits of other scripts


def read_tsv(path: str | os.PathLike[str], num_classes: int) -> tuple[list[str], list[int]]:
    r"""Reads one split: UTF-8, `\n` line ends only, a header line, no quoting.

    Args:
        path: the file; its first line is `label<TAB>text`, every other line one example.
        num_classes: labels are integers from 0 to num_classes - 1.

    Returns:
        texts and labels, of equal length, in the order of the file.

    Raises:
        ValueError: the file is missing, unreadable, empty or malformed; names the file and the line.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason})") from None
    # str.splitlines would also split on the control and separator characters that some texts hold.
    lines = content.split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: the file is empty; its first line must be {HEADER!r}")
    if lines[0] != HEADER:
        raise ValueError(f"{path}:1: the header must be {HEADER!r}, got {lines[0][:80]!r}")
    if len(lines) == 1:
        raise ValueError(f"{path}: a header but no examples")
    texts, labels = [], []
    for number, example in enumerate(lines[1:], start=2):
        columns = example.split("\t")
        if len(columns) != 2:
            raise ValueError(f"{path}:{number}: {len(columns)} tab-separated columns; takes 2 (label, text)")
        label, text = columns
        if not _INTEGER.fullmatch(label):
            raise ValueError(f"{path}:{number}: label {label!r} is not an integer")
        if not 0 <= int(label) < num_classes:
            raise ValueError(f"{path}:{number}: label {label} is out of range; takes 0 to {num_classes - 1}")
        if not text.strip():
            raise ValueError(f"{path}:{number}: the text is empty")
        texts.append(text)
        labels.append(int(label))
    return texts, labels
