"""The head in one function, and the paper's operations one by one."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, INTERPRETED
from heads import NAMES, Call
from hypothesis import given
from hypothesis import strategies as st
from strategies import laid_out
from torch import nn

from fastamp import AMPLoss, Mix, functional, reference
from fastamp.functional import linear_amp_cross_entropy


def head(batch=4, depth=6, classes=4, *, relu=True, dropout=True, **options):
    """A head that is not cut, behind a ReLU and dropout."""
    return Call(batch, depth, classes, chunk_rows=None, relu=relu, dropout=dropout, **options)


@pytest.mark.parametrize(
    ("dtype", "relu", "dropout", "bias"),
    [
        (torch.float64, True, True, True),
        (torch.float32, True, True, True),
        (torch.float32, True, False, True),
        (torch.float32, False, True, False),
        (torch.float32, False, False, True),
        (torch.float16, True, True, True),
        (torch.bfloat16, True, False, False),
        (torch.bfloat16, False, True, True),
    ],
    ids=str,
)
def test_a_head_is_no_worse_than_its_composition(backend, dtype, relu, dropout, bias):
    call = head(5, 10, dtype=dtype, relu=relu, dropout=dropout, bias=bias, step_size=0.05, reduction="none")
    state = torch.get_rng_state()
    call.assert_contract()
    assert torch.equal(torch.get_rng_state(), state)  # both passes take the mask that is given, and draw none


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "mixup"},
        {"mode": "maxop", "step_size": 0.3},
        {"loss": "softmax_bce", "step_size": 0.05},
        {"loss": "binary_cross_entropy"},
        {"loss": "softmax_bce", "grad_scale": "mean", "grad_clip": None, "step_size": 0.3, "tie_tol": 0.0},
        {"label_smoothing": 0.2, "reduction": "sum", "step_size": 0.1},
        {"clamp": True, "step_size": 1.0},
        {"grad_scale": "mean", "num_items": 3.5, "step_size": 0.1},
    ],
    ids=str,
)
def test_a_head_takes_every_option(backend, options):
    head(**options).assert_contract()


@pytest.mark.parametrize("num_items", [None, torch.tensor(5)])
def test_a_head_takes_class_weights_ignored_labels_and_a_tensor_of_items(backend, num_items):
    call = head(weight=torch.rand(4), ignore_index=2, step_size=0.1, num_items=num_items)
    call.target[3] = 2
    call.assert_contract()


def test_a_head_takes_probabilities(backend):
    call = head(step_size=0.1)
    call.target = 0.9 * torch.rand(4, 4).softmax(1)
    call.assert_contract()


def rejected(call):
    """How many rows keep λ by the definition; ours are the same, wherever δ is clear of rounding."""
    stats, truth = call.by_library()[1], call.by_definition(torch.float64)[1]
    clear = truth.delta.abs() > 64 * torch.finfo(torch.float32).eps * (1 + truth.row_loss.abs())
    assert torch.equal(stats.mask[clear], truth.mask[clear])
    torch.testing.assert_close(stats.delta.double(), truth.delta, rtol=1e-3, atol=2e-6)
    return int((~truth.mask & clear).sum())


def test_behind_a_relu_rows_keep_lambda(backend):
    """The loss is not convex in λ there."""
    call = head(12, 7, 3, dropout=False, step_size=1.0)
    call.linear_weight *= 6
    assert rejected(call) > 0


@INTERPRETED
@given(
    seed=st.integers(0, 2**16),
    relu=st.booleans(),
    dropout=st.booleans(),
    target=st.sampled_from(["labels", "ignored labels", "probabilities", "less mass", "negative mass"]),
    weight=st.sampled_from(["none", "positive", "of both signs"]),
    options=st.fixed_dictionaries(
        {
            "loss": st.sampled_from(["cross_entropy", "binary_cross_entropy", "softmax_bce"]),
            "step_size": st.sampled_from([2e-3, 0.1, 1.0]),
            "grad_clip": st.sampled_from([1.0, None]),
            "grad_scale": st.sampled_from(["row", "row", "mean"]),
            "clamp": st.booleans(),
            "num_items": st.sampled_from([None, torch.tensor(2.0), torch.tensor(-2.0)]),
        }
    ),
)
def test_a_head_rejects_what_the_definition_rejects(backend, seed, relu, dropout, target, weight, options):
    """MinOp keeps every λ' for an affine head, cross-entropy, a target mass that is not negative, and nothing else."""
    torch.manual_seed(seed)
    batch = 4 if backend == "triton" else 40  # the interpreter is slow
    call = head(batch, 6, 3, relu=relu, dropout=dropout, **options)
    if target == "ignored labels":
        call.options["ignore_index"] = 1
    elif target != "labels":
        mass = torch.rand(batch, 3).softmax(1)
        call.target = {"probabilities": mass, "less mass": 0.3 * mass, "negative mass": mass - 0.6}[target]
    if weight != "none":
        call.options["weight"] = torch.rand(3) - (0.5 if weight == "of both signs" else 0)
    rejected(call)


@pytest.mark.parametrize(("batch", "depth", "classes"), [(1, 5, 3), (3, 1, 2), (4, 3, 1), (3, 33, 17), (2, 1030, 3)])
def test_a_head_of_any_shape_holds_the_contract(backend, batch, depth, classes):
    call = head(batch, depth, classes, step_size=0.05)
    call.hidden /= depth**0.5
    call.assert_contract()


@pytest.mark.parametrize("layout", ["transposed", "every second", "misaligned"])
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_a_head_takes_any_strides(backend, chunk_rows, layout):
    whole, weight = chunk_rows is None, torch.rand(3)
    call = Call(5, 6, 3, chunk_rows=chunk_rows, relu=whole, dropout=whole, step_size=0.1)
    loss, _, leaves = call.by_library(weight=weight)
    expected = call.gradients(loss, leaves)
    for name in (*NAMES, "target", "lam", "partner", *(("keep",) if whole else ())):
        setattr(call, name, laid_out(getattr(call, name), layout))
    strided, _, leaves = call.by_library(weight=laid_out(weight, layout))
    torch.testing.assert_close(strided, loss)
    torch.testing.assert_close(call.gradients(strided, leaves), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_backward_twice_gives_the_same_keeps_what_it_gave_and_a_second_derivative_is_refused(
    backend, chunk_rows, reduction
):
    call = Call(5, 4, 6, relu=chunk_rows is None, chunk_rows=chunk_rows, reduction=reduction)
    loss, _, leaves = call.by_library()
    first = call.gradients(loss, leaves, retain_graph=True)
    copies = [grad.clone() for grad in first]
    doubled = call.gradients(loss, leaves, 2 * call.upstream, retain_graph=True)
    again = call.gradients(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, copies))
    torch.testing.assert_close(again, first, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(doubled, tuple(2 * grad for grad in first), rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(loss.square().sum(), leaves[0], create_graph=True)


def test_a_head_without_a_gradient_of_its_own_passes_one_to_hidden_alone(backend):
    call = head()
    hidden, weight, bias = call.leaves()
    loss, _, leaves = call.by_library([hidden, weight.detach(), bias.detach()])
    (grad,) = call.gradients(loss, leaves)
    torch.testing.assert_close(grad, call.gradients(*call.by_library()[::2])[0])


def test_an_empty_batch_passes_a_head(backend):
    for chunk_rows in (None, 4):
        call = Call(0, chunk_rows=chunk_rows, relu=chunk_rows is None)
        for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
            loss, _, leaves = call.by_library(reduction=reduction)
            torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
            assert not any(grad.any() for grad in call.gradients(loss, leaves))


def row_batch(dtype=torch.float64, shape=(6, 3, 2)):
    return torch.randn(shape).to(dtype), torch.rand(6), torch.randperm(6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mix_rounds_once(dtype):
    hidden, lam, partner = row_batch(dtype)
    mixed = functional.mix(hidden, lam, partner)
    assert mixed.dtype == dtype
    truth = reference.mix(hidden.double(), lam.double(), partner)
    eps = torch.finfo(dtype).eps
    wide = 4 * torch.finfo(torch.float32).eps if dtype != torch.float64 else 0
    assert ((mixed.double() - truth).abs() <= (eps / 2 + wide) * truth.abs() + wide * 4 + 1e-14).all()


@pytest.mark.parametrize("clip", [1.0, 0.1, None])
@pytest.mark.parametrize("clamp", [False, True])
def test_remix_moves_lambda_by_the_clipped_gradient_and_mixes_there(clamp, clip):
    hidden, lam, partner = row_batch()
    grad_mixed = torch.randn_like(hidden)
    lam_adv, mixed = functional.remix(
        hidden.requires_grad_(), lam, partner, grad_mixed, step_size=0.7, grad_clip=clip, clamp=clamp
    )
    bound = torch.inf if clip is None else clip
    grad = (grad_mixed * (hidden - hidden[partner])).sum((1, 2)).detach()
    expected = lam.double() + 0.7 * grad.clamp(-bound, bound)
    torch.testing.assert_close(lam_adv, expected.clamp(0, 1) if clamp else expected)
    torch.testing.assert_close(mixed, reference.mix(hidden, lam_adv, partner))
    assert not lam_adv.requires_grad
    assert mixed.requires_grad


def test_select_loss_keeps_the_larger_and_the_gradient_of_the_branch_it_kept():
    loss = torch.tensor([1.0, 1.0, 2.0], requires_grad=True)
    loss_adv = torch.tensor([1.5, 0.5, 2.0], requires_grad=True)
    chosen, delta, mask = functional.select_loss(loss, loss_adv, tie_tol=0.0)
    assert chosen.tolist() == [1.5, 1.0, 2.0]
    assert delta.tolist() == [0.5, -0.5, 0.0]
    assert mask.tolist() == [True, False, False]
    chosen.sum().backward()
    assert loss.grad.tolist() == [0, 1, 1]
    assert loss_adv.grad.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("tie_tol", "loss", "delta", "taken"),
    [
        (0.0, 1.0, 0.0, False),
        (0.0, 1.0, 2**-20, True),
        (0.0, 1.0, -(2**-20), False),
        ("auto", 1.0, 0.0, True),
        ("auto", 1.0, -(2**-21), True),  # 4 ulp of 1
        ("auto", 1.0, -(2**-20), False),
        ("auto", 64.0, -(2**-15), True),
        ("auto", 64.0, -6 * 2**-17, False),
        (0.25, 1.0, -0.25, True),
        (0.25, 1.0, -0.26, False),
    ],
)
def test_a_tie_takes_the_loss_at_the_moved_lambda(tie_tol, loss, delta, taken):
    loss = torch.tensor([loss])
    assert functional.select_loss(loss, loss + delta, tie_tol=tie_tol)[2].item() is taken


def test_the_operations_make_up_the_reference():
    hidden, lam, partner = row_batch()
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    target = torch.randint(4, (6,))
    lam = lam.double()

    def losses(m):
        logits = net(m)
        own = F.cross_entropy(logits, target, reduction="none")
        return lam * own + (1 - lam) * F.cross_entropy(logits, target[partner], reduction="none")

    mixed = functional.mix(hidden, lam, partner).requires_grad_()
    loss = losses(mixed)
    (grad_mixed,) = torch.autograd.grad(loss.sum(), mixed, retain_graph=True)
    _, mixed_adv = functional.remix(hidden, lam, partner, grad_mixed, step_size=0.2)
    chosen, delta, mask = functional.select_loss(loss, losses(mixed_adv))
    result = reference.amp(net, hidden, target, lam, partner, step_size=0.2)
    torch.testing.assert_close(chosen.mean(), result.loss)
    torch.testing.assert_close(delta, result.delta)
    assert torch.equal(mask, result.mask)


def test_one_lambda_for_all_rows_is_that_of_every_row(backend):
    hidden, logits, ids = torch.randn(6, 2, 3), torch.randn(6, 4), torch.randint(5, (6, 3))
    target, partner, criterion = torch.randint(4, (6,)), torch.randperm(6), AMPLoss(step_size=0.3)
    for call in (
        lambda lam: functional.mix(hidden, lam, partner),
        lambda lam: functional.embedding_mix(ids, torch.ones(5, 2), lam, partner),
        lambda lam: functional.remix(hidden, lam, partner, hidden)[1],
        lambda lam: functional.amp_cross_entropy(logits, target, lam, partner, return_stats=True)[1].lam_adv,
        lambda lam: linear_amp_cross_entropy(logits, torch.eye(4), None, target, lam, partner),
        lambda lam: functional.select_cross_entropy(logits, 2 * logits, target, lam, partner)[0],
        lambda lam: criterion(logits, target, mix=Mix(lam, partner)),
        lambda lam: criterion.step(lambda m: 2 * m, logits, target, mix=Mix(lam, partner)),
    ):
        assert torch.equal(call(torch.tensor(0.3)), call(torch.full((6,), 0.3)))


def test_uint8_labels_are_class_indices(backend):
    logits, target, mix = torch.randn(6, 4), torch.randint(4, (6,)), Mix(torch.rand(6), torch.randperm(6))
    for call in (
        lambda y: functional.amp_cross_entropy(logits, y, *mix, reduction="none"),
        lambda y: linear_amp_cross_entropy(logits, torch.eye(4), None, y, *mix, reduction="none"),
        lambda y: functional.select_cross_entropy(logits, 2 * logits, y, *mix)[0],
        lambda y: AMPLoss().step(lambda m: 2 * m, logits, y, mix=mix, context={}),
    ):
        assert torch.equal(call(target.byte()), call(target))
