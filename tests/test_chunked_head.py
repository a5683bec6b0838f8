"""A linear head of many classes, some rows at a time: the numbers of the whole, and never (B, C) of anything."""

import pytest
import torch
from conftest import DTYPES, HAS_GPU, INTERPRETED, TOLERANCE, assert_no_worse
from heads import KINDS, NAMES, Call, Made, partners
from hypothesis import given
from hypothesis import strategies as st
from strategies import options
from torch import nn

import fastamp
from fastamp.functional import linear_amp_cross_entropy
from fastamp.ops import chunked_head


@given(batch=st.integers(1, 40), chunk_rows=st.integers(1, 45), kind=KINDS, seed=st.integers(0, 2**16))
def test_every_role_finds_both_of_its_rows_in_one_chunk(batch, chunk_rows, kind, seed):
    torch.manual_seed(seed)
    partner = partners(kind, batch)
    is_matching = torch.equal(partner[partner], torch.arange(batch))
    cut = chunked_head.chunks(partner, chunk_rows, chunked_head.PAIR if is_matching else None)
    assert cut.size <= chunk_rows + chunked_head.OUTSIDE
    every = []
    for rows, local in zip(cut.rows.split(cut.size), cut.partner.split(cut.size), strict=True):
        own = rows[cut.outside :]
        assert torch.equal(rows[local[cut.outside :]], partner[own])
        assert torch.equal(local.sort().values, torch.arange(len(rows)))
        every.append(own)
    assert torch.equal(torch.cat(every), cut.order)
    assert torch.equal(cut.order.sort().values, torch.arange(batch))


def test_the_order_is_made_without_a_look_at_the_permutation():
    on_meta = torch.empty(50, dtype=torch.int64, device="meta")
    cut = chunked_head.chunks(on_meta, 16)
    assert [len(rows) - cut.outside for rows in cut.rows.split(cut.size)] == [16, 16, 16, 2]


def test_the_indices_of_all_chunks_are_made_at_once():
    def operators(chunk_rows, longest=None):
        with Made() as made:
            chunked_head.chunks(torch.randperm(1000), chunk_rows, longest)
        return made.operators

    assert operators(3) == operators(400) < 90
    assert operators(3, chunked_head.PAIR) < operators(3) - 25


@st.composite
def calls(draw):
    batch, classes, depth = draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.integers(1, 6))
    soft, kind = draw(st.booleans()), draw(KINDS)
    chosen = draw(options(batch, classes, soft=soft))
    rows, bias = draw(st.integers(1, 14)), draw(st.booleans())
    ignored = draw(st.integers(0, batch))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    for name in ("weight", "pos_weight"):
        if chosen.get(name) is not None:
            chosen[name] = 0.25 + torch.rand(classes)
    call = Call(batch, depth, classes, dtype=torch.float64, chunk_rows=rows, bias=bias, **chosen)
    call.partner = partners(kind, batch)
    if soft:
        call.target = 0.9 * torch.rand(batch, classes, dtype=torch.float64).softmax(1)
    elif chosen["ignore_index"] != -100:
        call.target[:ignored] = chosen["ignore_index"]
    return call


@given(call=calls())
def test_closed_forms_in_chunks_are_the_definition(call):
    with fastamp.set_backend("torch"):
        call.assert_contract()


@INTERPRETED
@given(call=calls())
def test_kernels_in_chunks_are_the_definition(triton_backend, call):
    for name in ("hidden", "linear_weight", "linear_bias", "target", "lam", "partner"):
        value = getattr(call, name)
        setattr(call, name, None if value is None else value.to(torch.get_default_device()))
    call.assert_contract()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_no_worse_than_its_composition(backend, dtype):
    for reduction in ("mean", "none"):
        Call(5, 8, 19, dtype=dtype, step_size=0.05, reduction=reduction).assert_contract()


@pytest.mark.parametrize("classes", [8, 37])
def test_rows_of_either_kernel_hold_the_contract(small_tiles, classes):
    Call(5, 4, classes, chunk_rows=2, step_size=0.05).assert_contract()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_of_unlikely_classes_survive_until_the_loss_scale_is_known(backend, dtype):
    """The forward pass makes them, of p / B below the smallest float16."""
    call = Call(8, 4, 2000, dtype=dtype, chunk_rows=5)
    call.linear_weight *= 0.1
    call.linear_bias = torch.zeros(2000, dtype=dtype)
    call.linear_bias[500:] = -10
    call.upstream, call.target = torch.tensor(2.0**15), call.target % 500
    ours, truth = (call.gradients(run[0], run[2]) for run in (call.by_library(), call.by_definition(torch.float64)))
    rare = truth[2][500:]
    assert rare.max() / call.upstream / len(call.hidden) < 2**-24
    torch.testing.assert_close(ours[2][500:].double(), rare, rtol=20 * TOLERANCE[dtype], atol=0)


def test_chunks_take_the_dtype_of_autocast(backend):
    call = Call(9, 16, 30, step_size=0.1)
    device = call.hidden.device.type
    with torch.autocast(device, torch.bfloat16):
        loss, _, leaves = call.by_library()
        whole, _, whole_leaves = call.by_library(chunk_rows=None)
    assert loss.dtype == torch.float32
    truth, _, true_leaves = call.by_definition(torch.float64)
    assert_no_worse("loss", loss.detach(), truth.detach(), whole.detach(), torch.bfloat16)
    gradients = (call.gradients(*run) for run in ((loss, leaves), (truth, true_leaves), (whole, whole_leaves)))
    for name, mine, true, other in zip(NAMES, *gradients, strict=True):
        assert mine.dtype == torch.float32
        assert_no_worse(name, mine, true, other, torch.bfloat16)
    assert (loss - truth).abs() > 1e-6  # it did round


def test_an_upstream_gradient_of_stride_zero_is_that_of_the_sum(backend):
    call = Call()
    losses, _, leaves = call.by_library(reduction="none")
    total, _, total_leaves = call.by_library(reduction="sum")
    mine = call.gradients(losses, leaves, torch.ones(()).expand(len(call.hidden)))
    expected = call.gradients(total, total_leaves, torch.ones(()))
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_the_same_inputs_give_the_same_bits(backend):
    call, runs = Call(13, 6, 30, chunk_rows=4), []
    for _ in range(2):
        loss, stats, leaves = call.by_library()
        runs.append((loss.detach(), *stats[1:5], *call.gradients(loss, leaves)))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize(("reduction", "soft"), [("mean", False), ("none", True)])
def test_no_tensor_has_as_many_elements_as_the_logits(backend, monkeypatch, reduction, soft):
    batch, classes, rows = 16, 60, 3
    monkeypatch.setattr(chunked_head, "SLICE_BYTES", 2 * 4 * classes)
    call = Call(batch, 4, classes, dtype=torch.bfloat16, chunk_rows=rows, reduction=reduction)
    if soft:
        call.target = torch.rand(batch, classes).softmax(1)
    leaves = call.leaves()
    with Made() as made:
        loss = call.by_library(leaves)[0]
        call.gradients(loss, leaves)
    assert made.largest <= 4 * (rows + chunked_head.OUTSIDE) * classes
    with Made() as made:
        call.by_library(chunk_rows=None)
    assert made.largest >= 2 * batch * classes


@pytest.mark.parametrize(
    ("which", "reduction"),
    [((True, False, False), "mean"), ((False, True, False), "none"), ((False, False, True), "mean")],
)
def test_only_gradients_that_are_asked_for_are_made(backend, which, reduction):
    call = Call(7, 5, 13, chunk_rows=2, reduction=reduction)
    loss, _, leaves = call.by_library()
    expected = call.gradients(loss, leaves)
    leaves = [leaf.detach().requires_grad_(wanted) for leaf, wanted in zip(leaves, which, strict=True)]
    with Made() as made:
        loss = call.by_library(leaves)[0]
        (mine,) = call.gradients(loss, leaves)
    torch.testing.assert_close(mine, expected[which.index(True)])
    if not which[0]:
        assert (7, 5) not in made.shapes  # that of the gradient to hidden
    if not which[1]:
        assert (13, 5) not in made.shapes


def test_inference_makes_no_gradient(backend, monkeypatch):
    def refuse(*_):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(chunked_head, "_accumulate", refuse)
    call = Call()
    with torch.no_grad():
        loss = call.by_library()[0]
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), call.by_definition(torch.float64)[0].detach(), rtol=1e-5, atol=1e-6)
    call.by_library([None if leaf is None else leaf.detach() for leaf in call.leaves()])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be an int >= 1 or None, got 0"),
        ({"chunk_rows": True}, TypeError, "chunk_rows must be an int >= 1 or None, got True"),
        ({"chunk_rows": 2.0}, TypeError, r"chunk_rows must be an int >= 1 or None, got 2\.0"),
        ({"activation": "relu"}, NotImplementedError, "chunk_rows takes neither an activation nor a dropout_mask"),
        ({"dropout_mask": torch.ones(7, 6)}, NotImplementedError, "chunk_rows takes neither"),
    ],
)
def test_chunk_rows_that_cannot_be_are_refused(changed, error, message):
    with pytest.raises(error, match=message):
        Call().by_library(**changed)


def test_a_compiled_step_breaks_its_graph_and_gives_the_numbers_of_eager_mode(backend):
    torch._dynamo.reset()
    call = Call(step_size=0.1)
    layer = nn.Linear(6, 6)

    def step(hidden, weight, bias):
        batch = (call.target, call.lam, call.partner)
        return linear_amp_cross_entropy(layer(hidden), weight, bias, *batch, step_size=0.1, chunk_rows=3).exp()

    results = []
    for run in (step, torch.compile(step, backend="inductor" if HAS_GPU else "aot_eager")):
        leaves = call.leaves()
        loss = run(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, [*leaves, *layer.parameters()])))
    torch.testing.assert_close(*results, rtol=2e-5, atol=1e-6)
