"""Confident predictions, -inf and NaN; and what is particular to AMP: ties, branches, clamping, equal rows."""

import contextlib
import math
from decimal import Decimal, getcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED, assert_contract, by_definition, by_library, random_case
from hypothesis import given
from hypothesis import strategies as st

import fastamp
from fastamp.functional import amp_cross_entropy
from fastamp.ops import rows
from fastamp.policy import Policy

LOSSES = ("cross_entropy", "binary_cross_entropy", "softmax_bce")


def exact(a, b, labels, lam, step):
    """Loss at λ, ∇λ and δ of one row under cross-entropy, with 60 digits."""
    getcontext().prec = 60
    a, b, lam = [Decimal(v) for v in a], [Decimal(v) for v in b], Decimal(lam)

    def lse(c):
        return sum((c * x + (1 - c) * y).exp() for x, y in zip(a, b, strict=True)).ln()

    def score(c):
        x = [c * u + (1 - c) * v for u, v in zip(a, b, strict=True)]
        return lam * x[labels[0]] + (1 - lam) * x[labels[1]]

    tiny = Decimal(10) ** -25
    grad = ((lse(lam + tiny) - score(lam + tiny)) - (lse(lam - tiny) - score(lam - tiny))) / (2 * tiny)
    lam_adv = lam + Decimal(step) * max(Decimal(-1), min(Decimal(1), grad))
    loss, loss_adv = lse(lam) - score(lam), lse(lam_adv) - score(lam_adv)
    return float(loss), float(grad), float(loss_adv - loss)


@pytest.mark.parametrize("scale", [1.0, 8.0, 30.0])
def test_confident_predictions_lose_no_digits_of_delta(backend, scale):
    """Cancellation where the loss is about 1e-13, or where p rounds to 1."""
    logits = scale * torch.tensor([[1.0, 0.0, -0.5], [0.75, -0.25, 0.0], [0.0, 1.0, -1.0]])
    target, lam, partner = torch.tensor([0, 0, 1]), torch.tensor([0.75, 0.5, 0.25]), torch.tensor([1, 2, 0])
    loss, stats = amp_cross_entropy(logits, target, lam, partner, reduction="none", return_stats=True, tie_tol=0.0)
    for r in range(3):
        q = int(partner[r])
        value, grad, delta = exact(
            logits[r].tolist(), logits[q].tolist(), (int(target[r]), int(target[q])), lam[r].item(), 2e-3
        )
        # λ' is rounded to float32, which moves the step by up to 3e-8.
        # A kernel rounds logits in units of log 2, where these are whole numbers.
        rounding = 2e-7 * scale**2 if backend == "triton" else 0.0
        slack = 1e-4 * abs(delta) + 4e-8 * abs(grad) + 2e-3 * rounding**2
        assert abs(stats.grad[r].item() - grad) <= 4e-6 * max(1e-3, abs(grad)) * scale + rounding
        assert abs(stats.delta[r].item() - delta) <= slack
        assert abs(loss[r].item() - value - delta) <= 2e-6 * max(1.0, abs(value)) + slack


@pytest.mark.parametrize(
    ("pairing", "reach"),
    [("permutation", reach) for reach in (1e-3, 0.06, 0.065, 0.2, 0.3, 2.0)] + [("matching", 0.06), ("matching", 0.3)],
)
def test_delta_of_long_rows_keeps_its_digits_from_moments_and_from_passes(small_tiles, pairing, reach):
    # Compared with 0: where δ decides nothing it need not have its digits.
    case = random_case(4, 37, step_size=1.0, pairing=pairing, tie_tol=0.0)
    case = case._replace(partner=torch.arange(4).roll(2))
    spread = (case.logits - case.logits[case.partner]).abs().amax()
    # ∇λ is clipped to 1 wherever it is larger: the largest |η d| is `reach`, whatever way is taken for it.
    case.options["step_size"] = float(reach / spread)
    ours = by_library(case)
    a, b = case.logits.double(), case.logits.double()[case.partner]
    labels = torch.stack([case.target, case.target[case.partner]], 1)
    mass = torch.stack([case.lam, 1 - case.lam], 1).double()

    def loss(lam):
        x = lam.double()[:, None] * a + (1 - lam.double()[:, None]) * b
        return x.logsumexp(1) - (mass * x.gather(1, labels)).sum(1)

    # At the λ' that was taken: rounded, it is at another distance than ε·clip(∇λ).
    torch.testing.assert_close(ours.delta.double(), loss(ours.lam_adv) - loss(case.lam), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
    ("loss", "scale"),
    [("cross_entropy", 100.0), ("binary_cross_entropy", 100.0), ("softmax_bce", 30.0), ("softmax_bce", 100.0)],
)
def test_saturated_rows_have_finite_losses_and_gradients(backend, loss, scale):
    """Probabilities that round to 0 and 1."""
    case = random_case(8, 5, loss=loss, step_size=0.3, reduction="none")
    case = case._replace(logits=scale * torch.randn(8, 5))
    ours, truth = by_library(case), by_definition(case, torch.float64)
    assert all(value.isfinite().all() for value in ours)
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-5, atol=1e-4 * scale)


def excluding(loss="cross_entropy", **options):
    """Rows with -inf logits in classes that neither label of a pair names."""
    case = random_case(6, 6, loss=loss, **options)
    logits = case.logits.clone()
    logits[0, 4], logits[1, 5], logits[3, 4:] = -torch.inf, -torch.inf, -torch.inf
    return case._replace(logits=logits, target=torch.randint(4, (6,)), partner=torch.tensor([3, 2, 0, 1, 5, 4]))


@pytest.mark.parametrize(("mode", "reduction"), [("amp", "mean"), ("maxop", "none"), ("mixup", "mean")])
def test_a_class_that_is_minus_infinity_is_excluded_from_its_pairs(kernel, mode, reduction):
    """Not 0 times -inf."""
    case = excluding(mode=mode, reduction=reduction, step_size=0.3)
    if kernel == "loops":
        case = case._replace(logits=torch.cat([case.logits, torch.randn(6, 8)], 1))
    ours = assert_contract(case)
    assert all(value.isfinite().all() for value in ours)
    excluded = case.logits == -torch.inf
    assert (ours.grad_logits[excluded] == 0).all()
    # In a pair of 0 and 3, class 4 is -inf on both sides, class 5 on one: neither gets a gradient from it.
    rows = torch.zeros(6).index_fill_(0, torch.tensor([0]), 1.0)
    alone = by_library(case._replace(options={**case.options, "reduction": "none"}, upstream=rows))
    assert (alone.grad_logits[[0, 3]][:, 4:6] == 0).all()
    assert (alone.grad_logits[[0, 3]][:, :4] != 0).all()


@pytest.mark.parametrize("label_of", ["row", "partner"])
def test_a_label_on_an_excluded_class_makes_the_loss_infinite(backend, label_of):
    case = random_case(4, 4, reduction="none")._replace(partner=torch.tensor([1, 0, 3, 2]))
    logits, target = case.logits.clone(), torch.tensor([0, 1, 2, 3])
    logits[0, 0 if label_of == "row" else 1] = -torch.inf
    ours = by_library(case._replace(logits=logits, target=target, upstream=torch.ones(4)))
    assert ours.loss[:2].tolist() == [math.inf, math.inf]
    assert ours.loss[2:].isfinite().all()
    assert ours.grad_logits[2:].isfinite().all()
    assert not ours.grad_logits.isnan().any()


@pytest.mark.parametrize(("loss", "value"), [("cross_entropy", torch.nan), ("softmax_bce", torch.inf)])
def test_a_nan_poisons_its_own_pairs_alone(kernel, loss, value):
    case = random_case(6, 11, loss=loss, reduction="none")
    logits, partner = case.logits.clone(), torch.tensor([1, 0, 3, 2, 5, 4])
    logits[2, 9] = value
    ours = by_library(case._replace(logits=logits, partner=partner))
    clean = by_library(case._replace(partner=partner))
    others = [0, 1, 4, 5]
    for name, mine, expected in zip(ours._fields, ours, clean, strict=True):
        torch.testing.assert_close(mine[others], expected[others], rtol=1e-6, atol=1e-6, msg=name)
    assert ours.loss[[2, 3]].isnan().all()
    assert ours.grad_logits[[2, 3]].isnan().any(1).all()


@INTERPRETED
@given(
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
    step=st.sampled_from([1e-6, 2e-3, 0.3, 1.0]),
    clip=st.sampled_from([1.0, 0.1, None]),
    smoothing=st.sampled_from([0.0, 0.3]),
)
def test_with_cross_entropy_a_step_is_never_rejected(backend, seed, scale, step, clip, smoothing):
    """ℓ is convex in λ, so a step along its derivative cannot lower it."""
    torch.manual_seed(seed)
    case = random_case(
        5, 4, dtype=torch.float64, step_size=step, grad_clip=clip, tie_tol=0.0, label_smoothing=smoothing
    )
    ours = by_library(case._replace(logits=scale * torch.randn(5, 4, dtype=torch.float64)))
    # A smaller derivative is the rounding of 1e-16 times |d| <= 60 or so.
    moved = (ours.grad.abs() > 1e-13) & (ours.lam_adv != case.lam)
    assert ours.mask[moved].all()
    assert (ours.delta >= -1e-16).all()
    assert (ours.delta[ours.lam_adv == case.lam] == 0).all()


NOT_CONVEX = {
    "a target of negative mass": {"target": -torch.tensor([[0.2, 0.3, 0.5]]).expand(32, 3)},
    "negative class weights": {"weight": torch.tensor([-1.0, -2.0, -0.5])},
    "a negative divisor": {"grad_scale": "mean", "num_items": torch.tensor(-1.0)},
}


@pytest.mark.parametrize("where", ["torch", "triton_backend", "many_programs", "small_tiles", "pairs"])
@pytest.mark.parametrize("options", NOT_CONVEX.values(), ids=NOT_CONVEX)
def test_where_the_loss_is_not_convex_a_step_can_be_rejected(request, where, options):
    """S·lse(x) - ⟨t, x⟩ is convex only for S >= 0, and δ >= η∇λ >= 0 only where η has the sign of ∇λ."""
    if where != "torch":
        request.getfixturevalue("small_tiles" if where == "pairs" else where)
    case = random_case(32, 3, step_size=1.0, grad_clip=None, reduction="sum", **options)
    target = case.options.pop("target", case.target)
    if where == "torch":  # of small logits and steps, the shorter way is taken
        case.options.update(step_size=10.0, grad_clip=0.02)
        case = case._replace(logits=case.logits.clamp(-2.5, 2.5))
    if where == "pairs":
        case.options["pairing"] = "matching"
        case = case._replace(partner=torch.arange(32).view(-1, 2).flip(1).flatten())
    if where in ("small_tiles", "pairs"):  # more classes than a tile has
        case = case._replace(logits=F.pad(case.logits, (0, 7), value=-40.0))
        target = F.pad(target, (0, 7)) if target.is_floating_point() else target
        if "weight" in case.options:
            case.options["weight"] = F.pad(case.options["weight"], (0, 7), value=1.0)
    case = case._replace(target=target)
    with fastamp.set_backend("torch") if where == "torch" else contextlib.nullcontext():
        ours = by_library(case)
    truth = by_definition(case, torch.float64)
    clear = truth.delta.abs() > 1e-5
    assert (~truth.mask & clear).any()
    assert torch.equal(ours.mask[clear], truth.mask[clear])


def test_with_softmax_bce_a_step_can_be_rejected(backend):
    """The theorem is one of cross-entropy."""
    torch.manual_seed(0)
    case = random_case(32, 3, dtype=torch.float64, loss="softmax_bce", step_size=1.0, tie_tol=0.0, reduction="none")
    case = case._replace(logits=3 * case.logits)
    ours = assert_contract(case)
    rejected = ~ours.mask & (ours.grad != 0)
    assert rejected.any()
    assert (ours.delta[rejected] < 0).all()
    plain = by_library(case._replace(options={**case.options, "mode": "mixup"}))
    torch.testing.assert_close(ours.loss[rejected], plain.loss[rejected], rtol=1e-15, atol=0)


@pytest.mark.parametrize(("tie_tol", "taken"), [("auto", True), (0.0, False), (1e-3, True)])
def test_equal_losses_are_a_tie(backend, tie_tol, taken):
    case = random_case(4, 3, tie_tol=tie_tol)._replace(partner=torch.arange(4))
    ours = by_library(case)
    assert (ours.delta == 0).all()
    assert ours.mask.tolist() == [taken] * 4


def test_the_tie_tolerance_is_absolute_where_it_is_a_number():
    policy = Policy(tie_tol=0.25, loss="softmax_bce")
    loss = torch.tensor([100.0, 0.1, 100.0, 0.1])
    delta = torch.tensor([-0.24, -0.24, -0.26, -0.26])
    assert rows.select(loss, delta, policy, policy.tie_bounds(loss.dtype)).tolist() == [True, True, False, False]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_the_chosen_branch_with_lambda_held_constant(backend, loss):
    case = random_case(16, 3, dtype=torch.float64, loss=loss, step_size=1.0, grad_clip=None, tie_tol=0.0)
    case = case._replace(logits=0.7 * case.logits, upstream=torch.ones((), dtype=torch.float64))
    ours = by_library(case)
    if loss == "softmax_bce":
        assert 0 < int(ours.mask.sum()) < 16
    chosen = torch.where(ours.mask, ours.lam_adv, case.lam.double())
    logits = case.logits.clone().requires_grad_()
    x = chosen[:, None] * logits + (1 - chosen[:, None]) * logits[case.partner]
    q = F.one_hot(case.target, 3).double()
    t = case.lam[:, None] * q + (1 - case.lam[:, None]) * q[case.partner]
    rows = -(t * x.log_softmax(1)).sum(1)
    if loss == "binary_cross_entropy":
        rows = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1)
    if loss == "softmax_bce":
        others = torch.stack([x[:, [1, 2]], x[:, [0, 2]], x[:, [0, 1]]], 1).logsumexp(2)
        rows = rows - ((1 - t) * (others - x.logsumexp(1, keepdim=True))).sum(1)
    torch.testing.assert_close(ours.loss, rows.mean().detach(), rtol=1e-9, atol=1e-9)
    (expected,) = torch.autograd.grad(rows.mean(), logits)
    torch.testing.assert_close(ours.grad_logits, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("edge", [0.0, 1.0])
@pytest.mark.parametrize("clamp", [False, True])
def test_lambda_leaves_the_unit_interval_unless_it_is_clamped(backend, clamp, edge):
    case = random_case(16, 4, step_size=0.5, clamp=clamp)
    case = case._replace(lam=torch.full((16,), edge))
    ours = assert_contract(case)
    outside = (ours.lam_adv < 0) | (ours.lam_adv > 1)
    assert bool(outside.any()) is not clamp
    at_edge = ours.lam_adv == edge
    assert not clamp or (at_edge.any() and not at_edge.all())


@pytest.mark.parametrize("loss", LOSSES)
def test_two_equal_rows_have_no_lambda_gradient(backend, loss):
    case = random_case(4, 5, loss=loss, step_size=0.3)
    logits = case.logits[:1].repeat(4, 1)
    ours = assert_contract(case._replace(logits=logits, partner=torch.tensor([1, 0, 3, 2])))
    assert (ours.grad == 0).all()
    assert torch.equal(ours.lam_adv, case.lam)


def test_two_rows_of_one_label_are_moved_all_the_same(backend):
    case = random_case(6, 5, step_size=0.3)._replace(
        target=torch.full((6,), 3), partner=torch.tensor([1, 2, 3, 4, 5, 0])
    )
    ours = assert_contract(case)
    assert (ours.grad != 0).all()
