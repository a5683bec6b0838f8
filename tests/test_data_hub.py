"""Corpora from the Hugging Face hub, by a stand-in for the package `datasets` that has its form and its errors."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fastamp.data import load
from fastamp.data.sources import _SPLITS, SOURCES, read

DATA_DIR = Path(os.environ.get("FASTAMP_DATA_DIR", Path(__file__).parents[2] / "shared/data"))
ON_THE_HUB = [name for name, source in SOURCES.items() if source.repository]
SIZES = {"train": 40, "validation": 20, "test": 20}


class Table(dict):
    """A dataset: columns by name; a column that is not there is a ValueError, as in datasets 5."""

    def __missing__(self, column):
        raise ValueError(f"Column '{column}' doesn't exist.")


def table(name: str, n: int, word: str) -> Table:
    """n rows of a set in the hub's form, its classes in turn."""
    source = SOURCES[name]
    classes = source.classes or source.label_names
    values = [classes[i % len(classes)] for i in range(n)]
    texts = [f" {word} x{i} {value} \n" for i, value in enumerate(values)]
    # Classes by name stand beside numbers, which need not be ours.
    return Table({"text": texts, "label": [-1] * n, source.column: values})


@pytest.fixture
def hub(monkeypatch):
    """The hub: its splits by name of the repository, all small; the sizes expected are theirs."""
    splits = {}
    for name in ON_THE_HUB:
        source = SOURCES[name]
        names = {part: [s for s in _SPLITS[part] if (name, s) != ("subj", "validation")] for part in source.sizes}
        splits[source.repository] = {s: table(name, SIZES[s], s) for of_part in names.values() for s in of_part}
        sizes = {part: sum(map(SIZES.get, of_part)) for part, of_part in names.items()}
        monkeypatch.setitem(SOURCES, name, replace(source, sizes=sizes))
    asked = []

    def load_dataset(path, *, revision):
        asked.append((path, revision))
        return splits[path]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return SimpleNamespace(splits=splits, asked=asked, module=module)


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_a_set_without_data_dir_comes_from_the_hub_with_our_labels(hub, name):
    corpus = load(name, seed=1, lower=True)
    source = SOURCES[name]
    assert hub.asked == [(source.repository, source.revision)]
    assert re.fullmatch("[0-9a-f]{40}", source.revision)
    examples = [pair for s in corpus.splits for pair in zip(s.texts, s.labels, strict=True)]
    assert len(examples) == sum(source.sizes.values())
    for text, label in examples:
        assert text.split(maxsplit=2)[2] == str((source.classes or source.label_names)[label])
        assert text == text.strip()


def test_dev_and_test_are_the_hubs_where_it_has_them(hub):
    assert {text.split()[0] for text in load("sst1").dev.texts} == {"validation"}
    assert {text.split()[0] for text in load("trec").test.texts} == {"test"}
    assert {text.split()[0] for text in load("trec").dev.texts} == {"train"}


def test_sets_without_a_test_split_are_joined_in_order_of_their_class(hub):
    texts, labels = read("mr", None)["all"]
    assert labels == [0] * 40 + [1] * 40
    assert [text.split()[0] for text in texts[:40]] == ["train"] * 20 + ["validation"] * 10 + ["test"] * 10


def test_the_hubs_mr_has_the_files_order_and_folds(tmp_path, monkeypatch, hub):
    """The hub's splits are 80%, 10% and 10% of each class, the positive first."""
    texts = {label: [f"{label} t{i}" for i in range(40)] for label in (0, 1)}
    cut = {"train": slice(0, 32), "validation": slice(32, 36), "test": slice(36, 40)}
    for split, part in cut.items():
        hub.splits[SOURCES["mr"].repository][split] = Table(
            text=texts[1][part] + texts[0][part], label=[1] * len(texts[1][part]) + [0] * len(texts[0][part])
        )
    (tmp_path / "mr").mkdir()
    lines = "".join(f"{label}\t{text}\n" for label in (0, 1) for text in texts[label])
    (tmp_path / "mr" / "all.tsv").write_text("label\ttext\n" + lines)
    assert load("mr", seed=2).fingerprint() == load("mr", data_dir=tmp_path, seed=2).fingerprint()


def test_another_number_of_examples_is_refused_with_both(hub):
    splits = hub.splits["SetFit/subj"]
    splits["test"] = Table({name: values[:-1] for name, values in splits["test"].items()})
    message = "SetFit/subj on the Hugging Face hub: 59 examples in train + validation + test; takes 60"
    with pytest.raises(ValueError, match=re.escape(message)):
        load("subj")


def test_an_unknown_label_is_refused(hub):
    hub.splits["SetFit/sst2"]["validation"]["label_text"][3] = "neutral"
    message = "unknown label 'neutral' in the column 'label_text'; takes 'negative', 'positive'"
    with pytest.raises(ValueError, match=re.escape(message)):
        load("sst2")


def test_a_missing_split_or_column_is_refused(hub):
    splits = hub.splits["SetFit/TREC-QC"]
    del splits["train"]["label_coarse_original"]
    with pytest.raises(ValueError, match="lacks a column of 'train': 'text' or 'label_coarse_original'"):
        load("trec")
    del splits["train"]
    with pytest.raises(ValueError, match="0 examples in train; takes 40"):
        load("trec")


def test_without_the_package_datasets_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"pip install 'fastamp\[data\]', or give data_dir, the folder that holds sst1/"
    ):
        load("sst1")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'SetFit/TREC-QC' on the Hub (OfflineModeIsEnabled)"),
        ValueError("Couldn't find cache for SetFit/TREC-QC for config 'default'"),
    ],
)
def test_a_hub_out_of_reach_says_to_give_data_dir(hub, error):
    def load_dataset(path, *, revision):
        raise error

    hub.module.load_dataset = load_dataset
    with pytest.raises(ValueError, match="give data_dir, the folder that holds trec/") as raised:
        load("trec")
    assert str(error) in str(raised.value)


@pytest.mark.skipif(not (DATA_DIR / "trec" / "train.tsv").exists(), reason=f"no corpora in {DATA_DIR}")
def test_the_sizes_expected_of_the_hub_are_those_of_the_files():
    for name in ON_THE_HUB:
        for part, size in SOURCES[name].sizes.items():
            assert (DATA_DIR / name / f"{part}.tsv").read_bytes().count(b"\n") - 1 == size
