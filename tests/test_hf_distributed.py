"""fastamp.hf in two processes on gloo, launched by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastamp

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import hf_models

from fastamp.hf import AMPTrainer

WORKER = Path(__file__).with_name("hf_worker.py")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of PyTorch has no gloo")
def test_two_processes_train_as_one_draw_different_lambdas_and_may_be_sharded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, str(WORKER), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    for mix_at in (1, "logits"):
        model = hf_models.build("bert")
        trainer = AMPTrainer(
            model,
            hf_models.arguments(tmp_path, per_device_train_batch_size=16),
            criterion=hf_models.fixed_mixes(fastamp.AMPLoss(step_size=0.05)),
            mix_at=mix_at,
            train_dataset=hf_models.Questions(32),
        )
        trainer.train()
        for rank in range(2):
            theirs = torch.load(tmp_path / f"{mix_at}-{rank}.pt")
            torch.testing.assert_close(theirs["weights"], hf_models.weights(model), rtol=1e-9, atol=1e-11)
            for ours, other in zip(trainer.state.log_history[:2], theirs["logs"], strict=False):
                for key in ("loss", "mix/lam_shift", "mix/mask_rate", "mix/grad_abs", "mix/delta"):
                    assert other[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-7), key
