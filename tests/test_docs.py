"""README.md and docs/ do what they say: their Python runs, their commands exist, their numbers are the results'."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import nn

import fastamp
from fastamp.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *(ROOT / "docs").glob("*.md")]
INCLUDED = re.compile(r'--8<-- "(.*)"\n')


def blocks(page: Path, language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


# What a page leaves to its reader.


class Classifier(nn.Module):
    """A model in the parts that the pages name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dropout, self.classifier = nn.Embedding(20, 8), nn.Dropout(), nn.Linear(8, 3)

    def encode(self, x):
        return self.embed(x).tanh().sum(1)

    def classify(self, embedded, mask):
        return self.classifier((embedded * mask.unsqueeze(-1)).tanh().sum(1))

    def forward(self, x):
        return self.classify(self.embed(x), x != 0)


def a_model(_: Path) -> dict[str, Any]:
    x, y = torch.randint(1, 20, (6, 5)), torch.randint(3, (6,))
    x[:3, 3:] = 0
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rest = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(40, 3))
    return {
        "model": model,
        "criterion": fastamp.AMPLoss(),
        "x": x,
        "y": y,
        "mask": x != 0,
        "f_module": rest,
        "optimizer": optimizer,
        "batches": [(x, y), (x[:2], y[:2])],
    }


def a_bert(folder: Path) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    importlib.import_module("fastamp.hf")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    bert = transformers.BertForSequenceClassification(config)
    ids = torch.randint(1, 30, (8, 6))
    args = transformers.TrainingArguments(str(folder), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    return {
        "fastamp": fastamp,
        "Trainer": transformers.Trainer,
        "bert": bert,
        "args": args,
        "dataset": [{"input_ids": row, "labels": number % 2} for number, row in enumerate(ids)],
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "labels": torch.arange(8) % 2,
    }


SETUPS: dict[str, list[Callable[[Path], dict[str, Any]]]] = {
    "README.md": [a_bert, a_model],
    "index.md": [a_bert],
    "any-layer.md": [a_model],
    "hugging-face.md": [lambda folder: (given := a_bert(folder)) | {"model": given["bert"]}],
    "faq.md": [a_model],
}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names: dict[str, Any] = {}
    for setup in SETUPS.get(page.name, []):
        names |= setup(tmp_path)
    for code in blocks(page, "python"):
        if not INCLUDED.fullmatch(code):  # a program, see below
            exec(compile(code, str(page), "exec"), names)


def test_what_a_page_includes_is_there_and_programs_are_tested() -> None:
    tested = (ROOT / "tests" / "test_examples.py").read_text(encoding="utf-8")
    included = [name for page in PAGES for name in INCLUDED.findall(page.read_text(encoding="utf-8"))]
    programs = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert programs == {Path(name).stem for name in included if name.startswith("examples/")}
    for name in included:
        assert (ROOT / name.partition(":")[0]).is_file()
    for program in programs:
        assert f'"{program}"' in tested


def commands(page: Path) -> list[str]:
    """The page's command lines: those of its blocks of bash, and what is indented as code and begins as one."""
    text = page.read_text(encoding="utf-8")
    lines = [line for code in blocks(page, "bash") for line in code.replace("\\\n", "").splitlines()]
    lines += re.findall(r"^    ((?:pip|python|fastamp|pytest|ruff) .*)$", text, re.MULTILINE)
    lines += re.findall(r"`(fastamp [a-z][^`]*)`", text)
    return [part for line in lines for part in line.partition(" #")[0].split("&&")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    known = ("pip", "pytest", "ruff", "mypy", "mkdocs", "torchrun", "accelerate", "bash", "pre-commit")
    for line in commands(page):
        first, *rest = shlex.split(line)
        scripts = [word for word in rest if word.endswith(".py") and word != "train.py"]
        assert all((ROOT / script).is_file() for script in scripts), line
        if first == "fastamp":
            check_fastamp(rest, line)
        elif first != "python":
            assert first in known, line


def check_fastamp(words: list[str], line: str) -> None:
    """Every subcommand and option of a `fastamp` line is one that the command line takes."""
    command: click.Command = main
    context = click.Context(command)
    for word in words:
        if word.startswith("-"):
            taken = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
            assert word in taken, line
        elif isinstance(command, click.Group) and (inner := command.get_command(context, word)) is not None:
            command = inner
    assert command is not main, line


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


LAYERS = ("AMPLoss.step", "AMP autograd", "AMP autograd, split", "AMP as published")
HEAD = ("AMPLoss", "AMP autograd", "AMP autograd", "AMP, official code")
COMPILED = ("AMPLoss", "AMPLoss, compiled", "AMP autograd", "AMP, official code")
TABLES = {  # by what a row begins with: the file of results, its workload, and the contenders of the columns
    "BERT 6x384, words mixed": ("-layers", "BERT 6x384, (24, 24)", LAYERS),
    "TextCNN, words mixed": ("-layers", "TextCNN, (50, 37)", LAYERS),
    "last layer alone, 1000 classes": ("", "(256, 2048) -> 1000", HEAD),
    "last layer alone, 6 classes": ("", "(50, 300) -> 6", HEAD),
    **{
        head.replace("->", "→"): ("", head, COMPILED)
        for head in ("(50, 300) -> 6", "(50, 1024) -> 2", "(24, 768) -> 5", "(24, 768) -> 2", "(256, 2048) -> 1000")
    },
}


def test_the_numbers_of_tables_are_those_of_the_results() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/performance.md"))
    found = re.findall(r"^\| (.*?)(?:: (time|memory) \| 1)? \| ([\d*].*) \|$", text, re.MULTILINE)
    assert {what for what, _, _ in found} == set(TABLES)
    for what, kind, cells in found:
        suite, workload, contenders = TABLES[what]
        path = ROOT / "bench" / "results" / f"cpu-amd-epyc-26-2{suite}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        measured = {row["contender"]: row for row in rows if row["workload"] == workload}
        for cell, contender in zip(cells.split("|"), contenders, strict=True):
            # Where nothing comes before the first non-linearity there is no other cut.
            row = measured.get(contender) or measured.get(contender.removesuffix(", split"))
            value = row and (row["peak_memory_ratio"] if kind == "memory" else row["ratio"]["both"]["q50"])
            assert cell.strip(" *") == (f"{value:.2f}" if value else ""), f"{what}, {kind}: {contender}"


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    pytest.importorskip("transformers")
    shown = set(re.findall(r"^::: (.*)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    for module in ("fastamp", "fastamp.functional", "fastamp.hf"):
        names = importlib.import_module(module).__all__
        assert shown >= {f"{module}.{name}" for name in names} - {"fastamp.functional", "fastamp.reference"}
