"""The reference against arithmetic by hand, torch.nn's losses and numerical derivatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastamp import reference
from fastamp.reweighting import moving_weights, new_window

STEP = 0.1


def identity(m):
    return m


def rows(batch=5, classes=4):
    return torch.randn(batch, classes, dtype=torch.float64), torch.randint(classes, (batch,))


def draws(batch=5):
    return torch.rand(batch, dtype=torch.float64), torch.randperm(batch)


def test_two_rows_of_two_classes_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    lam, partner = torch.tensor([0.75, 0.4], dtype=torch.float64), torch.tensor([1, 0])
    result = reference.amp(identity, logits, torch.tensor([0, 1]), lam, partner, step_size=STEP, reduction="mean")

    def loss_at(own, other, t0, coefficient):
        """-(t_0 log p_0 + t_1 log p_1) at the mixture with `coefficient`, and p_0."""
        x = [coefficient * a + (1 - coefficient) * b for a, b in zip(own, other, strict=True)]
        p0 = 1 / (1 + math.exp(x[1] - x[0]))
        return -(t0 * math.log(p0) + (1 - t0) * math.log(1 - p0)), p0

    z0, z1 = (2.0, 0.0), (0.0, 1.0)
    # Row 0: t = (0.75, 0.25), d = (2, -1). Row 1: label 1 with 0.4, label 0 with 0.6: t = (0.6, 0.4), d = (-2, 1).
    expected = []
    for own, other, t0, lam_r in ((z0, z1, 0.75, 0.75), (z1, z0, 0.6, 0.4)):
        loss, p0 = loss_at(own, other, t0, lam_r)
        grad = (p0 - t0) * (own[0] - other[0]) + ((1 - p0) - (1 - t0)) * (own[1] - other[1])
        lam_adv = lam_r + STEP * max(-1.0, min(1.0, grad))
        loss_adv, p0_adv = loss_at(own, other, t0, lam_adv)
        assert loss_adv > loss  # so MinOp keeps λ'
        expected.append((loss_adv, lam_adv, grad, loss_adv - loss, p0_adv - t0))
    loss, lam_adv, grad, delta, slope = torch.tensor(expected, dtype=torch.float64).T
    assert result.mask.tolist() == [True, True]
    slopes = torch.stack([slope, -slope], 1)  # of the loss by the mixed logits
    mine, other = lam_adv[:, None] * slopes, (1 - lam_adv)[:, None] * slopes
    found = (result.row_loss, result.lam_adv, result.grad, result.delta, result.loss.detach())
    found = (*found, *torch.autograd.grad(result.loss, logits))
    for ours, true in zip(found, (loss, lam_adv, grad, delta, loss.mean(), (mine + other.flip(0)) / 2), strict=True):
        torch.testing.assert_close(ours.detach(), true, rtol=0, atol=1e-14)


def test_a_step_that_lowers_the_loss_is_rejected():
    # Self-made f: the loss falls past a kink that the gradient at λ does not see.
    lam, partner = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([1, 0])
    hidden = torch.tensor([[1.0], [0.0]], dtype=torch.float64)

    def f(m):
        x = torch.where(m > 0.55, -30 * (m - 0.55) + 0.05, m - 0.5) + 1.0
        return torch.cat([torch.zeros_like(x), x], 1)

    options = {"step_size": 1.0, "grad_clip": 0.2, "tie_tol": 0.0, "reduction": "none"}
    result, plain, always = (
        reference.amp(f, hidden, torch.tensor([0, 0]), lam, partner, mode=mode, **options)
        for mode in ("amp", "mixup", "maxop")
    )
    assert result.delta[0] < 0
    assert result.mask[0].item() is False
    assert result.loss[0] == plain.loss[0]
    torch.testing.assert_close(always.loss[0], plain.loss[0] + result.delta[0])


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "softmax_bce"])
def test_gradients_of_plain_mixup_are_the_numerical_ones(loss):
    hidden, target = rows(4, 3)
    head = torch.randn(3, 3, dtype=torch.float64)
    lam, partner = torch.rand(4, dtype=torch.float64), torch.tensor([2, 0, 1, 3])

    def total(h, w):
        return reference.amp(lambda m: m.tanh() @ w, h, target, lam, partner, mode="mixup", loss=loss).loss

    assert torch.autograd.gradcheck(total, (hidden.requires_grad_(), head.requires_grad_()))


def test_the_lambda_gradient_is_the_numerical_one_with_the_label_mass_held_fixed():
    logits, target = rows(6, 4)
    lam, partner = draws(6)
    q = F.one_hot(target, 4).double()
    t = lam[:, None] * q + (1 - lam[:, None]) * q[partner]

    def losses(coefficient):
        m = coefficient[:, None] * logits + (1 - coefficient[:, None]) * logits[partner]
        return -(t * m.log_softmax(1)).sum(1)

    numerical = (losses(lam + 1e-6) - losses(lam - 1e-6)) / 2e-6
    result = reference.amp(identity, logits, target, lam, partner)
    torch.testing.assert_close(result.grad, numerical, rtol=0, atol=1e-8)


def test_lambda_after_the_step_is_a_constant_to_autograd():
    logits, target = rows(6, 4)
    logits.requires_grad_()
    lam, partner = draws(6)
    result = reference.amp(identity, logits, target, lam, partner, step_size=0.3, mode="maxop")
    (grad,) = torch.autograd.grad(result.loss, logits)

    def at_constant(z):
        m = result.lam_adv[:, None] * z + (1 - result.lam_adv[:, None]) * z[partner]
        own = F.cross_entropy(m, target, reduction="none")
        other = F.cross_entropy(m, target[partner], reduction="none")
        return (lam * own + (1 - lam) * other).mean()

    again = logits.detach().clone().requires_grad_()
    expected_loss = at_constant(again)
    (expected,) = torch.autograd.grad(expected_loss, again)
    torch.testing.assert_close(result.loss, expected_loss)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
    assert not result.lam_adv.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["labels", "ignored labels", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True])
def test_at_lambda_one_it_is_cross_entropy(weighted, kind, smoothing, reduction):
    logits, target = rows(7, 4)
    options = {"label_smoothing": smoothing, "weight": torch.rand(4, dtype=torch.float64) if weighted else None}
    if kind == "ignored labels":
        target[2] = options["ignore_index"] = 2
    if kind == "probabilities":
        target = torch.rand(7, 4, dtype=torch.float64)
    options["reduction"] = reduction
    expected = F.cross_entropy(logits, target, **options)
    lam, partner = torch.ones(7, dtype=torch.float64), torch.randperm(7)
    for mode in ("mixup", "amp"):
        result = reference.amp(identity, logits, target, lam, partner, mode=mode, step_size=0.0, **options)
        torch.testing.assert_close(result.loss, expected, rtol=1e-13, atol=1e-14)


def test_the_mixed_loss_is_the_mixture_of_two_cross_entropies():
    logits, target = rows(7, 4)
    target[1] = -100
    weight = torch.rand(4, dtype=torch.float64)
    lam, partner = draws(7)
    m = reference.mix(logits, lam, partner)
    own = F.cross_entropy(m, target, weight=weight, reduction="none")
    other = F.cross_entropy(m, target[partner], weight=weight, reduction="none")
    mass = torch.where(target == -100, 0, weight[target.clamp(min=0)])
    expected = (lam * own + (1 - lam) * other).sum() / (lam * mass + (1 - lam) * mass[partner]).sum()
    result = reference.amp(identity, logits, target, lam, partner, mode="mixup", weight=weight)
    torch.testing.assert_close(result.loss, expected)


def test_official_is_binary_cross_entropy_of_the_softmax_with_the_gradient_of_the_batch_mean():
    logits, target = rows(3, 4)
    logits = 4 * logits
    lam, partner = torch.rand(3, dtype=torch.float64), torch.tensor([1, 2, 0])
    q = F.one_hot(target, 4).double()
    t = lam[:, None] * q + (1 - lam[:, None]) * q[partner]
    bce = nn.BCELoss(reduction="none")

    def losses(coefficient):
        m = coefficient[:, None] * logits + (1 - coefficient[:, None]) * logits[partner]
        return bce(m.softmax(1), t).sum(1)

    leaf = lam.clone().requires_grad_()
    (grad,) = torch.autograd.grad(losses(leaf).mean(), leaf)
    lam_adv = lam + 0.05 * grad  # no clip
    loss, loss_adv = losses(lam), losses(lam_adv)
    official = {**reference.OFFICIAL, "reweight": None, "step_size": 0.05}
    result = reference.amp(identity, logits, target, lam, partner, **official)
    torch.testing.assert_close(result.grad, grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.lam_adv, lam_adv, rtol=1e-9, atol=1e-12)
    expected = torch.where(loss_adv - loss > 0, loss_adv, loss)
    torch.testing.assert_close(result.row_loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.loss, expected.mean(), rtol=1e-9, atol=1e-12)
    assert (grad.abs() > 1).any()  # a clip at 1 would have shown


def test_the_gradient_of_the_mean_is_that_of_the_row_over_the_batch_size():
    logits, target = rows(5, 4)
    lam, partner = draws()
    row = reference.amp(identity, logits, target, lam, partner)
    mean = reference.amp(identity, logits, target, lam, partner, grad_scale="mean")
    torch.testing.assert_close(mean.grad, row.grad / 5)


@pytest.mark.parametrize(("clip", "bound"), [(1.0, 1.0), (0.05, 0.05), (None, math.inf)])
def test_the_clip_bounds_the_step_on_both_sides_and_a_clamp_lambda(clip, bound):
    logits, target = rows(50, 4)
    arguments, options = (identity, 20 * logits, target, *draws(50)), {"step_size": 1.0, "grad_clip": clip}
    result = reference.amp(*arguments, **options)
    assert result.grad.max() > 1
    assert result.grad.min() < -1
    torch.testing.assert_close(result.lam_adv - arguments[3], result.grad.clamp(-bound, bound))
    assert result.lam_adv.min() < 0
    assert result.lam_adv.max() > 1
    assert torch.equal(reference.amp(*arguments, clamp=True, **options).lam_adv, result.lam_adv.clamp(0, 1))


def test_any_network_on_a_hidden_state_of_any_shape():
    hidden = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    target, lam, partner = torch.randint(4, (5,)), torch.rand(5, dtype=torch.float64), torch.randperm(5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    result = reference.amp(net, hidden, target, lam, partner, step_size=0.1, reduction="none")
    result.loss.sum().backward()
    for r in range(5):
        # One row alone: mix, label, step, compare, with nothing but its partner.
        coefficient = lam[r].clone().requires_grad_()
        pair = hidden[r].detach(), hidden[partner[r]].detach()
        labels = torch.stack([target[r], target[partner[r]]])

        def loss_at(c, pair=pair, labels=labels, r=r):
            logits = net((c * pair[0] + (1 - c) * pair[1])[None]).expand(2, -1)
            terms = F.cross_entropy(logits, labels, reduction="none")
            return lam[r] * terms[0] + (1 - lam[r]) * terms[1]

        loss = loss_at(coefficient)
        (grad,) = torch.autograd.grad(loss, coefficient)
        loss_adv = loss_at(lam[r] + 0.1 * grad.clamp(-1, 1))
        torch.testing.assert_close(result.loss[r], torch.maximum(loss, loss_adv))
    assert hidden.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_moving_weights_are_one_up_to_the_mean_and_grow_by_standard_deviations_above_it():
    history = []
    delta = torch.tensor([1.0, 2.0, 3.0, -5.0], dtype=torch.float64)
    weights = reference.moving_weights(delta, history)  # of 1, 2, 3 about 2: variance (1 + 0 + 1) / 2
    torch.testing.assert_close(weights, torch.tensor([1.0, 1, 2, 1], dtype=torch.float64))
    later = torch.tensor([6.0, 0.0], dtype=torch.float64)
    weights = reference.moving_weights(later, history)  # of 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3
    torch.testing.assert_close(weights, torch.tensor([1 + 3 / math.sqrt(14 / 3), 1], dtype=torch.float64))


@pytest.mark.parametrize("by", ["definition", "library"])
def test_the_standard_deviation_of_moving_weights_is_unbiased(by):
    def weights(*delta):
        delta = torch.tensor(delta, dtype=torch.float64)
        if by == "definition":
            return reference.moving_weights(delta, []).tolist()
        return moving_weights(delta, new_window(), torch.zeros((), dtype=torch.int64)).tolist()

    assert weights(1.0, 2.0, 6.0) == pytest.approx([1, 1, 1 + (6 - 3) / math.sqrt(7)])
    assert weights(-1.0, 3.0, -2.0) == [1, 1, 1]  # one positive δ: no deviation
    assert weights(-1.0, 0.0) == [1, 1]
    assert weights(2.0, 2.0) == [1, 1]


def test_moving_weights_forget_after_five_steps():
    history = []
    reference.moving_weights(torch.tensor([1000.0, 1.0]), history)
    for _ in range(5):
        weights = reference.moving_weights(torch.tensor([1.0, 3.0]), history)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1 + 1 / math.sqrt(10 / 9)]))
