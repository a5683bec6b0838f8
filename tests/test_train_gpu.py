"""Training on a GPU: captured steps are the eager ones."""

from __future__ import annotations

import pytest
import torch

from fastamp.training import Listener, TrainConfig, train

pytestmark = pytest.mark.gpu


def config(**fields) -> TrainConfig:
    fields = {"steps": 60, "eval_every": 20, "embedding_dim": 16, "lr": 1e-3, "dropout": 0.0, **fields}
    return TrainConfig(device="cuda", **fields)


@pytest.mark.parametrize("method", ["none", "sent-mixup", "sent-amp", "word-mixup", "word-amp"])
@pytest.mark.parametrize("model", ["textcnn", "bilstm"])
def test_captured_steps_learn_what_eager_ones_learn(tmp_path, method, model):
    eager = train(config(method=method, model=model, hidden_size=32), tmp_path / "eager")
    captured = train(config(method=method, model=model, hidden_size=32, capture=True), tmp_path / "captured")
    # Not the same random numbers, and the atomics of an embedding's gradient: a few sentences of 500 may differ.
    assert captured.test_error == pytest.approx(eager.test_error, abs=6)
    assert captured.final_dev_error < 60


@pytest.mark.parametrize("method", ["none", "word-amp"])
def test_a_captured_run_resumes(tmp_path, method):
    whole = config(method=method, capture=True, checkpoint_every=20)
    result = train(whole, tmp_path / "whole")

    class StopError(Exception):
        pass

    class Stop(Listener):
        def stepped(self, step, _):
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
        def evaluated(self, record):
            seen.append(record["mix/lam"])

    train(config(method="sent-amp", capture=True), tmp_path / "run", listener=Watch())
    assert len(set(seen)) == 3
    torch.cuda.synchronize()
