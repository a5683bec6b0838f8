"""Objectives, recipes, updates and curves of training."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from fastamp import reference
from fastamp.models import TextCNN
from fastamp.training import METHODS, RECIPES, TrainConfig, recipe, train
from fastamp.training import curves as curves_module
from fastamp.training.batches import captured_length
from fastamp.training.checkpoint import load_tensors
from fastamp.training.curves import loss_curves, mixed_losses
from fastamp.training.objectives import Mixing, Objective, make_objective
from fastamp.training.task import Task
from fastamp.training.updates import CapturedUpdater, Updater, _Captured

CPU = torch.device("cpu")


def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    rows = [3, 4, 5, 6, 0], [7, 8, 0, 0, 0], [9, 4, 3, 2, 2], [5, 5, 6, 0, 0], [8, 3, 2, 9, 0], [2, 0, 0, 0, 0]
    return torch.tensor(rows), torch.tensor([0, 1, 2, 0, 1, 2])


def small_model(dropout: float = 0.0) -> TextCNN:
    torch.manual_seed(0)
    return TextCNN(12, 3, embedding_dim=4, maps=5, dropout=dropout)


def objective_of(method: str, model: TextCNN, **fields) -> Mixing:
    config = TrainConfig(method=method, **fields)
    return make_objective(model, config, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("at", ["word", "sent"])
@pytest.mark.parametrize("kind", ["mixup", "maxop", "amp"])
@pytest.mark.parametrize("preset", ["default", "paper", "official"])
def test_a_mixing_method_has_the_loss_of_the_definition(at, kind, preset):
    model = small_model().double().train()
    ids, labels = small_batch()
    step = {} if kind == "mixup" else {"step_size": 0.3, "reweight": "none"}
    objective = objective_of(f"{at}-{kind}", model, preset=preset, **step)
    mix = copy.deepcopy(objective.criterion).sample(len(labels), device=CPU)
    loss, stats = objective(ids, labels)
    options = {"default": {}, "paper": reference.PAPER, "official": reference.OFFICIAL}[preset]
    options = {name: value for name, value in options.items() if name not in ("reweight", "alpha")}
    g, f = model.split("word" if at == "word" else "sentence")
    context = f.context(ids, mix)
    expected = reference.amp(
        lambda mixed: f(mixed, **context),
        g(ids),
        labels,
        mix.lam.double(),
        mix.partner,
        **{**options, "step_size": 0.3, "mode": kind},
    )
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(stats.lam_adv.double(), expected.lam_adv, rtol=0, atol=1e-6)


def test_options_of_a_run_reach_the_criterion():
    options = {"preset": "official", "alpha": 0.3, "step_size": 0.7, "pass_dropout": "shared"}
    objective = objective_of("sent-amp", small_model(), **options)
    criterion = objective.criterion
    assert (criterion.alpha, criterion.step_size, criterion.dropout) == (0.3, 0.7, "shared")
    assert (criterion.policy.loss, criterion.policy.grad_clip, criterion.reweight) == ("softmax_bce", None, "moving")
    assert objective_of("sent-amp", small_model(), preset="official", reweight="none").criterion.reweight is None
    assert objective_of("word-amp", small_model(), preset="official").criterion.dropout == "redrawn"
    assert objective_of("word-amp", small_model(), reweight="moving").criterion.reweight == "moving"
    assert objective_of("word-maxop", small_model()).criterion.policy.mode == "maxop"


def test_double_softmax_takes_probabilities_for_logits():
    model, (ids, labels) = small_model(), small_batch()
    logits = model(ids)
    plain, stats = Objective(model)(ids, labels)
    double, _ = Objective(model, double_softmax=True)(ids, labels)
    assert stats is None
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels))
    torch.testing.assert_close(double, F.cross_entropy(logits.softmax(1), labels))
    assert not torch.isclose(plain, double)


def test_an_objective_registers_every_parameter_once():
    model = small_model()
    expected = [f"model.{name}" for name, _ in model.named_parameters()]
    for method in METHODS:
        if method != "nonlinear-mixup":
            named = objective_of(method, model).named_parameters(remove_duplicate=False)
            assert [name for name, _ in named] == expected


# Updates


def test_gradients_are_clipped_over_all_parameters_together():
    ids, labels = small_batch()
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Updater(Objective(model), optimizer, None)(ids, labels)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    Updater(Objective(model), optimizer, norm / 2)(ids, labels)
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item() == pytest.approx(norm / 2, rel=1e-4)


def test_batches_are_captured_at_few_lengths():
    lengths = {length: captured_length(length) for length in range(1, 38)}
    assert all(length <= captured < length + 8 for length, captured in lengths.items())
    assert sorted(set(lengths.values())) == [8, 16, 24, 32, 40]


def test_full_batches_are_replayed_by_length_and_others_updated_by_eagerly(monkeypatch):
    seen = []

    class Graph:
        def replay(self):
            seen.append("replay")

    def captured(updater, ids, labels):
        seen.append(tuple(ids.shape))
        return _Captured(Graph(), ids, labels, torch.zeros(()), None)

    monkeypatch.setattr(CapturedUpdater, "_capture", captured)
    model, (ids, labels) = small_model(), small_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    update = CapturedUpdater(Updater(Objective(model), optimizer, None), torch.Generator(), pad_id=0, rows=6)
    # The last batch of an epoch comes first where a run resumes there.
    before = model.classifier.bias.detach().clone()
    loss, _ = update(ids[:2], labels[:2])
    assert seen == []
    assert loss > 0
    assert not torch.equal(model.classifier.bias, before)
    update(ids, labels)
    update(ids[:, :4], labels)
    update(F.pad(ids, (0, 5)), labels)
    assert seen == [(6, 8), "replay", "replay", (6, 16), "replay"]


# Recipes


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_papers(name):
    chosen = recipe(name, dataset="sst2", **({"vectors": "glove.txt"} if RECIPES[name].vectors else {}))
    assert (chosen.lr, chosen.batch_size) == ((1e-5, 24) if name == "bert" else (2e-4, 50))
    assert (chosen.steps, chosen.l2) == (8000, 1e-8)
    assert chosen.model == {"cnn": "textcnn", "lstm": "bilstm", "bert": "bert"}[name.partition("-")[0]]
    assert chosen.freeze_vectors == name.endswith("-glove")
    assert chosen.lower


def test_recipes_take_fields_and_keep_the_case_of_trec():
    assert not recipe("cnn-rand", dataset="trec").lower
    chosen = recipe("cnn-rand", dataset="trec", lower=True, steps=3, lr=None)
    assert (chosen.lower, chosen.steps, chosen.lr) == (True, 3, 2e-4)
    with pytest.raises(ValueError, match="lstm-glove needs vectors"):
        recipe("lstm-glove")
    with pytest.raises(ValueError, match="unknown recipe 'cnn'; takes one of cnn-rand"):
        recipe("cnn")
    with pytest.raises(TypeError, match="speed"):
        recipe("cnn-rand", speed=1)


# Curves


def test_mixed_losses_are_those_of_every_pair():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 0, 2])
    partner, lam = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([0.0, 0.3, 1.0])
    losses = mixed_losses(lambda mixed: mixed, logits, labels, partner, lam)
    for i, coefficient in enumerate(lam.double().tolist()):
        mixed = coefficient * logits + (1 - coefficient) * logits[partner]
        target = coefficient * F.one_hot(labels, 3) + (1 - coefficient) * F.one_hot(labels[partner], 3)
        expected = F.cross_entropy(mixed, target.double(), reduction="none")
        torch.testing.assert_close(losses[i], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("method", "level", "tolerance"), [("word-amp", "word", 1e-3), ("sent-amp", "sentence", 1e-5)])
def test_curves_are_of_the_best_model_where_it_mixes_and_the_same_pairs_for_all(
    tmp_path, monkeypatch, method, level, tolerance
):
    config = TrainConfig(method=method, steps=6, lr=1e-3, embedding_dim=16, threads=1, eval_every=3)
    train(config, tmp_path / "run")
    state = torch.get_rng_state()
    monkeypatch.setattr(curves_module, "POINTS", 5)
    curves = loss_curves(config, tmp_path / "run")
    assert torch.equal(state, torch.get_rng_state())
    assert curves == loss_curves(config, tmp_path / "run")
    assert json.loads(json.dumps(curves)) == curves
    assert curves.keys() == {"lam", level}
    assert (curves["lam"][0], curves["lam"][-1], len(curves["lam"])) == (0.0, 1.0, 5)
    task = Task.load(config, CPU)
    model = task.model(config)
    model.load_state_dict(load_tensors(tmp_path / "run" / "best.pt")["model"])
    with torch.no_grad():
        unmixed = F.cross_entropy(model.eval()(task.test.ids), task.test.labels).item()
    mean, pairs = curves[level]["mean"], curves[level]["pairs"]
    # The whole test set is mixed with its reversal, so both ends are its loss; mixed words have the longer mask.
    assert (mean[0], mean[-1]) == pytest.approx((unmixed, unmixed), abs=tolerance)
    assert mean == pytest.approx(mean[::-1], abs=1e-6)
    assert [len(pair) for pair in pairs] == [5, 5]
    if level == "word":
        return
    # In the order of the file, which is not that of their lengths, each with its partner from the end.
    labels = torch.tensor(task.corpus.test.labels)
    partner, quarter = torch.arange(len(labels)).flip(0), torch.tensor([0.25])
    with torch.no_grad():
        features = model.encode(task.vocabulary.encode(task.corpus.test.sentences))
        losses = mixed_losses(model.classifier, features, labels, partner, quarter)
    first = int((labels != labels.flip(0)).nonzero()[0])
    assert mean[1] == pytest.approx(losses.mean().item(), abs=1e-6)
    assert pairs[0][1] == pytest.approx(losses[0, first].item(), abs=1e-6)
