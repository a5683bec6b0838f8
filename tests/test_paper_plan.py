"""The paper's methods by name, and the time their runs take."""

import pytest

from fastamp.paper.plan import METHODS, Run
from fastamp.paper.runner import Active, Options, time_left
from fastamp.paper.worker import Job


def run_of(method: str, seed: int = 0) -> Run:
    return Run("questions", "cnn-rand", method, 1.0, seed)


_LEVELS = ("word", "sent")
_ALPHAS = {"@alpha=0.2": 0.2, "": 1.0, "@alpha=0.5": 0.5, "@alpha=1.5": 1.5}
_STEPS = {"@eps=0.01": 0.01, "@eps=0.03": 0.03, "@eps=0.1": 0.1, "@eps=0.3": 0.3, "@eps=1": 1.0}
# By method: the method of TrainConfig, preset, reweight, pass_dropout, step_size, alpha.
_FIELDS = {
    **{name: (name, "default", None, None, 0.002, 1.0) for name in ("none", "nonlinear-mixup", "double-softmax")},
    **{f"{at}-maxop": (f"{at}-maxop", "default", None, None, 0.002, 1.0) for at in _LEVELS},
    **{
        f"{at}-{kind}{suffix}": (f"{at}-{kind}", "default", None, None, 0.002, alpha)
        for at in _LEVELS
        for kind in ("mixup", "amp")
        for suffix, alpha in _ALPHAS.items()
    },
    **{
        f"{at}-amp{suffix}": (f"{at}-amp", "default", None, None, step_size, 1.0)
        for at in _LEVELS
        for suffix, step_size in _STEPS.items()
    },
    **{
        f"{at}-{kind}": (f"{at}-{kind.partition('@')[0]}", *fields, 1.0)
        for at in _LEVELS
        for kind, fields in {
            "amp@redrawn": ("default", None, "redrawn", 0.002),
            "amp@eps=0+redrawn": ("default", None, "redrawn", 0.0),
            "mixup@official": ("official", None, None, 0.002),
            "amp@official": ("official", None, None, 0.002),
            "amp@official+no-reweight": ("official", "none", None, 0.002),
            "amp@official+shared": ("official", None, "shared", 0.002),
            "amp@paper": ("paper", None, None, 0.002),
        }.items()
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_what_its_name_says(method):
    config = Options().config(run_of(method))
    names = ("method", "preset", "reweight", "pass_dropout", "step_size", "alpha")
    assert tuple(getattr(config, name) for name in names) == _FIELDS[method]


def done_line(run: Run, seconds: float, *, resumed_from: int = 0) -> dict:
    result = {"steps": 60, "resumed_from": resumed_from}
    return {"status": "done", "model": run.model, "method": run.method, "result": result, "seconds": seconds}


def test_time_left_goes_by_the_rates_of_each_backbone_and_method():
    none, amp, other = run_of("none"), run_of("sent-amp"), run_of("word-amp")
    records = [{"status": "failed"}, done_line(none, 9.0), done_line(none, 30.0), done_line(amp, 5.0, resumed_from=50)]

    def left(*runs: Run, active: tuple[Active, ...] = (), jobs: int = 1) -> tuple[float, int]:
        jobs_waiting = [Job(run, Options(steps=60).config(run), None) for run in runs]
        return time_left(records, active, jobs_waiting, jobs)

    assert left(none) == (30.0, 0)
    assert left(none, run_of("none", 1), amp, jobs=2) == (45.0, 0)
    assert left(none, amp, jobs=8) == (30.0, 0)  # not less than the longest
    assert left(none, other) == (60.0, 0)  # by the last that is done of the backbone
    assert left(run_of("word-amp", 1), active=(Active(other, 20, 60, 50.0, 10.0),)) == (10.0, 0)
    assert left(active=(Active(amp, 20, 60, 50.0, 999.0),)) == (20.0, 0)
    assert left(active=(Active(other, 0, 60, None, None),)) == (30.0, 0)
    assert left() == (0.0, 0)
