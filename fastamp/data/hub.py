"""The corpora on the Hugging Face hub, read by the package `datasets`, which downloads and caches them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastamp.data import questions


@dataclass(frozen=True)
class HubSource:
    """Where a corpus is on the hub.

    Attributes:
        repository: its name there.
        revision: commit, so that the data cannot change.
        parts: our part to the hub's splits that make it up, in that order, and the number of their examples.
        label_column: the column that holds the class; the text is in "text".
        classes: what stands in that column for class 0, 1, ...
    """

    repository: str
    revision: str
    parts: Mapping[str, tuple[tuple[str, ...], int]]
    label_column: str
    classes: tuple[str | int, ...]


# Repositories without a loading script: datasets 4 runs none. Classes go by name where there is one, because the
# numbers are not ours: 0 is objective in SetFit/subj.
SOURCES = {
    "trec": HubSource(
        "SetFit/TREC-QC",
        "0a34640b3cac3affef6f0abdfb81e3d0ecffcf92",
        {"train": (("train",), 5452), "test": (("test",), 500)},
        "label_coarse_original",
        questions.LABELS,
    ),
    "sst1": HubSource(
        "SetFit/sst5",
        "e51bdcd8cd3a30da231967c1a249ba59361279a3",
        {"train": (("train",), 8544), "dev": (("validation",), 1101), "test": (("test",), 2210)},
        "label_text",
        ("very negative", "negative", "neutral", "positive", "very positive"),
    ),
    "sst2": HubSource(
        "SetFit/sst2",
        "00ea8ccb7a54b4e3780a3e51aa3f80361ff849c0",
        {"train": (("train",), 6920), "dev": (("validation",), 872), "test": (("test",), 1821)},
        "label_text",
        ("negative", "positive"),
    ),
    "subj": HubSource(
        "SetFit/subj",
        "f3c1162e678417f664d76b21864fdb87b0615fcf",
        {"all": (("train", "test"), 10000)},
        "label_text",
        ("subjective", "objective"),
    ),
    "mr": HubSource(
        "cornell-movie-review-data/rotten_tomatoes",
        "aa13bc287fa6fcab6daf52f0dfb9994269ffea28",
        {"all": (("train", "validation", "test"), 10662)},
        "label",
        (0, 1),
    ),
}


def read_hub(name: str) -> dict[str, tuple[list[str], list[int]]]:
    """Reads a corpus from the hub, or from the cache that `datasets` keeps.

    The examples of a part "all" are put in order of their class, as the data files have them. MR then has the files'
    order, and with it their folds; SUBJ has another order within the classes.

    Args:
        name: one of `SOURCES`.

    Returns:
        part ("train", "dev", "test" or "all") to texts and labels, of equal length.

    Raises:
        ValueError: the package `datasets` is not installed; the hub cannot be reached and nothing is cached; or what
            is there has other splits, columns, classes or numbers of examples than expected.
    """
    source = SOURCES[name]
    instead = f"give data_dir, the folder that holds {name}/"
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"dataset {name!r} is read from the Hugging Face hub by the package datasets, which cannot be imported "
            f"({error}): pip install 'fastamp[data]', or {instead}"
        ) from None
    try:
        splits = datasets.load_dataset(source.repository, revision=source.revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset {name!r} cannot be read from the Hugging Face hub and is not in its cache ({error}): {instead}"
        ) from error
    return {part: _part(source, splits, part) for part in source.parts}


def _part(source: HubSource, splits: Mapping[str, Mapping[str, list]], part: str) -> tuple[list[str], list[int]]:
    names, size = source.parts[part]
    where = f"{source.repository} on the Hugging Face hub"
    texts: list[str] = []
    labels: list[int] = []
    for split in names:
        try:
            given, values = list(splits[split]["text"]), list(splits[split][source.label_column])
        except (KeyError, ValueError):  # no such split; no such column
            raise ValueError(
                f"{where} lacks the split {split!r}, or one of its columns 'text' and {source.label_column!r}"
            ) from None
        unknown = set(values).difference(source.classes)
        if unknown:
            raise ValueError(
                f"{where}: unknown label {sorted(map(repr, unknown))[0]} in the column {source.label_column!r}; "
                f"takes {', '.join(map(repr, source.classes))}"
            )
        texts += (text.strip() for text in given)
        labels += map(source.classes.index, values)
    if len(texts) != size:
        raise ValueError(f"{where}: {len(texts)} examples in {' + '.join(names)}; takes {size}")
    if part == "all":
        order = sorted(range(size), key=labels.__getitem__)
        texts, labels = [texts[i] for i in order], [labels[i] for i in order]
    return texts, labels
