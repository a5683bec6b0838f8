"""Pairs and tuned launches on a GPU: sizes the interpreter is too slow for, and what only a GPU can show."""

import json
import re
from importlib import import_module

import pytest
import torch
from conftest import DTYPES, HAS_GPU, assert_contract, by_library, paired_case
from test_gpu import assert_stopped

from fastamp import AMPLoss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA or ROCm device")]

SIZES = [(50, 6), (257, 1000), (65, 4096), (33, 8192), (9, 32_003), (3, 128_257)]


@pytest.fixture(autouse=True)
def _on_the_gpu():
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_pairs_hold_the_contract_at_every_size(batch, classes, dtype):
    assert_contract(paired_case(batch, classes, dtype=dtype, step_size=0.1))


@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_pairs_give_the_same_bits_three_times(batch, classes):
    case = paired_case(batch, classes)
    first, *others = (by_library(case) for _ in range(3))
    for other in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, other, strict=True))


@pytest.mark.parametrize(("batch", "classes"), [(50, 6), (200, 1000), (8, 40_000)])
def test_a_step_of_pairs_is_captured_and_does_not_wait(batch, classes):
    criterion = AMPLoss(pairing="matching")
    logits, target = torch.randn(batch, classes, requires_grad=True), torch.randint(classes, (batch,))

    def step():
        return torch.autograd.grad(criterion(logits, target), logits)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = step()
    grads = []
    for _ in range(2):
        graph.replay()
        grads.append(grad.clone())
    assert grads[0].isfinite().all()
    assert not torch.equal(*grads)  # λ and partners are drawn anew


@pytest.mark.parametrize("classes", [300, 5000])
def test_partners_that_are_no_matching_stop_the_kernel(classes):
    """In a process of its own, for the context is lost."""
    code = f"""
import torch, fastamp
mix = fastamp.Mix(torch.rand(3, device="cuda"), torch.tensor([1, 2, 0], device="cuda"))
logits, target = torch.zeros(3, {classes}, device="cuda"), torch.tensor([0, 1, 2], device="cuda")
loss = fastamp.AMPLoss(pairing="matching")(logits, target, mix=mix)
torch.cuda.synchronize()
print(loss.item())
"""
    assert_stopped(code)


def test_launches_are_searched_for_on_the_device(monkeypatch, tmp_path):
    tuning = import_module("fastamp.kernels.tuning")
    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setenv("FASTAMP_CACHE", str(tmp_path))
    for classes in (1000, 40_000):
        assert_contract(paired_case(64, classes, step_size=0.1))
    (file,) = tmp_path.iterdir()
    assert re.sub(r"\W", "-", torch.cuda.get_device_name().lower()) in file.name
    for entry in json.loads(file.read_text()).values():
        times = {text: ms for text, ms in entry["ms"].items() if ms is not None}
        assert len(times) >= 2
        assert entry["launch"] == min(times, key=times.get)
