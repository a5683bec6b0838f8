"""The paper's runs in parallel processes."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from paper_runs import InThisProcess

from fastamp.paper import runner, worker
from fastamp.paper.plan import METHODS, Method, Run
from fastamp.paper.progress import Rates
from fastamp.paper.results import LINES, RUNS, claim, read
from fastamp.paper.runner import Display, Options, execute_all
from fastamp.paper.worker import Job
from fastamp.training import Listener, train

ROOT = Path(__file__).parents[1]
SMALL = {"embedding_dim": 8, "lr": 1e-3, "checkpoint_every": 5}
OPTIONS = Options(steps=60, eval_every=5, overrides=SMALL)


def run_of(method: str, seed: int = 0) -> Run:
    return Run("questions", "cnn-rand", method, 1.0, seed)


RUNS_ASKED = [run_of("none"), run_of("sent-amp")]


def whole_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LINES).read_text().splitlines()]


def numbers(folder: Path) -> dict[str, dict]:
    """What finished runs say, by key, without what time and place decide."""

    def timeless(record: dict) -> dict:
        return {name: value for name, value in record.items() if name not in ("steps_per_s", "resumed_from")}

    return {
        line["key"]: {
            "config": line["config"],
            "result": timeless(line["result"]),
            "history": [timeless(record) for record in line["history"]],
            "curves": line["curves"],
        }
        for line in read(folder).records
        if line["status"] == "done"
    }


def execute(folder: Path, runs, options=OPTIONS, **arguments):
    with claim(folder, options.settings(runs), "a test") as writer:
        return execute_all(runs, options, writer, **arguments)


# Configurations


def test_a_methods_own_fields_win_over_those_of_all_runs():
    options = Options(overrides={"alpha": 0.7}, steps=9)
    assert options.config(run_of("sent-amp@alpha=0.2")).alpha == 0.2
    config = options.config(Run("questions", "cnn-rand", "sent-amp", 0.5, 3))
    assert (config.alpha, config.steps, config.fraction, config.seed) == (0.7, 9, 0.5, 3)


def test_vectors_and_encoders_go_to_the_models_that_use_them():
    options = Options(vectors="glove.txt", pretrained="encoder")
    configs = [options.config(Run("questions", model, "none", 1.0, 0)) for model in ("cnn-rand", "lstm-glove", "bert")]
    assert [config.vectors for config in configs] == [None, "glove.txt", None]
    assert [config.pretrained for config in configs] == [None, None, "encoder"]


def test_what_a_model_needs_is_asked_for_by_name(monkeypatch):
    with pytest.raises(ValueError, match=r"cnn-glove needs vectors: give --vectors"):
        Options().config(Run("questions", "cnn-glove", "none", 1.0, 0))
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bert needs the package transformers"):
        Options().config(Run("questions", "bert", "none", 1.0, 0))


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", r"torch finds \d+ CUDA devices here"), ("gpu", "'gpu' cannot be used"), ("meta", "takes cpu or cuda")],
)
def test_a_device_that_is_not_there_is_refused_before_any_run(device, message):
    with pytest.raises(ValueError, match=message):
        Options(device=device)


def test_the_digests_of_vectors_and_of_an_encoder_are_those_of_the_files_and_not_of_the_path(tmp_path, encoder):
    runs = [Run("questions", model, "none", 1.0, 0) for model in ("cnn-glove", "bert")]
    settings = []
    for name, text in (("one", "a 1 2\n"), ("two", "a 1 2\n"), ("three", "a 1 3\n")):
        folder = tmp_path / name
        shutil.copytree(encoder, folder)
        (folder / "README.md").write_text(text)
        (tmp_path / f"{name}.txt").write_text(text)
        settings.append(Options(vectors=f"{folder}.txt", pretrained=str(folder)).settings(runs))
    assert settings[0] == settings[1]
    assert settings[0]["vectors"] != settings[2]["vectors"]
    assert settings[0]["pretrained"] != settings[2]["pretrained"]


def test_the_digest_of_the_data_sees_the_case_of_the_texts(tmp_path):
    (tmp_path / "trec").mkdir()
    digests = set()
    for question in ("Who ?", "who ?", "Who  ?"):
        for part in ("train", "test"):
            lines = "".join(f"{i % 6}\t{question}\n" for i in range(60))
            (tmp_path / "trec" / f"{part}.tsv").write_text("label\ttext\n" + lines)
        run = Run("trec", "cnn-rand", "none", 1.0, 0)
        digests.add(Options(data_dir=str(tmp_path)).settings([run])["data"]["trec"])
    assert len(digests) == 3


def test_an_override_goes_to_the_runs_that_use_it_and_one_that_none_uses_is_told():
    options = Options(overrides={"hidden_size": 8, "alpha": 0.5})
    runs = [Run("questions", model, "none", 1.0, 0) for model in ("cnn-rand", "lstm-rand")]
    assert [options.config(run).hidden_size for run in runs] == [1024, 8]
    assert options.notices(runs) == ["no run here uses alpha, which is for methods that mix, not for 'none'"]
    assert options.notices([*runs, run_of("sent-amp")]) == []


# Runs. Every process costs seconds, so a folder serves several tests, all in one worker of pytest's.

together = pytest.mark.xdist_group("paper runner")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder of undisturbed runs in this process, one after the other, the first of which diverges."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_Worker", InThisProcess)
        patch.setitem(METHODS, "broken", Method("Diverges", {"method": "sent-amp", "lr": 1e30}))
        progress = execute(folder, [run_of("broken"), *RUNS_ASKED])
    assert (progress.total, progress.done, progress.failed, progress.active) == (3, 3, 1, ())
    assert progress.steps_done == progress.steps == 3 * 60
    return folder


@together
def test_a_run_that_diverges_is_recorded_as_failed_and_the_others_go_on(whole):
    failed, *done = read(whole).records
    assert (failed["key"], failed["status"]) == ("questions/cnn-rand/broken/1/0", "failed")
    assert failed["error"].startswith("DivergedError: the logits became NaN or infinite at step ")
    assert "lr is 1e+30" in failed["error"]
    assert "Traceback" in failed["traceback"]
    assert [(line["key"], line["status"]) for line in done] == [(run.key, "done") for run in RUNS_ASKED]


@together
def test_a_line_says_what_the_run_was_and_what_it_came_to(whole):
    line = read(whole).records[2]
    assert [line[name] for name in ("dataset", "model", "method", "ratio", "seed")] == [
        "questions",
        "cnn-rand",
        "sent-amp",
        1.0,
        0,
    ]
    assert line["config"] == OPTIONS.config(RUNS_ASKED[1]).to_dict()
    assert [record["step"] for record in line["history"]] == list(range(5, 61, 5))
    assert all(0 < record["mix/lam_shift"] <= 2.001e-3 for record in line["history"])
    assert line["result"]["test_error"] == next(
        record["test_error"] for record in line["history"] if record["step"] == line["result"]["best_step"]
    )
    assert len(line["curves"]["lam"]) == len(line["curves"]["sentence"]["mean"]) == 21
    assert line["machine"]["threads"] == 1
    assert line["seconds"] > 0
    assert not (whole / RUNS).exists()


@together
def test_finished_runs_are_not_repeated_and_failed_ones_on_request(whole, tmp_path):
    for name in ("settings.json", LINES):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    leftover = tmp_path / RUNS / RUNS_ASKED[0].key
    leftover.mkdir(parents=True)
    progress = execute(tmp_path, RUNS_ASKED)
    assert (progress.done, progress.steps) == (2, 0)
    assert not (tmp_path / RUNS).exists()
    assert (tmp_path / LINES).read_bytes() == (whole / LINES).read_bytes()

    records = {line["key"]: line for line in read(tmp_path).records}
    broken = run_of("broken")
    assert [runner.is_kept(run, records, False) for run in (broken, *RUNS_ASKED)] == [True, True, True]
    assert [runner.is_kept(run, records, True) for run in (broken, *RUNS_ASKED)] == [False, True, True]
    assert not runner.is_kept(run_of("none", seed=1), records, False)


@together
def test_a_worker_that_is_killed_fails_its_run_alone_and_the_number_of_jobs_changes_no_number(
    whole, tmp_path, monkeypatch
):
    class KillOne(Display):
        killed = 0

        def polled(self, progress):
            if not self.killed:
                self.killed = multiprocessing.active_children()[0].pid
                os.kill(self.killed, signal.SIGKILL)

    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    progress = execute(tmp_path, RUNS_ASKED, jobs=2, display=KillOne())
    assert (progress.done, progress.failed) == (2, 1)
    assert not multiprocessing.active_children()
    (failed,) = (line for line in read(tmp_path).records if line["status"] == "failed")
    assert failed["error"] == "its process was killed by SIGKILL, perhaps for want of memory"
    assert failed["machine"].keys() == {"device", "torch", "fastamp", "threads"}
    progress = execute(tmp_path, RUNS_ASKED, jobs=2, retry_failed=True)
    assert (progress.done, progress.failed) == (2, 0)
    assert len(whole_lines(tmp_path)) == 3
    assert numbers(tmp_path) == numbers(whole)


class Unreadable:
    """Cannot be unpickled, as where a package is broken."""

    def __reduce__(self):
        return int, ("unreadable",)


@together
def test_a_job_that_the_worker_cannot_read_is_a_failed_run_with_its_traceback(tmp_path):
    process = runner._Worker()
    try:
        job = Job(run_of("none"), OPTIONS.config(run_of("none")), tmp_path)
        process.job, process.began = job, time.monotonic()
        process.connection.send(Unreadable())
        line = process.take()
    finally:
        process.end()
    assert (line["key"], line["status"]) == (job.run.key, "failed")
    assert line["error"] == "ValueError: invalid literal for int() with base 10: 'unreadable'"
    assert "Traceback" in line["traceback"]


@together
def test_an_interrupt_ends_all_workers_at_once(tmp_path, monkeypatch):
    class Interrupt(Display):
        def polled(self, progress):
            assert [run.key for run in progress.active] == [run.key for run in RUNS_ASKED]
            raise KeyboardInterrupt

    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, RUNS_ASKED, jobs=2, display=Interrupt())
    assert not multiprocessing.active_children()
    assert read(tmp_path).records == ()


@together
def test_a_runner_that_is_killed_leaves_no_worker_and_goes_on_to_the_same_lines(whole, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    under_way = folder / RUNS / RUNS_ASKED[1].key
    code = f"""
import multiprocessing, os, signal, sys, threading
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from fastamp.training import loop
from test_paper_runner import RUNS_ASKED, execute
if __name__ == "__main__":
    execute(Path({str(folder)!r}), RUNS_ASKED)
save_tensors = loop.save_tensors
def save(path, value):
    save_tensors(path, value)
    if path == Path({str(under_way / "last.pt")!r}):
        os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
        threading.Event().wait()
loop.save_tensors = save  # of the worker, for which this is no main program
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    killed = subprocess.run([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    # The worker holds this lock as long as it lives.
    with FileLock(under_way / worker.LOCK):
        pass
    assert (under_way / "last.pt").exists()
    assert [line["key"] for line in read(folder).records] == [RUNS_ASKED[0].key]
    with open(folder / LINES, "a") as file:
        file.write('{"format": 1, "key": "')
    monkeypatch.setattr(runner, "_Worker", InThisProcess)
    execute(folder, RUNS_ASKED)
    assert [line["key"] for line in whole_lines(folder)] == [run.key for run in RUNS_ASKED]
    resumed = read(folder).records[1]
    assert resumed["status"] == "done", resumed
    assert resumed["result"]["resumed_from"] == 5
    assert numbers(folder) == numbers(whole)
    assert not (folder / RUNS).exists()


@together
def test_the_progress_of_a_command_tells_the_time_left(whole, tmp_path, monkeypatch):
    class Seen(Display):
        left = ()

        def ended(self, line, progress):
            self.left += (progress.unknown,)

    for name in ("settings.json", LINES):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    monkeypatch.setattr(runner, "_Worker", InThisProcess)
    display = Seen()
    asked = [run_of(method, 1) for method in ("none", "word-amp", "word-mixup")]
    progress = execute(tmp_path, asked, display=display)
    assert display.left == (0, 0, 0)
    assert progress.seconds_left == 0


def test_the_time_left_is_told_from_the_first_finished_run_of_the_nearest_kind():
    def finished(model: str, method: str, loss: str, rate: int) -> dict:
        fields = {"status": "done", "model": model, "method": method, "seconds": 1.0}
        return {**fields, "config": {"device": "cpu", "method": loss}, "result": {"steps": rate, "resumed_from": 0}}

    def left(rates: Rates, method: str, model: str = "cnn-rand") -> tuple[float, int]:
        return rates.left([], {Run("trec", model, method, 1.0, 0): 120}, 1)

    rates = Rates([], "cpu")
    assert left(rates, "sent-amp") == (0.0, 1)
    rates.keep(finished("cnn-rand", "none", "none", 60))
    assert left(rates, "sent-amp") == (2.0, 0)
    assert left(rates, "sent-amp", "lstm-rand") == (0.0, 1)
    rates.keep(finished("cnn-rand", "sent-amp@alpha=0.2", "sent-amp", 40))
    rates.keep(finished("cnn-rand", "word-amp", "word-amp", 10))
    assert left(rates, "sent-amp") == (3.0, 0)
    rates.keep(finished("cnn-rand", "sent-amp", "sent-amp", 30))
    assert left(rates, "sent-amp") == (4.0, 0)
    assert left(rates, "none") == (2.0, 0)
    rates.keep({**finished("cnn-rand", "none", "none", 1), "config": {"device": "cuda", "method": "none"}})
    assert left(rates, "none") == (2.0, 0)


# A worker's part, in this process


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A saved BERT of two narrow layers, whose tokenizer knows few words."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "what", "is", "the"]
    narrow = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **narrow)).save_pretrained(path)
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(path)
    return path


@pytest.mark.parametrize("method", ["word-amp", "nonlinear-mixup"])
def test_bert_is_run_from_a_folder(tmp_path, encoder, method):
    run = Run("questions", "bert", method, 1.0, 0)
    options = Options(steps=2, eval_every=2, pretrained=str(encoder))
    line = worker.execute(Job(run, options.config(run), tmp_path))
    assert line["status"] == "done", line
    assert (line["config"]["batch_size"], line["config"]["lr"]) == (24, 1e-5)
    assert (line["curves"] is None) == (method == "nonlinear-mixup")
    assert line["curves"] is None or line["curves"].keys() == {"lam", "word", "sentence"}


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test catches it."""


class KillAt(Listener):
    def stepped(self, step, loss):
        if step == 8:
            raise Killed


@pytest.mark.parametrize(("device", "resumed_from"), [("cpu", 5), ("cuda:3", 0)])
def test_a_run_under_way_on_another_device_is_started_over(tmp_path, device, resumed_from):
    run = run_of("sent-amp")
    config = Options(steps=10, eval_every=5, overrides=SMALL).config(run)
    with pytest.raises(Killed):
        train(config, tmp_path, listener=KillAt())
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "device": device}))
    line = worker.execute(Job(run, config, tmp_path))
    assert line["status"] == "done", line
    assert line["result"]["resumed_from"] == resumed_from
    assert [record["step"] for record in line["history"]] == [5, 10]


def test_a_damaged_line_of_a_runs_metrics_is_a_failed_run_that_names_it_and_says_what_to_do(tmp_path):
    run = run_of("none")
    config = Options(steps=10, eval_every=5, overrides=SMALL).config(run)
    train(config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]))
    line = worker.execute(Job(run, config, tmp_path))
    assert line["status"] == "failed"
    assert f"{tmp_path / 'metrics.jsonl'}, line 2 is damaged (" in line["error"]
    assert line["error"].endswith("; --retry-failed makes the run again")


def test_a_device_that_cannot_be_used_is_a_failed_run(tmp_path):
    run = run_of("none")
    line = worker.execute(Job(run, replace(OPTIONS.config(run), device="cuda:99"), tmp_path))
    assert line["status"] == "failed"
    assert line["error"].startswith("ValueError: device 'cuda:99' cannot be used")
    assert line["machine"]["device"] == "cuda:99"
