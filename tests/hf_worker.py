"""Run by torchrun in two processes on gloo from test_hf_distributed.py: trains and compares; fails by an exception."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from distributed_steps import leave
from torch import Tensor

import fastamp
from fastamp.hf import AMPTrainer
from fastamp.hf.trainer import MixedPass, forward_of


def by_ddp(folder: str) -> None:
    """Two optimizer steps, each over 2 processes x 2 accumulated batches x 4 rows; weights are left for the parent."""
    for mix_at in (1, "logits"):
        model = hf_models.build("bert")
        args = hf_models.arguments(
            folder,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            ddp_find_unused_parameters=mix_at == 1,
        )
        criterion = hf_models.fixed_mixes(fastamp.AMPLoss(step_size=0.05))
        trainer = AMPTrainer(
            model, args, criterion=criterion, mix_at=mix_at, train_dataset=hf_models.Questions(32), eval_dataset=None
        )
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        torch.save(
            {"weights": hf_models.weights(model), "logs": trainer.state.log_history},
            f"{folder}/{mix_at}-{dist.get_rank()}.pt",
        )


def different_lambdas(folder: str) -> None:
    """From one seed everywhere by the default generator; by a generator of the criterion's own that knows its rank."""
    for generator in (None, torch.Generator().manual_seed(3 + dist.get_rank())):
        drawn: list[Tensor] = []
        trainer = trainer_that_keeps(drawn, generator, folder)
        trainer.train()
        ours = torch.cat(drawn)
        theirs = [torch.empty_like(ours) for _ in range(2)]
        dist.all_gather(theirs, ours)
        assert len(set(torch.cat(theirs).tolist())) == 2 * len(ours), theirs
    with pytest.raises(ValueError, match="the same state in two processes"):
        trainer_that_keeps([], torch.Generator().manual_seed(3), folder).train()


def trainer_that_keeps(drawn: list[Tensor], generator: torch.Generator | None, folder: str) -> AMPTrainer:
    """A Trainer whose criterion appends the λ that it draws."""
    criterion = fastamp.AMPLoss(generator=generator)
    sample = criterion.sample

    def keep(batch_size: int, *, device: Any) -> fastamp.Mix:
        mix = sample(batch_size, device=device)
        drawn.append(mix.lam)
        return mix

    criterion.sample = keep  # type: ignore[method-assign]
    args = hf_models.arguments(folder)
    return AMPTrainer(hf_models.build("bert"), args, criterion=criterion, train_dataset=hf_models.Questions(32))


def by_fsdp2() -> None:
    """A model sharded as accelerate shards it: gradients are those of the whole model on both processes' batches."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    rank = dist.get_rank()
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    lam = torch.rand(2, 6, generator=torch.Generator().manual_seed(5))
    for name, layer, mix_at in (
        ("modernbert", "ModernBertEncoderLayer", 1),
        ("vit", "ViTLayer", "embeddings"),
    ):
        whole, model = hf_models.build(name), hf_models.build(name)
        inputs = hf_models.batch(whole)
        labels = inputs.pop("labels")
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[layer],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            torch_device_mesh=mesh,
            parallelism_config=SimpleNamespace(fsdp_dim_names=("shard",)),
            mixed_precision="no",
            device=torch.device("cpu"),
            is_main_process=rank == 0,
        )
        model = fsdp2_prepare_model(accelerator, model)

        def loss_of(model: Any, row: int, mix_at: Any = mix_at, labels: Any = labels, inputs: Any = inputs) -> Tensor:
            step = MixedPass(fastamp.AMPLoss(step_size=0.05), model, mix_at)
            step.prepare(labels, fastamp.Mix(lam[row], torch.tensor([3, 0, 1, 4, 5, 2])), None)
            with forward_of(model, step.forward):
                return model(**inputs)["loss"]

        for row in range(2):
            (loss_of(whole, row) / 2).backward()
        for _ in range(2):
            model.zero_grad()
            loss_of(model, rank).backward()
            for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
                assert (ours.grad is None) == (theirs.grad is None)
                if theirs.grad is not None:
                    torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-10, atol=1e-12)


def by_trainer_and_fsdp2(folder: str) -> None:
    """The whole Trainer with FSDP2, which accelerate has for accelerators only and has to be talked into."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    weights = []
    for precision in (None, "fp32", "bf16"):
        model = hf_models.build("bert")
        trainer = AMPTrainer(
            model,
            hf_models.arguments(folder, per_device_train_batch_size=4, gradient_accumulation_steps=2),
            criterion=hf_models.fixed_mixes(fastamp.AMPLoss(step_size=0.05)),
            mix_at="embeddings",
            train_dataset=hf_models.Questions(32),
            eval_dataset=hf_models.Questions(8),
        )
        if precision is not None:
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["BertLayer"],
                mixed_precision_policy="bf16" if precision == "bf16" else None,
                cpu_ram_efficient_loading=False,
            )
            AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
            trainer.is_fsdp_enabled = True
        losses: list[Tensor] = []
        loss_of = trainer.training_step

        def keep(*args: Any, loss_of: Any = loss_of, losses: list[Tensor] = losses) -> Tensor:
            losses.append(loss_of(*args))
            return losses[-1]

        trainer.training_step = keep  # type: ignore[method-assign]
        trainer.train()
        assert ("FSDP" in type(trainer.model_wrapped).__name__) == (precision is not None)
        # Sharding casts results to bfloat16, of which the loss and the counts in it are spared.
        assert {loss.dtype for loss in losses} == {torch.float32 if precision == "bf16" else torch.float64}
        assert precision != "bf16" or any(loss.bfloat16().float() != loss for loss in losses)
        trainer.evaluate()
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]
        weights.append(torch.cat([parameter.flatten() for parameter in whole]))
    ddp, sharded, low = weights
    torch.testing.assert_close(sharded, ddp, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(low, ddp, rtol=0.02, atol=0.02)


if __name__ == "__main__":
    by_ddp(sys.argv[1])
    different_lambdas(sys.argv[1])
    by_fsdp2()
    by_trainer_and_fsdp2(sys.argv[1])
    leave()
