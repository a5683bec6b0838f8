"""Where the corpora come from: files, or the Hugging Face hub by the package `datasets`, which keeps them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastamp.data import questions
from fastamp.data.files import read_tsv
from fastamp.data.tokens import clean_str, clean_str_sst


@dataclass(frozen=True)
class Source:
    """A corpus that is read, or, without a repository, generated."""

    label_names: tuple[str, ...]  # of class 0, 1, ...
    repository: str = ""  # on the hub
    revision: str = ""  # its commit, so that the data cannot change
    sizes: Mapping[str, int] = field(default_factory=dict)  # examples of "train", "dev" and "test", or of "all"
    column: str = "label_text"  # of the hub's, which holds the class
    classes: tuple[str | int, ...] | None = None  # what stands there for class 0, 1, ...; its name where it is None
    tokenise: Callable[..., list[str]] = clean_str


_POLARITY = ("negative", "positive")
# Repositories without a loading script: datasets 4 runs none. Classes go by name where there is one, because the
# numbers are not ours: 0 is objective in SetFit/subj.
SOURCES = {
    "questions": Source(questions.LABELS),
    "trec": Source(
        questions.LABELS,
        "SetFit/TREC-QC",
        "0a34640b3cac3affef6f0abdfb81e3d0ecffcf92",
        {"train": 5452, "test": 500},
        column="label_coarse_original",
    ),
    "sst1": Source(
        ("very negative", "negative", "neutral", "positive", "very positive"),
        "SetFit/sst5",
        "e51bdcd8cd3a30da231967c1a249ba59361279a3",
        {"train": 8544, "dev": 1101, "test": 2210},
        tokenise=clean_str_sst,
    ),
    "sst2": Source(
        _POLARITY,
        "SetFit/sst2",
        "00ea8ccb7a54b4e3780a3e51aa3f80361ff849c0",
        {"train": 6920, "dev": 872, "test": 1821},
        tokenise=clean_str_sst,
    ),
    "subj": Source(
        ("subjective", "objective"), "SetFit/subj", "f3c1162e678417f664d76b21864fdb87b0615fcf", {"all": 10000}
    ),
    "mr": Source(
        _POLARITY,
        "cornell-movie-review-data/rotten_tomatoes",
        "aa13bc287fa6fcab6daf52f0dfb9994269ffea28",
        {"all": 10662},
        column="label",
        classes=(0, 1),
    ),
}
# The hub's splits that make up a part, in that order, as far as a repository has them.
_SPLITS = {"train": ("train",), "dev": ("validation",), "test": ("test",), "all": ("train", "validation", "test")}

Examples = tuple[Sequence[str], Sequence[int]]  # texts and labels, of equal length


def read(name: str, data_dir: str | os.PathLike[str] | None) -> dict[str, Examples]:
    """Texts and labels of every part of a corpus: from files, without a folder from the hub.

    The hub's examples of a part "all" are put in order of their class, as the data files have them. MR then has the
    files' order, and with it their folds; SUBJ has another order within the classes.

    Raises:
        ValueError: a missing or malformed file. For the hub: the package `datasets` is not installed; it cannot be
            reached and nothing is cached; or what is there has other splits, columns, classes or numbers of examples
            than expected.
    """
    source = SOURCES[name]
    if not source.repository:
        return dict(zip(("train", "dev", "test"), questions.generate(), strict=True))
    if data_dir is not None:
        folder = Path(data_dir) / name
        return {part: read_tsv(folder / f"{part}.tsv", len(source.label_names)) for part in source.sizes}
    instead = f"give data_dir, the folder that holds {name}/"
    try:
        import datasets

        splits = datasets.load_dataset(source.repository, revision=source.revision)
    except ImportError as error:
        raise ValueError(
            f"dataset {name!r} is read from the Hugging Face hub by the package datasets, which cannot be imported "
            f"({error}): pip install 'fastamp[data]', or {instead}"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset {name!r} cannot be read from the Hugging Face hub and is not in its cache ({error}): {instead}"
        ) from error
    return {part: _part(source, splits, part) for part in source.sizes}


def _part(source: Source, splits: Mapping[str, Mapping[str, list]], part: str) -> Examples:
    where, classes = f"{source.repository} on the Hugging Face hub", source.classes or source.label_names
    texts: list[str] = []
    labels: list[int] = []
    for split in (split for split in _SPLITS[part] if split in splits):
        try:
            given, values = list(splits[split]["text"]), list(splits[split][source.column])
        except (KeyError, ValueError):  # as datasets has it
            raise ValueError(f"{where} lacks a column of {split!r}: 'text' or {source.column!r}") from None
        unknown = set(values).difference(classes)
        if unknown:
            raise ValueError(
                f"{where}: unknown label {sorted(map(repr, unknown))[0]} in the column {source.column!r}; "
                f"takes {', '.join(map(repr, classes))}"
            )
        texts += (text.strip() for text in given)
        labels += map(classes.index, values)
    if len(texts) != source.sizes[part]:
        raise ValueError(f"{where}: {len(texts)} examples in {' + '.join(_SPLITS[part])}; takes {source.sizes[part]}")
    if part == "all":
        order = sorted(range(len(labels)), key=labels.__getitem__)
        texts, labels = [texts[i] for i in order], [labels[i] for i in order]
    return texts, labels
