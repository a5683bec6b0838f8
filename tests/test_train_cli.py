"""A run's configuration, and `fastamp train`."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastamp.cli import main
from fastamp.cli.train import TrainDisplay
from fastamp.training import TrainConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"dataset": "imdb"}, ValueError, "unknown dataset 'imdb'; takes one of questions, trec"),
        ({"model": "lstm"}, ValueError, "unknown model 'lstm'; takes one of textcnn"),
        ({"method": "amp"}, ValueError, "unknown method 'amp'; takes one of none, double-softmax, word-mixup"),
        ({"steps": 10.0}, TypeError, "steps must be int, got 10.0"),
        ({"steps": True}, TypeError, "steps must be int, got True"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be from 0 to 4294967295, got -1"),
        ({"lr": 0.0}, ValueError, "lr must be above 0, got 0"),
        ({"lr": "fast"}, TypeError, "lr must be float, got 'fast'"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"alpha": 0}, ValueError, "alpha must be above 0"),
        ({"step_size": -0.1}, ValueError, "step_size must be finite and at least 0, got -0.1"),
        ({"dropout": 1.0}, ValueError, "dropout must be below 1, got 1.0"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"data_dir": 3}, TypeError, "data_dir must be str or None, got 3"),
        ({"device": None}, TypeError, "device must be str, got None"),
        ({"dataset": "mr", "fold": 10}, ValueError, "fold must be from 0 to 9, got 10"),
        ({"fraction": 0.0}, ValueError, "fraction must be above 0 and at most 1, got 0"),
        ({"preset": "fast"}, ValueError, "unknown preset 'fast'; takes one of default, paper, official"),
        ({"preset": "official"}, ValueError, "preset is for methods that mix by AMPLoss, not for 'none'"),
        ({"pass_dropout": "none"}, ValueError, "unknown pass_dropout 'none'; takes one of shared, redrawn, None"),
        ({"method": "sent-mixup", "pass_dropout": "redrawn"}, ValueError, "pass_dropout is for methods with an adver"),
        ({"reweight": "moving"}, ValueError, "reweight is for methods with an adversarial step, not for 'none'"),
        ({"freeze_vectors": True}, ValueError, "freeze_vectors needs vectors"),
        ({"freeze_vectors": 1}, TypeError, "freeze_vectors must be bool, got 1"),
        ({"model": "bert"}, ValueError, "model 'bert' needs pretrained: the name or folder of an encoder"),
        ({"pretrained": "x"}, ValueError, "pretrained is for model 'bert', not for 'textcnn'"),
        ({"model": "bert", "pretrained": "x", "vectors": "v"}, ValueError, "vectors is for models over words, not for"),
        ({"model": "bert", "pretrained": "x", "dropout": 0.1}, ValueError, "dropout is for models over words, not for"),
        ({"hidden_size": 8}, ValueError, "hidden_size is for model 'bilstm', not for 'textcnn'"),
        ({"alpha": 0.2}, ValueError, "alpha is for methods that mix, not for 'none'"),
        ({"method": "sent-mixup", "step_size": 0.1}, ValueError, "step_size is for methods with an adversarial step"),
        ({"capture": True}, ValueError, "capture needs a cuda device, got device 'cpu'"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TrainConfig(**fields)


def invoke(*arguments: object):
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def test_command_trains_then_reports_the_finished_run_and_continues_it_by_more_steps(tmp_path):
    arguments = ("--method", "sent-mixup", "--eval-every", 2, "--embedding-dim", 8, "--out", tmp_path / "out")
    first = invoke("--steps", 4, *arguments)
    assert first.exit_code == 0, first.output
    lines = first.output.splitlines()
    assert re.fullmatch(r"step 2  loss [\d.]+  dev error [\d.]+%  [\d.]+ steps/s", lines[0])
    assert re.fullmatch(r"test error [\d.]+% at step \d, where dev error is least \([\d.]+%\)", lines[2])
    second = invoke("--steps", 4, *arguments)
    assert second.exit_code == 0
    assert second.output.splitlines() == [f"{tmp_path / 'out'} holds this run, finished", *lines[2:]]
    longer = invoke("--steps", 6, *arguments)
    assert longer.exit_code == 0, longer.output
    assert longer.output.splitlines()[0] == "resuming at step 4 of 6"
    assert "after step 6: " in longer.output


@pytest.mark.parametrize(("step", "goes_on"), [(3, "this begins again, from step 0"), (7, "this goes on from step 6")])
def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch, step, goes_on):
    def interrupt(self, at, loss):
        if at == step:
            raise KeyboardInterrupt

    out = tmp_path / "my runs"
    arguments = ("--method", "sent-amp", "--steps", 9, "--eval-every", 9, "--checkpoint-every", 6, "--embedding-dim", 8)
    with monkeypatch.context() as patch:
        patch.setattr(TrainDisplay, "on_step", interrupt)
        result = invoke(*arguments, "--out", out)
    assert result.exit_code == 130
    told, _, command = result.output.splitlines()[-1].rpartition(": ")
    assert told == f"interrupted; {goes_on}"
    assert command == f"fastamp train {' '.join(map(str, arguments))} --out '{out}'"
    again = CliRunner().invoke(main, shlex.split(command)[1:])
    assert again.exit_code == 0, again.output
    assert ("resuming at step 6 of 9" in again.output) == (step == 7)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing option '--out'"),
        (("--dataset", "imdb"), 2, "'imdb' is not one of 'questions', 'trec'"),
        (("--model", "lstm"), 2, "'lstm' is not"),
        (("--method", "amp"), 2, "'amp' is not one of 'none', 'double-softmax', 'word-mixup'"),
        (("--steps", "many"), 2, "'many' is not a valid integer"),
        (("--steps", "-3"), 1, "steps must be at least 1, got -3"),
        (("--dataset", "trec", "--data-dir", "absent"), 1, os.path.join("absent", "trec", "train.tsv")),
        (("--vectors", "absent.txt"), 1, "cannot read absent.txt"),
        (("--device", "gpu"), 1, "device 'gpu' cannot be used"),
    ],
)
def test_bad_commands_end_in_one_line_and_a_failure_code(tmp_path, arguments, code, message):
    out = ("--out", tmp_path / "out") if arguments else ()
    result = invoke(*arguments, *out)
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    *usage, last = result.output.strip().splitlines()
    assert last.startswith("Error: ")
    assert message in last
    assert bool(usage) == (code == 2)


def test_a_file_in_the_place_of_the_folder_is_an_error_of_one_line(tmp_path):
    (tmp_path / "out").write_text("")
    result = invoke("--out", tmp_path / "out")
    assert (result.exit_code, result.output) == (1, f"Error: {tmp_path / 'out'} is not a folder\n")


def test_help_lists_the_commands_without_importing_them():
    code = (
        "import sys, fastamp\n"
        "heavy = {'fastamp.data', 'fastamp.models', 'fastamp.training', 'rich', 'click'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from fastamp.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "heavy -= {'click'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    for command in ("train", "check", "bench", "demo"):
        assert re.search(rf"^  {command} ", output.stdout, re.MULTILINE)
