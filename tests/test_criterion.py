"""AMPLoss in a training loop: autograd, accumulation, autocast."""

import pytest
import torch
from conftest import random_case
from torch import nn

from fastamp import AMPLoss, Mix
from fastamp.functional import amp_cross_entropy

REDUCTIONS = ("mean", "sum", "none")


def batch(size=8, classes=5, dtype=torch.float32):
    case = random_case(size, classes, dtype=dtype)
    return case.logits.requires_grad_(), case.target, Mix(case.lam, case.partner)


def spy(monkeypatch, backend):
    """The calls of the computation below, as a list that fills: keyword arguments of each."""
    calls = []
    if backend == "triton":
        from fastamp import kernels

        place, name = kernels, "amp_cross_entropy_forward"
    else:
        from fastamp.ops import amp_cross_entropy

        place, name = amp_cross_entropy, "closed_form"
    inner = getattr(place, name)

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        return inner(*args, **kwargs)

    monkeypatch.setattr(place, name, recorded)
    return calls


@pytest.mark.filterwarnings("ignore:AMPLoss is in train mode")
@pytest.mark.parametrize("grad_mode", ["no leaf", "no_grad", "inference_mode"])
def test_no_gradient_is_computed_where_none_can_be_asked_for(backend, monkeypatch, grad_mode):
    calls = spy(monkeypatch, backend)
    logits, target, mix = batch()
    if grad_mode == "no leaf":
        loss, _ = AMPLoss()(logits.detach(), target, mix=mix, return_stats=True)
    else:
        with torch.no_grad() if grad_mode == "no_grad" else torch.inference_mode():
            loss, _ = AMPLoss()(1 * logits, target, mix=mix, return_stats=True)
    assert not loss.requires_grad
    (call,) = calls
    assert not (call["want_grad"] if backend == "triton" else call["need_grad"])


def test_the_returned_loss_may_be_modified_in_place_before_backward(backend):
    logits, target, mix = batch()
    for reduction in REDUCTIONS:
        (expected,) = torch.autograd.grad(AMPLoss(reduction=reduction)(logits, target, mix=mix).sum(), logits)
        for return_stats in (False, True):
            out = AMPLoss(reduction=reduction)(logits, target, mix=mix, return_stats=return_stats)
            loss = out[0] if return_stats else out
            loss /= 4
            (grad,) = torch.autograd.grad(loss.sum(), logits)
            torch.testing.assert_close(grad, expected / 4, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("return_stats", [False, True])
def test_backward_twice_gives_equal_gradients_and_leaves_the_first_alone(backend, reduction, return_stats):
    logits, target, mix = batch()
    out = AMPLoss(reduction=reduction)(logits, target, mix=mix, return_stats=return_stats)
    loss = out[0] if return_stats else out
    upstream = torch.randn(loss.shape)
    first = torch.autograd.grad(loss, logits, upstream, retain_graph=True)[0]
    kept = first.clone()
    doubled = torch.autograd.grad(loss, logits, 2 * upstream, retain_graph=True)[0]
    again = torch.autograd.grad(loss, logits, upstream)[0]
    torch.testing.assert_close(doubled, 2 * kept, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-7)
    assert torch.equal(first, kept)


def test_what_is_done_to_one_gradient_does_not_reach_the_next(backend):
    logits, target, mix = batch()
    loss = AMPLoss()(logits, target, mix=mix)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    expected = first.clone()
    first.fill_(torch.nan)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("return_stats", [False, True])
def test_double_backward_raises(backend, return_stats, reduction):
    logits, target, mix = batch()
    out = AMPLoss(reduction=reduction)(logits, target, mix=mix, return_stats=return_stats)
    loss = out[0] if return_stats else out
    # The square, or a model's layers, have a second derivative of their own: without the loss's a wrong one.
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(loss.square().sum(), logits, create_graph=True)


def test_logits_of_a_model_pass_the_gradient_on(backend):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5))
    x = torch.randn(8, 6)
    _, target, mix = batch()
    logits = model(x)
    logits.retain_grad()
    AMPLoss()(logits, target, mix=mix).backward()
    leaf = model(x).detach().requires_grad_()
    AMPLoss()(leaf, target, mix=mix).backward()
    torch.testing.assert_close(logits.grad, leaf.grad)
    torch.testing.assert_close(model[2].bias.grad, leaf.grad.sum(0))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_hooks_see_the_complete_gradient_once_and_may_replace_it(backend):
    leaf, target, mix = batch()
    (expected,) = torch.autograd.grad(AMPLoss()(leaf, target, mix=mix), leaf)
    seen = []
    logits = leaf * 1
    logits.register_hook(lambda grad: (seen.append(grad.clone()), 2 * grad)[1])
    AMPLoss()(logits, target, mix=mix).backward()
    (grad,) = seen
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(leaf.grad, 2 * expected)


def test_gradients_accumulate_over_micro_batches_to_that_of_the_whole(backend):
    logits, target, mix = batch()
    blocks = torch.tensor([2, 0, 1, 3, 7, 4, 6, 5])  # each half is mixed within itself
    AMPLoss()(logits, target, mix=Mix(mix.lam, blocks)).backward()
    whole, logits.grad = logits.grad, None
    for half in (slice(0, 4), slice(4, 8)):
        part = Mix(mix.lam[half], blocks[half] - half.start)
        AMPLoss()(logits[half], target[half], mix=part, num_items=8).backward()
    torch.testing.assert_close(logits.grad, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_loss_is_that_of_the_low_precision_logits(backend, dtype):
    torch.manual_seed(1)
    model = nn.Linear(6, 5)
    x = torch.randn(8, 6)
    _, target, mix = batch()
    with torch.autocast(x.device.type, dtype=dtype):
        logits = model(x)
        assert logits.dtype == dtype
        loss = AMPLoss(weight=torch.rand(5), label_smoothing=0.1)(logits, target, mix=mix)
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.dtype == torch.float32
    assert model.weight.grad.abs().sum() > 0
    torch.manual_seed(1)
    outside = AMPLoss(weight=None, label_smoothing=0.1)(logits.detach(), target, mix=mix)
    with torch.autocast(x.device.type, dtype=dtype):
        inside = AMPLoss(weight=None, label_smoothing=0.1)(logits.detach(), target, mix=mix)
    assert torch.equal(inside, outside)


def test_a_step_of_an_optimizer_lowers_the_loss(backend):
    torch.manual_seed(1)
    model, criterion = nn.Linear(6, 3), AMPLoss(generator=torch.Generator().manual_seed(0))
    x, target = torch.randn(12, 6), torch.randint(3, (12,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = criterion.eval()(model(x), target).item()
    for _ in range(20):
        optimizer.zero_grad()
        criterion.train()(model(x), target).backward()
        optimizer.step()
    assert criterion.eval()(model(x), target).item() < 0.9 * before


def test_a_compact_loss_and_one_with_statistics_have_the_same_gradient(backend):
    logits, target, mix = batch()
    for options in ({}, {"mode": "mixup"}, {"mode": "maxop"}, {"weight": torch.rand(5)}, {"ignore_index": 1}):
        short = AMPLoss(**options)(logits, target, mix=mix)
        full, _ = AMPLoss(**options)(logits, target, mix=mix, return_stats=True)
        torch.testing.assert_close(short, full, rtol=1e-6, atol=1e-7)
        grads = [torch.autograd.grad(loss, logits)[0] for loss in (short, full)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_several_losses_of_one_batch_add_up(backend):
    logits, target, mix = batch()
    other = Mix(1 - mix.lam, mix.partner.flip(0))
    grads = [torch.autograd.grad(AMPLoss()(logits, target, mix=m), logits)[0] for m in (mix, other)]
    both = AMPLoss()(logits, target, mix=mix) + 3 * AMPLoss()(logits, target, mix=other)
    torch.testing.assert_close(torch.autograd.grad(both, logits)[0], grads[0] + 3 * grads[1], rtol=1e-5, atol=1e-7)


def test_the_function_gives_the_gradient_through_a_view_of_the_logits(backend):
    logits, target, mix = batch(8, 6)
    amp_cross_entropy(logits[:, 1:], target.clamp(max=4), *mix).backward()
    assert (logits.grad[:, 0] == 0).all()
    assert (logits.grad[:, 1:] != 0).all()
