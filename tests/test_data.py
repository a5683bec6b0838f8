"""Readers, tokenisers, vocabulary, vectors, the generated corpus."""

import gzip
import os
import re
from pathlib import Path

import pytest
import torch

from fastamp.data import DATASETS, PAD, UNK, Vocabulary, clean_str, clean_str_sst, embedding_table, load, questions
from fastamp.data.files import read_tsv
from fastamp.data.vectors import coverage, read_vectors

QUESTIONS_DIGEST = "4c28f6d6122ff458"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# TSV


def test_tsv_keeps_quotes_and_splits_lines_on_newline_only(tmp_path):
    texts = ['he said "no', "a\u2028b", "2 1\u00a0/ 2", "a\x0bb\x85c\rd"]
    path = write(tmp_path / "t.tsv", "label\ttext\n" + "".join(f"{i % 2}\t{t}\n" for i, t in enumerate(texts)))
    assert read_tsv(path, 2) == (texts, [0, 1, 0, 1])
    path.write_bytes(path.read_bytes()[:-1])  # without the last newline
    assert read_tsv(path, 2) == (texts, [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("", ":1", "header must be 'label\\ttext', got ''"),
        ("label\ttext\n", "", "a header but no lines below it"),
        ("0\ta\n1\tb\n", ":1", "header must be 'label\\ttext', got '0\\ta'"),
        ("label\ttext\r\n0\ta\r\n", ":1", "header"),
        ("\ufefflabel\ttext\n0\ta\n", ":1", "header"),
        ("label\ttext\n0\ta\n0\n", ":3", "1 tab-separated columns"),
        ("label\ttext\n0\ta\n\n1\tb\n", ":3", "1 tab-separated columns"),
        ("label\ttext\n0\ta\tb\n", ":2", "3 tab-separated columns"),
        ("label\ttext\nx\ta\n", ":2", "label 'x' is not an integer"),
        ("label\ttext\n1_0\ta\n", ":2", "is not an integer"),
        ("label\ttext\n\u0661\ta\n", ":2", "is not an integer"),
        ("label\ttext\n2\ta\n", ":2", "label 2 is out of range; takes 0 to 1"),
        ("label\ttext\n-1\ta\n", ":2", "label -1 is out of range"),
        ("label\ttext\n0\t \n", ":2", "text is empty"),
        (b"label\ttext\n0\ta\n1\tcaf\xe9\n", ":3", "not UTF-8"),
    ],
)
def test_malformed_tsv_is_refused_by_file_and_line(tmp_path, content, line, reason):
    path = write(tmp_path / "t.tsv", content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{line}: ")) as error:
        read_tsv(path, 2)
    assert reason in str(error.value)


# Tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's Bob's, isn't it?", "it 's bob 's , is n't it ?"),
        ("I've (we'd) they'll you're!", "i 've ( we 'd ) they 'll you 're !"),
        ("can't've", "ca n't 've"),
        ("a\u00a0b -- c_d; \u00e9 \x85 5.5%", "a b c d 5 5"),
        ("``quoted''", "``quoted''"),
        ("...", ""),
    ],
)
def test_clean_str_follows_kims_rules(text, tokens):
    assert clean_str(text) == tokens.split()


def test_clean_str_keeps_case_on_request_and_clean_str_sst_treebank_tokens_whole():
    assert clean_str("What is NATO?", lower=False) == ["What", "is", "NATO", "?"]
    assert clean_str_sst("It 's n't -lrb- 2 1\\/2 -rrb-") == ["it", "'s", "n't", "lrb", "2", "1", "2", "rrb"]


# Corpora


def test_unknown_datasets_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown dataset 'imdb'; takes one of questions, trec"):
        load("imdb")
    with pytest.raises(ValueError, match=re.escape(f"cannot read {tmp_path / 'trec' / 'train.tsv'}")):
        load("trec", data_dir=tmp_path)


# Questions


def test_questions_are_the_same_at_every_call_and_on_every_platform():
    first, second = load("questions"), load("questions", seed=5)
    assert DATASETS == ("questions", "trec", "sst1", "sst2", "subj", "mr")
    assert first.label_names == ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
    # The digest holds the corpus fixed across versions: results on it are published.
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint().startswith(QUESTIONS_DIGEST)


def test_questions_hold_no_question_twice_and_every_class_in_every_split():
    state = torch.get_rng_state()
    parts = questions.generate()
    assert torch.equal(state, torch.get_rng_state())
    assert [len(texts) for texts, _ in parts] == [2000, 250, 500]
    texts = [text for part, _ in parts for text in part]
    assert len(set(texts)) == len(texts)
    assert all(set(labels) == set(range(6)) for _, labels in parts)
    assert not any(character in text for text in texts for character in "{}|")


# Vocabulary


def test_vocabulary_counts_pad_and_unknown_and_pads_on_the_right():
    vocabulary = Vocabulary.build([["b", "a", "b"]], [["c"]])
    assert vocabulary.words == ("b", "a", "c")
    assert len(vocabulary) == 5
    assert "a" in vocabulary
    assert "z" not in vocabulary
    ids = vocabulary.encode([["b", "z", "a"], ["c"], []])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[2, UNK, 3], [4, PAD, PAD], [UNK, PAD, PAD]]
    assert vocabulary.encode([]).shape == (0, 1)
    with pytest.raises(ValueError, match="'a' 2 times"):
        Vocabulary(["a", "b", "a"])


# Vectors

GLOVE = "the 1 2 3\nNATO 4 5 6\n. . . 7 8 9\ncaf\u00e9 -1e-1 0 .5\nthe 9 9 9\n"


@pytest.mark.parametrize(
    "pack", [str.encode, lambda text: gzip.compress(text.encode(), mtime=0)], ids=["plain", "gzip"]
)
def test_vectors_are_read_plain_and_compressed(tmp_path, pack):
    path = write(tmp_path / "v", pack(GLOVE))
    vectors = read_vectors(path, ["the", "The", "caf\u00e9", ". . .", "absent"])
    assert vectors.dim == 3
    found = {word: vectors.table[row].tolist() for word, row in vectors.rows.items()}
    assert found == {"the": [1, 2, 3], ". . .": [7, 8, 9], "caf\u00e9": [pytest.approx(-0.1), 0, 0.5]}
    assert vectors.find("The") == vectors.rows["the"]
    assert vectors.find("absent") is None
    assert coverage([["The", "the", "absent", "the"]], vectors).types == pytest.approx(200 / 3)
    assert coverage([["The", "the", "absent", "the"]], vectors).tokens == 75


def test_embedding_table_takes_vectors_and_draws_the_rest(tmp_path):
    vectors = read_vectors(write(tmp_path / "v", GLOVE), ["the", "NATO"])
    vocabulary = Vocabulary(["zzz", "NATO", "the"])
    table = embedding_table(vocabulary, vectors)
    assert table.shape == (5, 3)
    assert table.dtype == torch.float32
    assert table[PAD].tolist() == [0, 0, 0]
    assert table[3:].tolist() == [[4, 5, 6], [1, 2, 3]]
    assert (table[1:3].abs() <= 0.25).all()
    assert table[1:3].std() > 0


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("", "", "is empty"),
        ("400000 50\nthe 1 2\n", ":1", "word2vec"),
        ("the\n", ":1", "not a word and its numbers"),
        ("the 1 x 3\n", ":1", "not a word and its numbers"),
        ("the 1 2 3\na 1 2\n", ":2", "2 values where the first line has 3"),
        ("the 1 2 3\na 1 2 3 4\n", ":2", "4 values where the first line has 3"),
        ("the 1 2 3\n\na 1 2 3\n", ":2", "0 values where the first line has 3"),
        ("the 1 2 3\na 1 x 3\n", ":2", "not a word and 3 numbers"),
        ("the 1 2 3\na 1 nan 3\n", ":2", "not finite"),
        (gzip.compress(b"the 1 2 3\n" * 1000, mtime=0)[:-12], ":", "damaged"),
    ],
)
def test_malformed_vectors_are_refused_by_file_and_line(tmp_path, content, line, reason):
    path = write(tmp_path / "v.txt", content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{line}")) as error:
        read_vectors(path, ["the", "a"])
    assert reason in str(error.value)


def test_vectors_are_read_once_for_a_file_and_its_words(tmp_path):
    path = write(tmp_path / "v", GLOVE)
    first = read_vectors(path, ["the", "NATO"])
    assert read_vectors(str(tmp_path / "." / "v"), ("NATO", "the")) is first
    assert read_vectors(path, ["the"]).rows.keys() == {"the"}


def test_changed_vectors_are_read_again(tmp_path):
    path = write(tmp_path / "v", "the 1 2 3\n")
    assert read_vectors(path, ["the"]).table.tolist() == [[1, 2, 3]]
    write(path, "the 4 5 6\n")  # of the same length
    os.utime(path, ns=(0, 0))
    assert read_vectors(path, ["the"]).table.tolist() == [[4, 5, 6]]
    write(path, "the 7 8 9 1\n")
    os.utime(path, ns=(0, 0))  # at the same time
    assert read_vectors(path, ["the"]).table.tolist() == [[7, 8, 9, 1]]
