"""What binary cross-entropy adds: nn.BCEWithLogitsLoss's arguments, ignored entries, and rows that never reject."""

import pytest
import torch
import torch.nn.functional as F
from conftest import by_library, random_case

from fastamp import AMPLoss, reference
from fastamp.functional import amp_cross_entropy, linear_amp_cross_entropy

BINARY = "binary_cross_entropy"


def identity(m):
    return m


def vectors(classes):
    return {name: 0.5 + torch.rand(classes, dtype=torch.float64) for name in ("weight", "pos_weight")}


@pytest.mark.parametrize("soft", [False, True])
def test_the_definition_is_that_of_torch_on_either_side(soft):
    logits = 2 * torch.randn(5, 4, dtype=torch.float64)
    target = torch.rand(5, 4, dtype=torch.float64) if soft else torch.randint(4, (5,))
    lam, partner, given = torch.rand(5, dtype=torch.float64), torch.randperm(5), vectors(4)
    found = reference.amp(identity, logits, target, lam, partner, mode="mixup", loss=BINARY, **given)
    mixed = reference.mix(logits, lam, partner)
    sides = target if soft else F.one_hot(target, 4).double()
    own, theirs = (
        F.binary_cross_entropy_with_logits(mixed, side, reduction="none", **given).mean(1)
        for side in (sides, sides[partner])
    )
    torch.testing.assert_close(found.row_loss, lam * own + (1 - lam) * theirs)
    torch.testing.assert_close(found.loss, found.row_loss.mean())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_eval_mode_is_that_of_torch(soft, reduction):
    logits, given = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), vectors(4)
    target = torch.rand(5, 4) if soft else torch.randint(4, (5,))
    sides = target.double() if soft else F.one_hot(target, 4).double()
    rows = F.binary_cross_entropy_with_logits(logits, sides, reduction="none", **given).mean(1)
    expected = rows if reduction == "none" else getattr(rows, reduction)()
    criterion = AMPLoss(**given, loss=BINARY, reduction=reduction).eval()
    ours = criterion(logits, target)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(criterion.step(identity, logits, target), expected)
    grads = (torch.autograd.grad(loss.sum(), logits, retain_graph=True) for loss in (ours, expected))
    torch.testing.assert_close(*grads)
    criterion.sum_classes = True
    torch.testing.assert_close(criterion(logits, target), 4 * expected)
    assert criterion(logits.bfloat16(), target).dtype == torch.bfloat16


def test_an_ignored_entry_counts_for_nothing(backend):
    case = random_case(6, 5, loss=BINARY, step_size=0.3)
    target = torch.rand(6, 5)
    ignored = torch.rand(6, 5) < 0.3
    case = case._replace(target=target.masked_fill(ignored, -100.0))
    kept = (~ignored).float()
    ours = by_library(case)
    share = torch.lerp(kept[case.partner].mean(1), kept.mean(1), case.lam)
    rows = by_library(case._replace(options={**case.options, "reduction": "none"}, upstream=torch.ones(6)))
    torch.testing.assert_close(ours.loss, rows.loss.sum() / share.sum())
    nothing = by_library(case._replace(target=torch.full((6, 5), -100.0)))
    assert nothing.loss.isnan()  # 0/0, as nn.CrossEntropyLoss has it
    assert (nothing.grad_logits == 0).all()
    criterion = AMPLoss(loss=BINARY).eval()
    plain = F.binary_cross_entropy_with_logits(case.logits, target, reduction="none") * kept
    torch.testing.assert_close(criterion(case.logits, case.target), plain.sum() / kept.sum())


@pytest.mark.parametrize("classes", [5, 40])
def test_behind_an_affine_layer_no_row_rejects(backend, classes):
    """The loss is convex in λ, whatever the target is."""
    for target in (torch.randint(classes, (30,)), torch.rand(30, classes), 3 * torch.randn(30, classes)):
        case = random_case(30, classes, loss=BINARY, step_size=0.5)._replace(target=target)
        ours = by_library(case)
        assert ours.mask.all()
        assert (ours.delta >= -1e-6 * ours.loss.abs().clamp(min=1)).all()


def test_a_head_in_chunks_is_the_head(backend):
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True)
    given = (torch.rand(9, 20), torch.rand(9), torch.randperm(9))
    found = []
    for chunk_rows in (None, 4):
        loss = linear_amp_cross_entropy(hidden, weight, None, *given, loss=BINARY, chunk_rows=chunk_rows)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(*found)


def test_its_arguments_belong_to_it_alone():
    logits, target, lam, partner = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.rand(4), torch.randperm(4)
    given = (logits, target, lam, partner)
    with pytest.raises(
        ValueError, match=r"pos_weight belongs to loss='binary_cross_entropy', got loss='cross_entropy'"
    ):
        amp_cross_entropy(*given, pos_weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"sum_classes belongs to loss='binary_cross_entropy', got loss='softmax_bce'"):
        amp_cross_entropy(*given, loss="softmax_bce", sum_classes=True)
    with pytest.raises(TypeError, match=r"sum_classes must be True or False, got 1"):
        AMPLoss(loss=BINARY, sum_classes=1)
    with pytest.raises(ValueError, match=r"pos_weight must have shape \(3,\), one a class, got \(4,\)"):
        amp_cross_entropy(*given, loss=BINARY, pos_weight=torch.ones(4))
    with pytest.raises(ValueError, match=r"pos_weight must have shape \(3,\)"):
        AMPLoss(loss=BINARY, pos_weight=torch.ones(4)).step(identity, logits, target)
    with pytest.raises(ValueError, match=r"pos_weight must not require a gradient"):
        amp_cross_entropy(*given, loss=BINARY, pos_weight=torch.ones(3, requires_grad=True))
    with pytest.raises(TypeError, match=r"pos_weight must be a \(C,\) tensor or None"):
        AMPLoss(loss=BINARY, pos_weight=2.0)


def test_the_criterion_keeps_its_weights():
    criterion = AMPLoss(loss=BINARY, pos_weight=torch.tensor([1.0, 2.0, 3.0]), sum_classes=True)
    assert "pos_weight=(3,)" in repr(criterion)
    assert "sum_classes=True" in repr(criterion)
    assert torch.equal(criterion.state_dict()["pos_weight"], criterion.pos_weight)
    assert criterion.to(torch.float64).pos_weight.dtype == torch.float64
