"""Chunks of a linear head: how many rows and how much memory they take, half precision, and what is refused."""

import itertools

import pytest
import torch
from conftest import assert_no_worse
from heads import NAMES, Call, Made, partners, peak_bytes
from torch import nn

from fastamp import AMPLoss, Mix
from fastamp.checks import checked_num_items
from fastamp.functional import amp_cross_entropy, linear_amp_cross_entropy
from fastamp.ops import chunked_head
from fastamp.reduction import Reduction

ALL = (True, True, True)


class Leaf:
    """What is asked of a tensor before its rows are counted; on any device."""

    def __init__(self, shape, dtype, requires_grad, device):
        self.shape, self.dtype, self.requires_grad = shape, dtype, requires_grad
        self.device = torch.device(device)

    def __len__(self):
        return self.shape[0]


def automatic_rows(batch, depth, classes, dtype, needs=ALL, device="cuda"):
    shapes = ((batch, depth), (classes, depth), (classes,))
    leaves = [Leaf(shape, dtype, need, device) for shape, need in zip(shapes, needs, strict=True)]
    return chunked_head.automatic_rows(chunked_head.Head(*leaves))


def wanted_elements(batch, depth, classes, needs):
    """Of the gradients."""
    return sum(size for size, need in zip((batch * depth, classes * depth, classes), needs, strict=True) if need)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("needs", [ALL, (True, False, False), (False, True, False), (False, False, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_chunks_take_less_memory_than_the_whole(dtype, needs, device):
    """By what is held at most: logits and their gradient, gradients in the dtype of sums, and those returned."""
    cut = 0
    on_host = device == "cpu"
    least = chunked_head.SAVED_BYTES_CPU if on_host else chunked_head.SAVED_BYTES
    batches = (1, 2, 5, 6, 7, 8, 20, 100, 300, 1000, 1022, 2000, 4096, 8192, 10**5)
    for batch, depth, classes in itertools.product(batches, (16, 1024, 8192), (1000, 32_000, 128_256, 10**6, 10**8)):
        rows = automatic_rows(batch, depth, classes, dtype, needs, device)
        row_bytes = (2 if any(needs) else 1) * classes * dtype.itemsize
        whole = batch * (chunked_head.CLOSED_FORM * classes * max(4, dtype.itemsize) if on_host else row_bytes)
        elements = wanted_elements(batch, depth, classes, needs)
        summed, returned = elements * max(4, dtype.itemsize), elements * dtype.itemsize
        if rows is None:
            fewest = (chunked_head.MIN_ROWS_CPU if on_host else 1280) * row_bytes
            assert whole < least + summed + max(fewest, returned + 128 * row_bytes)
            continue
        cut += 1
        assert rows >= (chunked_head.MIN_ROWS_CPU if on_host else chunked_head.MIN_ROWS)
        assert summed + max((rows + chunked_head.OUTSIDE) * row_bytes, returned) <= whole - least
    assert cut > 20


def test_chunks_on_a_gpu_are_large_whole_tiles_and_as_few_as_take_no_memory_of_their_own():
    shape = (8192, 2048, 128_256)
    assert automatic_rows(*shape, torch.bfloat16) == 1150
    assert (1150 + chunked_head.OUTSIDE) % chunked_head.TILE_ROWS == 0
    # A gradient of W that is returned in float32 takes the room of so many rows.
    with_room = automatic_rows(16_384, 2048, 32_000, torch.float32)
    assert 2 * (with_room + chunked_head.OUTSIDE - chunked_head.TILE_ROWS) * 4 * 32_000 <= 4 * wanted_elements(
        16_384, 2048, 32_000, ALL
    )
    assert with_room > 1150


def test_heads_of_which_chunks_would_save_little_are_not_cut():
    assert automatic_rows(50, 300, 6, torch.float32) is None
    assert automatic_rows(1024, 1024, 21841, torch.bfloat16) is None
    assert automatic_rows(4096, 1024, 32_000, torch.bfloat16) is None
    shape = (4096, 4096, 128_256, torch.bfloat16)
    assert automatic_rows(*shape) is None
    assert automatic_rows(*shape, (True, False, True)) is not None
    assert automatic_rows(50, 300, 6, torch.float32, device="cpu") is None
    assert automatic_rows(256, 2048, 1000, torch.float32, device="cpu") is None


def test_logits_too_large_are_cut_without_being_asked(backend, monkeypatch):
    sums, rows = 4 * wanted_elements(15, 4, 60, ALL), 2 * 4 * (4 + chunked_head.OUTSIDE) * 60
    monkeypatch.setattr(chunked_head, "MIN_ROWS_CPU", 4)
    monkeypatch.setattr(chunked_head, "SLICE_BYTES", 2 * 4 * 60)
    monkeypatch.setattr(chunked_head, "SAVED_BYTES_CPU", chunked_head.CLOSED_FORM * 4 * 15 * 60 - rows - sums)
    call = Call(15, 4, 60, chunk_rows=None)
    with Made() as made:
        loss = call.by_library()[0]
    assert made.largest == 4 * (4 + chunked_head.OUTSIDE) * 60
    torch.testing.assert_close(loss, call.by_library(chunk_rows=15)[0])
    with Made() as made:
        Call(14, 4, 60, chunk_rows=None).by_library()
    assert made.largest == 4 * 14 * 60


def test_a_cpu_holds_little_besides_a_chunk_and_the_gradients():
    """The fused linear cross-entropy of torch, of chunks of any size, holds the gradients and their scaled copies."""
    batch, depth, classes = 256, 64, 16_000
    call = Call(batch, depth, classes, chunk_rows=None)
    leaves = call.leaves()

    def step():
        loss, _, _ = call.by_library(leaves)
        call.gradients(loss, leaves)

    rows = automatic_rows(batch, depth, classes, torch.float32, device="cpu")
    gradients = 4 * wanted_elements(batch, depth, classes, ALL)
    logits = 2 * 4 * (rows + chunked_head.OUTSIDE) * classes
    assert rows < batch / 2
    assert peak_bytes(step) < gradients + max(gradients, logits) + 10 * chunked_head.SLICE_BYTES


def test_a_half_gradient_is_scaled_without_a_second_wide_one():
    call = Call(6, 64, 16_384, dtype=torch.bfloat16, chunk_rows=2)
    loss, _, leaves = call.by_library()
    call.gradients(loss, leaves, retain_graph=True)
    elements = wanted_elements(6, 64, 16_384, ALL)
    assert 2 * elements <= peak_bytes(lambda: call.gradients(loss, leaves)) < 3 * elements


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_autograd_runs_the_chunks_of_backward_as_they_are(backend, reduction):
    call = Call(reduction=reduction)
    loss, _, leaves = call.by_library()
    expected = call.gradients(loss, leaves)
    loss, _, leaves = call.by_library()
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward(call.upstream.to(loss))
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


class Wide:
    """Stands in for what cuBLAS offers: products of half precision that are summed, and left, in float32."""

    def __init__(self, monkeypatch, adds):
        self.calls = []
        mm, addmm = torch.mm, torch.addmm

        def wide_mm(a, b, *, out_dtype):
            assert (a.dtype, b.dtype, out_dtype) == (a.dtype, a.dtype, torch.float32)
            self.calls.append("mm")
            return mm(a.float(), b.float())

        def wide_addmm(total, a, b, *, beta, out_dtype, out):
            assert (total.dtype, b.dtype, out_dtype) == (torch.float32, a.dtype, torch.float32)
            self.calls.append("addmm")
            return addmm(total, a.float(), b.float(), beta=beta, out=out)

        monkeypatch.setattr(torch, "mm", wide_mm)
        monkeypatch.setattr(torch, "addmm", wide_addmm)
        monkeypatch.setattr(chunked_head, "_has_wide_products", lambda factor: factor.dtype.itemsize == 2)
        monkeypatch.setattr(chunked_head, "ADDS_WIDE", adds)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(("dtype", "reduction"), [(torch.float16, "mean"), (torch.bfloat16, "none")], ids=str)
def test_products_that_are_left_in_float32_hold_the_contract(monkeypatch, dtype, reduction, adds):
    call = Call(9, 8, 19, dtype=dtype, step_size=0.05, reduction=reduction)
    wide = Wide(monkeypatch, adds)
    loss, _, leaves = call.by_library()
    ours = call.gradients(loss, leaves)
    assert wide.calls == ["mm", "addmm" if adds else "mm"] * 3
    monkeypatch.undo()
    truth, other = (call.gradients(run[0], run[2]) for run in map(call.by_definition, (torch.float64, dtype)))
    for name, mine, true, theirs in zip(NAMES, ours, truth, other, strict=True):
        assert mine.dtype == dtype
        assert_no_worse(name, mine, true, theirs, dtype)


def large_masses():
    call = Call(16, 8, 500, dtype=torch.float16)
    call.target = torch.zeros(16, 500)
    call.target[:, 3] = 200
    return call


def far_coefficients():
    call = Call(7, 4, 20, dtype=torch.float16, step_size=1.0, grad_clip=None)
    call.hidden, call.linear_weight = 30 * call.hidden, 3 * call.linear_weight
    return call


def products_that_cancel():
    call = Call(6, 4, 20, dtype=torch.float16)
    call.hidden *= 0
    call.linear_weight[:10], call.linear_weight[10:] = -150, 150
    call.linear_bias = torch.tensor([0.0] * 10 + [20.0] * 10, dtype=torch.float16)
    call.target = call.target % 10
    return call


@pytest.mark.parametrize("make", [large_masses, far_coefficients, products_that_cancel])
def test_float16_gradients_are_finite_where_those_of_the_whole_are(backend, make):
    call = make()
    ours, whole, truth = (
        call.gradients(run[0], run[2])
        for run in (call.by_library(), call.by_library(chunk_rows=None), call.by_definition(torch.float64))
    )
    assert all(grad.isfinite().all() for grad in whole)
    largest = max(float(true.abs().max()) for true in truth)  # of which a bias gets a sum that cancels
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-2, atol=2e-3 * largest)


@pytest.mark.parametrize(("factor", "options"), [(2.0**-20, {"mode": "mixup"}), (2.0**12, {"grad_scale": "mean"})])
def test_a_factor_of_all_class_weights_changes_no_gradient_of_the_mean(backend, factor, options):
    call = Call(7, 6, 60, dtype=torch.float16, **options)
    call.upstream, weight = torch.tensor(2.0**10), 0.5 + torch.rand(60)
    runs = (call.by_library(weight=weight), call.by_library(weight=factor * weight))
    expected, mine = (call.gradients(loss, leaves) for loss, _, leaves in runs)
    torch.testing.assert_close(mine, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(("chunk_rows", "reduction"), [(1, "sum"), (2, "none"), (5, "sum")])
def test_a_row_of_nan_reaches_the_rows_it_is_mixed_with_alone(backend, chunk_rows, reduction):
    for kind in ("one cycle", "permutation"):
        call = Call(12, 4, 9, chunk_rows=chunk_rows, reduction=reduction)
        call.partner = partners(kind, 12)
        call.hidden[4] = torch.nan
        hidden, weight, bias = call.leaves()
        loss, _, leaves = call.by_library([hidden, weight.detach(), bias.detach()])
        (grad,) = call.gradients(loss, leaves)
        (before,) = (call.partner == 4).nonzero().flatten().tolist()
        reached = grad.isnan().any(1).nonzero().flatten().tolist()
        assert reached == sorted({4, int(call.partner[4]), before})


def test_a_count_of_zero_gives_what_the_whole_gives(backend):
    call = Call(num_items=torch.tensor(0.0))
    loss, _, leaves = call.by_library()
    assert loss == call.by_library(chunk_rows=None)[0] == torch.inf
    assert not any(grad.any() for grad in call.gradients(loss, leaves))


@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize(
    ("autocast", "name", "dtype", "message"),
    [
        (False, "linear_bias", torch.float64, "must have hidden's dtype torch.float32 outside torch.autocast"),
        (False, "linear_weight", torch.float16, "must have hidden's dtype torch.float32 outside"),
        (True, "hidden", torch.float64, "linear_weight must have hidden's dtype torch.float64, got"),
        (True, "linear_weight", torch.float64, "must have .* got torch.float64: torch"),
        (True, "linear_bias", torch.float64, "must have hidden's dtype torch.float32, got"),
    ],
)
def test_dtypes_that_a_linear_layer_does_not_take_are_refused(chunk_rows, autocast, name, dtype, message):
    call = Call(chunk_rows=chunk_rows)
    setattr(call, name, getattr(call, name).to(dtype))
    message = message if name == "hidden" else f"{name} {message}"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(TypeError, match=message):
        call.by_library()


def test_class_weights_that_want_a_gradient_are_refused():
    call, weight = Call(), torch.rand(11).requires_grad_()
    logits, batch = torch.randn(7, 11), (call.target, call.lam, call.partner)
    for run in (
        lambda: call.by_library(weight=weight)[0],
        lambda: call.by_library(weight=weight, chunk_rows=None)[0],
        lambda: amp_cross_entropy(logits, *batch, weight=weight),
        lambda: AMPLoss(weight=weight)(logits, call.target),
    ):
        with pytest.raises(ValueError, match=r"weight must not require a gradient.*weight\.detach\(\)"):
            run()
        with torch.no_grad():
            assert run().isfinite()


def test_a_count_on_the_cpu_is_a_number_for_rows_elsewhere():
    """Where a copy of it would wait for the device."""
    elsewhere, here = torch.device("meta"), torch.tensor(4.0)
    assert checked_num_items(torch.tensor(4), elsewhere) == 4
    assert isinstance(checked_num_items(here, elsewhere), float)
    assert checked_num_items(here, torch.device("cpu")) is here
    with pytest.raises(ValueError, match="num_items must be a finite number > 0 or None, got 0"):
        checked_num_items(torch.tensor(0.0), elsewhere)


def test_every_loss_takes_such_a_count(monkeypatch):
    given = []

    def step(*arguments, **_):
        given.extend(one.num_items for one in arguments if isinstance(one, Reduction))
        return torch.zeros(()), None

    for operation in ("amp_cross_entropy", "linear_amp_cross_entropy"):
        monkeypatch.setattr(f"fastamp.ops.{operation}.dispatch", step)
    with torch.device("meta"):
        rows, weight, logits = torch.empty(4, 3), torch.empty(5, 3), torch.empty(4, 5)
        target, lam, partner = torch.empty(4, dtype=torch.int64), torch.empty(4), torch.empty(4, dtype=torch.int64)
    count = torch.tensor(2.0)
    linear_amp_cross_entropy(rows, weight, None, target, lam, partner, num_items=count)
    amp_cross_entropy(logits, target, lam, partner, num_items=count)
    AMPLoss()(logits, target, mix=Mix(lam, partner), num_items=count)
    assert [type(one) for one in given] == [float] * 3


TRANSFORMS = {
    "grad": lambda f, rows: torch.func.grad(f)(rows[0]),
    "vmap": lambda f, rows: torch.func.vmap(f)(rows),
    "jvp": lambda f, rows: torch.func.jvp(f, (rows[0],), (rows[0],)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("of", ["chunks", "logits", "criterion"])
def test_transforms_of_torch_func_are_refused_by_name(transform, of):
    call = Call()
    batch = (call.target, call.lam, call.partner)

    def loss(hidden):
        if of == "chunks":
            return linear_amp_cross_entropy(hidden, call.linear_weight, None, *batch, chunk_rows=3)
        logits = hidden @ call.linear_weight.mT
        return amp_cross_entropy(logits, *batch) if of == "logits" else AMPLoss()(logits, call.target)

    name = {"chunks": "linear_amp_cross_entropy", "logits": "amp_cross_entropy", "criterion": "AMPLoss in train mode"}
    with pytest.raises(NotImplementedError, match=f"{name[of]} does not go with the transforms of torch.func"):
        transform(loss, torch.rand(1, 7, 6))


def test_a_full_graph_with_chunks_is_refused_by_name():
    call = Call()
    layer = nn.Linear(6, 11)

    def step(hidden):
        batch = (call.target, call.lam, call.partner)
        return linear_amp_cross_entropy(hidden, layer.weight, layer.bias, *batch, chunk_rows=3)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="chunk_rows breaks the graph: leave it out for fullgraph=True"):
        torch.compile(step, backend="eager", fullgraph=True)(call.hidden)
