"""The head in one function, and the paper's operations one by one."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_no_worse
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import laid_out
from torch import nn

import fastamp
from fastamp import functional, reference
from fastamp.functional import linear_amp_cross_entropy

GRADIENTS = ("hidden", "linear_weight", "linear_bias")


class Head:
    """A linear head, its batch and its options."""

    def __init__(self, batch=7, depth=10, classes=4, *, dtype=torch.float32, relu=True, dropout=True, bias=True):
        self.hidden = torch.randn(batch, depth).to(dtype)
        self.linear_weight = torch.randn(classes, depth).to(dtype)
        self.linear_bias = torch.randn(classes).to(dtype) if bias else None
        self.target = torch.randint(classes, (batch,))
        self.lam, self.partner = torch.rand(batch), torch.randperm(batch)
        self.relu = relu
        self.keep = F.dropout(torch.ones(batch, depth), 0.4).to(dtype) if dropout else None

    def leaves(self, dtype):
        tensors = (self.hidden, self.linear_weight, self.linear_bias)
        return [None if t is None else t.detach().to(dtype).clone().requires_grad_() for t in tensors]

    def by_definition(self, dtype, **options):
        hidden, weight, bias = self.leaves(dtype)
        keep = None if self.keep is None else self.keep.to(dtype)

        def f(m):
            m = m.relu() if self.relu else m
            return F.linear(m if keep is None else m * keep, weight, bias)

        target = self.target.to(dtype) if self.target.is_floating_point() else self.target
        result = reference.amp(f, hidden, target, self.lam, self.partner, **options)
        return result.loss, result, [hidden, weight, bias]

    def by_library(self, **options):
        leaves = [None if t is None else t.detach().requires_grad_() for t in self.tensors()]
        loss, stats = linear_amp_cross_entropy(
            *leaves,
            self.target,
            self.lam,
            self.partner,
            activation="relu" if self.relu else None,
            dropout_mask=self.keep,
            return_stats=True,
            **options,
        )
        return loss, stats, leaves

    def tensors(self):
        return self.hidden, self.linear_weight, self.linear_bias

    def assert_contract(self, **options):
        dtype = self.hidden.dtype
        truth, composed = (self.by_definition(precision, **options) for precision in (torch.float64, dtype))
        runs = self.by_library(**options), truth, composed
        ours, truth, composed = (loss.detach() for loss, _, _ in runs)
        assert_no_worse("loss", ours, truth, composed, dtype)
        for name in ("lam_adv", "grad", "delta"):
            values = [getattr(result, name) for _, result, _ in runs]
            assert_no_worse(name, *values, dtype)
        assert torch.equal(runs[0][1].mask, runs[1][1].mask)
        upstream = torch.randn(ours.shape)  # each row has its own, in both of its roles
        gradients = []
        for loss, _, leaves in runs:
            present = [leaf for leaf in leaves if leaf is not None]
            gradients.append(torch.autograd.grad(loss, present, upstream.to(loss.dtype)))
        for name, leaf, mine, true, other in zip(GRADIENTS, self.tensors(), *gradients, strict=False):
            assert mine.dtype == leaf.dtype
            assert_no_worse(f"gradient of {name}", mine, true, other, dtype)


@pytest.mark.parametrize(("relu", "dropout", "bias"), list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_is_no_worse_than_its_composition(backend, dtype, relu, dropout, bias):
    head = Head(dtype=dtype, relu=relu, dropout=dropout, bias=bias)
    head.assert_contract(step_size=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "mixup"},
        {"mode": "maxop", "step_size": 0.3},
        {"loss": "softmax_bce", "step_size": 0.05},
        {"loss": "softmax_bce", "grad_scale": "mean", "grad_clip": None, "step_size": 0.3, "tie_tol": 0.0},
        {"label_smoothing": 0.2, "reduction": "sum", "step_size": 0.1},
        {"clamp": True, "step_size": 1.0},
        {"num_items": 3.5, "step_size": 0.1},
        {"grad_scale": "mean", "num_items": 2, "step_size": 0.1},
        {"reduction": "none", "step_size": 0.1},
    ],
    ids=str,
)
def test_a_head_takes_every_option(backend, options):
    Head().assert_contract(**options)


def test_a_head_takes_class_weights_ignored_labels_and_a_tensor_of_items(backend):
    head = Head()
    head.target[3] = 2
    options = {"weight": torch.rand(4), "ignore_index": 2, "step_size": 0.1}
    head.assert_contract(**options)
    head.assert_contract(num_items=torch.tensor(5), **options)


def test_a_head_takes_probabilities(backend):
    head = Head()
    head.target = 0.9 * torch.rand(7, 4).softmax(1)
    head.assert_contract(step_size=0.1)


def rejected(head, **options):
    """How many rows keep λ by the definition; ours are the same, wherever δ is clear of rounding."""
    batch = (*head.tensors(), head.target, head.lam, head.partner)
    activation = "relu" if head.relu else None
    _, stats = linear_amp_cross_entropy(
        *batch, activation=activation, dropout_mask=head.keep, return_stats=True, **options
    )
    _, truth, _ = head.by_definition(torch.float64, **options)
    clear = truth.delta.abs() > 64 * torch.finfo(torch.float32).eps * (1 + truth.row_loss.abs())
    assert torch.equal(stats.mask[clear], truth.mask[clear])
    torch.testing.assert_close(stats.delta.double(), truth.delta, rtol=1e-3, atol=2e-6)
    return int((~truth.mask & clear).sum())


def test_behind_a_relu_rows_keep_lambda(backend):
    """The loss is not convex in λ there."""
    assert rejected(Head(24, 7, 3, dropout=False), step_size=1.0) > 0


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**16),
    relu=st.booleans(),
    dropout=st.booleans(),
    target=st.sampled_from(["labels", "ignored labels", "probabilities", "less mass", "negative mass"]),
    weight=st.sampled_from(["none", "positive", "of both signs"]),
    options=st.fixed_dictionaries(
        {
            "loss": st.sampled_from(["cross_entropy", "cross_entropy", "softmax_bce"]),
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
    head = Head(batch, 6, 3, relu=relu, dropout=dropout)
    if target == "ignored labels":
        options["ignore_index"] = 1
    elif target != "labels":
        mass = torch.rand(batch, 3).softmax(1)
        head.target = {"probabilities": mass, "less mass": 0.3 * mass, "negative mass": mass - 0.6}[target]
    if weight != "none":
        options["weight"] = torch.rand(3) - (0.5 if weight == "of both signs" else 0)
    rejected(head, **options)


@pytest.mark.parametrize(("batch", "depth", "classes"), [(1, 5, 3), (3, 1, 2), (4, 3, 1), (5, 33, 17), (6, 1030, 3)])
def test_a_head_of_any_shape_holds_the_contract(backend, batch, depth, classes):
    head = Head(batch, depth, classes)
    head.hidden, head.linear_weight = head.hidden / depth**0.5, head.linear_weight / depth**0.5
    head.assert_contract(step_size=0.05)


def test_a_batch_of_more_rows_than_programs_holds_the_contract(backend):
    Head(131, 3, 2).assert_contract(step_size=0.05)


@pytest.mark.parametrize("layout", ["transposed", "columns sliced", "every second", "misaligned"])
def test_a_head_takes_any_strides(backend, layout):
    head = Head(5, 6, 3)
    weight = torch.rand(3)
    plain, _, leaves = head.by_library(step_size=0.1, weight=weight)
    gradients = torch.autograd.grad(plain, leaves)
    for name in ("hidden", "linear_weight", "linear_bias", "keep", "target", "lam", "partner"):
        setattr(head, name, laid_out(getattr(head, name), layout))
    strided, _, leaves = head.by_library(step_size=0.1, weight=laid_out(weight, layout))
    torch.testing.assert_close(strided, plain)
    for name, mine, expected in zip(GRADIENTS, torch.autograd.grad(strided, leaves), gradients, strict=True):
        torch.testing.assert_close(mine, expected, msg=name)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_through_a_head_twice_gives_the_same_and_keeps_what_it_gave(backend, reduction, relu):
    loss, _, leaves = Head(relu=relu).by_library(reduction=reduction)
    upstream = torch.randn(loss.shape)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    copies = [grad.clone() for grad in first]
    doubled = torch.autograd.grad(loss, leaves, 2 * upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream)
    for grad, copy, double, last in zip(first, copies, doubled, again, strict=True):
        assert torch.equal(grad, copy)
        torch.testing.assert_close(last, copy, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(double, 2 * copy, rtol=1e-6, atol=1e-7)


def test_a_head_without_a_gradient_of_its_own_passes_one_to_hidden_alone(backend):
    head = Head()
    loss = linear_amp_cross_entropy(
        head.hidden.requires_grad_(), head.linear_weight, None, head.target, head.lam, head.partner, activation="relu"
    )
    loss.backward()
    assert head.hidden.grad.isfinite().all()
    assert head.linear_weight.grad is None


def test_an_affine_head_gives_what_its_logits_give(backend):
    head = Head(relu=False, dropout=False)
    loss, stats, _ = head.by_library(step_size=0.1)
    logits = F.linear(head.hidden, head.linear_weight, head.linear_bias)
    other, other_stats = functional.amp_cross_entropy(
        logits, head.target, head.lam, head.partner, step_size=0.1, return_stats=True
    )
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.grad, other_stats.grad, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_passes_a_head(backend):
    head = Head(0)
    loss, _, leaves = head.by_library(reduction="sum")
    assert loss.item() == 0
    assert torch.autograd.grad(loss, leaves)[1].abs().sum() == 0


def test_a_head_is_double_where_hidden_is(backend):
    loss, stats, _ = Head(dtype=torch.float64).by_library()
    assert loss.dtype == stats.delta.dtype == torch.float64


def test_a_head_refuses_to_be_differentiated_twice(backend):
    loss, _, (hidden, *_) = Head().by_library()
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(loss.square(), hidden, create_graph=True)


# --- the operations one by one


def row_batch(dtype=torch.float64, shape=(6, 3, 2)):
    return torch.randn(shape).to(dtype), torch.rand(6), torch.randperm(6)


def test_mix_is_the_mixture_of_rows():
    hidden, lam, partner = row_batch()
    mixed = functional.mix(hidden, lam, partner)
    for r in range(6):
        expected = lam[r].double() * hidden[r] + (1 - lam[r].double()) * hidden[partner[r]]
        torch.testing.assert_close(mixed[r], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mix_rounds_once(dtype):
    hidden, lam, partner = row_batch(dtype)
    mixed = functional.mix(hidden, lam, partner)
    assert mixed.dtype == dtype
    truth = reference.mix(hidden.double(), lam.double(), partner)
    eps = torch.finfo(dtype).eps
    wide = 4 * torch.finfo(torch.float32).eps if dtype != torch.float64 else 0
    assert ((mixed.double() - truth).abs() <= (eps / 2 + wide) * truth.abs() + wide * 4 + 1e-14).all()


def test_mix_passes_its_gradient_to_both_rows():
    hidden, lam, partner = row_batch()
    assert torch.autograd.gradcheck(
        lambda h: functional.mix(h, lam, partner), (hidden.requires_grad_(),), check_batched_grad=False
    )


def test_lambda_grad_is_the_inner_product_with_the_difference():
    hidden, lam, partner = row_batch()
    leaf = lam.double().requires_grad_()
    mixed = reference.mix(hidden, leaf, partner).detach().requires_grad_()
    (grad_mixed,) = torch.autograd.grad(mixed.sin().sum(), mixed)
    (expected,) = torch.autograd.grad(reference.mix(hidden, leaf, partner).sin().sum(), leaf)
    torch.testing.assert_close(functional.lambda_grad(grad_mixed, hidden, partner), expected)


def test_lambda_grad_of_low_precision_rows_is_float32():
    hidden, _, partner = row_batch(torch.bfloat16)
    grad = functional.lambda_grad(hidden.clone().requires_grad_(), hidden, partner)
    assert grad.dtype == torch.float32
    assert not grad.requires_grad


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
    ("tie_tol", "delta", "taken"),
    [
        (0.0, 0.0, False),
        (0.0, 2**-20, True),
        (0.0, -(2**-20), False),
        ("auto", 0.0, True),
        ("auto", -(2**-21), True),  # 4 ulp of 1
        ("auto", -(2**-20), False),
        (0.25, -0.25, True),
        (0.25, -0.26, False),
    ],
)
def test_a_tie_takes_the_loss_at_the_moved_lambda(tie_tol, delta, taken):
    loss = torch.ones(1)
    assert functional.select_loss(loss, loss + delta, tie_tol=tie_tol)[2].item() is taken


def test_the_automatic_tie_grows_with_the_loss():
    loss = torch.tensor([64.0])
    assert functional.select_loss(loss, loss - 4 * 64 * 2**-23)[2].item() is True
    assert functional.select_loss(loss, loss - 6 * 64 * 2**-23)[2].item() is False


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


def test_the_functions_take_the_backend_that_is_set():
    hidden, lam, partner = row_batch(torch.float32, (6, 4))
    with fastamp.set_backend("torch"):
        loss = functional.amp_cross_entropy(hidden, torch.zeros(6, dtype=torch.int64), lam, partner)
    assert loss.isfinite()


def test_one_lambda_for_all_rows_is_that_of_every_row(backend):
    hidden, logits, ids = torch.randn(6, 2, 3), torch.randn(6, 4), torch.randint(5, (6, 3))
    target, one, partner = torch.randint(4, (6,)), torch.tensor(0.3), torch.randperm(6)
    calls = [
        lambda lam: functional.mix(hidden, lam, partner),
        lambda lam: functional.embedding_mix(ids, torch.ones(5, 2), lam, partner),
        lambda lam: functional.remix(hidden, lam, partner, hidden)[1],
        lambda lam: functional.amp_cross_entropy(logits, target, lam, partner, return_stats=True)[1].lam_adv,
        lambda lam: linear_amp_cross_entropy(logits, torch.eye(4), None, target, lam, partner),
        lambda lam: functional.select_cross_entropy(logits, 2 * logits, target, lam, partner)[0],
    ]
    for call in calls:
        assert torch.equal(call(one), call(torch.full((6,), 0.3)))


def test_uint8_labels_are_class_indices(backend):
    logits, target = torch.randn(6, 4), torch.randint(4, (6,))
    mix = torch.rand(6), torch.randperm(6)
    calls = [
        lambda y: functional.amp_cross_entropy(logits, y, *mix, reduction="none"),
        lambda y: linear_amp_cross_entropy(logits, torch.eye(4), None, y, *mix, reduction="none"),
        lambda y: functional.select_cross_entropy(logits, 2 * logits, y, *mix)[0],
    ]
    for call in calls:
        assert torch.equal(call(target.byte()), call(target))
