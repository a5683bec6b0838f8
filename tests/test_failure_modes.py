"""What went wrong in other kernel libraries, and the criterion in a training loop."""

import sys
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from conftest import HAS_GPU, assert_contract, by_definition, by_library, random_case
from torch import nn

from fastamp import AMPLoss, Mix
from fastamp.functional import amp_cross_entropy, embedding_mix

LOSSES = ("cross_entropy", "binary_cross_entropy", "softmax_bce")


def leaf(case):
    return case.logits.detach().clone().requires_grad_()


def call(case, logits, **options):
    return amp_cross_entropy(logits, case.target, case.lam, case.partner, **{**case.options, **options})


@pytest.mark.parametrize(
    ("loss", "reduction", "soft"),
    [("cross_entropy", "mean", False), ("cross_entropy", "none", True), ("softmax_bce", "mean", True)],
)
def test_inputs_are_never_written(backend, loss, reduction, soft):
    """A loss that overwrites its logits makes the gradients further up wrong."""
    case = random_case(6, 5, loss=loss, reduction=reduction, weight=torch.rand(5))
    target = torch.rand(6, 5).softmax(1) if soft else case.target
    hidden, head = torch.randn(6, 4, requires_grad=True), torch.randn(4, 5)
    logits = hidden @ head
    inputs = (logits, target, case.lam, case.partner, case.options["weight"])
    before = [tensor.detach().clone() for tensor in inputs]
    versions = [tensor._version for tensor in inputs]
    value = amp_cross_entropy(logits, target, case.lam, case.partner, **case.options)
    (value.sum() + logits.square().sum()).backward()
    assert all(map(torch.equal, inputs, before))
    assert [tensor._version for tensor in inputs] == versions
    value = amp_cross_entropy(hidden @ head, target, case.lam, case.partner, **case.options)
    (alone,) = torch.autograd.grad(value.sum(), hidden)
    (square,) = torch.autograd.grad((hidden @ head).square().sum(), hidden)
    torch.testing.assert_close(hidden.grad, alone + square, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("reduction", "return_stats"), [("mean", False), ("none", False), ("sum", True)])
def test_backward_twice_gives_the_same_leaves_the_first_alone_and_a_second_derivative_raises(
    backend, reduction, return_stats
):
    case = random_case(6, 5)
    logits = leaf(case)
    out = AMPLoss(reduction=reduction)(logits, case.target, mix=Mix(case.lam, case.partner), return_stats=return_stats)
    loss = out[0] if return_stats else out
    upstream = torch.randn(loss.shape)
    first = torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0]
    kept = first.clone()
    doubled = torch.autograd.grad(loss, logits, 2 * upstream, retain_graph=True)[0]
    assert torch.equal(first, kept)
    first.fill_(torch.nan)
    again = torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0]
    torch.testing.assert_close(doubled, 2 * kept, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-7)
    # The square, or a model's layers, have a second derivative of their own: without the loss's a wrong one.
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(loss.square().sum(), logits, create_graph=True)


def test_a_captured_backward_that_is_replayed_twice_scales_once(triton_backend, monkeypatch):
    """A graph of the backward alone runs again on the gradient that the forward left."""
    kernels, loss_kernels = map(import_module, ("fastamp.kernels", "fastamp.kernels.amp_cross_entropy"))
    left = []
    run = kernels.amp_cross_entropy_forward

    def forward(*given, **options):
        out = run(*given, **options)
        left.append((out.dlogits, out.dlogits.clone()))
        return out

    monkeypatch.setattr(kernels, "amp_cross_entropy_forward", forward)
    monkeypatch.setattr(loss_kernels, "is_captured", lambda device: True)
    case = random_case(6, 5)
    logits = leaf(case)
    (grad,) = torch.autograd.grad(call(case, logits), logits, torch.tensor(4.0))
    ((kept, before),) = left
    assert torch.equal(kept, before)
    torch.testing.assert_close(grad, 4 * before)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hooks_of_saved_tensors_see_all_that_waits_for_backward(backend, reduction):
    """Activation offloading and checkpointing: nothing of the logits' size stays beside what is saved."""
    case = random_case(6, 5, reduction=reduction)
    logits = leaf(case)
    (expected,) = torch.autograd.grad(call(case, logits).sum(), logits)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(force=True), lambda x: torch.tensor(x)):
        loss = call(case, logits)
    held = [value for value in vars(loss.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert not [value.shape for value in held]
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_row_has_its_own_upstream_gradient_in_both_of_its_roles(backend, loss):
    case = random_case(6, 5, loss=loss, reduction="none", step_size=0.3)
    case = case._replace(upstream=torch.tensor([1.0, 0.0, -3.0, 100.0, 0.5, 2.0]))
    assert_contract(case)
    one_hot = case._replace(upstream=torch.eye(6)[2])
    grad = by_library(one_hot).grad_logits
    touched = {2, int(case.partner[2])}
    assert {r for r in range(6) if grad[r].abs().sum() > 0} == touched


def test_an_upstream_gradient_of_any_stride(backend):
    """`.sum().backward()` passes an expanded scalar down; what was concatenated or stacked, a strided view."""
    case = random_case(6, 5, reduction="none")
    factor = torch.randn(6, 2)
    logits = leaf(case)
    loss = call(case, logits)
    columns = torch.cat([factor[:, 0], torch.ones(3)])
    for total, upstream in (
        (loss.sum(), torch.ones(6)),
        ((torch.stack([loss, torch.ones(6)], 1) * factor).sum(), factor[:, 0].contiguous()),
        ((torch.cat([loss, torch.ones(3)]) * columns).sum(), factor[:, 0].contiguous()),
    ):
        expected = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
        found = torch.autograd.grad(total, logits, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("classes", "reduction"), [(3, "mean"), (9, "none")])
def test_offsets_beyond_the_range_of_int32(small_tiles, classes, reduction):
    """Row times stride does not fit in 32 bits; memory that is never touched costs nothing."""
    stride = 2**31 // 2 + 7
    storage = torch.empty(3 * stride, dtype=torch.float16)  # rows 2 and 3 begin past 2^31 elements or bytes
    logits = storage.as_strided((3, classes), (stride, 1))
    logits.copy_(torch.randn(3, classes))
    case = random_case(3, classes, dtype=torch.float16, reduction=reduction)
    assert_contract(case._replace(logits=logits))
    across = storage.as_strided((2, 3), (1, stride))
    across.copy_(torch.randn(2, 3))
    assert_contract(random_case(2, 3, reduction=reduction)._replace(logits=across))


@pytest.mark.skipif(HAS_GPU, reason="6 GB, of which a CPU gives only what is touched")
def test_offsets_of_columns_beyond_the_range_of_int32(triton_backend):
    """Column times stride does not fit in 32 bits, though each of them does."""
    stride = 2**31 // 2 + 7
    upstream = torch.empty(2 * stride + 1, dtype=torch.float16).as_strided((1, 1, 3), (1, 1, stride))
    upstream.copy_(torch.tensor([1.0, 2.0, 3.0]))
    ids, lam, partner = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    table = torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)
    (grad,) = torch.autograd.grad(embedding_mix(ids, table, lam, partner), table, upstream)
    assert grad.tolist() == [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_two_to_the_thirty_one_logits(triton_backend):
    """With every element in use."""
    classes = 128_257
    batch = 2**31 // classes + 2
    logits = torch.randn(batch, classes, dtype=torch.bfloat16).requires_grad_()
    target, lam, partner = torch.randint(classes, (batch,)), torch.rand(batch), torch.arange(batch).flip(0)
    loss = amp_cross_entropy(logits, target, lam, partner, reduction="none")
    loss.sum().backward()
    ends = torch.tensor([0, 1, batch - 2, batch - 1])
    part = logits.detach()[ends].requires_grad_()
    expected = amp_cross_entropy(part, target[ends], lam[ends], torch.tensor([3, 2, 1, 0]), reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(loss[ends], expected)
    torch.testing.assert_close(logits.grad[ends], part.grad)


@pytest.mark.parametrize(
    ("classes", "loss"), [(8, "cross_entropy"), (9, "cross_entropy"), (16, "softmax_bce"), (17, "cross_entropy")]
)
def test_class_counts_on_both_sides_of_a_block(small_tiles, classes, loss):
    assert_contract(random_case(4, classes, loss=loss, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("loss", "batch", "ignored"), [("cross_entropy", 4, -100), ("cross_entropy", 37, 2), ("softmax_bce", 4, 2)]
)
def test_all_rows_ignored_is_what_cross_entropy_makes_of_it(backend, loss, batch, ignored):
    """The mean is 0/0, the sum 0, the gradient 0."""
    case = random_case(batch, 5, loss=loss, ignore_index=ignored)
    target = torch.full((batch,), ignored)
    for reduction in ("mean", "sum", "none"):
        logits, plain = leaf(case), leaf(case)
        value = call(case._replace(target=target), logits, reduction=reduction)
        expected = F.cross_entropy(plain, target, ignore_index=ignored, reduction=reduction)
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
        value.sum().backward()
        expected.sum().backward()
        assert torch.equal(logits.grad, plain.grad)
        assert (logits.grad == 0).all()


@pytest.mark.parametrize(
    ("loss", "ignored"), [("cross_entropy", -100), ("cross_entropy", 0), ("softmax_bce", 4), ("cross_entropy", 17)]
)
def test_an_ignored_label_takes_no_part(backend, ignored, loss):
    """It may also be a class."""
    case = random_case(6, 5, loss=loss, ignore_index=ignored, step_size=0.3)
    target = case.target.clone()
    target[target == ignored] = 2
    target[1] = ignored
    case = case._replace(target=target, partner=torch.tensor([2, 1, 0, 4, 5, 3]))
    ours = assert_contract(case)
    assert (ours.grad_logits[1] == 0).all()  # paired with itself: both sides are ignored
    other = call(case, case.logits, ignore_index=-1) if ignored in (0, 4) else None
    assert other is None or not torch.isclose(other, ours.loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_arguments_of_other_dtypes(backend, dtype):
    case = random_case(6, 5, dtype=dtype, weight=torch.rand(5, dtype=torch.float64))
    case = case._replace(target=torch.rand(6, 5, dtype=torch.float64).softmax(1))
    outside = assert_contract(case)
    with torch.autocast(case.logits.device.type, dtype=torch.bfloat16):
        inside = by_library(case)
    assert all(map(torch.equal, inside, outside))


@pytest.mark.parametrize(
    ("loss", "dtype"), [("cross_entropy", torch.float16), ("softmax_bce", torch.bfloat16)], ids=str
)
def test_forward_and_backward_compute_in_the_same_precision(backend, dtype, loss):
    """Low precision is what goes in and comes out, once."""
    case = random_case(6, 5, dtype=dtype, loss=loss, step_size=0.3, reduction="sum")
    case = case._replace(upstream=torch.ones(()))
    low, wide = by_library(case), by_library(case._replace(logits=case.logits.float()))
    assert torch.equal(low.loss, wide.loss)
    # Triton's interpreter truncates to bfloat16: one unit in the last place.
    ulp = torch.finfo(dtype).eps if backend == "triton" and not HAS_GPU else 0
    torch.testing.assert_close(low.grad_logits, wide.grad_logits.to(dtype), rtol=ulp, atol=0)


@pytest.mark.parametrize(("scale", "reduction"), [(1.0, "mean"), (2.0**14, "mean"), (2.0**14, "none")])
def test_a_scaled_loss_keeps_small_float16_gradients(backend, reduction, scale):
    """A gradient that was rounded to float16 before the loss scale came has lost what the scale is for."""
    case = random_case(64, 10, dtype=torch.float16, reduction=reduction)
    case = case._replace(logits=(2.5 * case.logits.float()).half())
    upstream = torch.full((64,), scale / 64) if reduction == "none" else torch.tensor(scale)
    case = case._replace(upstream=upstream)
    ours, truth = by_library(case).grad_logits.double(), by_definition(case, torch.float64).grad_logits
    assert truth.abs().max() < 65504
    torch.testing.assert_close(ours, truth, rtol=2e-3, atol=2**-24)


@pytest.mark.parametrize("loss", ["cross_entropy", "softmax_bce"])
def test_a_large_offset_common_to_a_row_changes_nothing(backend, loss):
    """Logits near ±10^4. The values are such that float32 adds the offset without rounding."""
    case = random_case(6, 5, loss=loss, step_size=0.3)
    case = case._replace(logits=(case.logits * 256).round() / 256)
    offset = torch.tensor([1e4, -1e4, 8e3, 0.0, 1e4, -3.0])[:, None]
    shifted = case._replace(logits=case.logits + offset)
    assert torch.equal(shifted.logits - offset, case.logits)
    for name, one, other in zip(case._fields, by_library(case), by_library(shifted), strict=False):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss", LOSSES)
def test_probabilities_need_not_sum_to_one(backend, loss):
    """Backward assumes that soft targets sum to 1."""
    case = random_case(6, 5, loss=loss, step_size=0.3)
    mass = torch.tensor([0.0, 0.3, 1.0, 0.7, 1.6, 1.0])[:, None]
    ours = assert_contract(case._replace(target=mass * torch.rand(6, 5).softmax(1)))
    assert ours.loss.isfinite()


def test_nothing_is_autotuned_and_a_repeated_call_gives_the_same_bits(triton_backend):
    from triton.runtime.autotuner import Autotuner

    case = random_case(6, 5)
    first, second = by_library(case), by_library(case)
    assert all(map(torch.equal, first, second))
    modules = [module for name, module in sys.modules.items() if name.startswith("fastamp.kernels")]
    assert len(modules) > 2
    assert not [value for module in modules for value in vars(module).values() if isinstance(value, Autotuner)]


def test_the_mean_under_accumulation_is_the_mean_of_all_items(backend):
    """Four micro-batches of different kept mass."""
    parts = [random_case(size, 5) for size in (3, 1, 4, 2)]
    parts[2].target[0] = -100
    leaves = [leaf(case) for case in parts]
    items = sum((case.target != -100).sum() for case in parts)
    for case, logits in zip(parts, leaves, strict=True):
        call(case, logits, num_items=items).backward()
    start, partner = 0, []
    for case in parts:
        partner.append(case.partner + start)
        start += len(case.partner)
    whole = torch.cat([case.logits for case in parts]).requires_grad_()
    fields = (torch.cat([getattr(case, name) for case in parts]) for name in ("target", "lam"))
    (amp_cross_entropy(whole, *fields, torch.cat(partner), reduction="sum") / items).backward()
    torch.testing.assert_close(torch.cat([x.grad for x in leaves]), whole.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("label", "ignored"), [(-1, -100), (5, 2), (2**40, -100), (-101, -100)])
def test_a_label_out_of_range_is_refused(backend, label, ignored):
    """It is read past the row, or counts as no class at all."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("on a GPU the kernel asserts, and the context is lost")
    case = random_case(6, 5)
    case.target[4] = label
    with pytest.raises(ValueError, match=rf"target must lie in 0\.\.4 or be ignore_index .* got {label} in row 4"):
        call(case, case.logits, ignore_index=ignored)


@pytest.mark.parametrize("pairing", ["permutation", "matching"])
def test_odd_and_last_partial_batches(backend, pairing):
    for size in (1, 2, 3, 5):
        case = random_case(size, 5)
        logits = leaf(case)
        loss, stats = AMPLoss(pairing=pairing)(logits, case.target, return_stats=True)
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.abs().sum() > 0
        assert stats.lam.shape == (size,)


def test_each_rank_draws_its_own_lambda_and_each_step_another(backend):
    case = random_case(6, 5)
    draws = []
    for rank in (0, 1):
        criterion = AMPLoss(generator=torch.Generator(case.logits.device).manual_seed(100 + rank))
        for _ in range(2):
            draws.append(criterion(case.logits, case.target, return_stats=True)[1].lam)
    for i, one in enumerate(draws):
        assert not any(torch.equal(one, other) for other in draws[i + 1 :])


def test_the_step_of_lambda_leaves_no_gradient_behind(backend):
    model, x, case = nn.Linear(4, 5), torch.randn(6, 4, requires_grad=True), random_case(6, 5)
    call(case, model(x))
    assert model.weight.grad is None
    assert x.grad is None


def spy(monkeypatch, backend):
    """Whether each call of the computation below is to make a gradient, as a list that fills."""
    module, name, option = {
        "triton": ("fastamp.kernels", "amp_cross_entropy_forward", "want_grad"),
        "torch": ("fastamp.ops.amp_cross_entropy", "closed_form", "need_grad"),
    }[backend]
    module, wanted = import_module(module), []
    inner = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: wanted.append(kwargs[option]) or inner(*args, **kwargs))
    return wanted


@pytest.mark.filterwarnings("ignore:AMPLoss is in train mode")
def test_no_gradient_is_computed_where_none_can_be_asked_for(backend, monkeypatch):
    wanted, case = spy(monkeypatch, backend), random_case(6, 5)
    for logits, mode in (
        (leaf(case), torch.no_grad()),
        (leaf(case), torch.inference_mode()),
        (case.logits, torch.enable_grad()),
    ):
        with mode:
            loss, _ = AMPLoss()(1 * logits, case.target, return_stats=True)
        assert not loss.requires_grad
    assert wanted == [False] * 3


def test_the_returned_loss_may_be_modified_in_place_before_backward(backend):
    case = random_case(6, 5)
    for reduction, return_stats in (("mean", False), ("none", True), ("none", False)):
        criterion, logits = AMPLoss(reduction=reduction), leaf(case)
        batch = {"mix": Mix(case.lam, case.partner), "return_stats": return_stats}
        (expected,) = torch.autograd.grad(criterion(logits, case.target, mix=batch["mix"]).sum(), logits)
        out = criterion(logits, case.target, **batch)
        loss = out[0] if return_stats else out
        loss /= 4
        total = loss.sum()
        loss.detach().zero_()  # backward reads nothing of it
        torch.testing.assert_close(torch.autograd.grad(total, logits)[0], expected / 4, rtol=1e-5, atol=1e-8)


def test_hooks_see_the_complete_gradient_once_and_may_replace_it(backend):
    case = random_case(6, 5)
    logits, seen = leaf(case), []
    (expected,) = torch.autograd.grad(call(case, logits), logits)
    twice = logits * 1
    twice.register_hook(lambda grad: (seen.append(grad.clone()), 2 * grad)[1])
    call(case, twice).backward()
    (grad,) = seen
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(logits.grad, 2 * expected)
