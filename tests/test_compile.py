"""torch.compile: whole graphs, the numbers of eager mode, new draws in every call; the registered operators."""

import copy

import pytest
import torch
from conftest import HAS_GPU, random_case
from test_mixing import assert_beta
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import fastamp
from fastamp import AMPLoss, Mix, functional
from fastamp.functional import amp_cross_entropy
from fastamp.mixing import Mixture
from fastamp.models import NonlinearMixup, TextCNN
from fastamp.ops import amp_cross_entropy as ops
from fastamp.policy import Policy

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
CLOSE = {"rtol": 2e-5, "atol": 1e-6}
WHOLE = {"fullgraph": True, "backend": "eager"}


@pytest.fixture
def torch_backend():
    with fastamp.set_backend("torch"):
        yield


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager", **options)


def counting(graphs):
    """A compiler backend that notes every graph."""

    def compile_graph(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return compile_graph


def batch(size=6, classes=5):
    case = random_case(size, classes)
    return case.logits.requires_grad_(), case.target, Mix(case.lam, case.partner)


OPTIONS = [
    {},
    {"loss": "softmax_bce", "step_size": 0.1, "grad_scale": "mean", "grad_clip": None},
    {"loss": "binary_cross_entropy", "step_size": 0.1, "pos_weight": torch.arange(1.0, 6.0), "sum_classes": True},
    {"reduction": "none", "label_smoothing": 0.1, "ignore_index": 2, "weight": torch.arange(1.0, 6.0)},
    {"reweight": "moving", "step_size": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_compiled_criterion_gives_the_numbers_of_eager_mode(backend, options):
    inputs, target, mix = batch()
    model = nn.Linear(5, 5)

    def step(criterion, inputs):
        return criterion(model(inputs), target, mix=mix)

    eager, other = (AMPLoss(**options).to(inputs.device) for _ in range(2))
    fast = compiled(step)
    for _ in range(2):
        expected, loss = step(eager, inputs), fast(other, inputs)
        torch.testing.assert_close(loss, expected, **CLOSE)
        upstream = torch.randn(loss.shape)
        grads = [torch.autograd.grad(x, [inputs, *model.parameters()], upstream) for x in (expected, loss)]
        torch.testing.assert_close(*grads, **CLOSE)
    if "reweight" in options:
        torch.testing.assert_close(other.window, eager.window, **CLOSE)


@pytest.mark.parametrize("entry", ["forward", "step"])
def test_a_schedule_of_the_step_size_is_compiled_for_twice(torch_backend, entry):
    logits, target, mix = batch()
    graphs, criterion, eager, head = [], AMPLoss(), AMPLoss(), nn.Linear(5, 5)

    def call(criterion):
        return criterion.step(head, logits, target, mix=mix) if entry == "step" else criterion(logits, target, mix=mix)

    step = torch.compile(call, fullgraph=True, backend=counting(graphs))
    for step_size in (0.1, 0.2, 0.4, 0.3, 0.8):
        criterion.step_size = eager.step_size = step_size
        torch.testing.assert_close(step(criterion), call(eager), **CLOSE)
    assert len(graphs) == 2


def test_every_option_acts_in_a_compiled_criterion(torch_backend):
    logits, target, mix = batch()
    criterion, eager = AMPLoss(step_size=0.3), AMPLoss(step_size=0.3)
    call = torch.compile(criterion, fullgraph=True, backend="eager")
    for name, value in (("mode", "mixup"), ("reduction", "sum"), ("weight", torch.rand(5)), ("reweight", "moving")):
        for each in (criterion, eager):
            setattr(each, name, value)
        torch.testing.assert_close(call(logits, target, mix=mix), eager(logits, target, mix=mix), **CLOSE)


def test_inductor_gives_the_numbers_of_eager_mode_for_batches_of_any_size(torch_backend):
    criterion = AMPLoss(ignore_index=1, label_smoothing=0.1)
    fast = torch.compile(criterion, fullgraph=True, dynamic=True)
    for size in (8, 5):
        logits, target, mix = batch(size)
        loss, stats = fast(logits, target, mix=mix, return_stats=True)
        expected, expected_stats = criterion(logits, target, mix=mix, return_stats=True)
        torch.testing.assert_close(loss, expected, **CLOSE)
        torch.testing.assert_close(stats[:5], expected_stats[:5], **CLOSE)
        grads = [torch.autograd.grad(x, logits)[0] for x in (loss, expected)]
        torch.testing.assert_close(*grads, **CLOSE)


def test_a_compiled_criterion_draws_a_new_lambda_in_every_call(backend):
    logits, target, _ = batch()
    criterion = AMPLoss()
    fast = compiled(lambda logits: criterion(logits, target, return_stats=True)[1])
    draws = [fast(logits) for _ in range(4)]
    assert all(((one.lam >= 0) & (one.lam <= 1)).all() for one in draws)
    assert len({tuple(one.lam.tolist()) for one in draws}) == 4
    assert len({tuple(one.lam_adv.tolist()) for one in draws}) == 4


def test_batches_of_any_size_pass_one_dynamic_graph(backend):
    criterion, graphs, first = AMPLoss(), [], 0

    def step(logits, target, lam, partner):
        return criterion(logits, target, mix=Mix(lam, partner))

    fast = torch.compile(step, fullgraph=True, dynamic=True, backend=counting(graphs))
    for size in (6, 9, 3):
        logits, target, mix = batch(size)
        losses = fast(logits, target, *mix), step(logits, target, *mix)
        torch.testing.assert_close(*losses, **CLOSE)
        torch.testing.assert_close(*[torch.autograd.grad(loss, logits)[0] for loss in losses], **CLOSE)
        first = first or len(graphs)  # the compiler may begin again before it is content
    assert len(graphs) == first


SIZES = (8, 5, 6)  # a partial batch makes the sizes symbols, odd ones among them


@pytest.mark.parametrize(
    ("pairing", "alpha", "dynamic"), [("permutation", 1.0, None), ("permutation", 0.3, True), ("matching", 0.3, None)]
)
def test_a_graph_draws_for_batches_of_any_size_what_eager_mode_draws(torch_backend, pairing, alpha, dynamic):
    """Where torch.rand takes no symbolic size beside generator=None."""
    criterion = AMPLoss(alpha=alpha, pairing=pairing)
    sample = torch.compile(criterion.sample, **WHOLE, dynamic=dynamic)
    for size in SIZES:
        draws = []
        for draw in (sample, criterion.sample):
            torch.manual_seed(size)
            draws.append([draw(size, device="cpu") for _ in range(2)])
        for ours, eager in zip(*draws, strict=True):
            assert torch.equal(ours.lam, eager.lam)
            assert torch.equal(ours.partner, eager.partner)
        assert not torch.equal(draws[0][0].lam, draws[0][1].lam)
    mix = sample(20_001, device="cpu")
    assert_beta(mix.lam, alpha)
    rows = torch.arange(20_001)
    assert torch.equal(mix.partner.sort().values, rows)
    assert pairing != "matching" or torch.equal(mix.partner[mix.partner], rows)


@pytest.mark.parametrize(
    ("options", "soft"),
    [({}, False), ({"alpha": 0.3, "pairing": "matching", "reweight": "moving"}, True)],
    ids=str,
)
def test_a_compiled_loop_takes_a_smaller_last_batch(backend, options, soft):
    criterion = AMPLoss(**options)

    def step(logits, target):
        mix = criterion.sample(len(logits), device=logits.device)
        return criterion(2 * logits, target, mix=mix), mix

    fast = torch.compile(step, **WHOLE)
    for size in (8, 5):
        logits, labels, _ = batch(size)
        target = torch.rand(size, 5).softmax(1) if soft else labels
        state = copy.deepcopy(criterion.state_dict())
        loss, mix = fast(logits, target)
        criterion.load_state_dict(state)
        expected = criterion(2 * logits, target, mix=mix)
        torch.testing.assert_close(loss, expected, **CLOSE)
        grads = [torch.autograd.grad(x, logits)[0] for x in (loss, expected)]
        torch.testing.assert_close(*grads, **CLOSE)


def test_a_function_compiles_with_dynamic_sizes_and_numbers(backend):
    """Where math.isfinite of a number that is a symbol breaks the graph; items are a tensor."""
    options = {"step_size": 0.1, "grad_clip": 0.5, "label_smoothing": 0.1}

    def step(logits, target, lam, partner, items):
        return amp_cross_entropy(logits, target, lam, partner, num_items=items, **options)

    fast = torch.compile(step, **WHOLE, dynamic=True)
    for size in (6, 5):
        logits, target, mix = batch(size)
        arguments = (logits, target, *mix, torch.tensor(float(size)))
        torch.testing.assert_close(fast(*arguments), step(*arguments), **CLOSE)


def test_nonlinear_mixup_compiles_for_batches_of_any_size(torch_backend):
    model = NonlinearMixup(TextCNN(9, 64, embedding_dim=4), num_classes=3, length=6, width=4, alpha=0.5)
    fast = torch.compile(model.loss, **WHOLE)
    for size in (8, 5):
        ids, labels = torch.randint(1, 9, (size, 6)), torch.randint(3, (size,))
        losses = []
        for loss in (fast, model.loss):
            torch.manual_seed(1)
            losses.append(loss(ids, labels))
        torch.testing.assert_close(*losses, **CLOSE)


@pytest.mark.parametrize("layout", ["transposed", "every second"])
def test_compiled_strides_reach_the_kernel_as_they_are(triton_backend, layout):
    target, mix = batch(6, 5)[1:]
    wide = torch.randn(12, 12, requires_grad=True)
    criterion = AMPLoss()

    def step(w):
        logits = (w * 2)[:5, :6].t() if layout == "transposed" else (w * 2)[::2, 1:11:2]
        return criterion(logits, target, mix=mix)

    loss, expected = compiled(step)(wide), step(wide)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(*[torch.autograd.grad(x, wide)[0] for x in (loss, expected)], **CLOSE)


def test_a_compiled_head_gives_the_gradients_of_eager_mode(backend, monkeypatch):
    """Without a look for a launch by the number of rows, which a graph must not have: a compiled head is composed."""
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((6, 7), (5, 7), (5,))]
    _, target, mix = batch()

    def step(*leaves):
        return functional.linear_amp_cross_entropy(*leaves, target, *mix, activation="relu")

    def refused(*arguments, **options):
        raise AssertionError("looked for")

    losses = [step(*leaves)]
    if backend == "triton":
        monkeypatch.setattr("fastamp.kernels.linear_head_config", refused)
    losses.append(compiled(step, dynamic=True)(*leaves))
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses), **CLOSE)


def test_eval_mode_compiles(torch_backend):
    logits, target, _ = batch()
    criterion = AMPLoss().eval()
    torch.testing.assert_close(compiled(criterion)(logits, target), nn.functional.cross_entropy(logits, target))


def operator_arguments(*, divisor, soft=False, dtype=torch.float32, layout=None):
    case = random_case(6, 5, dtype=dtype)
    logits = case.logits if layout is None else torch.stack([case.logits, case.logits], 2)[..., 0]
    target = torch.rand(6, 5).softmax(1) if soft else case.target
    mixture = Mixture(target, case.lam, case.partner, torch.rand(5))
    return logits.detach(), mixture, Policy(), 0.1, None, divisor


@pytest.mark.parametrize(
    "options",
    [{"divisor": 0.0, "layout": "strided"}, {"divisor": 1.0, "dtype": torch.bfloat16}, {"divisor": None, "soft": True}],
    ids=str,
)
def test_the_forward_operator_passes_opcheck(triton_backend, options):
    arguments = ops.forward.unpacked(*operator_arguments(**options))
    torch.library.opcheck(ops.forward.registered, arguments)


@pytest.mark.parametrize("upstream", ["scalar", "stride 0", "strided"])
def test_the_backward_operator_passes_opcheck(triton_backend, upstream):
    """Gradients of stride 0 among them, which gradcheck does not try."""
    arguments = operator_arguments(divisor=1.0 if upstream == "scalar" else None)
    logits, mixture, policy, *_ = arguments
    rows, _, divisor = ops.forward(*arguments)
    grad = {"scalar": torch.tensor(0.5), "stride 0": torch.ones(()).expand(6), "strided": torch.randn(6, 2)[:, 1]}
    divisor = divisor if upstream == "scalar" else None
    backward = (logits, mixture, rows, divisor, grad[upstream], policy)
    torch.library.opcheck(ops.backward.registered, ops.backward.unpacked(*backward))
