"""Training on a GPU: captured steps are the eager ones."""

from __future__ import annotations

import pytest
import torch

from fastamp.training import Listener, TrainConfig, train

pytestmark = pytest.mark.gpu

SIZES = {"textcnn": {}, "bilstm": {"hidden_size": 32}}


def config(**fields) -> TrainConfig:
    fields = {"steps": 60, "eval_every": 20, "embedding_dim": 16, "lr": 1e-2, "dropout": 0.0, **fields}
    return TrainConfig(device="cuda", **fields)


@pytest.mark.parametrize("method", ["none", "sent-mixup", "sent-amp", "word-mixup", "word-amp"])
@pytest.mark.parametrize("model", ["textcnn", "bilstm"])
def test_captured_steps_learn_what_eager_ones_learn(tmp_path, method, model):
    fields = {"method": method, "model": model, **SIZES[model], "steps": 200, "eval_every": 100}
    eager = train(config(**fields), tmp_path / "eager")
    captured = train(config(**fields, capture=True), tmp_path / "captured")
    # Sums in another order grow apart: a few sentences of 500 may differ.
    assert captured.test_error == pytest.approx(eager.test_error, abs=6)
    assert captured.final_dev_error < 40  # the most frequent class alone leaves about 72


@pytest.mark.parametrize("model", ["textcnn", "bilstm"])
def test_the_first_captured_losses_are_the_eager_ones(tmp_path, model):
    """Whatever the captures of new lengths run to warm up must leave no trace in weights and moments."""
    losses = {}
    for capture in (False, True):
        seen = losses[capture] = []

        class Watch(Listener):
            def on_step(self, step, loss, seen=seen):
                seen.append(loss.item())

        fields = {"model": model, **SIZES[model], "steps": 30, "lr": 3e-3, "clip_norm": 1.0, "capture": capture}
        train(config(**fields), tmp_path / f"{capture}", listener=Watch())
    assert losses[True] == pytest.approx(losses[False], rel=0.01)
    assert losses[True][-1] < losses[True][0]


@pytest.mark.parametrize("method", ["none", "word-amp"])
def test_a_captured_run_resumes(tmp_path, method):
    whole = config(method=method, capture=True, checkpoint_every=20)
    result = train(whole, tmp_path / "whole")

    class StopError(Exception):
        pass

    class Stop(Listener):
        def on_step(self, step, _):
            if step == 45:
                raise StopError

    with pytest.raises(StopError):
        train(whole, tmp_path / "cut", listener=Stop())
    resumed = train(whole, tmp_path / "cut")
    assert resumed.resumed_from == 40
    assert resumed.test_error == pytest.approx(result.test_error, abs=6)


def test_captured_steps_draw_new_coefficients(tmp_path):
    seen = []

    class Watch(Listener):
        def on_evaluate(self, record):
            seen.append(record["mix/lam"])

    train(config(method="sent-amp", capture=True), tmp_path / "run", listener=Watch())
    assert len(set(seen)) == 3
    torch.cuda.synchronize()
