"""The paper's methods by name, and the time their runs take."""

import re

from fastamp.paper.plan import METHODS, Run
from fastamp.paper.runner import Active, Options, time_left
from fastamp.paper.worker import Job

MARKS = {
    "redrawn": {"pass_dropout": "redrawn"},
    "shared": {"pass_dropout": "shared"},
    "official": {"preset": "official"},
    "paper": {"preset": "paper"},
    "no-reweight": {"reweight": "none"},
}


def test_a_method_is_what_its_name_says():
    assert len(METHODS) == 3 + 2 * 21
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
