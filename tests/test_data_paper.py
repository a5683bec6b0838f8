"""Sizes, vocabularies and coverage by word vectors, as the paper's Table 1 and the data's README have them."""

import os
from functools import cache
from pathlib import Path

import pytest

from fastamp.data import Corpus, Vocabulary, load, read_vectors
from fastamp.data.vectors import coverage

DATA_DIR = Path(os.environ.get("FASTAMP_DATA_DIR", Path(__file__).parents[2] / "shared/data"))
pytestmark = pytest.mark.skipif(
    not (DATA_DIR / "trec" / "train.tsv").exists(), reason=f"no corpora in {DATA_DIR}; set FASTAMP_DATA_DIR"
)


@cache
def corpus(name: str) -> Corpus:
    return load(name, data_dir=DATA_DIR, lower=name != "trec")


def sentences(name: str) -> list[tuple[str, ...]]:
    return [s for split in corpus(name).splits for s in split.sentences]


@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [
        ("trec", (4907, 545, 500), 6),
        ("sst1", (8544, 1101, 2210), 5),
        ("sst2", (6920, 872, 1821), 2),
        ("subj", (8100, 900, 1000), 2),
        ("mr", (8636, 960, 1066), 2),
    ],
)
def test_corpora_have_the_papers_sizes_and_all_classes_in_every_split(name, sizes, classes):
    assert tuple(map(len, corpus(name).splits)) == sizes
    assert all(set(split.labels) == set(range(classes)) for split in corpus(name).splits)
    assert corpus(name).num_classes == classes


# Table 1 has 21323 for SUBJ and 16185 for SST-2.
@pytest.mark.parametrize(
    ("name", "size"), [("sst1", 17836), ("sst2", 16188), ("mr", 18765), ("subj", 21322), ("trec", 9592)]
)
def test_vocabulary_has_the_papers_size(name, size):
    assert len(Vocabulary.build(sentences(name)).words) == size


# One small set and one large: each reads the whole file of vectors. TREC's case is kept here, and found lowered.
@pytest.mark.parametrize(("name", "types", "tokens"), [("trec", 97.5, 99.56), ("mr", 93.9, 99.33)])
def test_glove_subset_covers_as_much_as_its_readme_says(name, types, tokens):
    everything = [tuple(token.lower() for token in sentence) for sentence in sentences(name)]
    words = {word for sentence in everything for word in sentence}
    vectors = read_vectors(DATA_DIR / "vectors" / "glove.6B.50d.subset.txt.gz", words)
    covered = coverage(everything, vectors)
    assert vectors.dim == 50
    assert (round(covered.types, 1), round(covered.tokens, 2)) == (types, tokens)
