"""torch.compile: whole graphs, the numbers of eager mode, new draws in every call; the registered operators."""

import copy

import pytest
import torch
import torch._dynamo
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

CLOSE = {"rtol": 2e-5, "atol": 1e-6}
WHOLE = {"fullgraph": True, "backend": "eager"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
    {"reduction": "none", "label_smoothing": 0.1, "ignore_index": 2, "weight": torch.arange(1.0, 6.0)},
    {"reweight": "moving", "step_size": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_compiled_criterion_gives_the_numbers_of_eager_mode(backend, options):
    """12, 14: silently wrong under torch.compile, or the graph breaks."""
    logits, target, mix = batch()

    def step(criterion, logits):
        return criterion(2 * logits, target, mix=mix)

    eager, other = (AMPLoss(**options).to(logits.device) for _ in range(2))
    fast = compiled(step)
    for _ in range(2):
        expected, loss = step(eager, logits), fast(other, logits)
        torch.testing.assert_close(loss, expected, **CLOSE)
        upstream = torch.randn(loss.shape)
        grads = [torch.autograd.grad(x, logits, upstream)[0] for x in (expected, loss)]
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


def test_inductor_gives_the_numbers_of_eager_mode(torch_backend):
    logits, target, mix = batch()
    criterion = AMPLoss(ignore_index=1, label_smoothing=0.1)
    loss, stats = torch.compile(criterion, fullgraph=True)(logits, target, mix=mix, return_stats=True)
    expected, expected_stats = criterion(logits, target, mix=mix, return_stats=True)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(stats[:5], expected_stats[:5], **CLOSE)
    grads = [torch.autograd.grad(x, logits)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads, **CLOSE)


def test_a_compiled_criterion_draws_a_new_lambda_in_every_call(backend):
    """29: a λ frozen into the graph."""
    logits, target, _ = batch()
    criterion = AMPLoss()
    fast = compiled(lambda logits: criterion(logits, target, return_stats=True)[1])
    draws = [fast(logits) for _ in range(4)]
    for i, one in enumerate(draws):
        assert ((one.lam >= 0) & (one.lam <= 1)).all()
        assert not any(torch.equal(one.lam, other.lam) for other in draws[i + 1 :])
    assert len({tuple(one.lam_adv.tolist()) for one in draws}) == 4


@pytest.mark.parametrize(("pairing", "alpha"), [("permutation", 1.0), ("matching", 0.3)])
def test_every_kind_of_draw_compiles_into_one_graph(torch_backend, pairing, alpha):
    """14: compile raises or breaks the graph."""
    logits, target, _ = batch()
    criterion = AMPLoss(alpha=alpha, pairing=pairing)
    graphs = []
    torch.compile(criterion, fullgraph=True, backend=counting(graphs))(logits, target).backward()
    assert len(graphs) == 1
    assert logits.grad.isfinite().all()


def test_batches_of_any_size_pass_one_dynamic_graph(backend):
    criterion, graphs, first = AMPLoss(), [], 0

    def step(logits, target, lam, partner):
        return criterion(logits, target, mix=Mix(lam, partner))

    fast = torch.compile(step, fullgraph=True, dynamic=True, backend=counting(graphs))
    for size in (6, 9, 3, 12):
        logits, target, mix = batch(size)
        losses = fast(logits, target, *mix), step(logits, target, *mix)
        torch.testing.assert_close(*losses, **CLOSE)
        torch.testing.assert_close(*[torch.autograd.grad(loss, logits)[0] for loss in losses], **CLOSE)
        first = first or len(graphs)  # the compiler may begin again before it is content
    assert len(graphs) == first


SIZES = (8, 8, 5, 7, 6)  # a partial batch makes the sizes symbols, odd ones among them


@pytest.mark.parametrize(
    ("pairing", "alpha", "dynamic"),
    [("permutation", 1.0, None), ("permutation", 0.3, True), ("matching", 1.0, True), ("matching", 0.3, None)],
)
def test_a_graph_draws_for_batches_of_any_size_what_eager_mode_draws(torch_backend, pairing, alpha, dynamic):
    """29, 37: torch.rand takes no symbolic size beside generator=None."""
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
    """28, 37."""
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


def test_inductor_takes_batches_of_any_size(torch_backend):
    """37."""
    criterion = AMPLoss()
    fast = torch.compile(criterion, fullgraph=True, dynamic=True)
    for size in (8, 5, 7):
        logits, target, _ = batch(size)
        losses = [fast(logits, target) for _ in range(2)]
        assert losses[0] != losses[1]
        losses[0].backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"step_size": 0.1, "grad_clip": 0.5, "label_smoothing": 0.1}], ids=str)
def test_a_function_compiles_with_dynamic_sizes_and_numbers(torch_backend, options):
    """37: math.isfinite of a number that is a symbol breaks the graph."""

    def step(logits, target, lam, partner):
        return amp_cross_entropy(logits, target, lam, partner, **options)

    fast = torch.compile(step, **WHOLE, dynamic=True)
    for size in (6, 5):
        logits, target, mix = batch(size)
        torch.testing.assert_close(fast(logits, target, *mix), step(logits, target, *mix), **CLOSE)


def test_a_compiled_head_looks_for_no_launch_by_the_number_of_rows(triton_backend, monkeypatch):
    """37: a graph must not look at it; a compiled head is composed anyway."""

    def refused(*arguments, **options):
        raise AssertionError("looked for")

    monkeypatch.setattr("fastamp.kernels.linear_head_config", refused)

    def step(hidden, weight, target, lam, partner):
        return functional.linear_amp_cross_entropy(hidden, weight, None, target, lam, partner)

    _, target, mix = batch()
    hidden, weight = torch.randn(6, 7), torch.randn(5, 7)
    fast = torch.compile(step, **WHOLE, dynamic=True)
    expected = functional.amp_cross_entropy(hidden @ weight.T, target, *mix)
    torch.testing.assert_close(fast(hidden, weight, target, *mix), expected, **CLOSE)


def test_nonlinear_mixup_compiles_for_batches_of_any_size(torch_backend):
    """37."""
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
    """13: the compiler pads or reorders strides before the kernel."""
    target, mix = batch(6, 5)[1:]
    wide = torch.randn(12, 12, requires_grad=True)
    criterion = AMPLoss()

    def step(w):
        logits = (w * 2)[:5, :6].t() if layout == "transposed" else (w * 2)[::2, 1:11:2]
        return criterion(logits, target, mix=mix)

    loss, expected = compiled(step)(wide), step(wide)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(*[torch.autograd.grad(x, wide)[0] for x in (loss, expected)], **CLOSE)


def test_a_compiled_training_step_gives_the_gradients_of_eager_mode(backend):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    x = torch.randn(6, 4)
    _, target, mix = batch()
    criterion = AMPLoss()

    def step(x):
        return criterion(model(x), target, mix=mix)

    gradients = []
    for run in (step, compiled(step)):
        model.zero_grad()
        run(x).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, eager, **CLOSE)


def test_a_compiled_head_gives_the_gradients_of_eager_mode(backend):
    hidden, weight, bias = torch.randn(6, 7), torch.randn(5, 7), torch.randn(5)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    _, target, mix = batch()

    def step(*leaves):
        return fastamp.functional.linear_amp_cross_entropy(*leaves, target, *mix, activation="relu")

    losses = step(*leaves), compiled(step)(*leaves)
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(other, one, **CLOSE)


def test_eval_mode_compiles(torch_backend):
    logits, target, _ = batch()
    criterion = AMPLoss().eval()
    torch.testing.assert_close(compiled(criterion)(logits, target), nn.functional.cross_entropy(logits, target))


def test_the_function_compiles_with_items_on_the_device(backend):
    logits, target, mix = batch()

    def step(logits, items):
        return amp_cross_entropy(logits, target, *mix, num_items=items)

    items = torch.tensor(3.0)
    torch.testing.assert_close(compiled(step)(logits, items), step(logits, items), **CLOSE)


# --- the registered operators


def operator_arguments(*, divisor, soft=False, dtype=torch.float32, layout=None):
    case = random_case(6, 5, dtype=dtype)
    logits = case.logits if layout is None else torch.stack([case.logits, case.logits], 2)[..., 0]
    target = torch.rand(6, 5).softmax(1) if soft else case.target
    mixture = Mixture(target, case.lam, case.partner, torch.rand(5))
    return logits.detach(), mixture, Policy(), 0.1, None, divisor


@pytest.mark.parametrize(
    "options",
    [
        {"divisor": 0.0},
        {"divisor": 1.0, "dtype": torch.bfloat16},
        {"divisor": None, "soft": True},
        {"divisor": None, "layout": "strided"},
    ],
    ids=str,
)
def test_the_forward_operator_passes_opcheck(triton_backend, options):
    arguments = ops.forward.unpacked(*operator_arguments(**options))
    torch.library.opcheck(ops.forward.registered, arguments)


@pytest.mark.parametrize("upstream", ["scalar", "rows", "stride 0", "strided"])
def test_the_backward_operator_passes_opcheck(triton_backend, upstream):
    """Gradients of stride 0 among them, which gradcheck does not try."""
    arguments = operator_arguments(divisor=1.0 if upstream == "scalar" else None)
    logits, mixture, policy, *_ = arguments
    rows, _, divisor = ops.forward(*arguments)
    grad = {
        "scalar": torch.tensor(0.5),
        "rows": torch.randn(6),
        "stride 0": torch.ones(()).expand(6),
        "strided": torch.randn(6, 2)[:, 1],
    }[upstream]
    backward = (logits, mixture, rows, divisor if upstream == "scalar" else None, grad, policy)
    torch.library.opcheck(ops.backward.registered, ops.backward.unpacked(*backward))
