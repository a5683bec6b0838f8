"""Steps in several processes, beside the same steps in one; run by test_distributed.py through torchrun.

torchrun --standalone --nproc-per-node 2 tests/distributed_steps.py ddp|ddp-unused|ddp-static|ddp-loop|fsdp|draws
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastamp import AMPLoss, Mix

BATCH, WIDTH, CLASSES = 12, 6, 4
STEP = {"step_size": 0.4, "grad_clip": None, "tie_tol": 0.0}


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(3 * self.inner(x))


class Network(nn.Module):
    """An encoder, blocks and a head, whose forward can also start at or stop before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, CLASSES)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor | None = None, hidden: Tensor | None = None, *, stop: bool = False) -> Tensor:
        hidden = self.encoder(x) if hidden is None else hidden
        return hidden if stop else self.head(self.blocks(hidden))


class StepInForward(nn.Module):
    """The whole step as one forward pass, which is what DistributedDataParallel and FSDP expect of a step."""

    def __init__(self, network: Network, criterion: AMPLoss) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, x: Tensor, target: Tensor, mix: Mix, plan: str) -> Tensor:
        hidden = self.network(x, stop=True)
        f = lambda m: self.network(hidden=m)  # noqa: E731
        return self.criterion.step(f, hidden, target, mix=mix, plan=plan, context={})


def batch(rank: int) -> tuple[Tensor, Tensor, Mix]:
    """The part of a rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    made: dict[str, Any] = {"generator": generator}
    x = torch.randn(BATCH, 5, dtype=torch.float64, **made)
    target = torch.randint(CLASSES, (BATCH,), **made)
    return x, target, Mix(torch.rand(BATCH, dtype=torch.float64, **made), torch.randperm(BATCH, **made))


def joined(ranks: int) -> tuple[Tensor, Tensor, Mix]:
    """All parts as one batch: rows mix within their part."""
    x, target, mixes = zip(*(batch(rank) for rank in range(ranks)), strict=True)
    partner = torch.cat([mix.partner + rank * BATCH for rank, mix in enumerate(mixes)])
    return torch.cat(x), torch.cat(target), Mix(torch.cat([mix.lam for mix in mixes]), partner)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name, without a wrapper's prefix."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def network(*, used: bool = True) -> Network:
    """From one seed; `used`: without a parameter that gets no gradient, which plain DDP takes for an error."""
    torch.manual_seed(0)
    made = Network().double()
    made.unused.requires_grad_(not used)
    return made


def assert_same_gradients(expected: nn.Module, model: nn.Module) -> None:
    found = gradients(model)
    for name, grad in gradients(expected).items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-6, msg=name)


def compare(kind: str, rank: int, ranks: int) -> None:
    """Gradients on `ranks` processes against those of one, on the joined batch, for every plan."""
    options = {"ddp": {}, "ddp-unused": {"find_unused_parameters": True}, "ddp-static": {"static_graph": True}}
    for plan in ("auto", "merged", "both"):
        alone = StepInForward(network(), AMPLoss(**STEP))
        alone(*joined(ranks), plan).backward()
        model: nn.Module = StepInForward(network(used=kind == "ddp"), AMPLoss(**STEP))
        if kind == "fsdp":
            # Not the wrapper: every pass has to go through a sharded module's own forward, since the backward of the
            # first one leaves all parameters sharded.
            for block in model.network.blocks:
                fully_shard(block)
            fully_shard(model.network)
        else:
            model = DistributedDataParallel(model, **options[kind])
        for _ in range(2):  # the second time round a reducer that was left in a wrong state says so
            model.zero_grad()
            model(*batch(rank), plan).backward()
        assert_same_gradients(alone, model)
    print(f"{kind}: as one process", flush=True)


def user_loop(rank: int, ranks: int) -> None:
    """Plain use of DDP: hidden from the wrapped model, f through the wrapped model."""

    def step(model: nn.Module, x: Tensor, target: Tensor, mix: Mix) -> None:
        AMPLoss(**STEP).step(lambda m: model(hidden=m), model(x, stop=True), target, mix=mix).backward()

    alone, model = network(), network()
    step(alone, *joined(ranks))
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        wrapped.zero_grad()
        step(wrapped, *batch(rank))
    assert_same_gradients(alone, wrapped)
    print("ddp-loop: as one process", flush=True)


def gathered(value: Any) -> list[Any]:
    """That of every rank."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def draws(rank: int, ranks: int) -> None:
    """From one seed every rank draws λ and partners of its own; its own generator is taken as it is."""
    for options in ({}, {"alpha": 0.3}, {"pairing": "matching"}):
        torch.manual_seed(0)
        criterion = AMPLoss(**options)
        for mix in [criterion.sample(64, device="cpu") for _ in range(2)]:
            assert mix.partner.sort().values.equal(torch.arange(64))
            if "pairing" in options:
                assert mix.partner[mix.partner].equal(torch.arange(64))
            lams, partners = gathered(mix.lam.tolist()), gathered(mix.partner.tolist())
            assert len({tuple(partner) for partner in partners}) == ranks
            first, second = ({x for x in lam if 0 < x < 1} for lam in lams[:2])  # Beta(0.3) also rounds to 0 and 1
            assert not first & second
        states = gathered(torch.get_rng_state().tolist())
        assert states[0] == states[1]  # in step, whatever the number of ranks
    torch.manual_seed(0)
    uneven = gathered(AMPLoss().sample(8 - 4 * rank, device="cpu").lam.tolist())
    assert not set(uneven[0]) & set(uneven[1])  # a last batch may be smaller on one rank
    own = gathered(AMPLoss(generator=torch.Generator().manual_seed(5)).sample(8, device="cpu").lam.tolist())
    assert own[0] == own[1]
    print("draws: different on every rank", flush=True)


def leave() -> None:
    """End this process with all its work done: the last line of a program that torchrun runs."""
    dist.barrier()  # no process leaves while another still talks to it
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # After FSDP on gloo, torch 2.13 now and then aborts while the interpreter shuts down, with all work done.
    os._exit(0)


def main(kinds: list[str]) -> None:
    """Run some checks in this process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in kinds:
        check = {"draws": draws, "ddp-loop": user_loop}.get(kind, functools.partial(compare, kind))
        check(dist.get_rank(), dist.get_world_size())
    leave()


if __name__ == "__main__":
    main(sys.argv[1:])
