"""AttentionBiLSTM."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastamp import AMPLoss, Mix, reference
from fastamp.models import AttentionBiLSTM

# Sums of some tens of float32 products, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LENGTHS = (7, 2, 1, 9, 4, 4)
LABELS = torch.tensor([0, 1, 2, 3, 0, 2])
PLACES = ("word", "sentence", "embedding")


def small(**options) -> AttentionBiLSTM:
    torch.manual_seed(0)
    return AttentionBiLSTM(30, 4, **{"embedding_dim": 12, "hidden_size": 10, **options}).eval()


def sentences(*lengths: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 30, (n,), generator=generator) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def a_mix(dtype: torch.dtype) -> Mix:
    generator = torch.Generator().manual_seed(4)
    return Mix(torch.rand(6, generator=generator).to(dtype), torch.tensor([3, 0, 1, 2, 4, 5]))


def by_definition(model: AttentionBiLSTM, row: torch.Tensor) -> torch.Tensor:
    """Features of one sentence (n,), its words in the order of each direction, attention as a loop over them."""
    words = model.embedding.weight[row]
    onward = model.encoder.forwards(words)[0]
    backward = model.encoder.backwards(words.flip(0))[0].flip(0)
    states = [torch.cat(pair) for pair in zip(onward, backward, strict=True)]
    scores = [(model.encoder.score.weight[0] * state.tanh()).sum().exp() for state in states]
    return sum(score * state for score, state in zip(scores, states, strict=True)) / sum(scores)


def test_features_are_those_of_the_definition():
    model, ids = small().double(), sentences(*LENGTHS)
    expected = torch.stack([by_definition(model, row[:n]) for row, n in zip(ids, LENGTHS, strict=True)])
    torch.testing.assert_close(model.encode(ids), expected)
    torch.testing.assert_close(model(ids), model.classifier(expected.clamp(min=0)))


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), extra=st.integers(0, 8))
def test_logits_do_not_depend_on_padding_or_on_the_rest_of_the_batch(lengths, extra):
    model, ids = small(), sentences(*lengths)
    logits = model(ids)
    torch.testing.assert_close(model(F.pad(ids, (0, extra))), logits, **CLOSE)
    for row, length, expected in zip(ids, lengths, logits, strict=True):
        torch.testing.assert_close(model(row[None, :length])[0], expected, **CLOSE)


def test_float32_and_float64_agree_in_value_and_gradient():
    # torch computes them by different libraries.
    model, ids = small(), sentences(*LENGTHS)
    upstream = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = []
    for dtype in (torch.float32, torch.float64):
        logits = model.to(dtype)(ids)
        results.append((logits, *torch.autograd.grad(logits, list(model.parameters()), upstream.to(dtype))))
    for single, double in zip(*results, strict=True):
        torch.testing.assert_close(single.double(), double, **CLOSE)


def test_padding_gets_exactly_no_attention():
    model, ids = small(), sentences(*LENGTHS)
    mask = ids != 0
    # Scores far below zero for words leave nothing to padding either.
    model.encoder.score.weight.data.fill_(-100.0)
    states = model.encoder.states(model.embed(ids), mask).abs()
    weights = model.encoder.attention(states, mask)
    assert (weights[~mask] == 0).all()
    assert (weights[mask] >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(6))


# split


def test_every_place_gives_the_models_own_logits():
    model, ids = small(), sentences(*LENGTHS)
    for at in PLACES:
        g, f = model.split(at)
        torch.testing.assert_close(f(g(ids), **f.context(ids)), model(ids), rtol=0, atol=0)


def test_a_mixed_row_is_as_long_as_the_longer_of_both():
    model, ids, mix = small(), sentences(*LENGTHS), a_mix(torch.float32)
    for at in ("word", "embedding"):
        mask = model.split(at).f.context(ids, mix)["mask"]
        assert mask.sum(1).tolist() == [max(LENGTHS[r], LENGTHS[q]) for r, q in enumerate(mix.partner.tolist())]


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("plan", ["auto", "merged", "both"])
def test_a_step_is_the_definition(at, plan):
    model, ids = small(dropout=0.0).double().train(), sentences(*LENGTHS)
    mix = a_mix(torch.float64)
    union = mix.union(ids != 0)
    options = {"step_size": 0.05, "tie_tol": 0.0}

    def rest(mixed):
        features = mixed if at == "sentence" else model.encoder(mixed, union)
        return model.classifier(features.relu())

    hidden = model.encode(ids) if at == "sentence" else model.embed(ids)
    truth = reference.amp(rest, hidden, LABELS, *mix, **options)
    g, f = model.split(at)
    loss, stats = AMPLoss(**options).step(
        f, g(ids), LABELS, mix=mix, context=f.context(ids, mix), plan=plan, return_stats=True
    )
    ours = [loss, stats.grad, stats.lam_adv, stats.delta]
    theirs = [truth.loss, truth.grad, truth.lam_adv, truth.delta]
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours += torch.autograd.grad(loss, parameters)
    theirs += torch.autograd.grad(truth.loss, parameters)
    assert {"embedding.weight", "encoder.backwards.weight_hh_l0", "encoder.score.weight"} < set(names)
    assert (stats.lam_adv != stats.lam).sum() > 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at", PLACES)
def test_the_plans_of_a_step_agree_in_float32_under_dropout(at):
    model, ids, mix = small().train(), sentences(*LENGTHS), a_mix(torch.float32)
    g, f = model.split(at)
    results = []
    for plan in ("auto", "merged", "both"):
        torch.manual_seed(5)
        loss = AMPLoss(step_size=0.05).step(f, g(ids), LABELS, mix=mix, context=f.context(ids, mix), plan=plan)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for one, *others in zip(*results, strict=True):
        assert one.isfinite().all()
        assert one.abs().max() > 0
        for other in others:
            torch.testing.assert_close(one, other, **CLOSE)


def test_sentences_are_mixed_before_the_relu_and_dropout():
    model, ids, mix = small(dropout=0.5).train(), sentences(*LENGTHS), a_mix(torch.float32)
    g, f = model.split("sentence")
    assert (g(ids) < 0).any()
    torch.manual_seed(5)
    loss = AMPLoss(mode="mixup").step(f, g(ids), LABELS, mix=mix, context=f.context(ids, mix))
    torch.manual_seed(5)
    truth = reference.amp(
        lambda features: model.classifier(model.dropout(features.relu())), g(ids), LABELS, *mix, mode="mixup"
    )
    torch.testing.assert_close(loss, truth.loss)


@pytest.mark.parametrize("at", PLACES)
def test_the_parts_share_parameters_and_mode_with_the_model(at):
    model = small()
    names = list(model.state_dict())
    _, f = model.split(at)
    assert list(model.state_dict()) == names
    own = dict(model.named_parameters())
    assert all(value is own[name] for name, value in f.named_parameters())
    assert ("encoder.score.weight" in dict(f.named_parameters())) == (at != "sentence")
    for mode in (True, False):
        model.train(mode)
        assert all(module.training == mode for module in f.modules())
    f.train()
    assert model.dropout.training


# Bad and extreme input


def test_a_sentence_without_words_and_an_empty_batch_give_finite_results():
    model = small()
    ids = F.pad(sentences(4), (0, 0, 0, 1))
    assert model.encode(ids)[1].tolist() == [0.0] * 10
    with torch.autograd.set_detect_anomaly(True):
        model(ids).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 4)


def test_given_vectors_are_copied_and_may_be_frozen():
    vectors = torch.randn(30, 5, dtype=torch.float64)
    model = small(vectors=vectors, freeze=True)
    assert torch.equal(model.embedding.weight[1:], vectors[1:].float())
    assert model.embedding.weight[0].abs().max() == 0
    assert not model.embedding.weight.requires_grad
    assert model.encoder.forwards.input_size == model.embedding_dim == 5
    model(sentences(3, 4)).sum().backward()


def test_defaults_are_the_papers():
    model = AttentionBiLSTM(5, 2)
    assert model.embedding.weight.shape == (5, 300)
    assert (model.encoder.forwards.hidden_size, model.encoder.forwards.num_layers) == (512, 1)
    assert model.dropout.p == 0.5
    assert model.classifier.weight.shape == (2, 1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 7}, "hidden_size counts both directions and must be even, got 7"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"embedding_dim": -1}, "embedding_dim must be at least 1, got -1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"vectors": torch.zeros(29, 5)}, r"float tensor of shape \(30, D\), got .* \(29, 5\)"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_ids_and_places_are_refused():
    model = small()
    with pytest.raises(TypeError, match=r"ids must be int64, got torch.float32"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"got \(3, 0\)"):
        model(torch.zeros(3, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"at must be one of 'word', 'sentence', 'embedding'; got 'words'"):
        model.split("words")
