"""Pairs: where partner is its own inverse one program takes both rows, in registers or by loops over tiles."""

from __future__ import annotations

import pytest
import torch
from conftest import INTERPRETED, assert_contract, by_library, paired_case
from hypothesis import given
from hypothesis import strategies as st

import fastamp
from fastamp import AMPLoss, functional

OPTIONS = [
    {},
    {"label_smoothing": 0.3, "ignore_index": 1},
    {"reduction": "none"},
    {"reduction": "sum", "step_size": 0.5, "grad_clip": None},
    {"mode": "mixup"},
    {"mode": "maxop", "clamp": True, "step_size": 0.9},
    {"tie_tol": 0.0},
    {"grad_scale": "mean", "num_items": 11.0},
    {"loss": "softmax_bce", "step_size": 0.1},
    {"loss": "binary_cross_entropy"},
    {"loss": "binary_cross_entropy", "label_smoothing": 0.1, "sum_classes": True},
]


@pytest.fixture(params=["many_programs", "small_tiles"])
def classes(request):
    """Pairs in registers, or by loops: how many classes a row has then."""
    request.getfixturevalue(request.param)
    return 40 if request.param == "many_programs" else 21


@pytest.mark.parametrize(("batch", "kind"), [(6, "probabilities"), (7, "weights")])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pairs_hold_the_contract(classes, options, batch, kind):
    case = paired_case(batch, classes, **options)
    if kind == "probabilities":
        case = case._replace(target=torch.rand_like(case.logits).softmax(1))
    elif kind == "weights":
        case.options["weight"] = torch.rand(case.logits.shape[1]) + 0.5
    assert_contract(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_pairs_hold_the_contract_in_every_dtype(classes, dtype):
    assert_contract(paired_case(5, classes, dtype=dtype, step_size=0.05))


@INTERPRETED
@given(batch=st.integers(1, 9), width=st.integers(1, 30), seed=st.integers(0, 99))
def test_the_promise_changes_nothing(backend, batch, width, seed):
    torch.manual_seed(seed)
    case = paired_case(batch, width, step_size=0.2)
    promised = by_library(case)
    del case.options["pairing"]
    for ours, theirs in zip(promised, by_library(case), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_excluded_classes_offsets_and_strided_rows_of_pairs(classes):
    case = paired_case(6, classes, step_size=0.1)
    logits = case.logits.clone()
    logits[:, 5] = -torch.inf
    logits[2, 7] = -torch.inf
    target = case.target.clone()
    target[(target == 5) | (target == 7)] = 3
    strided = torch.empty(classes, 6).T.copy_(logits + 1e4)
    assert not strided.is_contiguous()
    assert_contract(case._replace(logits=strided, target=target))
    assert_contract(case._replace(target=torch.full((6,), 1), options={**case.options, "ignore_index": 1}))


def test_a_second_backward_and_another_upstream_gradient_are_right(classes, poisoned_empty):
    case = paired_case(7, classes)
    logits = case.logits.requires_grad_()
    loss = functional.amp_cross_entropy(logits, case.target, case.lam, case.partner, pairing="matching")
    grads = [torch.autograd.grad(loss * factor, logits, retain_graph=True)[0] for factor in (1.0, 2.0, 1.0)]
    torch.testing.assert_close(grads[1], 2 * grads[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-6, atol=1e-8)
    again = torch.autograd.grad(
        functional.amp_cross_entropy(logits, case.target, case.lam, case.partner, pairing="matching"), logits
    )
    assert torch.equal(again[0], grads[0])  # to the bit


def test_a_criterion_of_matchings_takes_its_own_draws_and_no_other_permutations(backend):
    criterion = AMPLoss(pairing="matching", step_size=0.1)
    logits, target = torch.randn(6, 5), torch.randint(5, (6,))
    mix = criterion.sample(6, device=logits.device)
    loss, stats = criterion(logits, target, mix=mix, return_stats=True)
    plain, plain_stats = AMPLoss(step_size=0.1)(logits, target, mix=mix, return_stats=True)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(stats.lam_adv, plain_stats.lam_adv)
    if logits.is_cuda:
        return  # values on a GPU are not looked at; the kernels assert them
    cycle = fastamp.Mix(mix.lam, torch.tensor([1, 2, 0, 3, 4, 5]))
    message = r"partner must be its own inverse for pairing='matching', but row 0's partner is 1, whose partner is 2"
    with pytest.raises(ValueError, match=message):
        criterion(logits, target, mix=cycle)
    with pytest.raises(ValueError, match=message):
        functional.amp_cross_entropy(logits, target, *cycle, pairing="matching")
    with pytest.raises(ValueError, match=message):
        criterion.step(lambda m: m, logits, target, mix=cycle)
    with pytest.raises(ValueError, match=message):
        functional.linear_amp_cross_entropy(logits, torch.randn(4, 5), None, target % 4, *cycle, pairing="matching")


def test_a_compiled_criterion_of_matchings_gives_the_same(triton_backend):
    criterion = AMPLoss(pairing="matching", step_size=0.1)
    logits, target = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,))
    mix = criterion.sample(6, device=logits.device)
    compiled = torch.compile(lambda z: criterion(z, target, mix=mix), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(criterion(logits, target, mix=mix), logits)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(logits), logits)[0], expected)
