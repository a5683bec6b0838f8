"""What AMPLoss.step refuses, and what its errors say."""

from __future__ import annotations

import pytest
import torch
from test_step import BATCH, CLASSES, WAVY_STEP, WIDTH, problem
from torch import nn

from fastamp import AMPLoss, Mix

HIDDEN = torch.randn(BATCH, WIDTH)
TARGET = torch.randint(CLASSES, (BATCH,))
NETWORK = nn.Linear(WIDTH, CLASSES)


class Output:
    logits = torch.zeros(BATCH, CLASSES)


BAD = [
    ({"f": "network"}, TypeError, "f must be callable, a module or a function.* got str"),
    (
        {"hidden": torch.ones(BATCH, 4, dtype=torch.int64)},
        TypeError,
        "hidden must be float16, .* got torch.int64; embed integer ids first",
    ),
    ({"hidden": torch.tensor(1.0)}, ValueError, "hidden must have a batch dimension, got a"),
    ({"hidden": 3.0}, TypeError, "hidden must be a tensor or a dict or tuple.* got float"),
    ({"hidden": {}}, ValueError, "hidden must have at least one tensor"),
    ({"hidden": {"a": None}}, TypeError, r"hidden\['a'\] must be a tensor, got NoneType"),
    (
        {"hidden": {"a": HIDDEN, "b": HIDDEN[1:]}},
        ValueError,
        rf"got {BATCH} rows in hidden\['a'\] and {BATCH - 1} in hidden\['b'\]",
    ),
    ({"hidden": HIDDEN.byte()}, TypeError, r"got torch.uint8; make pixels floating point .*\.float\(\) / 255"),
    ({"target": TARGET.int()}, TypeError, r"got torch\.int32; pass target\.long\(\)"),
    ({"hidden": (HIDDEN, TARGET)}, TypeError, r"hidden\[1\] must be float16"),
    ({"hidden": (HIDDEN, HIDDEN.to("meta"))}, ValueError, r"hidden\[1\] is on meta"),
    ({"target": TARGET[1:]}, ValueError, rf"target .* shape \({BATCH},\)"),
    ({"target": TARGET.float()}, ValueError, r"must have shape \(B, C\), got .* must be int64"),
    ({"target": torch.full((BATCH,), CLASSES)}, ValueError, f"target must lie in 0..{CLASSES - 1}"),
    ({"target": torch.rand(BATCH, CLASSES + 1)}, ValueError, "shape of the logits"),
    ({"target": None}, TypeError, "target must be a tensor, got NoneType"),
    ({"context": [TARGET]}, TypeError, "context must be a dict of .* or None, got list"),
    ({"context": {1: TARGET}}, TypeError, "the names of f's arguments as keys, got 1"),
    ({"context": {"n": 2}}, TypeError, r"context\['n'\] must be a tensor or None, got int"),
    (
        {"context": {"mask": TARGET[:4]}},
        ValueError,
        rf"context\['mask'\] must have {BATCH} rows.* got shape \(4,\); what all rows share belongs into f",
    ),
    ({"context": {"mask": TARGET.to("meta")}}, ValueError, r"context\['mask'\] is on meta, the rows to mix are on cpu"),
    ({"plan": "fast"}, ValueError, "plan must be one of 'auto', 'merged', 'both'; got 'fast'"),
    ({"mix": Mix(torch.rand(3), torch.arange(3))}, ValueError, rf"lam must have shape \({BATCH},\)"),
    ({"f": lambda m: NETWORK(m[1:])}, ValueError, f"each of hidden's {BATCH} rows, got shape"),
    ({"f": lambda m: NETWORK(m).argmax(1, True)}, TypeError, "f's output must be logits, .* got torch.int64"),
    ({"f": lambda m: NETWORK(m)[:, 0]}, ValueError, "f's output must have 2 dimensions"),
    (
        {"f": lambda m: NETWORK(m)[:, None]},
        ValueError,
        r"f's output must have 2 dimensions, .*; a row of hidden has one target: pool over positions in f, or",
    ),
    ({"f": lambda m: Output()}, TypeError, "got Output; take its .logits"),
    (
        {"f": lambda m: NETWORK(m).index_fill(0, torch.tensor([2, 5]), torch.nan)},
        ValueError,
        rf"f returned NaN or \+inf in 2 of {BATCH} rows, first in row 2",
    ),
    (
        {"f": lambda m: NETWORK(m).index_fill(0, torch.tensor([7]), torch.inf)},
        ValueError,
        rf"f returned NaN or \+inf in 1 of {BATCH} rows, first in row 7",
    ),
    ({"f": lambda m: NETWORK(m.detach())}, ValueError, "f's logits do not depend on hidden"),
    ({"f": lambda m: NETWORK(HIDDEN)}, ValueError, "f's logits do not depend on hidden"),
    ({"f": torch.no_grad()(NETWORK.forward)}, ValueError, r"torch.no_grad\(\)\?"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD)
def test_bad_input_is_named(wrong, kind, message):
    given = {"f": NETWORK, "hidden": HIDDEN, "target": TARGET, **wrong}
    state = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        AMPLoss().step(given.pop("f"), given.pop("hidden"), given.pop("target"), **given)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_f_that_breaks_the_promise_of_context_is_told_what_it_promises():
    p = problem()

    def whole(m):
        return p.network(torch.cat([m, m.new_zeros(BATCH - len(m), WIDTH)]))

    with pytest.raises(ValueError, match=r"given \d of the rows and returned 9: giving context, even empty, promises"):
        p.step(whole, context={}, **WAVY_STEP)
    assert p.step(whole, **WAVY_STEP)[1].plan == "merged"


def test_an_f_of_changing_classes_is_refused():
    p = problem()
    calls = []

    def f(m):
        calls.append(1)
        return p.network(m)[:, : CLASSES + 1 - len(calls)]

    with pytest.raises(ValueError, match="same number of classes in every pass, got 4, then 3"):
        p.step(f)


def test_eval_mode_checks_as_well():
    criterion = AMPLoss().eval()
    with pytest.raises(ValueError, match="f must return a row of logits"):
        criterion.step(lambda m: NETWORK(m[1:]), HIDDEN, TARGET)
    with pytest.raises(ValueError, match="need train mode"):
        criterion.step(NETWORK, HIDDEN, TARGET, return_stats=True)


@pytest.mark.parametrize("weight", [torch.ones(1), torch.ones(CLASSES - 1), torch.ones(CLASSES + 3)])
@pytest.mark.parametrize("training", [True, False])
def test_class_weights_of_another_number_are_named(weight, training):
    criterion = AMPLoss(weight=weight).train(training)
    with pytest.raises(
        ValueError, match=rf"weight must have shape \({CLASSES},\), one a class, got \({len(weight)},\)"
    ):
        criterion.step(NETWORK, HIDDEN, TARGET)


@pytest.mark.filterwarnings("ignore:AMPLoss is in train mode")
def test_inference_mode_is_refused_with_a_way_out():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"criterion\.eval\(\), .* torch.no_grad\(\)"):
        AMPLoss().step(NETWORK, HIDDEN, TARGET)


def test_dropout_is_shared_or_redrawn():
    with pytest.raises(ValueError, match="dropout must be one of 'shared', 'redrawn'; got 'none'"):
        AMPLoss(dropout="none")
    assert AMPLoss.preset("official").dropout == "redrawn"
    assert "dropout='redrawn'" in repr(AMPLoss(dropout="redrawn"))
