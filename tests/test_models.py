"""TextCNN and AttentionBiLSTM."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastamp import AMPLoss, Mix, reference
from fastamp.models import AttentionBiLSTM, TextCNN

# Sums of at most 1500 float32 products, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = (7, 2, 1, 9, 4, 4)
LABELS = torch.tensor([0, 1, 2, 3, 0, 2])
PLACES = ("word", "sentence", "embedding")

both = pytest.mark.parametrize("make", [TextCNN, AttentionBiLSTM], ids=["textcnn", "bilstm"])


def small(make=TextCNN, **options):
    torch.manual_seed(0)
    size = {"maps": 7} if make is TextCNN else {"hidden_size": 10}
    return make(30, 4, **{"embedding_dim": 12, **size, **options}).eval()


def sentences(*lengths: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 30, (n,), generator=generator) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def a_mix(dtype: torch.dtype = torch.float32) -> Mix:
    generator = torch.Generator().manual_seed(4)
    return Mix(torch.rand(6, generator=generator).to(dtype), torch.tensor([3, 0, 1, 2, 4, 5]))


def cnn_by_definition(model: TextCNN, row: torch.Tensor) -> torch.Tensor:
    """Features of one sentence (n,), a filter and a window at a time."""
    table = model.embedding.weight
    words = torch.stack([table[i] for i in row] + [torch.zeros_like(table[0])] * (max(model.widths) - 1))
    features = []
    for conv, width in zip(model.convolutions, model.widths, strict=True):
        for weight, bias in zip(conv.weight, conv.bias, strict=True):  # weight (D, width)
            windows = [(words[t : t + width].T * weight).sum() + bias for t in range(len(row))]
            features.append(torch.stack(windows).max().clamp(min=0))
    return torch.stack(features)


def lstm_by_definition(model: AttentionBiLSTM, row: torch.Tensor) -> torch.Tensor:
    """Features of one sentence (n,), its words in the order of each direction, attention as a loop over them."""
    words = model.embedding.weight[row]
    onward = model.encoder.forwards(words)[0]
    backward = model.encoder.backwards(words.flip(0))[0].flip(0)
    states = [torch.cat(pair) for pair in zip(onward, backward, strict=True)]
    scores = [(model.encoder.score.weight[0] * state.tanh()).sum().exp() for state in states]
    return sum(score * state for score, state in zip(scores, states, strict=True)) / sum(scores)


@both
def test_features_and_logits_are_those_of_the_definition(make):
    model, ids = small(make).double(), sentences(*LENGTHS)
    by_definition = cnn_by_definition if make is TextCNN else lstm_by_definition
    expected = torch.stack([by_definition(model, row[:n]) for row, n in zip(ids, LENGTHS, strict=True)])
    torch.testing.assert_close(model.encode(ids), expected)
    torch.testing.assert_close(model(ids), model.classifier(expected.clamp(min=0)))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (TextCNN, {"widths": (3, 4, 5)}),
        (TextCNN, {"widths": (1,)}),
        (TextCNN, {"widths": (2, 6)}),
        (AttentionBiLSTM, {}),
    ],
)
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), extra=st.integers(0, 8))
def test_logits_do_not_depend_on_padding_or_on_the_rest_of_the_batch(make, options, lengths, extra):
    model, ids = small(make, **options), sentences(*lengths)
    logits = model(ids)
    torch.testing.assert_close(model(F.pad(ids, (0, extra))), logits, **CLOSE)
    for row, length, expected in zip(ids, lengths, logits, strict=True):
        torch.testing.assert_close(model(row[None, :length])[0], expected, **CLOSE)


def test_the_cpu_path_and_the_convolution_agree_in_value_and_gradient():
    model, ids = small(), sentences(6, 1, 9, 3)
    upstream = torch.randn(4, 21, generator=torch.Generator().manual_seed(2))
    gradients = []
    for features in (model.encode(ids), model.pool(model.convolve(model.embed(ids)), ids != 0)):
        gradients.append((features, *torch.autograd.grad(features, list(model.parameters())[:-2], upstream)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_padding_gets_exactly_no_attention():
    model, ids = small(AttentionBiLSTM), sentences(*LENGTHS)
    mask = ids != 0
    # Scores far below zero for words leave nothing to padding either.
    model.encoder.score.weight.data.fill_(-100.0)
    states = model.encoder.states(model.embed(ids), mask).abs()
    weights = model.encoder.attention(states, mask)
    assert (weights[~mask] == 0).all()
    assert (weights[mask] >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(6))


# split


@both
def test_every_place_gives_the_models_own_logits(make):
    model, ids = small(make), sentences(*LENGTHS)
    for at in PLACES:
        g, f = model.split(at)
        # Behind its word vectors a TextCNN's own forward pass sums in another order on a CPU.
        bounds = CLOSE if (make, at) == (TextCNN, "embedding") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(f(g(ids), **f.context(ids)), model(ids), **bounds)


@both
@pytest.mark.parametrize("plan", ["auto", "merged", "both"])
@pytest.mark.parametrize("at", PLACES)
def test_a_step_is_the_definition_on_words_and_on_sentences(make, at, plan):
    """That of a TextCNN mixes behind the convolution, which is mixing the word vectors."""
    model, ids = small(make, dropout=0.0).double().train(), sentences(*LENGTHS)
    mix = a_mix(torch.float64)
    union = mix.union(ids != 0)
    options = {"step_size": 0.05, "tie_tol": 0.0}

    def rest(mixed):
        if at == "sentence":
            return model.classifier(mixed.relu())
        features = model.pool(model.convolve(mixed), union) if make is TextCNN else model.encoder(mixed, union).relu()
        return model.classifier(features)

    hidden = model.encode(ids) if at == "sentence" else model.embed(ids)
    truth = reference.amp(rest, hidden, LABELS, *mix, **options)
    g, f = model.split(at)
    loss, stats = AMPLoss(**options).step(
        f, g(ids), LABELS, mix=mix, context=f.context(ids, mix), plan=plan, return_stats=True
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = [loss, stats.grad, stats.lam_adv, stats.delta, *torch.autograd.grad(loss, parameters)]
    theirs = [truth.loss, truth.grad, truth.lam_adv, truth.delta, *torch.autograd.grad(truth.loss, parameters)]
    assert "embedding.weight" in names
    assert make is TextCNN or {"encoder.backwards.weight_hh_l0", "encoder.score.weight"} < set(names)
    assert (stats.lam_adv != stats.lam).sum() > 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@both
def test_sentences_are_mixed_before_dropout_and_an_lstms_relu(make):
    model, ids, mix = small(make, dropout=0.5).train(), sentences(*LENGTHS), a_mix()
    g, f = model.split("sentence")
    assert (g(ids) < 0).any() == (make is AttentionBiLSTM)
    torch.manual_seed(5)
    loss = AMPLoss(mode="mixup").step(f, g(ids), LABELS, mix=mix, context=f.context(ids, mix))
    torch.manual_seed(5)
    truth = reference.amp(
        lambda features: model.classifier(model.dropout(features.relu())), model.encode(ids), LABELS, *mix, mode="mixup"
    )
    torch.testing.assert_close(loss, truth.loss)


@both
@pytest.mark.parametrize("at", PLACES)
def test_the_parts_share_parameters_and_mode_with_the_model(make, at):
    model = small(make)
    names = list(model.state_dict())
    _, f = model.split(at)
    assert list(model.state_dict()) == names
    own = dict(model.named_parameters())
    assert all(value is own[name] for name, value in f.named_parameters())
    used = {name.partition(".")[0] for name, _ in f.named_parameters()} - {"classifier"}
    if make is TextCNN:
        assert used == ({"convolutions"} if at == "embedding" else set())
    else:
        assert used == ({"encoder"} if at != "sentence" else set())
    for mode in (True, False):
        model.train(mode)
        assert all(module.training == mode for module in f.modules())
    f.train()
    assert model.dropout.training


def test_a_part_compiles():
    model, ids, mix = small(dropout=0.0).train(), sentences(*LENGTHS), a_mix()
    g, f = model.split("word")
    given = {"mix": mix, "context": f.context(ids, mix)}
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    losses = [AMPLoss().step(one, g(ids), LABELS, **given) for one in (f, compiled)]
    torch.testing.assert_close(*losses)


# Bad and extreme input


@both
def test_a_sentence_without_words_and_an_empty_batch_give_finite_results(make):
    model = small(make)
    ids = F.pad(sentences(4), (0, 0, 0, 1))
    assert (model.encode(ids)[1] == 0).all()
    with torch.autograd.set_detect_anomaly(True):
        model(ids).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 4)


def test_the_padding_vector_stays_zero_in_training():
    model = small().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(sentences(2, 8, 5)), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    assert model.embedding.weight[0].abs().max() == 0
    assert model.embedding.weight[1:].isfinite().all()


@both
def test_given_vectors_are_copied_and_may_be_frozen(make):
    vectors = torch.randn(30, 5, dtype=torch.float64)
    kept = vectors.clone()
    model = small(make, vectors=vectors, freeze=True)
    assert torch.equal(vectors, kept)
    assert torch.equal(model.embedding.weight[1:], vectors[1:].float())
    assert model.embedding.weight[0].abs().max() == 0
    assert not model.embedding.weight.requires_grad
    assert model.embedding_dim == 5
    model(sentences(3, 4)).sum().backward()


def test_defaults_are_kims_and_the_papers():
    cnn, lstm = TextCNN(50, 2), AttentionBiLSTM(50, 2)
    assert cnn.embedding.weight.shape == lstm.embedding.weight.shape == (50, 300)
    table = cnn.embedding.weight[1:]  # uniform
    assert table.abs().max() <= 0.25
    assert abs(table.std() - 0.5 / 12**0.5) < 0.005
    assert [tuple(conv.weight.shape) for conv in cnn.convolutions] == [(100, 300, w) for w in (3, 4, 5)]
    assert (lstm.encoder.forwards.hidden_size, lstm.encoder.forwards.num_layers) == (512, 1)
    assert cnn.dropout.p == lstm.dropout.p == 0.5
    assert (cnn.classifier.weight.shape, lstm.classifier.weight.shape) == ((2, 300), (2, 1024))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (TextCNN, {"maps": 0}, "maps must be at least 1, got 0"),
        (TextCNN, {"widths": ()}, "widths must be positive"),
        (TextCNN, {"widths": (3, 0)}, "widths must be positive"),
        (TextCNN, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (TextCNN, {"vectors": torch.zeros(29, 5)}, r"float tensor of shape \(30, D\), got .* \(29, 5\)"),
        (TextCNN, {"vectors": torch.zeros(30, 5, dtype=torch.int64)}, "got torch.int64"),
        (AttentionBiLSTM, {"hidden_size": 7}, "hidden_size counts both directions and must be even, got 7"),
        (AttentionBiLSTM, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options_are_refused_by_name(make, options, message):
    with pytest.raises(ValueError, match=message):
        small(make, **options)


@both
def test_bad_ids_and_places_are_refused(make):
    model = small(make)
    with pytest.raises(TypeError, match=r"ids must be int64, got torch.float32"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shape \(B, T\) .* got \(3,\)"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(3, 0\)"):
        model(torch.zeros(3, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"at must be one of 'word', 'sentence', 'embedding'; got 'words'"):
        model.split("words")
