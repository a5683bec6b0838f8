"""Folds, held-out examples and subsets of the training data."""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastamp.data import Corpus, Split, Vocabulary, load, read_vectors
from fastamp.data.splits import class_counts, leave_fold_out, stratified_subset
from fastamp.data.vectors import coverage
from fastamp.paper.plan import RATIOS

DATA_DIR = Path(os.environ.get("FASTAMP_DATA_DIR", Path(__file__).parents[2] / "shared/data"))
needs_data = pytest.mark.skipif(
    not (DATA_DIR / "trec" / "train.tsv").exists(), reason=f"no corpora in {DATA_DIR}; set FASTAMP_DATA_DIR"
)


def write_mr(folder: Path, n: int = 103) -> Path:
    lines = (f"{int(i >= n // 2)}\tt{i} !\n" for i in range(n))  # sorted by class, as the real one
    return _write(folder / "mr" / "all.tsv", lines)


def write_trec(folder: Path, sizes: tuple[int, ...], test: int = 12) -> Path:
    """`sizes[c]` training examples of class c, their order shuffled."""
    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    _write(folder / "trec" / "test.tsv", (f"{i % 6}\ttest{i}\n" for i in range(test)))
    return _write(folder / "trec" / "train.tsv", (f"{labels[i]}\tt{n}\n" for n, i in enumerate(order)))


def _write(path: Path, lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("label\ttext\n" + "".join(lines))
    return path.parent.parent


def words(split: Split) -> list[str]:
    return [sentence[0] for sentence in split.sentences]


# Folds


def test_ten_folds_partition_the_set_and_train_dev_test_partition_it_in_each(tmp_path):
    folder = write_mr(tmp_path)
    everything = sorted(f"t{i}" for i in range(103))
    corpora = [load("mr", data_dir=folder, fold=fold) for fold in range(10)]
    assert sorted(word for corpus in corpora for word in words(corpus.test)) == everything
    for corpus in corpora:
        assert sorted(words(corpus.train) + words(corpus.dev) + words(corpus.test)) == everything
        assert len(corpus.test) in (10, 11)
        assert len(corpus.dev) == 9
        assert set(corpus.test.labels) == {0, 1}


def test_a_fold_does_not_depend_on_the_seed_but_dev_does_and_without_a_fold_the_seed_names_it(tmp_path):
    folder = write_mr(tmp_path)
    first, second = (load("mr", data_dir=folder, seed=seed) for seed in (4, 14))
    assert first.test == second.test
    assert first.dev != second.dev
    assert first == load("mr", data_dir=folder, seed=4, fold=4)
    assert first.fingerprint() == load("mr", data_dir=folder, seed=4).fingerprint() != second.fingerprint()


def test_folds_are_the_same_in_every_version_and_on_every_platform():
    assert [leave_fold_out(20, fold)[1] for fold in (0, 9)] == [[2, 10], [0, 7]]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("questions", {"fold": 0}, ValueError, "'questions' has test examples of its own, and no folds"),
        ("mr", {"fold": 10}, ValueError, "fold must be from 0 to 9, got 10"),
        ("mr", {"fold": -1}, ValueError, "fold must be from 0 to 9, got -1"),
        ("mr", {"fold": True}, TypeError, "fold must be an int or None, got True"),
        ("mr", {"fraction": 0}, ValueError, "fraction must be above 0 and at most 1, got 0"),
        ("mr", {"fraction": 1.1}, ValueError, "fraction must be above 0 and at most 1, got 1.1"),
        ("mr", {"fraction": float("nan")}, ValueError, "fraction must be above 0 and at most 1, got nan"),
        ("mr", {"fraction": True}, TypeError, "fraction must be a number, got True"),
    ],
)
def test_a_fold_or_fraction_that_cannot_be_is_refused_by_name(tmp_path, name, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        load(name, data_dir=write_mr(tmp_path), **options)


# Fractions


TREC = (1162, 1250, 86, 1223, 835, 896)
PRINTED = (160, 215, 270, 543, 815, 1089, 2179, 4359, 5452)


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80),
    fractions=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted),
    seed=st.integers(0, 9),
)
def test_a_subset_has_its_size_every_class_and_every_smaller_subset(labels, fractions, seed):
    counts = [class_counts(labels, fraction) for fraction in fractions]
    small, large = (stratified_subset(labels, c, torch.Generator().manual_seed(seed)) for c in counts)
    assert set(small) <= set(large)
    for kept, wanted in ((small, counts[0]), (large, counts[1])):
        assert kept == sorted(set(kept))
        assert Counter(labels[i] for i in kept) == wanted
    assert min(counts[0].values()) >= 1


def test_the_shares_of_trec_hold_the_numbers_of_labels_that_the_paper_prints():
    labels = [c for c, size in enumerate(TREC) for _ in range(size)]
    counts = [class_counts(labels, fraction) for fraction in RATIOS]
    assert tuple(sum(of.values()) for of in counts) == PRINTED
    assert counts[0] == dict(enumerate((34, 37, 2, 36, 25, 26)))
    assert class_counts([0] * 20, 0.15) == {0: 3}  # 2.9999999999999996 in float64


@pytest.mark.parametrize("seed", range(3))
def test_what_is_trained_on_has_the_papers_number_of_labels_beside_its_dev_data(tmp_path, seed):
    folder = write_trec(tmp_path, TREC)
    whole = load("trec", data_dir=folder, seed=seed)
    assert (len(whole.train), len(whole.dev)) == (4907, 545)  # together 5452
    for fraction, size in zip(RATIOS[:-1], PRINTED[:-1], strict=True):
        corpus = load("trec", data_dir=folder, seed=seed, fraction=fraction)
        assert (len(corpus.train), corpus.dev) == (size, whole.dev)
        assert not set(corpus.train.texts) & set(corpus.dev.texts)


def test_a_class_that_a_share_would_leave_empty_keeps_one_example_and_a_warning_names_it(tmp_path):
    folder = write_trec(tmp_path, (60, 60, 9, 60, 60, 60))
    with pytest.warns(UserWarning, match=r"'trec': a share of 0.1 leaves no example of class 2 \(ABBR\); one is kept"):
        kept = load("trec", data_dir=folder, seed=3, fraction=0.1).train
    assert Counter(kept.labels) == {0: 6, 1: 6, 2: 1, 3: 6, 4: 6, 5: 6}


def test_a_subset_of_a_class_is_drawn_at_random_and_by_the_seed():
    labels = [0] * 200 + [1] * 200
    counts = class_counts(labels, 0.1)
    drawn = [stratified_subset(labels, counts, torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert len(set(map(tuple, drawn))) == 50
    counts = Counter(i for kept in drawn for i in kept)
    assert len(counts) > 390  # each is missed by all 50 with a probability of 0.5%
    assert max(counts.values()) < 20


def test_a_fraction_leaves_dev_and_test_as_they_are_and_keeps_the_files_order(tmp_path):
    folder = write_trec(tmp_path, (60, 60, 34, 40, 34, 34))
    whole = load("trec", data_dir=folder, seed=3)
    previous: set[str] = set()
    for fraction in (0.03, 0.1, 0.6, 1.0):
        corpus = load("trec", data_dir=folder, seed=3, fraction=fraction)
        assert (corpus.dev, corpus.test) == (whole.dev, whole.test)
        kept = words(corpus.train)
        assert previous <= set(kept)
        assert kept == [word for word in words(whole.train) if word in set(kept)]
        previous = set(kept)
    assert corpus == whole
    tenths = [load("trec", data_dir=folder, seed=seed, fraction=0.1).train for seed in (3, 4)]
    assert tenths[0] != tenths[1]


def test_a_class_without_a_training_example_is_refused_by_name(tmp_path):
    folder = write_trec(tmp_path, (20, 20, 0, 20, 20, 20))
    with pytest.raises(ValueError, match=re.escape("dataset 'trec': no training example of class 2 (ABBR)")):
        load("trec", data_dir=folder, fraction=0.5)


def test_too_few_examples_are_refused_by_the_sets_name(tmp_path):
    with pytest.raises(ValueError, match="dataset 'mr': 9 examples are too few for 10 folds"):
        load("mr", data_dir=write_mr(tmp_path, 9))
    with pytest.raises(ValueError, match="dataset 'trec': 4 examples are too few to hold out 10%"):
        load("trec", data_dir=write_trec(tmp_path, (4,)))


# Texts


def test_the_raw_texts_go_with_the_sentences(tmp_path):
    corpus = load("mr", data_dir=write_mr(tmp_path), fraction=0.3)
    for split in (corpus.train, corpus.dev, corpus.test):
        assert [text.split() for text in split.texts] == [list(tokens) for tokens in split.sentences]
    assert corpus.dev.take([2, 0]).texts == (corpus.dev.texts[2], corpus.dev.texts[0])


def test_the_fingerprint_of_the_tokens_does_not_see_the_texts():
    digests = set()
    for texts in (("a", "b"), ("A", "B")):
        split = Split((("a",), ("b",)), (0, 1), texts)
        corpus = Corpus("x", ("0", "1"), split, split, split)
        digests.add((corpus.fingerprint(), corpus.text_fingerprint()))
    (first, second) = digests
    assert first[0] == second[0]
    assert first[1] != second[1]


# The real sets, as the paper's Table 1 and the data's README have them


# Table 1 has 21323 words for SUBJ and 16185 for SST-2.
@needs_data
@pytest.mark.parametrize(
    ("name", "sizes", "classes", "size"),
    [
        ("trec", (4907, 545, 500), 6, 9592),
        ("sst1", (8544, 1101, 2210), 5, 17836),
        ("sst2", (6920, 872, 1821), 2, 16188),
        ("subj", (8100, 900, 1000), 2, 21322),
        ("mr", (8636, 960, 1066), 2, 18765),
    ],
)
def test_corpora_have_the_papers_sizes_and_vocabulary_and_all_classes_in_every_split(name, sizes, classes, size):
    corpus = load(name, data_dir=DATA_DIR, lower=name != "trec")
    assert tuple(map(len, corpus.splits)) == sizes
    assert all(set(split.labels) == set(range(classes)) for split in corpus.splits)
    assert corpus.num_classes == classes
    assert len(Vocabulary.build(*(split.sentences for split in corpus.splits)).words) == size


# One small set and one large: each reads the whole file of vectors.
@needs_data
@pytest.mark.parametrize(("name", "types", "tokens"), [("trec", 97.5, 99.56), ("mr", 93.9, 99.33)])
def test_glove_subset_covers_as_much_as_its_readme_says(name, types, tokens):
    sentences = [sentence for split in load(name, data_dir=DATA_DIR).splits for sentence in split.sentences]
    words = {word for sentence in sentences for word in sentence}
    vectors = read_vectors(DATA_DIR / "vectors" / "glove.6B.50d.subset.txt.gz", words)
    covered = coverage(sentences, vectors)
    assert vectors.dim == 50
    assert (round(covered.types, 1), round(covered.tokens, 2)) == (types, tokens)


@needs_data
@pytest.mark.parametrize(
    ("name", "seed", "digest"),
    [("trec", 0, "c98b80d1e3c23951"), ("trec", 3, "64bf27d5fa75fcd7"), ("sst2", 3, "47f8881c168ab2c9")],
)
def test_splits_are_the_same_in_every_version(name, seed, digest):
    assert load(name, data_dir=DATA_DIR, seed=seed).fingerprint().startswith(digest)
