"""Training: what it refuses, by name."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import Kill, Killed, short, tiny_encoder, write_corpus

from fastamp.training import TrainConfig, checkpoint, loop, train
from fastamp.training.curves import loss_curves


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder that holds a corpus, "data", and a finished run on it, "out"."""
    folder = tmp_path_factory.mktemp("finished")
    train(short(write_corpus(folder / "data")), folder / "out")
    return folder


@pytest.fixture
def corpus(finished, tmp_path) -> Path:
    """The corpus, beside a copy of the run in tmp_path / "out"."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "data"


def test_a_device_that_cannot_be_used_is_refused_by_name(tmp_path):
    for device in ("gpu", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
            train(TrainConfig(device=device), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_run_is_refused_and_the_fields_named(tmp_path, corpus):
    with pytest.raises(ValueError, match=r"different: steps 10 \(there 14\), lr 0.5 \(there 0.001\)$"):
        train(short(corpus, steps=10, lr=0.5), tmp_path / "out")
    text = (corpus / "mr" / "all.tsv").read_text()
    (corpus / "mr" / "all.tsv").write_text(text.replace("w1 ", "w2 "))
    with pytest.raises(ValueError, match=r"different: dataset files$"):
        train(short(corpus), tmp_path / "out")


def test_another_text_of_the_same_tokens_is_another_run_of_an_encoder_only(tmp_path, corpus):
    encoder = {"model": "bert", "pretrained": str(tiny_encoder(tmp_path / "encoder")), "embedding_dim": None}
    train(short(corpus, **encoder, steps=1), tmp_path / "encoded")
    data = corpus / "mr" / "all.tsv"
    data.write_text(data.read_text().replace("w1 ", "w1 \u00e9 "))
    assert train(short(corpus), tmp_path / "out").resumed_from == 14
    with pytest.raises(ValueError, match=r"different: dataset files$"):
        train(short(corpus, **encoder, steps=1), tmp_path / "encoded")


def test_a_run_of_another_version_is_refused_and_says_what_to_do(tmp_path, corpus):
    last = tmp_path / "out" / "last.pt"
    checkpoint.save_tensors(last, {**checkpoint.load_tensors(last), "format": loop.FORMAT - 1})
    message = f"has format {loop.FORMAT - 1}, of another version of fastamp; takes {loop.FORMAT}: give another folder"
    with pytest.raises(ValueError, match=message):
        train(short(corpus), tmp_path / "out")


def test_a_moved_data_folder_does_not_make_another_run_and_what_cannot_be_trained_takes_no_folder(tmp_path, corpus):
    corpus.rename(tmp_path / "moved")
    assert train(short(tmp_path / "moved"), tmp_path / "out").resumed_from == 14
    with pytest.raises(ValueError, match="hidden_size counts both directions and must be even, got 7"):
        train(short(tmp_path / "moved", model="bilstm", hidden_size=7), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, corpus):
    last = tmp_path / "out" / "last.pt"
    whole = last.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    for content in (flipped, whole[:half], b"", b"not a checkpoint"):
        last.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(str(last))} is damaged \(.+\); delete it to start over$"):
            train(short(corpus), tmp_path / "out")


@pytest.mark.parametrize("change", ["objective", "mixing", "rng", "at"])
def test_a_checkpoint_that_lacks_a_part_is_refused_by_name(tmp_path, corpus, change):
    last = tmp_path / "out" / "last.pt"
    state = checkpoint.load_tensors(last)
    del state[change]
    checkpoint.save_tensors(last, state)
    with pytest.raises(ValueError, match=rf"{re.escape(str(last))} is damaged .*{change}.*; delete it to"):
        train(short(corpus), tmp_path / "out")


@pytest.mark.parametrize("change", ["no model", "no file of ours", "another model"])
def test_a_damaged_best_model_is_refused_by_name_and_says_what_to_do(tmp_path, corpus, change):
    best = tmp_path / "out" / "best.pt"
    content = {"no model": {}, "another model": {"model": {"weight": torch.ones(2)}}}.get(change)
    best.write_bytes(b"text") if content is None else checkpoint.save_tensors(best, content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(best))} is damaged \(.+\); delete .*out to start the run"):
        loss_curves(short(corpus, method="sent-mixup"), tmp_path / "out")


def test_other_damage_to_a_run_is_refused_by_name(tmp_path, corpus):
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        train(short(corpus), out, listener=Kill())
    (out / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged \(0 bytes, fewer than .*delete \S*last.pt to"):
        train(short(corpus), out)
    (out / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged \(.+\); put it back from a copy, or give another"):
        train(short(corpus), out)
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match=r"metrics.jsonl without a config.json"):
        train(short(corpus), out)
