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
def corpus(name: str, lower: bool = True) -> Corpus:
    return load(name, data_dir=DATA_DIR, lower=lower)


def sentences(corpus: Corpus) -> list[tuple[str, ...]]:
    return [s for split in (corpus.train, corpus.dev, corpus.test) for s in split.sentences]


# Table 1 has 21323 for SUBJ and 16185 for SST-2.
@pytest.mark.parametrize(
    ("name", "lower", "size"),
    [
        ("sst1", True, 17836),
        ("sst2", True, 16188),
        ("mr", True, 18765),
        ("subj", True, 21322),
        ("trec", False, 9592),
        ("trec", True, 8764),
    ],
)
def test_vocabulary_has_the_papers_size(name, lower, size):
    assert len(Vocabulary.build(sentences(corpus(name, lower))).words) == size


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [("trec", 5952, 6), ("sst1", 11855, 5), ("sst2", 9613, 2), ("subj", 10000, 2), ("mr", 10662, 2)],
)
def test_corpus_has_the_papers_size_and_classes(name, size, classes):
    assert len(sentences(corpus(name))) == size
    assert corpus(name).num_classes == classes


@pytest.mark.parametrize(
    ("name", "types", "tokens"),
    [
        ("trec", 97.5, 99.56),
        ("sst1", 97.4, 99.75),
        ("sst2", 97.6, 99.75),
        ("subj", 93.7, 99.28),
        ("mr", 93.9, 99.33),
    ],
)
def test_glove_subset_covers_as_much_as_its_readme_says(name, types, tokens):
    everything = sentences(corpus(name))
    words = {word for sentence in everything for word in sentence}
    vectors = read_vectors(DATA_DIR / "vectors" / "glove.6B.50d.subset.txt.gz", words)
    covered = coverage(everything, vectors)
    assert vectors.dim == 50
    assert (round(covered.types, 1), round(covered.tokens, 2)) == (types, tokens)
