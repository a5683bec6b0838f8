"""Pre-trained word vectors in GloVe's text format."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from fastamp.data.vocabulary import PAD, Vocabulary

_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class WordVectors:
    """Vectors of the words that were asked for."""

    rows: dict[str, int]  # word to row of `table`
    table: Tensor  # (words, dim), float32
    digest: str  # SHA-256 of the lines taken, to tell one file's vectors from another's

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self.table.shape[1]

    def find(self, word: str) -> int | None:
        """The row of a word, or of its lower-cased form (GloVe 6B has no other), or None."""
        row = self.rows.get(word)
        return self.rows.get(word.lower()) if row is None else row


@dataclass(frozen=True)
class Coverage:
    """Share of a corpus that has a pre-trained vector, in percent of its distinct words and of its tokens."""

    types: float
    tokens: float


def read_vectors(path: str | os.PathLike[str], words: Collection[str]) -> WordVectors:
    """Reads the vectors of `words` from a GloVe text file, `word v1 v2 ...` a line, plain or gzip-compressed.

    The first line sets the width. Every line must have as many values; only those of words asked for are
    parsed. A word may hold spaces, as a few in GloVe 840B do. The first of a word's several lines counts.

    A large file takes long to read, so the last two results are kept for the life of the process, and given again for
    the same words while the file's size and time of change stay the same.

    Args:
        path: the file.
        words: the words to keep; a word in upper case is also looked up in lower case.

    Returns:
        the vectors found, float32; other callers may hold the same object, so copy what you want to change.

    Raises:
        ValueError: the file is missing, unreadable, empty or malformed; names the file and the line.
    """
    path = Path(path)
    try:
        state = path.stat()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    identity = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    return _read(path, identity, frozenset(words))


@lru_cache(maxsize=2)
def _read(path: Path, identity: tuple[int, ...], words: frozenset[str]) -> WordVectors:
    # `identity` only tells another or a changed file at `path` from the one whose vectors are kept.
    wanted = {word.encode() for word in words} | {word.lower().encode() for word in words}
    rows: dict[str, int] = {}
    values: list[list[float]] = []
    digest = hashlib.sha256()
    dim = 0
    for number, line in enumerate(_lines(path), start=1):
        line = line.rstrip(b"\r\n ")
        dim = dim or _width(path, line)
        if line.count(b" ") == dim and line[: line.find(b" ")] not in wanted:
            continue
        word, *fields = line.rsplit(b" ", dim)
        # A number in the word's place is an overlong vector, not a word with spaces.
        if len(fields) != dim or any(map(_is_number, word.split(b" ")[1:])):
            found = line.count(b" ")
            raise ValueError(f"{path}:{number}: {found} values where the first line has {dim}: {_shown(line)}")
        if word not in wanted:
            continue
        try:
            text, vector = word.decode("utf-8"), list(map(float, fields))
        except ValueError:
            raise ValueError(f"{path}:{number}: not a word and {dim} numbers: {_shown(line)}") from None
        if not all(map(math.isfinite, vector)):
            raise ValueError(f"{path}:{number}: a value is not finite: {_shown(line)}")
        if text not in rows:
            rows[text] = len(values)
            values.append(vector)
            digest.update(line + b"\n")
    if not dim:
        raise ValueError(f"{path}: the file is empty")
    table = torch.tensor(values, dtype=torch.float32, device="cpu").reshape(len(values), dim)
    return WordVectors(rows, table, digest.hexdigest())


def embedding_table(vocabulary: Vocabulary, vectors: WordVectors) -> Tensor:
    """A table (V, D), float32, for V ids: zero for padding, vectors where there are, else U(-0.25, 0.25) as Kim does.

    It is on the CPU; what is drawn is drawn by the global generator.
    """
    size = len(vocabulary)
    table = torch.rand(size, vectors.dim, dtype=torch.float32, device="cpu") * 0.5 - 0.25
    table[PAD] = 0
    found = [(size - len(vocabulary.words) + i, vectors.find(w)) for i, w in enumerate(vocabulary.words)]
    pairs = [(number, row) for number, row in found if row is not None]
    if pairs:
        numbers, sources = torch.tensor(pairs, device="cpu").unbind(1)
        table[numbers] = vectors.table[sources]
    return table


def coverage(sentences: Iterable[Sequence[str]], vectors: WordVectors) -> Coverage:
    """Share of the words of tokenised sentences that `vectors` covers."""
    types: dict[str, bool] = {}
    covered = total = 0
    for tokens in sentences:
        for token in tokens:
            if token not in types:
                types[token] = vectors.find(token) is not None
            covered += types[token]
            total += 1
    return Coverage(100 * sum(types.values()) / max(len(types), 1), 100 * covered / max(total, 1))


def _lines(path: Path) -> Iterator[bytes]:
    number = 0
    try:
        with open(path, "rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            stream = cast("IO[bytes]", gzip.GzipFile(fileobj=raw) if compressed else raw)
            for line in stream:
                number += 1
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{number + 1}: the compressed file is damaged ({error})") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _width(path: Path, line: bytes) -> int:
    fields = line.split(b" ")
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        raise ValueError(f"{path}:1: {_shown(line)} is the header of a word2vec file; takes GloVe text without it")
    if len(fields) < 2 or not all(map(_is_number, fields[1:])):
        raise ValueError(f"{path}:1: not a word and its numbers: {_shown(line)}")
    return len(fields) - 1


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")
