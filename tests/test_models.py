"""TextCNN."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastamp import AMPLoss, Mix, reference
from fastamp.models import TextCNN

# Sums of at most 1500 float32 products, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def small(**options) -> TextCNN:
    torch.manual_seed(0)
    options = {"embedding_dim": 12, "maps": 7, **options}
    return TextCNN(30, 4, **options).eval()


def sentences(*lengths: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 30, (n,), generator=generator) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def by_definition(model: TextCNN, row: list[int]) -> torch.Tensor:
    """Features of one sentence, a filter and a window at a time, in float64."""
    table = model.embedding.weight.double()
    words = torch.stack([table[i] for i in row] + [torch.zeros_like(table[0])] * (max(model.widths) - 1))
    features = []
    for conv, width in zip(model.convolutions, model.widths, strict=True):
        for weight, bias in zip(conv.weight.double(), conv.bias.double(), strict=True):  # weight (D, width)
            windows = [(words[t : t + width].T * weight).sum() + bias for t in range(len(row))]
            features.append(max(torch.stack(windows).max(), torch.zeros((), dtype=torch.float64)))
    return torch.stack(features)


def test_features_are_those_of_the_definition():
    model = small()
    rows = [[3, 7, 7, 1, 29, 4], [5], [8, 9]]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    expected = torch.stack([by_definition(model, row) for row in rows]).float()
    torch.testing.assert_close(model.encode(ids), expected, **CLOSE)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    extra=st.integers(0, 8),
    widths=st.sampled_from([(3, 4, 5), (1,), (2, 6)]),
)
def test_logits_do_not_depend_on_padding_or_on_the_rest_of_the_batch(lengths, extra, widths):
    model = small(widths=widths)
    ids = sentences(*lengths)
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


def test_convolve_is_affine_so_mixing_commutes_with_it():
    model = small()
    a, b = torch.randn(2, 3, 6, 12, generator=torch.Generator().manual_seed(3)).unbind(0)
    lam = torch.tensor([0.2, 0.5, 1.1])[:, None, None]
    mixed = lam * model.convolve(a) + (1 - lam) * model.convolve(b)
    torch.testing.assert_close(model.convolve(lam * a + (1 - lam) * b), mixed, **CLOSE)


# split

IDS_LENGTHS = (7, 2, 1, 9, 4, 4)
LABELS = torch.tensor([0, 1, 2, 3, 0, 2])


def mixed_batch(dtype: torch.dtype) -> Mix:
    generator = torch.Generator().manual_seed(4)
    return Mix(torch.rand(6, generator=generator).to(dtype), torch.tensor([3, 0, 1, 2, 4, 5]))


@pytest.mark.parametrize("plan", ["auto", "merged", "both"])
@pytest.mark.parametrize("at", ["word", "embedding"])
def test_mixing_behind_the_convolution_is_mixing_the_word_vectors(at, plan):
    model, ids = small(dropout=0.0).double().train(), sentences(*IDS_LENGTHS)
    mix = mixed_batch(torch.float64)
    union = mix.union(ids != 0)
    options = {"step_size": 0.05, "tie_tol": 0.0}

    def on_words(embedded):
        return model.classifier(model.pool(model.convolve(embedded), union))

    truth = reference.amp(on_words, model.embed(ids), LABELS, *mix, **options)
    g, f = model.split(at)
    loss, stats = AMPLoss(**options).step(
        f, g(ids), LABELS, mix=mix, context=f.context(ids, mix), plan=plan, return_stats=True
    )
    ours = [loss, stats.grad, stats.lam_adv, stats.delta]
    theirs = [truth.loss, truth.grad, truth.lam_adv, truth.delta]
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours += torch.autograd.grad(loss, parameters)
    theirs += torch.autograd.grad(truth.loss, parameters)
    assert "embedding.weight" in names
    assert (stats.lam_adv != stats.lam).sum() > 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_every_place_gives_the_models_own_logits():
    model, ids = small(), sentences(*IDS_LENGTHS)
    for at in ("word", "sentence", "embedding"):
        g, f = model.split(at)
        # Behind its word vectors the model's own forward pass sums in another order on a CPU.
        bounds = CLOSE if at == "embedding" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(f(g(ids), **f.context(ids)), model(ids), **bounds)


def test_sentences_are_mixed_before_dropout():
    model, ids, mix = small(dropout=0.5).train(), sentences(*IDS_LENGTHS), mixed_batch(torch.float32)
    g, f = model.split("sentence")
    torch.manual_seed(5)
    loss = AMPLoss(mode="mixup").step(f, g(ids), LABELS, mix=mix, context=f.context(ids, mix))
    torch.manual_seed(5)
    truth = reference.amp(
        lambda features: model.classifier(model.dropout(features)), model.encode(ids), LABELS, *mix, mode="mixup"
    )
    torch.testing.assert_close(loss, truth.loss)


def test_each_number_of_the_word_vectors_may_be_mixed_for_itself():
    model, ids, mix = small(), sentences(*IDS_LENGTHS), mixed_batch(torch.float32)
    g, f = model.split("embedding")
    words = g(ids)
    assert words.shape == (6, 9, 12)
    share = torch.rand(words.shape, generator=torch.Generator().manual_seed(6))
    mixed = share * words + (1 - share) * words[mix.partner]
    expected = model.classifier(model.pool(model.convolve(mixed), mix.union(ids != 0)))
    torch.testing.assert_close(f(mixed, **f.context(ids, mix)), expected)


@pytest.mark.parametrize("at", ["word", "sentence", "embedding"])
def test_the_parts_share_parameters_and_mode_with_the_model(at):
    model = small()
    names = list(model.state_dict())
    _, f = model.split(at)
    assert list(model.state_dict()) == names
    own = dict(model.named_parameters())
    assert all(value is own[name] for name, value in f.named_parameters())
    used = {name.partition(".")[0] for name, _ in f.named_parameters()}
    assert used == ({"convolutions", "classifier"} if at == "embedding" else {"classifier"})
    for mode in (True, False):
        model.train(mode)
        assert all(module.training == mode for module in f.modules())
    f.train()
    assert model.dropout.training


def test_a_part_compiles():
    model, ids, mix = small(dropout=0.0).train(), sentences(*IDS_LENGTHS), mixed_batch(torch.float32)
    g, f = model.split("word")
    given = {"mix": mix, "context": f.context(ids, mix)}
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    losses = [AMPLoss().step(one, g(ids), LABELS, **given) for one in (f, compiled)]
    torch.testing.assert_close(*losses)


def test_an_unknown_place_is_refused():
    with pytest.raises(ValueError, match=r"at must be one of 'word', 'sentence', 'embedding'; got 'words'"):
        small().split("words")


# Bad and extreme input


def test_a_row_of_padding_and_an_empty_batch_give_finite_results():
    model = small()
    assert model.encode(torch.zeros(2, 3, dtype=torch.int64)).tolist() == [[0.0] * 21] * 2
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


def test_given_vectors_are_copied_and_may_be_frozen():
    vectors = torch.randn(30, 5, dtype=torch.float64)
    kept = vectors.clone()
    model = small(vectors=vectors, freeze=True)
    assert torch.equal(vectors, kept)
    assert torch.equal(model.embedding.weight[1:], vectors[1:].float())
    assert model.embedding.weight[0].abs().max() == 0
    assert not model.embedding.weight.requires_grad
    model(sentences(3, 4)).sum().backward()


def test_random_vectors_are_uniform_on_a_quarter():
    table = small(embedding_dim=200).embedding.weight[1:]
    assert table.abs().max() <= 0.25
    assert abs(table.std() - 0.5 / 12**0.5) < 0.005


def test_defaults_are_kims():
    model = TextCNN(5, 2)
    assert model.embedding.weight.shape == (5, 300)
    assert [tuple(conv.weight.shape) for conv in model.convolutions] == [(100, 300, w) for w in (3, 4, 5)]
    assert model.dropout.p == 0.5
    assert model.classifier.weight.shape == (2, 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": 0}, "maps must be at least 1, got 0"),
        ({"embedding_dim": -1}, "embedding_dim must be at least 1, got -1"),
        ({"widths": ()}, "widths must be positive"),
        ({"widths": (3, 0)}, "widths must be positive"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"vectors": torch.zeros(29, 5)}, r"float tensor of shape \(30, D\), got .* \(29, 5\)"),
        ({"vectors": torch.zeros(30, 5, dtype=torch.int64)}, "got torch.int64"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_ids_are_refused():
    model = small()
    with pytest.raises(TypeError, match=r"ids must be int64, got torch.float32"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shape \(B, T\) .* got \(3,\)"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(3, 0\)"):
        model(torch.zeros(3, 0, dtype=torch.int64))
