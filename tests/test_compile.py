"""torch.compile: whole graphs, the numbers of eager mode, new draws in every call; the registered operators."""

import pytest
import torch
import torch._dynamo
from conftest import HAS_GPU, random_case
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import fastamp
from fastamp import AMPLoss, Mix
from fastamp.functional import amp_cross_entropy
from fastamp.policy import Policy

CLOSE = {"rtol": 2e-5, "atol": 1e-6}


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


def operator_arguments(*, divisor, soft=False, dtype=torch.float32, layout=None, **options):
    from fastamp.ops import row_policy

    case = random_case(6, 5, dtype=dtype)
    logits = case.logits if layout is None else torch.stack([case.logits, case.logits], 2)[..., 0]
    target = torch.rand(6, 5).softmax(1) if soft else case.target
    policy = row_policy(Policy(**options), torch.float32)
    tensors = (logits.detach().requires_grad_(), target, case.lam, case.partner, torch.rand(5), None)
    return (*tensors, *policy, 0.1, divisor)


@pytest.mark.parametrize(
    "options",
    [
        {"divisor": 0.0},
        {"divisor": 1.0, "dtype": torch.bfloat16},
        {"divisor": None, "soft": True},
        {"divisor": None, "loss": "softmax_bce", "layout": "strided"},
    ],
    ids=str,
)
def test_the_forward_operator_passes_opcheck(triton_backend, options):
    import fastamp.ops  # noqa: F401 - registers the operators

    torch.library.opcheck(torch.ops.fastamp.amp_cross_entropy.default, operator_arguments(**options))


@pytest.mark.parametrize(
    ("upstream", "loss"),
    [
        ("scalar", "cross_entropy"),
        ("rows", "softmax_bce"),
        ("stride 0", "cross_entropy"),
        ("strided", "cross_entropy"),
    ],
)
def test_the_backward_operator_passes_opcheck(triton_backend, upstream, loss):
    """5: gradients of stride 0 among them, which gradcheck does not try."""
    import fastamp.ops  # noqa: F401 - registers the operators

    arguments = operator_arguments(divisor=1.0 if upstream == "scalar" else None, loss=loss)
    rows, _, divisor = torch.ops.fastamp.amp_cross_entropy(*arguments)
    grad = {
        "scalar": torch.tensor(0.5),
        "rows": torch.randn(6),
        "stride 0": torch.ones(()).expand(6),
        "strided": torch.randn(6, 2)[:, 1],
    }[upstream]
    tensors = [t if t is None else t.detach() for t in arguments[:5]]
    divisor = divisor.detach() if upstream == "scalar" else None
    backward = (*tensors, rows.detach(), divisor, grad, *arguments[6:-2])
    torch.library.opcheck(torch.ops.fastamp.amp_cross_entropy_backward.default, backward)
