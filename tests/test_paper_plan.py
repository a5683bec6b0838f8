"""The paper's methods by name, and the time their runs take."""

import re

import torch

from fastamp.paper.plan import METHODS, Request, Run
from fastamp.paper.runner import Active, Options, time_left
from fastamp.paper.worker import Job
from fastamp.training import train
from fastamp.training.checkpoint import load_tensors

MARKS = {
    "redrawn": {"pass_dropout": "redrawn"},
    "shared": {"pass_dropout": "shared"},
    "official": {"preset": "official"},
    "paper": {"preset": "paper"},
    "no-reweight": {"reweight": "none"},
    "placebo": {"step_size": 1e-6},
}


def test_a_method_is_what_its_name_says():
    assert len(METHODS) == 3 + 2 * 22
    for name in METHODS:
        method, *marks = re.split("[@+]", name)
        expected = {"method": method, "preset": "default", "reweight": None, "pass_dropout": None}
        expected |= {"step_size": 0.002, "alpha": 1.0}
        for mark in marks:
            field, _, value = mark.partition("=")
            number = {"alpha": "alpha", "eps": "step_size"}.get(field)
            expected |= {number: float(value)} if number else MARKS[mark]
        config = Options().config(Run("questions", "cnn-rand", name))
        assert {field: getattr(config, field) for field in expected} == expected


def table4(*models: str) -> Request:
    return Request("table4", ["trec"], models, ["sent-maxop", "word-maxop", "sent-amp"], [1.0], [0])


def test_maxop_and_amp_of_a_cnns_sentences_are_run_once_unless_an_override_makes_them_two():
    def methods(model: str, *overrides: str) -> list[str]:
        return [run.method for run in table4(model).runs(overrides)]

    assert methods("cnn-glove") == ["sent-amp", "word-maxop"]
    assert methods("cnn-glove", "lr") == ["sent-amp", "word-maxop"]
    for model, overrides in (("lstm-glove", ()), ("bert", ()), ("cnn-glove", ("pass_dropout",))):
        assert methods(model, *overrides) == ["sent-maxop", "word-maxop", "sent-amp"]


def test_maxop_and_amp_of_a_cnns_sentences_train_the_same_bit_for_bit(tmp_path):
    weights = []
    for method in ("sent-maxop", "sent-amp"):
        config = Options(steps=30, eval_every=30, overrides={"embedding_dim": 8}).config(
            Run("questions", "cnn-rand", method)
        )
        train(config, tmp_path / method)
        weights.append(load_tensors(tmp_path / method / "best.pt")["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_nonlinear_mixup_is_run_where_the_paper_prints_it():
    request = Request("table2", ["trec", "mr"], ["cnn-rand", "cnn-glove", "bert"], ["nonlinear-mixup"], [1.0], [0])
    assert [(run.dataset, run.model) for run in request.runs()] == [("trec", "cnn-glove"), ("mr", "cnn-glove")]


def test_the_time_left_goes_by_the_last_finished_run_of_the_nearest_kind():
    finished = [{"status": "failed"}]

    def finish(method: str, rate: int, *, steps: int = 60, resumed_from: int = 0) -> None:
        result = {"steps": steps, "resumed_from": resumed_from}
        seconds = (steps - resumed_from) / rate
        finished.append({"status": "done", "model": "cnn-rand", "method": method, "seconds": seconds, "result": result})

    def left(*methods: str, model: str = "cnn-rand", active: tuple[Active, ...] = (), jobs: int = 1) -> tuple:
        runs = [Run("trec", model, method) for method in methods]
        return time_left(finished, active, [Job(run, Options(steps=120).config(run), None) for run in runs], jobs)

    def under_way(method: str, step: int, rate: float | None) -> Active:
        return Active(Run("trec", "cnn-rand", method), step, 120, 9.0, rate)

    assert left() == (0.0, 0)
    assert left("sent-amp") == (0.0, 1)
    assert left("word-amp", active=(under_way("word-amp", 20, 10.0),)) == (22.0, 0)
    finish("none", 10)
    finish("none", 60)
    assert left("sent-amp") == (2.0, 0)  # of the backbone
    assert left("sent-amp", model="lstm-rand") == (0.0, 1)
    finish("sent-amp@alpha=0.2", 40, resumed_from=50)
    finish("word-amp", 10)
    assert left("sent-amp") == (3.0, 0)  # but for α
    assert left("sent-amp", active=(under_way("sent-amp", 60, 20.0),)) == (9.0, 0)
    finish("sent-amp", 30)
    assert left("sent-amp") == (4.0, 0)
    assert left("none", "sent-amp", "sent-amp", jobs=2) == (5.0, 0)
    assert left("none", "sent-amp", jobs=8) == (4.0, 0)  # not less than the longest
    assert left(active=(under_way("sent-amp", 60, 999.0), under_way("none", 0, None))) == (4.0, 0)
