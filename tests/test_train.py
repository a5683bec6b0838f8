"""Training: resuming, results, batches."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from runs import Kill, Killed, assert_same, assert_same_run, records, short, tiny_encoder, write_corpus

from fastamp.cli import main
from fastamp.data import Vocabulary
from fastamp.training import METHODS, DivergedError, Listener, TrainConfig, checkpoint, loop, train
from fastamp.training.batches import Batches, Examples, error_rate
from fastamp.training.task import Task


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "data")


# Resuming


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to kill")
def test_a_run_killed_in_the_middle_resumes_by_the_same_command_to_the_same_weights_and_metrics(tmp_path, corpus):
    class KillProcess(Listener):
        def on_step(self, step, loss):
            if step == 11:
                os.kill(os.getpid(), signal.SIGKILL)

    config = short(corpus, method="sent-amp", seed=3)
    options = "--dataset mr --method sent-amp --seed 3 --steps 14 --eval-every 3 --checkpoint-every 4 --threads 1"
    options += " --batch-size 10 --embedding-dim 8 --lr 1e-3"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    train(config, whole)
    given = {"target": train, "args": (config, killed), "kwargs": {"listener": KillProcess()}}
    process = multiprocessing.get_context("fork").Process(**given)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.load_tensors(killed / "last.pt")["at"]["step"] == 8
    command = ["train", *options.split(), "--data-dir", str(corpus), "--out", str(killed)]
    result = CliRunner().invoke(main, command)
    assert "resuming at step 8 of 14" in result.output.splitlines(), result.output
    assert_same_run(killed, whole)


def test_a_run_killed_before_or_after_any_disk_operation_resumes_to_the_same_result(tmp_path, corpus, monkeypatch):
    config = short(corpus, method="word-amp", steps=7)
    expected = train(config, tmp_path / "whole")
    operations = 0
    deadly = -1

    def guarded(function):
        def wrapper(*arguments, **options):
            nonlocal operations
            operations += 1
            if operations == deadly and deadly % 2:
                raise Killed
            value = function(*arguments, **options)
            if operations == deadly:
                raise Killed
            return value

        return wrapper

    for module, name in ((os, "replace"), (os, "fsync"), (torch, "save"), (checkpoint.MetricsLog, "append")):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    train(config, tmp_path / "count")
    total = operations
    assert total > 20
    for deadly in range(1, total + 1, 3):  # an odd one is not done any more
        out = tmp_path / f"{deadly}"
        operations = 0
        with pytest.raises(Killed):
            train(config, out)
        operations = total  # no second kill
        result = train(config, out)
        assert (result.best_step, result.test_error) == (expected.best_step, expected.test_error)
        assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [
        {"model": "bilstm", "method": "none", "clip_norm": 0.05},
        {"model": "bilstm", "method": "word-amp", "pass_dropout": "redrawn", "reweight": "moving"},
        {"model": "bert", "method": "word-amp"},
        {"model": "bert", "method": "nonlinear-mixup"},
        {"method": "sent-amp", "preset": "official", "fraction": 0.5},
        {"method": "word-maxop", "vectors": True, "freeze_vectors": True, "fold": 3},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_a_run_of_any_kind_resumes_to_the_same_weights_and_metrics(tmp_path, corpus, options):
    if options.get("model") == "bilstm":
        options = {"hidden_size": 8, **options}
    if options["method"].endswith(("-amp", "-maxop")):
        options = {"step_size": 0.3, **options}
    if options.get("model") == "bert":
        options |= {"pretrained": str(tiny_encoder(tmp_path / "encoder")), "embedding_dim": None}
    if "vectors" in options:
        (tmp_path / "vectors.txt").write_text("".join(f"w{i} {i} {-i} 0.5\n" for i in range(0, 50, 2)))
        options |= {"vectors": str(tmp_path / "vectors.txt"), "embedding_dim": None}
    config = short(corpus, **options)
    train(config, tmp_path / "whole")
    for step in (7, 11):  # resuming at 4 and at 8
        with pytest.raises(Killed):
            train(config, tmp_path / "out", listener=Kill(step))
    assert train(config, tmp_path / "out").resumed_from == 8
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("steps", [[14, 24], [12, 18, 24]], ids=str)
def test_a_finished_run_of_fewer_steps_continues_to_the_same_weights_and_metrics(tmp_path, corpus, steps):
    """And the metrics of the last step of before stay, where they would not have been taken."""
    *_, longest = configs = [short(corpus, method="sent-amp", steps=of) for of in steps]
    train(longest, tmp_path / "whole")
    results = [train(config, tmp_path / "out") for config in configs]
    assert [result.resumed_from for result in results] == [0, *steps[:-1]]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["steps"] == 24
    (*ours, final), (*theirs, _) = records(tmp_path / "out"), records(tmp_path / "whole")
    assert {record["step"] for record in ours} == {*range(3, 25, 3), *steps}
    assert (final["final"], final["steps"]) == (True, 24)
    ours_last, theirs_last = (checkpoint.load_tensors(tmp_path / name / "last.pt") for name in ("out", "whole"))
    for part in ("objective", "optimizer", "mixing", "batches", "rng"):
        assert_same(ours_last[part], theirs_last[part], part)
    if 14 not in steps:
        assert ours == theirs


def test_a_continued_run_that_is_killed_resumes_and_its_length_is_kept(tmp_path, corpus):
    train(short(corpus, steps=24), tmp_path / "whole")
    train(short(corpus, steps=12), tmp_path / "out")
    with pytest.raises(Killed):
        train(short(corpus, steps=24), tmp_path / "out", listener=Kill(18))
    with pytest.raises(ValueError, match=r"different: steps 12 \(there 24\)$"):
        train(short(corpus, steps=12), tmp_path / "out")
    assert train(short(corpus, steps=24), tmp_path / "out").resumed_from == 16
    assert records(tmp_path / "out") == records(tmp_path / "whole")


def test_a_damaged_checkpoint_of_a_finished_run_is_not_made_longer(tmp_path, corpus):
    train(short(corpus), tmp_path / "out")
    (tmp_path / "out" / "last.pt").write_bytes(b"")
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"last\.pt is damaged"):
        train(short(corpus, steps=24), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == before


def test_a_torn_line_of_the_metrics_is_cut_off_on_resuming(tmp_path, corpus):
    config = short(corpus)
    train(config, tmp_path / "whole")
    with pytest.raises(Killed):
        train(config, tmp_path / "out", listener=Kill())
    with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "train_l')
    assert train(config, tmp_path / "out").resumed_from == 8
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_finished_run_reports_its_result_without_training(tmp_path, corpus):
    class Refuse(Listener):
        def on_start(self, config, step):
            raise AssertionError

    config = short(corpus)
    first = train(config, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = train(config, tmp_path / "out", listener=Refuse())
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert (first.resumed_from, second.resumed_from) == (0, config.steps)
    assert second.steps_per_s == first.steps_per_s
    assert second.test_error == first.test_error


def test_the_same_seed_repeats_a_run_and_another_does_not(tmp_path, corpus):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(short(corpus, method="sent-amp", seed=seed), tmp_path / out)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert records(tmp_path / "a") != records(tmp_path / "c")


def test_training_leaves_global_random_state_and_threads_alone(tmp_path, corpus):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(short(corpus, method="sent-mixup", threads=threads + 1, steps=2), tmp_path / "out")
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()


@pytest.mark.parametrize("seed", [0, 7])
def test_a_runs_sources_of_randomness_do_not_repeat_each_others_numbers(tmp_path, corpus, monkeypatch, seed):
    seeds = {"splits": seed}
    manual_seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda of: seeds.update(weights=of) or manual_seed(of))
    monkeypatch.setattr(loop, "Batches", lambda examples, size, of: seeds.update(shuffling=of))
    config = short(corpus, method="sent-amp", seed=seed)
    run = loop._Run(config, tmp_path, torch.device("cpu"), Task.load(config, torch.device("cpu")))
    seeds["mixing"] = run.mixing.initial_seed()
    # By what is drawn: two seeds, and even two states, that differ may give the same numbers.
    drawn = {tuple(torch.rand(8, generator=torch.Generator().manual_seed(of)).tolist()) for of in seeds.values()}
    assert len(drawn) == len(seeds) == 4


# Results


@pytest.mark.parametrize("method", METHODS)
def test_the_records_of_every_method_hold_its_facts(tmp_path, corpus, method):
    train(short(corpus, method=method, steps=6), tmp_path / "out")
    *evaluations, final = records(tmp_path / "out")
    assert [record["step"] for record in evaluations] == [3, 6]
    mixing = {key for record in evaluations for key in record if key.startswith("mix/")}
    adversarial = method.endswith(("-amp", "-maxop"))
    if method.startswith(("word-", "sent-")):
        names = {"mix/lam", "mix/lam_shift", "mix/mask"} | ({"mix/grad_abs", "mix/delta"} if adversarial else set())
        assert mixing == names
        for record in evaluations:
            assert 0.1 < record["mix/lam"] < 0.9
            assert (record["mix/lam_shift"] > 0) == adversarial
            assert record["mix/lam_shift"] <= 2e-3 + 1e-7
            assert not adversarial or record["mix/grad_abs"] > 0
    else:
        assert not mixing
    best = min(evaluations, key=lambda record: record["dev_error"])
    assert final["final"] is True
    assert (final["best_step"], final["test_error"]) == (best["step"], best["test_error"])
    assert final["final_dev_error"] == evaluations[-1]["dev_error"]
    assert final["least_test_error"] == min(record["test_error"] for record in evaluations)


def test_a_model_learns_the_questions(tmp_path):
    """That every method has its loss is held by test_objectives and test_nonlinear_mixup."""
    fields = {"steps": 100, "lr": 5e-3, "embedding_dim": 50, "threads": 1, "eval_every": 100}
    # About 4% of the labels cannot be told from the text.
    assert 2 <= train(TrainConfig(method="word-amp", **fields), tmp_path / "out").test_error <= 25


def test_best_checkpoint_is_the_model_of_least_dev_error(tmp_path, corpus):
    result = train(short(corpus, steps=30), tmp_path / "out")
    best = checkpoint.load_tensors(tmp_path / "out" / "best.pt")
    assert best["record"]["step"] == result.best_step
    assert best["record"]["dev_error"] == result.best_dev_error
    assert best["model"]["embedding.weight"].shape == (len(best["words"]) + 2, 8)
    assert best["label_names"] == ["negative", "positive"]


def test_pre_trained_vectors_set_the_width_and_add_the_words_they_cover(tmp_path, corpus):
    lines = [f"w{i} {i} {-i} 0.5\n" for i in range(50) if i % 2]
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("".join(lines))
    config = short(corpus, vectors=str(vectors), embedding_dim=None, steps=1)
    result = train(config, tmp_path / "out")
    assert 40 < result.types_covered < 60
    best = checkpoint.load_tensors(tmp_path / "out" / "best.pt")
    assert best["model"]["embedding.weight"].shape[1] == 3
    row = best["words"].index("w49") + 2
    torch.testing.assert_close(best["model"]["embedding.weight"][row], torch.tensor([49, -49, 0.5]), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match=r"embedding_dim is 8, but .*vectors\.txt has width 3"):
        train(short(corpus, vectors=str(vectors)), tmp_path / "other")


@pytest.mark.parametrize("method", ["none", "nonlinear-mixup", "word-mixup", "sent-amp"])
def test_a_diverging_run_stops_and_says_so(tmp_path, corpus, method):
    mixes = method.startswith(("word-", "sent-"))
    where = r"logits became NaN or infinite at step \d" if mixes else "between steps 1 and 3"
    with pytest.raises(DivergedError, match=rf"{where}; lr is 1e\+30"):
        train(short(corpus, method=method, lr=1e30), tmp_path / "out")
    assert not (tmp_path / "out" / "last.pt").exists()


# Batches


def test_an_epoch_holds_every_row_once_and_batches_are_trimmed():
    sentences = tuple(tuple("abcdefg"[: 1 + i % 7]) for i in range(23))
    examples = Examples.of(Vocabulary.build(sentences).encode(sentences), range(23), torch.device("cpu"))
    batches = Batches(examples, 5, seed=0)
    drawn = iter(batches)
    for _ in range(3):
        epoch = [next(drawn) for _ in range(5)]
        assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == list(range(23))
        assert [len(labels) for _, labels in epoch] == [5, 5, 5, 5, 3]
        for ids, labels in epoch:
            assert ids.shape[1] == max(1 + label % 7 for label in labels.tolist())
            assert torch.equal(ids, examples.ids[labels][:, : ids.shape[1]])


@pytest.mark.parametrize("position", [0, 2, 5, 7])
def test_batches_continue_from_a_saved_position(position):
    examples = Examples.of(torch.ones(23, 1, dtype=torch.int64), range(23), torch.device("cpu"))
    batches = Batches(examples, 5, seed=0)
    drawn = iter(batches)
    for _ in range(position):
        next(drawn)
    other = Batches(examples, 5, seed=1)
    other.load_state_dict(batches.state_dict())
    for _, (ours, theirs) in zip(range(8), zip(iter(other), drawn, strict=False), strict=False):
        assert torch.equal(ours[1], theirs[1])


def test_error_rate_counts_over_chunks_of_any_size(monkeypatch):
    monkeypatch.setattr("fastamp.training.batches.EVAL_BATCH", 4)
    ids = Vocabulary(["x"]).encode([["x"] * (1 + i % 5) for i in range(10)])
    examples = Examples.of(ids, [i % 3 for i in range(10)], torch.device("cpu")).by_length()
    assert error_rate(lambda ids: torch.eye(3)[0].expand(len(ids), 3), examples) == 60.0
