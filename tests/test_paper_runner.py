"""The paper's runs in parallel processes."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from paper_runs import InThisProcess
from runs import tiny_encoder

from fastamp.paper import runner, worker
from fastamp.paper.plan import METHODS, Method, Request, Run
from fastamp.paper.results import LINES, RUNS, claim, read
from fastamp.paper.runner import Display, Options, execute_all
from fastamp.paper.worker import Job
from fastamp.training import train

ROOT = Path(__file__).parents[1]
OPTIONS = Options(
    steps=20, eval_every=10, overrides={"embedding_dim": 8, "lr": 1e-3, "checkpoint_every": 5, "clip_norm": 9.0}
)


def run_of(method: str, seed: int = 0) -> Run:
    return Run("questions", "cnn-rand", method, 1.0, seed)


ASKED = [run_of("none"), run_of("sent-amp")]


def requested(*models: str, dataset: str = "questions") -> Request:
    return Request("table2", [dataset], models, ["none"], [1.0], [0])


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
    with claim(folder, options.specification(requested("cnn-rand"))) as writer:
        return execute_all(runs, options, writer, **{"curves": True, **arguments})


def copied(whole: Path, folder: Path, *keys: str) -> Path:
    """A copy of a results folder, with the lines of these keys."""
    folder.mkdir(exist_ok=True)
    shutil.copy(whole / "settings.json", folder)
    lines = (whole / LINES).read_text().splitlines(keepends=True)
    (folder / LINES).write_text("".join(line for line in lines if json.loads(line)["key"] in keys))
    return folder


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


def test_the_digests_of_vectors_and_of_an_encoder_are_those_of_the_files_and_not_of_the_path(tmp_path, encoder):
    data = []
    for name, text in (("one", "a 1 2\n"), ("two", "a 1 2\n"), ("three", "a 1 3\n")):
        folder = tmp_path / name
        shutil.copytree(encoder, folder)
        (folder / "README.md").write_text(text)
        (tmp_path / f"{name}.txt").write_text(text)
        options = Options(vectors=f"{folder}.txt", pretrained=str(folder))
        data.append(options.specification(requested("cnn-glove", "bert"))["data"])
    assert data[0] == data[1]
    assert data[0].keys() == {"questions", "vectors", "pretrained"}
    assert data[0]["vectors"] != data[2]["vectors"]
    assert data[0]["pretrained"] != data[2]["pretrained"]


def test_the_digest_of_the_data_sees_the_case_of_the_texts(tmp_path):
    (tmp_path / "trec").mkdir()
    digests = set()
    for question in ("Who ?", "who ?", "Who  ?"):
        for part in ("train", "test"):
            lines = "".join(f"{i % 6}\t{question}\n" for i in range(60))
            (tmp_path / "trec" / f"{part}.tsv").write_text("label\ttext\n" + lines)
        asked = requested("cnn-rand", dataset="trec")
        digests.add(Options(data_dir=str(tmp_path)).specification(asked)["data"]["trec"])
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
        patch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
        patch.setitem(METHODS, "broken", Method("Diverges", {"method": "sent-amp", "lr": 1e30}))
        progress = execute(folder, [run_of("broken"), *ASKED])
    assert (progress.total, progress.done, progress.failed, progress.active) == (3, 3, 1, ())
    return folder


@together
def test_a_run_that_diverges_is_recorded_as_failed_and_the_others_go_on(whole):
    failed, *done = read(whole).records
    assert (failed["key"], failed["status"]) == ("questions/cnn-rand/broken/1/0", "failed")
    assert failed["error"].startswith("DivergedError: the logits became NaN or infinite at step ")
    assert "lr is 1e+30" in failed["error"]
    assert "Traceback" in failed["traceback"]
    assert [(line["key"], line["status"]) for line in done] == [(run.key, "done") for run in ASKED]


@together
def test_a_line_says_what_the_run_was_and_what_it_came_to(whole):
    line = read(whole).records[2]
    assert {name: line[name] for name in vars(ASKED[1])} == vars(ASKED[1])
    assert line["config"] == OPTIONS.config(ASKED[1]).to_dict()
    errors = {record["step"]: record["test_error"] for record in line["history"]}
    assert list(errors) == [10, 20]
    assert line["result"]["test_error"] == errors[line["result"]["best_step"]]
    assert len(line["curves"]["lam"]) == len(line["curves"]["sentence"]["mean"]) == 21
    assert line["machine"].keys() == {"device", "torch", "fastamp", "threads"}
    assert line["machine"]["threads"] == 1
    assert line["seconds"] > 0
    assert not (whole / RUNS).exists()


@pytest.mark.parametrize(
    ("run", "wanted", "made"), [("none", False, False), ("none", True, True), ("fig", False, True)]
)
def test_the_loss_against_lambda_is_taken_where_a_figure_needs_it(tmp_path, monkeypatch, run, wanted, made):
    taken = []

    def keep(job):
        taken.append(job.curves)
        return worker.record(job, "failed", 1.0, error="", traceback="")

    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(runner, "execute", keep)
    figure2 = Run("trec", "bert", "sent-amp", 0.03)  # which the figure draws, whatever command runs it
    execute(tmp_path, [run_of("none") if run == "none" else figure2], curves=wanted)
    assert taken == [made]


@together
def test_finished_runs_are_not_repeated_and_failed_ones_on_request(whole, tmp_path):
    copied(whole, tmp_path, *(run.key for run in ASKED))
    leftover = tmp_path / RUNS / ASKED[0].key
    leftover.mkdir(parents=True)
    before = (tmp_path / LINES).read_bytes()
    progress = execute(tmp_path, ASKED)
    assert (progress.done, progress.failed) == (2, 0)
    assert not (tmp_path / RUNS).exists()
    assert (tmp_path / LINES).read_bytes() == before

    records = {line["key"]: line for line in read(whole).records}
    broken = run_of("broken")
    assert [runner.is_kept(run, records, False) for run in (broken, *ASKED)] == [True, True, True]
    assert [runner.is_kept(run, records, True) for run in (broken, *ASKED)] == [False, True, True]
    assert not runner.is_kept(run_of("none", seed=1), records, False)


@together
def test_a_process_that_is_killed_fails_its_run_alone_and_the_number_of_jobs_changes_no_number(
    whole, tmp_path, monkeypatch
):
    class KillOne(Display):
        killed = 0

        def on_poll(self, progress):
            if not self.killed:
                self.killed = multiprocessing.active_children()[0].pid
                os.kill(self.killed, signal.SIGKILL)

    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    progress = execute(tmp_path, ASKED, jobs=2, display=KillOne())
    assert (progress.done, progress.failed) == (2, 1)
    assert not multiprocessing.active_children()
    (failed,) = (line for line in read(tmp_path).records if line["status"] == "failed")
    assert failed["error"] == "its process ended without a result; it was killed, perhaps for want of memory"
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
    progress = execute(tmp_path, ASKED, retry_failed=True)
    assert (progress.done, progress.failed) == (2, 0)
    assert len((tmp_path / LINES).read_text().splitlines()) == 3
    assert numbers(tmp_path) == numbers(whole)


@together
def test_every_run_has_a_process_of_its_own_whose_memory_goes_with_it(tmp_path, monkeypatch):
    began = []

    class Pool(InThisProcess):
        open = 0

        def submit(self, function, job):
            Pool.open += 1
            began.append(Pool.open)
            return super().submit(function, job)

        def shutdown(self):
            Pool.open -= 1

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(runner, "execute", lambda job: worker.record(job, "failed", 1.0, error="", traceback=""))
    execute(tmp_path, [run_of("none", seed) for seed in range(4)], jobs=2)
    assert began == [1, 2, 1, 2]
    assert Pool.open == 0


@together
def test_an_interrupt_ends_the_processes_at_once_and_the_runs_stay_to_do(tmp_path, monkeypatch):
    class Interrupt(Display):
        def on_poll(self, progress):
            assert [active.run for active in progress.active] == ASKED
            raise KeyboardInterrupt

    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path, ASKED, jobs=2, display=Interrupt())
    assert not multiprocessing.active_children()
    assert read(tmp_path).records == ()


@together
def test_a_runner_that_is_killed_leaves_no_process_and_goes_on_to_the_same_lines(whole, tmp_path, monkeypatch):
    folder = copied(whole, tmp_path / "out", ASKED[0].key)
    under_way = folder / RUNS / ASKED[1].key
    script = tmp_path / "script.py"
    script.write_text(f"""
import multiprocessing, os, signal, sys, threading
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from fastamp.training import checkpoint
from test_paper_runner import ASKED, execute
if __name__ == "__main__":
    execute(Path({str(folder)!r}), ASKED)
save_tensors = checkpoint.save_tensors
def save(path, value):
    save_tensors(path, value)
    if path == Path({str(under_way / "last.pt")!r}):
        os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
        threading.Event().wait()
checkpoint.save_tensors = save  # of the run's process, for which this is no main program
""")
    killed = subprocess.run([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    # The run's process holds this lock as long as it lives.
    with FileLock(under_way / worker.LOCK):
        pass
    assert (under_way / "last.pt").exists()
    assert [line["key"] for line in read(folder).records] == [ASKED[0].key]
    with open(folder / LINES, "a") as file:
        file.write('{"key": "')
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
    execute(folder, ASKED)
    first, resumed = read(folder).records
    assert (first["key"], resumed["key"], resumed["status"]) == (ASKED[0].key, ASKED[1].key, "done")
    assert resumed["result"]["resumed_from"] == 5
    assert numbers(folder) == numbers(whole)
    assert not (folder / RUNS).exists()


@together
def test_the_progress_of_a_command_tells_the_time_left(tmp_path, monkeypatch):
    class Seen(Display):
        left = ()

        def on_end(self, line, progress):
            self.left += ((progress.unknown, progress.seconds_left),)

    def finish(job):
        result = {"steps": 20, "resumed_from": 0}
        return worker.record(job, "done", 7.0, result=result, history=[], curves=None)

    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(runner, "execute", finish)
    display = Seen()
    execute(tmp_path, [run_of("none"), run_of("none", 1), run_of("sent-amp")], display=display)
    assert display.left == ((0, 14.0), (0, 7.0), (0, 0.0))


def test_a_run_under_way_is_as_far_as_its_last_whole_evaluation(tmp_path):
    job = Job(ASKED[0], OPTIONS.config(ASKED[0]), tmp_path)
    assert runner.last_evaluation(job) == (ASKED[0], 0, 20, None, None)
    record = {"step": 10, "dev_error": 50.0, "steps_per_s": 3.0}
    (tmp_path / "metrics.jsonl").write_text(f'{json.dumps(record)}\n{{"st\n{{"final": true}}\n{{"step": 2')
    assert runner.last_evaluation(job) == (ASKED[0], 10, 20, 50.0, 3.0)


# A run's process, in this one


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("method", ["word-amp", "nonlinear-mixup"])
def test_bert_is_run_from_a_folder(tmp_path, encoder, method):
    run = Run("questions", "bert", method, 1.0, 0)
    options = Options(steps=2, eval_every=2, pretrained=str(encoder))
    line = worker.execute(Job(run, options.config(run), tmp_path, curves=True))
    assert line["status"] == "done", line
    assert (line["config"]["batch_size"], line["config"]["lr"]) == (24, 1e-5)
    assert line["curves"].keys() == (set() if method == "nonlinear-mixup" else {"lam", "word"})


def test_a_damaged_line_of_a_runs_metrics_is_a_failed_run_that_names_it_and_says_what_to_do(tmp_path):
    config = OPTIONS.config(ASKED[0])
    train(config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]))
    line = worker.execute(Job(ASKED[0], config, tmp_path))
    assert line["status"] == "failed"
    assert f"{tmp_path / 'metrics.jsonl'}, line 2 is damaged (" in line["error"]
    assert line["error"].endswith("; --retry-failed makes the run again")
