"""The README's code does what it says, as written, with the names that it leaves to the reader."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(first_line: str) -> str:
    """The Python block that begins with a line."""
    found = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if code.startswith(first_line)]
    assert len(found) == 1, f"{len(found)} blocks begin with {first_line!r}"
    return found[0]


class Classifier(nn.Module):
    """A model of the reader's, in the parts that the README names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def classify(self, embedded, mask):
        return self.head((embedded * mask.unsqueeze(-1)).tanh().sum(1))

    def forward(self, x):
        return self.classify(self.embed(x), x != 0)


def given() -> dict:
    x = torch.randint(1, 20, (6, 5))
    x[:3, 3:] = 0
    return {"model": Classifier(), "x": x, "mask": x != 0, "y": torch.randint(3, (6,))}


def test_the_criterion():
    names = given()
    exec(block("import fastamp\n\ncriterion = "), names)
    assert names["model"].head.weight.grad.any()
    assert not names["criterion"].training


def test_any_layer():
    import fastamp

    names = {**given(), "criterion": fastamp.AMPLoss()}
    exec(block("h = model.embed(x)"), names)
    assert names["model"].embed.weight.grad.any()


def test_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import fastamp

    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    rows = [{"input_ids": torch.randint(1, 30, (6,)), "labels": row % 2} for row in range(8)]
    names = {
        "fastamp": fastamp,
        "Trainer": transformers.Trainer,
        "model": transformers.BertForSequenceClassification(config),
        "args": transformers.TrainingArguments(
            str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no"
        ),
        "rows": rows,
    }
    code = block("loss = fastamp.hf.sent_loss").replace("train_dataset=...", "train_dataset=rows")
    assert code.count("trainer = ") == 2
    exec(code.replace("\n\ntrainer", "\ntrainer.train()\ntrainer") + "\ntrainer.train()\n", names)
