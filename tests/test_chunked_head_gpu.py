"""A linear head of many classes in chunks on a GPU: its products are left in float32 there, and nothing may wait."""

import pytest
import torch
from chunked_calls import Call
from conftest import DTYPES, HAS_GPU

import fastamp
from fastamp.functional import linear_amp_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA or ROCm device")]


@pytest.fixture(autouse=True)
def _on_the_gpu():
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [300, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_hold_the_contract(dtype, classes, reduction, backend):
    with fastamp.set_backend(backend):
        Call(50, 64, classes, dtype=dtype, chunk_rows=16, step_size=0.05, reduction=reduction).assert_contract()


def chunked_step(call, **options):
    """Loss, and its gradients to the leaves."""
    leaves = call.leaves()
    batch = (call.target, call.lam, call.partner)
    loss = linear_amp_cross_entropy(*leaves, *batch, chunk_rows=call.chunk_rows, **options)
    return (loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss)))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_give_the_same_bits_three_times(dtype, reduction, backend):
    call = Call(200, 64, 1000, dtype=dtype, chunk_rows=62)
    with fastamp.set_backend(backend):
        first, *others = (chunked_step(call, reduction=reduction) for _ in range(3))
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_do_not_wait_for_the_gpu(dtype, backend):
    """15: host synchronisation."""
    call = Call(200, 64, 1000, dtype=dtype, chunk_rows=62)
    counts = (torch.tensor(64.0), torch.tensor(64.0, device="cpu"))
    every = [{}, {"reduction": "none"}, {"weight": torch.rand(1000)}, {"ignore_index": 3}]
    every += [{"num_items": count, "grad_scale": scale} for count in counts for scale in ("row", "mean")]
    with fastamp.set_backend(backend):
        for options in every:
            chunked_step(call, **options)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            for options in every:
                chunked_step(call, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_in_a_captured_step_replay_on_new_inputs(dtype, reduction, backend):
    """15: CUDA graph capture fails."""
    call, fresh = (Call(200, 64, 1000, dtype=dtype, chunk_rows=62) for _ in range(2))
    with fastamp.set_backend(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                chunked_step(call, reduction=reduction)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chunked_step(call, reduction=reduction)
        for name in ("hidden", "linear_weight", "linear_bias", "target", "lam", "partner"):
            getattr(call, name).copy_(getattr(fresh, name))
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(map(torch.equal, replayed, chunked_step(fresh, reduction=reduction)))


def test_chunks_take_less_memory_than_whole_logits():
    call, peaks = Call(2048, 128, 32_000, dtype=torch.bfloat16), []
    for call.chunk_rows in (2048, 254):
        chunked_step(call)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        chunked_step(call)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] / 2
