"""Small training runs, what may kill them, and whether two of them came to the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastamp.training import Listener, TrainConfig, checkpoint

CLOCK = ("steps_per_s", "seconds", "window_seconds", "offset")


def write_corpus(folder: Path) -> Path:
    """A small two-class corpus of three to eight words a sentence."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(50, (80, 8), generator=generator).tolist()
    lines = [f"{i % 2}\t{' '.join(f'w{w}' for w in row[: 3 + i % 6])}\n" for i, row in enumerate(words)]
    (folder / "mr").mkdir(parents=True)
    (folder / "mr" / "all.tsv").write_text("label\ttext\n" + "".join(lines))
    return folder


def short(corpus: Path, **fields) -> TrainConfig:
    """A run of moments on that corpus, evaluated and saved at different steps."""
    fields = {
        "steps": 14,
        "eval_every": 3,
        "checkpoint_every": 4,
        "batch_size": 10,
        "embedding_dim": 8,
        "lr": 1e-3,
        "threads": 1,
        **fields,
    }
    return TrainConfig(dataset="mr", data_dir=str(corpus), **fields)


def records(out: Path) -> list[dict]:
    """metrics.jsonl without the times."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def assert_same(ours, theirs, where="") -> None:
    """Bitwise equality of nested checkpoints, times aside."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours.keys() - set(CLOCK):
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    else:
        assert ours == theirs, where


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Equality of all that two folders hold, times aside."""
    assert records(ours) == records(theirs)
    for name in ("best.pt", "last.pt"):
        assert_same(checkpoint.load_tensors(ours / name), checkpoint.load_tensors(theirs / name), name)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test catches it."""


class Kill(Listener):
    """Kills a run after a step."""

    def __init__(self, step: int = 11) -> None:
        self.step = step

    def on_step(self, step, loss):
        if step == self.step:
            raise Killed


def tiny_encoder(folder: Path) -> Path:
    """Saves a random BERT that drops out, and a tokenizer that knows most words of the corpus."""
    transformers = pytest.importorskip("transformers")
    import hf_models

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]
    torch.manual_seed(1)
    config = transformers.BertConfig(**{**hf_models.TEXT, "vocab_size": len(words)})
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder
