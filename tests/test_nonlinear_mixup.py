"""Non-linear Mixup."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastamp.data import Vocabulary, load
from fastamp.models import AttentionBiLSTM, NonlinearMixup, TextCNN, TransformerClassifier

LENGTHS = (7, 2, 1, 9, 4, 4)
LABELS = torch.tensor([0, 1, 2, 3, 0, 2])


def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 30, (n,), generator=generator) for n in LENGTHS]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def backbone(name: str, outputs: int) -> torch.nn.Module:
    if name == "textcnn":
        return TextCNN(30, outputs, embedding_dim=12, maps=7, dropout=0.0)
    if name == "bilstm":
        return AttentionBiLSTM(30, outputs, embedding_dim=12, hidden_size=10, dropout=0.0)
    hf_models = pytest.importorskip("hf_models")
    return TransformerClassifier(hf_models.build("bert", num_labels=outputs))


def small(name: str = "textcnn", *, seed: int = 3, **options) -> NonlinearMixup:
    torch.manual_seed(0)
    model = backbone(name, NonlinearMixup.outputs(4))
    generator = torch.Generator().manual_seed(seed)
    given = {"num_classes": 4, "length": 11, "width": model.embedding_dim, "generator": generator, **options}
    return NonlinearMixup(model, **given).train()


def by_definition(model: NonlinearMixup, batch: torch.Tensor, seed: int) -> torch.Tensor:
    """The loss row by row and number by number, α = 1, on its own draws."""
    generator = torch.Generator().manual_seed(seed)
    g, f = model.model.split("embedding")
    words = g(batch)
    share = torch.rand(words.numel(), generator=generator).view(words.shape).double()
    partner = torch.randperm(len(batch), generator=generator).tolist()
    total = 0.0
    for r, q in enumerate(partner):
        mixed = share[r] * words[r] + (1 - share[r]) * words[q]
        length = max(LENGTHS[r], LENGTHS[q])
        assert (mixed[length:] == 0).all() or isinstance(model.model, TransformerClassifier)
        name = "attention_mask" if isinstance(model.model, TransformerClassifier) else "mask"
        mask = (torch.arange(batch.shape[1]) < length)[None]
        output = f(mixed[None], **{name: mask})[0]
        vector = torch.zeros(model.length * model.width, dtype=torch.float64)
        vector[: mixed.numel()] = mixed.flatten()
        theta = 1 / (1 + (-(model.policy.weight @ vector) - model.policy.bias).exp())
        target = theta * model.labels.weight[LABELS[r]] + (1 - theta) * model.labels.weight[LABELS[q]]
        total = total + 1 - (output @ target) / (output.norm() * target.norm())
    return total / len(batch)


@pytest.mark.parametrize("name", ["textcnn", "bilstm", "bert"])
def test_the_loss_and_its_gradient_are_those_of_the_definition(name):
    model = small(name, seed=3).double()
    loss = model.loss(ids(), LABELS)
    truth = by_definition(model, ids(), seed=3)
    torch.testing.assert_close(loss, truth)
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert {"labels.weight", "policy.weight", "policy.bias"} < set(names)
    for key, ours, theirs in zip(
        names, torch.autograd.grad(loss, parameters), torch.autograd.grad(truth, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")
        # Attention keys' biases cancel in the softmax.
        assert ours.abs().max() > 0 or key.endswith("key.bias"), key


@pytest.mark.parametrize("alpha", [0.05, 1.0, 4.0])
def test_every_number_of_every_row_is_mixed_by_its_own_draw_of_beta(alpha):
    model = small(alpha=alpha)
    model.model.embedding.weight.data[:] = torch.arange(30)[:, None].expand(-1, 12)
    words = torch.tensor([[10] * 11] * 2 + [[20] * 11] * 2).repeat(30, 1)
    seen = []
    model.parts = model.parts._replace(f=_Spy(model.parts.f, seen))
    model.loss(words, torch.zeros(120, dtype=torch.int64))
    (mixed,) = seen
    assert mixed.shape == (120, 11, 12)
    assert mixed.min() >= 10
    assert mixed.max() <= 20
    # Rows whose partner is of the other kind tell the share of their own words.
    row = torch.where(words[:, 0] == 10, 20 - mixed.flatten(1).T, mixed.flatten(1).T - 10).T / 10
    share = row[(row.amax(1) > row.amin(1))].double()
    count = share.numel()
    assert count > 4000
    assert abs(share.mean() - 0.5) < 5 * math.sqrt(1 / (4 * (2 * alpha + 1)) / count)
    assert abs(share.var() - 1 / (4 * (2 * alpha + 1))) < 0.02
    if alpha == 1.0:
        assert len(share.unique()) > 0.99 * count


class _Spy(torch.nn.Module):
    """f, noting what it is given."""

    def __init__(self, f: torch.nn.Module, seen: list[torch.Tensor]) -> None:
        super().__init__()
        self.f, self.seen, self.context = f, seen, f.context

    def forward(self, mixed, **context):
        self.seen.append(mixed.detach())
        return self.f(mixed, **context)


def test_draws_come_from_the_generator_alone():
    losses = []
    for seed in (3, 3, 4):
        model = small(seed=seed)
        before = torch.get_rng_state()
        losses.append([model.loss(ids(), LABELS).item() for _ in range(2)])
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]
    assert losses[0][0] != losses[0][1]
    default = small(generator=None)
    torch.manual_seed(8)
    first = default.loss(ids(), LABELS)
    torch.manual_seed(8)
    assert torch.equal(default.loss(ids(), LABELS), first)


@pytest.mark.parametrize("name", ["textcnn", "bert"])
def test_scores_are_cosines_of_the_unmixed_input(name):
    model = small(name).double().eval()
    output = model.model(ids())
    scores = model(ids())
    for r, c in ((0, 0), (3, 2), (5, 3)):
        expected = F.cosine_similarity(output[r], model.labels.weight[c], dim=0)
        torch.testing.assert_close(scores[r, c], expected)
    assert scores.shape == (6, 4)
    assert scores.abs().max() <= 1
    assert torch.equal(model(ids()), scores)


def test_the_state_is_complete_and_a_copy_is_independent():
    model = small()
    assert {name.partition(".")[0] for name in model.state_dict()} == {"model", "labels", "policy"}
    assert sum(name.startswith("model.") for name in model.state_dict()) == len(model.model.state_dict())
    other = small(seed=3)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.loss(ids(), LABELS), model.loss(ids(), LABELS))
    twin = copy.deepcopy(other)
    own = {id(parameter) for parameter in twin.parameters()}
    assert own.issuperset(map(id, twin.parts.f.parameters()))
    assert own.isdisjoint(map(id, other.parameters()))


def test_it_learns_questions_and_keeps_label_embeddings_apart():
    corpus = load("questions")
    vocabulary = Vocabulary.build(corpus.train.sentences)
    words, labels = vocabulary.encode(corpus.train.sentences), torch.tensor(corpus.train.labels)
    classes = corpus.num_classes
    torch.manual_seed(0)
    backbone = TextCNN(len(vocabulary), NonlinearMixup.outputs(classes), embedding_dim=24, maps=24)
    generator = torch.Generator().manual_seed(0)
    model = NonlinearMixup(backbone, num_classes=classes, length=words.shape[1], width=24, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(100):
        rows = torch.randint(len(words), (50,), generator=generator)
        optimizer.zero_grad()
        model.loss(words[rows], labels[rows]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        dev = vocabulary.encode(corpus.dev.sentences)
        wrong = model(dev).argmax(1) != torch.tensor(corpus.dev.labels)
    assert wrong.float().mean() < 0.4  # the most frequent class alone leaves about 0.76
    directions = F.normalize(model.labels.weight.detach())
    assert (directions @ directions.T).triu(1).max() < 0.7


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_another_draw_in_a_checkpoints_recomputation_is_refused(use_reentrant):
    model, scale = small(), torch.ones((), requires_grad=True)
    loss = checkpoint(lambda scale: scale * model.loss(ids(), LABELS), scale, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="draw another λ: its generator"):
        loss.backward()


# Bad input


def test_bad_options_batches_and_models_are_refused_by_name():
    for options, labels, error, message in (
        ({"length": 0}, LABELS, ValueError, "length must be at least 1, got 0"),
        ({"alpha": 0.0}, LABELS, ValueError, "alpha must be positive, got 0.0"),
        ({"alpha": math.nan}, LABELS, ValueError, "alpha must be positive, got nan"),
        ({"length": 8}, LABELS, ValueError, "ids must be at most 8 long, the length that was given, got 9"),
        ({"width": 5}, LABELS, ValueError, "width is 5, but the model's word vectors have 12"),
        ({"num_classes": 70}, LABELS, ValueError, "model must have 70 outputs, got 64"),
        ({}, LABELS.float(), TypeError, r"labels must be int64, got torch.float32"),
        ({}, LABELS[:5], ValueError, r"labels must have shape \(6,\), one or more, got \(5,\)"),
    ):
        with pytest.raises(error, match=message):
            small(**options).loss(ids(), labels)
    with pytest.raises(ValueError, match=r"shape \(0,\), one or more, got \(0,\)"):
        small().loss(ids()[:0], LABELS[:0])
