"""On a GPU: the contract at sizes that the interpreter is too slow for, and what only a GPU can show."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import DTYPES, HAS_GPU, assert_contract, by_library, random_case

import fastamp
from fastamp import AMPLoss, Mix
from fastamp.conformance import EmbeddingCase, OperationCase, SelectionCase, check_case
from fastamp.functional import (
    amp_cross_entropy,
    embedding_mix,
    lambda_grad,
    linear_amp_cross_entropy,
    mix,
    remix,
    select_cross_entropy,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA or ROCm device")]

LOSSES = ("cross_entropy", "softmax_bce")


@pytest.fixture(autouse=True)
def _on_the_gpu():
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("batch", "classes"), [(50, 6), (128, 2), (257, 1000), (64, 4097), (33, 8192), (9, 32_003), (3, 128_257)]
)
def test_the_contract_holds_at_every_size(batch, classes, loss, dtype):
    if loss == "softmax_bce" and classes > 4097:
        pytest.skip("the reference holds (B, C, C)")
    case = random_case(batch, classes, dtype=dtype, loss=loss, step_size=0.1)
    # Long rows: the sum of many small terms, in another order.
    assert_contract(case)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_contract_holds_for_reductions_and_targets(soft, reduction):
    case = random_case(70, 300, reduction=reduction, weight=0.5 + torch.rand(300), label_smoothing=0.1)
    assert_contract(case._replace(target=torch.rand(70, 300).softmax(1)) if soft else case)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(("batch", "classes"), [(50, 6), (300, 1000), (16, 40_000)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_three_runs_give_the_same_bits(backend, batch, classes, reduction):
    case = random_case(batch, classes, reduction=reduction)
    with fastamp.set_backend(backend):
        first, *others = (by_library(case) for _ in range(3))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_a_head_gives_the_same_bits_three_times():
    hidden, weight, bias = (t.requires_grad_() for t in (torch.randn(500, 300), torch.randn(6, 300), torch.randn(6)))
    case = random_case(500, 6)
    runs = []
    for _ in range(3):
        loss = linear_amp_cross_entropy(hidden, weight, bias, case.target, case.lam, case.partner, activation="relu")
        runs.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("options", [{}, {"loss": "softmax_bce"}, {"reweight": "moving"}, {"ignore_index": 1}], ids=str)
def test_a_step_does_not_wait_for_the_gpu(backend, options):
    """15: host synchronisation."""
    case = random_case(64, 50)
    criterion = AMPLoss(generator=torch.Generator("cuda").manual_seed(1), **options).cuda()
    logits, items = case.logits.requires_grad_(), torch.tensor(64.0)
    with fastamp.set_backend(backend):
        criterion(logits, case.target).backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            for kwargs in ({}, {"return_stats": True}, {"num_items": items}):
                out = criterion(logits, case.target, **kwargs)
                loss = out[0] if isinstance(out, tuple) else out
                loss.backward(torch.ones_like(loss))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(("batch", "classes"), [(50, 6), (200, 1000), (8, 40_000)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_captured_step_replays_on_new_inputs(backend, batch, classes, reduction):
    """15: CUDA graph capture fails."""
    case = random_case(batch, classes)
    criterion = AMPLoss(reduction=reduction)
    logits = case.logits.clone().requires_grad_()
    target, mix = case.target.clone(), Mix(case.lam.clone(), case.partner.clone())

    def step():
        logits.grad = None
        loss = criterion(logits, target, mix=mix)
        loss.sum().backward()
        return loss, logits.grad

    with fastamp.set_backend(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss, grad = step()
        fresh = random_case(batch, classes)
        with torch.no_grad():
            for held, new in zip((logits, target, *mix), fresh, strict=False):
                held.copy_(new)
        graph.replay()
        loss, grad = loss.clone(), grad.clone()
        expected, expected_grad = step()
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)


def test_a_captured_backward_replays_twice_for_one_forward():
    """2: a second backward rescales saved gradients."""
    case = random_case(200, 1000)
    logits, factor = case.logits.clone().requires_grad_(), torch.tensor(4.0)
    criterion, mix = AMPLoss(), Mix(case.lam, case.partner)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        (expected,) = torch.autograd.grad(criterion(logits, case.target, mix=mix), logits, factor)
    torch.cuda.current_stream().wait_stream(stream)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        loss = criterion(logits, case.target, mix=mix)
    with torch.cuda.graph(backward):
        (grad,) = torch.autograd.grad(loss, logits, factor)
    forward.replay()
    for _ in range(2):
        backward.replay()
        torch.testing.assert_close(grad, expected)


@pytest.mark.skipif(HAS_GPU and torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_tensor_on_another_device_than_the_current_one():
    """16: the kernel is launched on the device of its tensors."""
    case = random_case(50, 6)
    expected = by_library(case)
    there = case._replace(
        **{name: getattr(case, name).to("cuda:1") for name in ("logits", "target", "lam", "partner", "upstream")}
    )
    assert torch.cuda.current_device() == 0
    ours = by_library(there)
    assert ours.loss.device == torch.device("cuda:1")
    assert torch.equal(ours.grad_logits.cpu(), expected.grad_logits.cpu())
    assert torch.cuda.current_device() == 0


def test_the_current_device_is_left_as_it_was():
    """16, with one device."""
    by_library(random_case(4, 3))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("label", [-1, 7, 2**40])
def test_a_label_out_of_range_stops_the_kernel(label):
    """27: in a process of its own, for the context is lost."""
    code = f"""
import torch, fastamp
loss = fastamp.AMPLoss()(torch.zeros(4, 7, device="cuda"), torch.tensor([0, 1, {label}, 2], device="cuda"))
torch.cuda.synchronize()
print(loss.item())
"""
    assert_stopped(code)


def assert_stopped(code):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"TRITON_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0, done.stdout
    assert "assert" in done.stderr.lower()


def test_arguments_on_different_devices_are_named():
    case = random_case(4, 3)
    for name in ("target", "lam", "partner"):
        with pytest.raises(ValueError, match=f"{name} is on cpu, the rows to mix are on cuda:0"):
            by_library(case._replace(**{name: getattr(case, name).cpu()}))


def test_the_gpu_takes_triton_unless_told_otherwise():
    pytest.importorskip("triton", reason="the package triton is not installed")
    x = torch.zeros(1)
    assert fastamp.backend.uses_triton(x)
    with fastamp.set_backend("torch"):
        assert not fastamp.backend.uses_triton(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_gradient_and_little_more(dtype):
    batch, classes = 512, 8192
    logits = torch.randn(batch, classes, dtype=dtype, requires_grad=True)
    target, lam, partner = torch.randint(classes, (batch,)), torch.rand(batch), torch.randperm(batch)
    amp_cross_entropy(logits, target, lam, partner).backward()
    logits.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    amp_cross_entropy(logits, target, lam, partner).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.1 * logits.numel() * logits.element_size()


# --- the operations of a step at any layer


def layer_inputs(batch, length, depth, dtype=torch.float32):
    hidden = (0.25 * torch.randn(batch, length, depth)).to(dtype)
    return hidden, torch.rand(batch), torch.randperm(batch), 0.01 * torch.randn_like(hidden)


def layer_step(hidden, lam, partner, grad_mixed, ids, table, target, head):
    """All of them, from embeddings to a loss, and back."""
    hidden, table = hidden.detach().requires_grad_(), table.detach().requires_grad_()
    words = embedding_mix(ids, table, lam, partner, padding_idx=0)
    mixed = mix(hidden, lam, partner)
    lam_adv, mixed_adv = remix(hidden, lam, partner, grad_mixed)
    logits, logits_adv = ((x.float() + words).mean(1) @ head for x in (mixed, mixed_adv))
    loss, delta, mask = select_cross_entropy(logits, logits_adv, target, lam, partner)
    loss.mean().backward()
    return loss.detach(), delta, mask, lam_adv, lambda_grad(grad_mixed, hidden, partner), hidden.grad, table.grad


def layer_step_inputs(batch=48, length=50, depth=256, classes=300):
    ids = (torch.rand(batch, length) ** 4 * 500).long()
    return (
        *layer_inputs(batch, length, depth),
        ids,
        0.25 * torch.randn(500, depth),
        torch.randint(classes, (batch,)),
        torch.randn(depth, classes),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["mix", "lambda_grad", "remix", "embedding_mix", "select_cross_entropy"])
def test_the_operations_hold_the_contract_at_size(op, dtype):
    sized = {
        "embedding_mix": [EmbeddingCase("large", shape=(64, 100, 768), vocabulary=5000)],
        "select_cross_entropy": [
            SelectionCase("large", shape=shape, change=change)
            for shape in ((4096, 6), (300, 1000), (64, 50_257))
            for change in (0.01, 3.0)
        ],
    }
    shapes = ((512, 768), (24, 40, 768), (3, 2**20 + 4))
    for case in sized.get(op, [OperationCase(op, "large", shape=shape) for shape in shapes]):
        with torch.device("cpu"):  # where inputs are drawn
            finding = check_case(case, "cuda", "auto", dtype)
        assert not finding.failures, (case, finding.failures)


def test_the_operations_give_the_same_bits_three_times():
    inputs = layer_step_inputs()
    first, *others = (layer_step(*inputs) for _ in range(3))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_the_operations_do_not_wait_for_the_gpu():
    """15: host synchronisation."""
    inputs = layer_step_inputs()
    layer_step(*inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer_step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_operations_replay_on_new_inputs():
    """15: CUDA graph capture fails."""
    inputs = layer_step_inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer_step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer_step(*inputs)
    for held, new in zip(inputs, layer_step_inputs(), strict=True):
        held.copy_(new)
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert all(map(torch.equal, replayed, layer_step(*inputs)))


@pytest.mark.parametrize("word", [-1, 5, 2**40])
def test_an_id_out_of_range_stops_the_kernel(word):
    """27, of the embedding."""
    code = f"""
import torch, fastamp
ids, partner = torch.tensor([[0, 1], [{word}, 2]], device="cuda"), torch.tensor([1, 0], device="cuda")
mixed = fastamp.functional.embedding_mix(ids, torch.zeros(5, 7, device="cuda"), torch.rand(2, device="cuda"), partner)
torch.cuda.synchronize()
print(mixed.sum().item())
"""
    assert_stopped(code)


def test_a_label_out_of_range_stops_the_selection():
    """27, of the selection."""
    code = """
import torch, fastamp
logits, target = torch.zeros(2, 3, device="cuda"), torch.tensor([0, 3], device="cuda")
lam, partner = torch.rand(2, device="cuda"), torch.tensor([1, 0], device="cuda")
loss, _, _ = fastamp.functional.select_cross_entropy(logits, logits, target, lam, partner)
torch.cuda.synchronize()
print(loss.sum().item())
"""
    assert_stopped(code)


def test_memory_of_mixed_embeddings_is_the_result_and_little_more():
    ids, table = torch.randint(1000, (64, 128)), torch.randn(1000, 512)
    lam, partner = torch.rand(64), torch.randperm(64)
    embedding_mix(ids, table, lam, partner)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mixed = embedding_mix(ids, table, lam, partner)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.1 * mixed.numel() * mixed.element_size()
