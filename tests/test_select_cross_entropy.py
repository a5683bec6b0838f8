"""Selection between two sets of logits, on both backends, whole rows at once and by loops."""

from typing import NamedTuple

import pytest
import torch
from conftest import HAS_GPU, INTERPRETED
from hypothesis import given
from hypothesis import strategies as st
from strategies import DRAWS, assert_case_holds
from torch import Tensor

from fastamp.conformance import SelectionCase
from fastamp.functional import select_cross_entropy
from fastamp.mixing import Mixture
from fastamp.ops.select_cross_entropy import dispatch
from fastamp.policy import checked_policy

LOSSES = ("cross_entropy", "binary_cross_entropy", "softmax_bce")


class Batch(NamedTuple):
    """One call, and the gradient from above."""

    logits: Tensor
    logits_adv: Tensor
    target: Tensor
    lam: Tensor
    partner: Tensor
    weight: Tensor | None
    options: dict
    upstream: Tensor


def random_batch(batch=6, classes=5, *, change=0.01, dtype=torch.float32, **options):
    logits = 3 * torch.randn(batch, classes)
    lam = torch.rand(batch, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    target, partner = torch.randint(classes, (batch,)), torch.randperm(batch)
    logits_adv = (logits + change * torch.randn(batch, classes)).to(dtype)
    return Batch(logits.to(dtype), logits_adv, target, lam, partner, None, options, torch.randn(batch))


def by_library(case):
    leaves = [x.detach().requires_grad_() for x in case[:2]]
    loss, delta, mask = select_cross_entropy(*leaves, *case[2:5], weight=case.weight, **case.options)
    assert not delta.requires_grad
    assert loss.dtype == delta.dtype == case.lam.dtype
    return loss.detach(), delta, mask, *torch.autograd.grad(loss, leaves, case.upstream.to(loss.dtype))


@INTERPRETED
@given(
    options=st.fixed_dictionaries(
        {
            "shape": st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3, 7, 8, 9, 20])),
            "change": st.sampled_from([0.0, 1e-3, 0.2, 3.0]),
            "soft": st.booleans(),
            "weighted": st.booleans(),
            "ignored": st.booleans(),
            "options": st.fixed_dictionaries(
                {"loss": st.sampled_from(LOSSES), "label_smoothing": st.sampled_from([0.0, 0.2])}
            ),
        }
    ),
    **DRAWS,
)
def test_any_selection_holds_the_contract(kernel, options, layout, dtype, seed):
    assert_case_holds(SelectionCase("any", **options), layout, dtype, seed)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_class_excluded_from_both_is_no_change(kernel, loss):
    """Neither 0 · -inf nor -inf - -inf."""
    case = random_batch(5, 12, loss=loss, tie_tol=0.0, sum_classes=loss == "binary_cross_entropy")
    case.target[case.target == 4] = 0
    case.logits[:, 4] = case.logits_adv[:, 4] = -torch.inf
    without = [x[:, torch.arange(12) != 4] for x in case[:2]]
    target = case.target - (case.target > 4).long()
    others = by_library(case._replace(logits=without[0], logits_adv=without[1], target=target))
    torch.testing.assert_close(by_library(case)[:3], others[:3], rtol=1e-5, atol=1e-5)


def test_the_mode_decides_and_an_ignored_label_may_be_a_class(kernel):
    case = random_batch(5, 12, change=0.5, tie_tol=0.0)
    loss, delta, *_ = by_library(case._replace(options={"mode": "mixup"}))
    loss_adv, _, mask, *_ = by_library(case._replace(options={"mode": "maxop"}))
    assert mask.all()
    torch.testing.assert_close(loss_adv - loss, delta, rtol=1e-5, atol=2e-6)
    target = torch.tensor([0, 3, 7, 0, 5])
    ignored = by_library(case._replace(target=target, options={"ignore_index": 0}))
    assert all(map(torch.equal, ignored, by_library(case._replace(target=torch.where(target == 0, -100, target)))))


@pytest.mark.parametrize("loss", ["cross_entropy", "softmax_bce"])
def test_a_logit_that_is_nan_makes_the_loss_nan(kernel, loss):
    case = random_batch(4, 12, loss=loss, mode="maxop")
    case.logits_adv[0, 3] = torch.nan
    case.logits_adv[1, 3] = torch.inf
    case.logits_adv[2] = -torch.inf
    loss, delta, *_ = by_library(case)
    assert loss[:3].isnan().all()
    assert delta[:3].isnan().all()
    assert loss[3].isfinite()
    # The comparison with NaN is no gain: the loss at λ stays.
    loss, _, mask, *_ = by_library(case._replace(options={**case.options, "mode": "amp"}))
    assert loss.isfinite().all()
    assert not mask[:3].any()


def test_a_small_change_keeps_its_digits(kernel):
    """The difference of two losses of about 2 has lost what the change of the logits still holds."""
    logits = torch.randint(-64, 64, (5, 20)) / 64
    case = random_batch(5, 20)._replace(
        logits=logits, logits_adv=logits + torch.randint(-8, 8, (5, 20)) * 2.0**-20, target=torch.arange(5)
    )
    wide = {name: getattr(case, name).double() for name in ("logits", "logits_adv", "lam")}
    ours, exact = by_library(case)[1], by_library(case._replace(**wide))[1]
    assert 1e-7 < exact.abs().max() < 1e-5
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-12)


@pytest.mark.parametrize("loss", ["cross_entropy", "softmax_bce"])
def test_a_large_common_offset_costs_no_digits(kernel, loss):
    for mode in ("maxop", "mixup"):  # the loss at λ', and at λ
        case = random_batch(5, 20, loss=loss, mode=mode)
        case = case._replace(logits=case.logits.mul(64).round() / 64, logits_adv=case.logits_adv.mul(64).round() / 64)
        shifted = case._replace(logits=case.logits + 4096, logits_adv=case.logits_adv + 4096)
        for one, other in zip(by_library(case), by_library(shifted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_each_gradient_goes_to_the_logits_that_were_taken(backend):
    case = random_batch(8, 5, change=0.5, tie_tol=0.0)._replace(upstream=torch.ones(()).expand(8))
    _, _, mask, grad, grad_adv = by_library(case)
    assert 0 < mask.sum() < 8
    assert (grad[mask] == 0).all()
    assert (grad_adv[~mask] == 0).all()
    assert (grad[~mask].abs().sum(1) > 0).all()


@pytest.mark.parametrize(("ties", "taken"), [((0.0, 0.0), False), ((0.1, 0.0), True), ((0.0, 0.1), True)])
def test_ties_follow_the_tolerances_that_are_given(backend, ties, taken):
    logits = torch.tensor([[2.0, 0.0]])
    adv = torch.tensor([[2.02, 0.0]])  # the loss falls by less than 0.02
    mixture = Mixture(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([0]), None)
    rows = dispatch(logits, adv, mixture, checked_policy(), ties, True)
    assert rows.mask.tolist() == [taken]
    assert rows.delta.item() < 0


def test_without_adversarial_logits_there_is_the_loss_alone(backend):
    case = random_batch(5, 4)
    arguments = (Mixture(*case[2:5], None), checked_policy(), (0.0, 1e-6), True)
    alone = dispatch(case.logits, None, *arguments)
    both = dispatch(case.logits, case.logits_adv, *arguments)
    assert alone.grad_adv is None
    assert not alone.mask.any()
    assert (alone.delta == 0).all()
    assert torch.equal(alone.grad, both.grad)
    torch.testing.assert_close(alone.loss, torch.where(both.mask, both.loss - both.delta, both.loss))


def test_an_empty_batch_passes(backend):
    case = random_batch(0, 4)
    loss, delta, mask, grad, _ = by_library(case)
    assert loss.shape == delta.shape == mask.shape == (0,)
    assert grad.shape == (0, 4)


def test_backward_twice_gives_the_same_and_a_second_derivative_is_refused(backend):
    case = random_batch(5, 4)
    leaf = case.logits.requires_grad_()
    loss, _, _ = select_cross_entropy(leaf, case.logits_adv, *case[2:5], mode="mixup")
    first = torch.autograd.grad(loss, leaf, case.upstream, retain_graph=True)[0]
    copy = first.clone()
    torch.autograd.grad(loss, leaf, 2 * case.upstream, retain_graph=True)
    assert torch.equal(first, copy)
    assert torch.equal(torch.autograd.grad(loss, leaf, case.upstream, retain_graph=True)[0], copy)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss.sum(), leaf, create_graph=True)[0].sum().backward()


def test_two_runs_give_the_same_bits(small_tiles):
    case = random_batch(4, 30)
    assert all(map(torch.equal, by_library(case), by_library(case)))


@pytest.mark.skipif(HAS_GPU, reason="values are looked at on the CPU only")
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits_adv": torch.zeros(2, 4)}, ValueError, r"logits_adv must have logits' shape \(2, 3\)"),
        ({"logits_adv": torch.zeros(2, 3).double()}, ValueError, r"logits_adv must .*got \(2, 3\) of torch.float64"),
        ({"logits_adv": None}, TypeError, "logits_adv must be a tensor, got NoneType"),
        ({"logits": torch.zeros(2, 3).long()}, TypeError, "logits must be float16"),
        ({"target": torch.tensor([0, 3])}, ValueError, "target must lie in 0..2"),
        ({"lam": torch.tensor([0.0, 1.5])}, ValueError, r"lam must lie in \[0, 1\]"),
        ({"partner": torch.tensor([0, 0])}, ValueError, "partner must be a permutation"),
        ({"weight": torch.ones(2)}, ValueError, r"weight must have shape \(3,\)"),
        ({"mode": "cutmix"}, ValueError, "mode must be one of"),
        ({"loss": "mse"}, ValueError, "loss must be one of"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(changed, error, message):
    given = {"logits": torch.zeros(2, 3), "logits_adv": torch.zeros(2, 3), "target": torch.tensor([0, 1])}
    given |= {"lam": torch.rand(2), "partner": torch.tensor([1, 0]), **changed}
    with pytest.raises(error, match=message):
        select_cross_entropy(**given)
