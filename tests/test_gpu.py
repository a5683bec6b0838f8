"""On a GPU: the contract at sizes that the interpreter is too slow for, and what only a GPU can show."""

import contextlib
import json
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import DTYPES, HAS_GPU, assert_contract, by_library, paired_case, random_case
from heads import Call
from torch import nn

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

LOSSES = ("cross_entropy", "binary_cross_entropy", "softmax_bce")
BACKENDS = pytest.mark.parametrize("backend", ["torch", "auto"])


@pytest.fixture(autouse=True)
def _on_the_gpu():
    with torch.device("cuda"):
        yield


@contextlib.contextmanager
def nothing_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def another_stream():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(step):
    """A graph of one step, and the tensors that each replay fills."""
    with another_stream():
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def peak_bytes(step):
    """Bytes that a step takes at its peak beyond what was there, once it is compiled."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# Steps: each is a function of tensors, and draws such tensors.


class LogitsStep:
    """A loss of logits, and its gradient."""

    def __init__(self, batch, classes, make=random_case, dtype=torch.float32, **options):
        self.draw = lambda: make(batch, classes, dtype=dtype, **options)[:4]
        self.options = options

    def __call__(self, logits, target, lam, partner):
        leaf = logits.detach().requires_grad_()
        loss = amp_cross_entropy(leaf, target, lam, partner, **self.options)
        return loss.detach(), *torch.autograd.grad(loss, leaf, torch.ones_like(loss))


class PairsStep(LogitsStep):
    """The same of matchings."""

    def __init__(self, batch, classes):
        super().__init__(batch, classes, paired_case)
        self.options = {"pairing": "matching"}


class HeadStep:
    """A linear head, whole behind a ReLU or in chunks, and its gradients."""

    def __init__(self, *shape, dtype=torch.float32, chunk_rows=None, **options):
        self.call = lambda: Call(*shape, dtype=dtype, chunk_rows=chunk_rows)
        self.options = {"chunk_rows": chunk_rows, "activation": "relu" if chunk_rows is None else None, **options}

    def draw(self):
        call = self.call()
        return call.hidden, call.linear_weight, call.linear_bias, call.target, call.lam, call.partner

    def __call__(self, hidden, weight, bias, *batch):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        loss = linear_amp_cross_entropy(*leaves, *batch, **self.options)
        return loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))


class LayerStep:
    """The operations of a step at any layer, from embeddings to a loss, and back."""

    def draw(self, batch=48, length=50, depth=256, classes=300):
        hidden = 0.25 * torch.randn(batch, length, depth)
        ids, table = (torch.rand(batch, length) ** 4 * 500).long(), 0.25 * torch.randn(500, depth)
        rows = hidden, torch.rand(batch), torch.randperm(batch), 0.01 * torch.randn_like(hidden)
        return *rows, ids, table, torch.randint(classes, (batch,)), torch.randn(depth, classes)

    def __call__(self, hidden, lam, partner, grad_mixed, ids, table, target, head):
        hidden, table = hidden.detach().requires_grad_(), table.detach().requires_grad_()
        words = embedding_mix(ids, table, lam, partner, padding_idx=0)
        mixed = mix(hidden, lam, partner)
        lam_adv, mixed_adv = remix(hidden, lam, partner, grad_mixed)
        logits, logits_adv = ((x.float() + words).mean(1) @ head for x in (mixed, mixed_adv))
        loss, delta, mask = select_cross_entropy(logits, logits_adv, target, lam, partner)
        grads = torch.autograd.grad(loss.mean(), (hidden, table))
        return loss.detach(), delta, mask, lam_adv, lambda_grad(grad_mixed, hidden, partner), *grads


STEPS = {
    **{
        f"{batch} x {classes}, {reduction}": LogitsStep(batch, classes, reduction=reduction)
        for batch, classes in ((50, 6), (257, 1000), (8, 40_000))
        for reduction in ("mean", "none")
    },
    **{
        f"chunks in {dtype}, {reduction}": HeadStep(200, 64, 1000, dtype=dtype, chunk_rows=62, reduction=reduction)
        for dtype in DTYPES
        for reduction in ("mean", "none")
    },
}
KERNELS = {
    **{f"pairs of {b} x {c}": PairsStep(b, c) for b, c in ((50, 6), (257, 1000), (9, 32_003), (3, 128_257))},
    "a head": HeadStep(500, 300, 6),
    "layers": LayerStep(),
}


def assert_repeatable(step):
    """It gives the same bits three times, does not wait for the GPU, and replays on new inputs."""
    inputs, fresh = step.draw(), step.draw()
    first = step(*inputs)
    with nothing_waits():
        others = [step(*inputs) for _ in range(2)]
    for other in others:
        assert all(map(torch.equal, first, other))
    graph, results = captured(lambda: step(*inputs))
    for held, new in zip(inputs, fresh, strict=True):
        held.copy_(new)
    graph.replay()
    replayed = [x.clone() for x in results]
    assert all(map(torch.equal, replayed, step(*fresh)))


@BACKENDS
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_step_gives_the_same_bits_does_not_wait_and_replays_on_new_inputs(backend, step):
    with fastamp.set_backend(backend):
        assert_repeatable(step)


@pytest.mark.parametrize("step", KERNELS.values(), ids=KERNELS)
def test_a_step_of_kernels_gives_the_same_bits_does_not_wait_and_replays_on_new_inputs(step):
    assert_repeatable(step)


# The contract


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("batch", "classes"), [(50, 6), (128, 2), (257, 1000), (64, 4097), (33, 8192), (9, 32_003), (3, 128_257)]
)
def test_the_contract_holds_at_every_size(batch, classes, loss, dtype):
    if loss == "softmax_bce" and classes > 4097:
        pytest.skip("the reference holds (B, C, C)")
    assert_contract(random_case(batch, classes, dtype=dtype, loss=loss, step_size=0.1))
    if loss != "softmax_bce":
        assert_contract(paired_case(batch, classes, dtype=dtype, loss=loss, step_size=0.1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_contract_holds_for_reductions_and_targets(soft, reduction):
    case = random_case(70, 300, reduction=reduction, weight=0.5 + torch.rand(300), label_smoothing=0.1)
    assert_contract(case._replace(target=torch.rand(70, 300).softmax(1)) if soft else case)


@BACKENDS
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [300, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_hold_the_contract(dtype, classes, reduction, backend):
    """Their products are left in float32 here."""
    with fastamp.set_backend(backend):
        Call(50, 64, classes, dtype=dtype, chunk_rows=16, step_size=0.05, reduction=reduction).assert_contract()


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
        finding = check_case(case, "cuda", "auto", dtype)
        assert not finding.failures, (case, finding.failures)


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


# The host


@BACKENDS
@pytest.mark.parametrize("options", [{}, {"loss": "softmax_bce"}, {"reweight": "moving"}, {"ignore_index": 1}], ids=str)
def test_a_criterion_that_draws_does_not_wait_for_the_gpu(backend, options):
    case = random_case(64, 50)
    criterion = AMPLoss(generator=torch.Generator("cuda").manual_seed(1), **options).cuda()
    logits, items = case.logits.requires_grad_(), torch.tensor(64.0)
    with fastamp.set_backend(backend):
        criterion(logits, case.target).backward()  # compiles
        with nothing_waits():
            for kwargs in ({}, {"return_stats": True}, {"num_items": items}):
                out = criterion(logits, case.target, **kwargs)
                loss = out[0] if isinstance(out, tuple) else out
                loss.backward(torch.ones_like(loss))


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_option_makes_chunks_wait_for_the_gpu(dtype, backend):
    counts = (torch.tensor(64.0), torch.tensor(64.0, device="cpu"))
    every = [{"weight": torch.rand(1000)}, {"ignore_index": 3}]
    every += [{"num_items": count, "grad_scale": scale} for count in counts for scale in ("row", "mean")]
    steps = [HeadStep(200, 64, 1000, dtype=dtype, chunk_rows=62, **options) for options in every]
    inputs = steps[0].draw()
    with fastamp.set_backend(backend):
        for step in steps:
            step(*inputs)  # compiles
        with nothing_waits():
            for step in steps:
                step(*inputs)


@pytest.mark.parametrize(("batch", "classes"), [(50, 6), (200, 1000), (8, 40_000)])
def test_a_captured_criterion_of_matchings_draws_at_every_replay(batch, classes):
    criterion = AMPLoss(pairing="matching")
    logits, target = torch.randn(batch, classes, requires_grad=True), torch.randint(classes, (batch,))

    def step():
        return torch.autograd.grad(criterion(logits, target), logits)[0]

    step()
    with nothing_waits():
        step()
    graph, grad = captured(step)
    grads = []
    for _ in range(2):
        graph.replay()
        grads.append(grad.clone())
    assert grads[0].isfinite().all()
    assert not torch.equal(*grads)


def test_a_captured_backward_replays_twice_for_one_forward():
    """A second backward must not rescale what is saved."""
    case = random_case(200, 1000)
    logits, factor = case.logits.clone().requires_grad_(), torch.tensor(4.0)
    criterion, mix = AMPLoss(), Mix(case.lam, case.partner)
    with another_stream():
        (expected,) = torch.autograd.grad(criterion(logits, case.target, mix=mix), logits, factor)
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
    """The kernel is launched on the device of its tensors."""
    case = random_case(50, 6)
    expected = by_library(case)
    there = case._replace(
        **{name: getattr(case, name).to("cuda:1") for name in ("logits", "target", "lam", "partner", "upstream")}
    )
    ours = by_library(there)
    assert ours.loss.device == torch.device("cuda:1")
    assert torch.equal(ours.grad_logits.cpu(), expected.grad_logits.cpu())
    assert torch.cuda.current_device() == 0


STOPPED = {
    **{
        f"a label {label}": f"fastamp.AMPLoss()(torch.zeros(4, 7), torch.tensor([0, 1, {label}, 2]))"
        for label in (-1, 7, 2**40)
    },
    **{
        f"an id {word}": f"""
ids, partner = torch.tensor([[0, 1], [{word}, 2]]), torch.tensor([1, 0])
fastamp.functional.embedding_mix(ids, torch.zeros(5, 7), torch.rand(2), partner)"""
        for word in (-1, 5, 2**40)
    },
    "a label of the selection": """
logits, target, partner = torch.zeros(2, 3), torch.tensor([0, 3]), torch.tensor([1, 0])
fastamp.functional.select_cross_entropy(logits, logits, target, torch.rand(2), partner)""",
    **{
        f"no matching, {classes} classes": f"""
mix = fastamp.Mix(torch.rand(3), torch.tensor([1, 2, 0]))
fastamp.AMPLoss(pairing="matching")(torch.zeros(3, {classes}), torch.tensor([0, 1, 2]), mix=mix)"""
        for classes in (300, 5000)
    },
}


@pytest.mark.parametrize("code", STOPPED.values(), ids=STOPPED)
def test_values_out_of_range_stop_the_kernel(code):
    """In a process of its own, for the context is lost."""
    code = f'import torch, fastamp\ntorch.set_default_device("cuda")\n{code}\ntorch.cuda.synchronize()'
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


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_gradient_and_little_more(dtype):
    step = LogitsStep(512, 8192, dtype=dtype)
    inputs = step.draw()
    assert peak_bytes(lambda: step(*inputs)) < 1.1 * inputs[0].numel() * dtype.itemsize


def test_chunks_take_less_memory_than_whole_logits():
    call = Call(2048, 128, 32_000, dtype=torch.bfloat16)
    peaks = []
    for call.chunk_rows in (2048, 254):
        peaks.append(peak_bytes(lambda: call.gradients(*call.by_library()[::2])))
    assert peaks[1] < peaks[0] / 2


def test_memory_of_mixed_embeddings_is_the_result_and_little_more():
    ids, table = torch.randint(1000, (64, 128)), torch.randn(1000, 512)
    lam, partner = torch.rand(64), torch.randperm(64)
    result = embedding_mix(ids, table, lam, partner).nbytes
    assert peak_bytes(lambda: embedding_mix(ids, table, lam, partner)) < 1.1 * result


# AMPLoss.step


def network(dropout):
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(dropout), nn.Linear(64, 6)).cuda()


def hidden_and_target():
    return torch.randn(50, 64, requires_grad=True), torch.randint(6, (50,))


@pytest.mark.parametrize("mode", ["amp", "maxop", "mixup"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_captured_training_step(mode, dropout):
    net, (hidden, target) = network(dropout), hidden_and_target()
    criterion = AMPLoss(mode=mode)
    mix = criterion.sample(50, device="cuda")
    with another_stream():
        for _ in range(3):
            net.zero_grad()
            criterion.step(net, hidden, target, mix=mix, plan="merged").backward()
    net.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, stats = criterion.step(net, hidden, target, return_stats=True)
        loss.backward()
    seen = set()
    for _ in range(4):
        graph.replay()
        torch.cuda.synchronize()
        seen.add(tuple(stats.lam.tolist()))
        assert loss.isfinite()
        assert stats.delta.abs().max() < 0.05  # with masks redrawn about 0.5
        assert all((parameter.grad != 0).any() for parameter in net.parameters())
    assert len(seen) == 4


@pytest.mark.parametrize("plan", ["auto", "merged", "both"])
def test_the_numbers_of_a_step_are_those_of_the_cpu(plan):
    net, (hidden, target) = network(0.0).double(), hidden_and_target()
    mix = Mix(torch.rand(50, dtype=torch.float64), torch.randperm(50))
    criterion = AMPLoss(step_size=0.4, grad_clip=None, tie_tol=0.0)
    found = []
    for device in ("cuda", "cpu"):
        moved, rows = net.to(device), hidden.detach().double().to(device)
        loss = criterion.step(moved, rows, target.to(device), mix=mix.to(device), plan=plan, context={})
        found.append([x.cpu() for x in (loss, *torch.autograd.grad(loss, list(moved.parameters())))])
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("plan", ["merged", "both"])
def test_no_step_waits_for_the_device(plan):
    net, (hidden, target) = network(0.5), hidden_and_target()
    criterion = AMPLoss()
    criterion.step(net, hidden, target, plan=plan).backward()
    with nothing_waits():
        criterion.step(net, hidden, target, plan=plan).backward()


def test_both_passes_share_their_dropout_masks():
    net, (hidden, target) = network(0.5), hidden_and_target()
    for autocast in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            _, stats = AMPLoss().step(net, hidden, target, return_stats=True)
        assert stats.delta.abs().max() < 0.1


def test_peak_memory_of_a_step_is_about_plain_mixups():
    layers = (nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(12))
    net = nn.Sequential(*layers, nn.Linear(1024, 8)).cuda()
    hidden = torch.randn(4096, 1024, requires_grad=True)
    target = torch.randint(8, (4096,))

    def step(criterion):
        criterion.step(net, hidden, target, context={}).backward()
        net.zero_grad()
        hidden.grad = None

    plain, ours = AMPLoss(mode="mixup"), AMPLoss()
    assert peak_bytes(lambda: step(ours)) <= 1.15 * peak_bytes(lambda: step(plain))
