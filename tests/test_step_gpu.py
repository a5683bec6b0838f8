"""AMPLoss.step on a GPU: captured training steps, no synchronisation, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastamp import AMPLoss, Mix

pytestmark = pytest.mark.gpu

BATCH, WIDTH, CLASSES = 50, 64, 6


def network(dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout), nn.Linear(WIDTH, CLASSES)).cuda()


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, WIDTH, device="cuda", requires_grad=True), torch.randint(CLASSES, (BATCH,), device="cuda")


@pytest.mark.parametrize("mode", ["amp", "maxop", "mixup"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_captured_training_step(mode, dropout):
    """15: CUDA graph capture fails, or replays one λ."""
    net, (hidden, target) = network(dropout), data()
    criterion = AMPLoss(mode=mode)
    mix = criterion.sample(BATCH, device="cuda")

    def step() -> tuple[Tensor, Tensor, Tensor]:
        loss, stats = criterion.step(net, hidden, target, return_stats=True)
        loss.backward()
        return loss.detach(), stats.lam, stats.delta

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net.zero_grad()
            criterion.step(net, hidden, target, mix=mix, plan="merged").backward()
    torch.cuda.current_stream().wait_stream(stream)
    net.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, lam, delta = step()
    seen = []
    for _ in range(4):
        graph.replay()
        torch.cuda.synchronize()
        seen.append(lam.tolist())
        assert loss.isfinite()
        assert delta.abs().max() < 0.05  # with masks redrawn about 0.5
        assert all((parameter.grad != 0).any() for parameter in net.parameters())
    assert len({tuple(one) for one in seen}) == 4


@pytest.mark.parametrize("plan", ["auto", "merged", "both"])
def test_the_numbers_are_those_of_the_cpu(plan):
    net, (hidden, target) = network(0.0).double(), data()
    mix = Mix(torch.rand(BATCH, dtype=torch.float64, device="cuda"), torch.randperm(BATCH, device="cuda"))
    options = {"step_size": 0.4, "grad_clip": None, "tie_tol": 0.0}
    found = []
    for device in ("cuda", "cpu"):
        moved = net.to(device)
        loss = AMPLoss(**options).step(
            moved,
            hidden.detach().double().to(device),
            target.to(device),
            mix=Mix(*(part.to(device) for part in mix)),
            plan=plan,
            context={},
        )
        found.append([loss, *torch.autograd.grad(loss, list(moved.parameters()))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("plan", ["merged", "both"])
def test_nothing_waits_for_the_device(plan):
    """15: host synchronisation."""
    net, (hidden, target) = network(0.5), data()
    criterion = AMPLoss()
    criterion.step(net, hidden, target, plan=plan).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion.step(net, hidden, target, plan=plan).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_both_passes_share_their_dropout_masks():
    """31: dropout differs between the two passes."""
    net, (hidden, target) = network(0.5), data()
    for autocast in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            _, stats = AMPLoss().step(net, hidden, target, return_stats=True)
        assert stats.delta.abs().max() < 0.1


def test_peak_memory_is_about_plain_mixups():
    net = nn.Sequential(
        *(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(12)), nn.Linear(1024, 8)
    ).cuda()
    hidden = torch.randn(4096, 1024, device="cuda", requires_grad=True)
    target = torch.randint(8, (4096,), device="cuda")

    def peak(criterion: AMPLoss) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        criterion.step(net, hidden, target, context={}).backward()
        net.zero_grad()
        hidden.grad = None
        return torch.cuda.max_memory_allocated() - before

    for _ in range(2):
        plain, ours = peak(AMPLoss(mode="mixup")), peak(AMPLoss())
    assert ours <= 1.15 * plain
