"""torch's default dtype and device decide nothing: λ is float32, a loss follows its logits, data are on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import random_case
from torch import Tensor, nn

from fastamp import AMPLoss, Mix, functional, reference
from fastamp.data import Vocabulary, embedding_table, load, read_vectors
from fastamp.data.splits import hold_out, leave_fold_out
from fastamp.mixing import draw
from fastamp.models import NonlinearMixup, TextCNN
from fastamp.step.randomness import RecordedMasks
from fastamp.training.batches import Batches, Examples

OPTIONS = [
    {},
    {"alpha": 0.3, "pairing": "matching", "step_size": 0.1, "clamp": True},
    {"mode": "mixup", "reduction": "none", "label_smoothing": 0.1},
    {"mode": "maxop", "grad_scale": "mean", "ignore_index": 2},
    {"loss": "binary_cross_entropy", "sum_classes": True},
    {"loss": "softmax_bce", "grad_clip": None, "reduction": "sum", "tie_tol": 0.0},
]
B, C, D = 7, 5, 4


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def leaves(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def with_grads(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss.sum(), inputs)]


def of_draws(inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    for alpha in (1.0, 0.3):
        for pairing in ("permutation", "matching"):
            for generator in (None, torch.Generator(inputs["lam"].device)):
                yield from draw(301, alpha=alpha, pairing=pairing, device=inputs["lam"].device, generator=generator)
    masks = RecordedMasks()
    with masks:
        yield F.dropout(inputs["head"].repeat(30, 1), 0.3)
    yield from masks.masks


def of_the_criterion(
    backend: str, dtype: torch.dtype, inputs: dict[str, Tensor], network: nn.Module
) -> Iterator[Tensor]:
    logits, hidden = leaves(inputs["logits"], inputs["hidden"], dtype=dtype)
    for target in (inputs["labels"], inputs["soft"]):
        for options in OPTIONS[: 5 if backend == "torch" else 2]:  # the interpreter takes its time
            criterion = AMPLoss(weight=inputs["weight"], **options)
            loss, stats = criterion(logits, target, return_stats=True)
            yield from (*with_grads(loss, [logits]), *stats[:5])
            yield from with_grads(criterion(logits, target, num_items=3), [logits])
            loss, stats = criterion.step(network, hidden, target, return_stats=True)
            yield from (*with_grads(loss, [hidden, *network.parameters()]), *stats[:5])
        yield AMPLoss(label_smoothing=0.1).eval()(logits, target).detach()


def of_the_functions(dtype: torch.dtype, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    mix = Mix(inputs["lam"], inputs["partner"])
    hidden, head, bias, logits = leaves(*(inputs[n] for n in ("hidden", "head", "bias", "logits")), dtype=dtype)
    table = inputs["table"].to(dtype)
    for target in (inputs["labels"], inputs["soft"]):
        yield from with_grads(functional.amp_cross_entropy(logits, target, *mix, pairing="matching"), [logits])
        for more in ({}, {"activation": "relu"}, {"chunk_rows": 3}, {"chunk_rows": 3, "reduction": "none"}):
            loss = functional.linear_amp_cross_entropy(hidden, head, bias, target, *mix, **more)
            yield from with_grads(loss, [hidden, head, bias])
        loss, delta, mask = functional.select_cross_entropy(logits, logits * 1.01, target, *mix)
        yield from (*with_grads(loss, [logits]), delta, mask)
        yield from functional.select_loss(loss.detach(), loss.detach() * 1.01)
        result = reference.amp(lambda m: m, logits, target, *mix, grad_scale="mean", num_items=3)
        yield from (*with_grads(result.loss, [logits]), *result[1:])
    yield from with_grads(functional.mix(hidden, *mix), [hidden])
    yield from (one.detach() for one in functional.remix(hidden, *mix, hidden.detach()))
    yield functional.lambda_grad(hidden.detach(), hidden, mix.partner)
    yield functional.embedding_mix(inputs["ids"], table, *mix)


def made() -> tuple[dict[str, Tensor], nn.Module]:
    case = random_case(B, C)
    _, matching = draw(B, pairing="matching")
    inputs = {"logits": case.logits, "labels": case.target, "lam": case.lam, "partner": matching}
    inputs |= {"soft": torch.rand(B, C).softmax(1), "weight": torch.rand(C), "hidden": torch.randn(B, D)}
    inputs |= {"head": torch.randn(C, D), "bias": torch.randn(C)}
    inputs |= {"ids": torch.randint(9, (B, 3)), "table": torch.randn(9, D)}
    return inputs, nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, C))


def of_everything(backend: str, dtype: torch.dtype, inputs: dict[str, Tensor], network: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    results = [*of_draws(inputs), *of_the_criterion(backend, dtype, inputs, network.to(dtype))]
    return [*results, *of_the_functions(dtype, inputs)]


def assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.device == other.device
        assert torch.equal(one, other) or one.isnan().all()


@pytest.mark.parametrize(
    ("backend", "dtype", "default"),
    [
        ("torch", torch.float32, torch.float16),
        ("torch", torch.bfloat16, torch.float64),
        ("torch", torch.float64, torch.bfloat16),
        ("triton", torch.float32, torch.float64),
    ],
    indirect=["backend"],
    ids=str,
)
def test_draws_losses_and_gradients_do_not_depend_on_the_default_dtype(backend, dtype, default):
    """In bfloat16 λ would have 256 values a binade; a loss is wider than its logits."""
    inputs, network = made()
    expected = of_everything(backend, dtype, inputs, network)
    assert expected[0].dtype == torch.float32
    torch.set_default_dtype(default)
    assert_same_bits(of_everything(backend, dtype, inputs, network), expected)
    assert AMPLoss()(inputs["logits"].to(dtype), inputs["labels"]).dtype == torch.promote_types(dtype, torch.float32)


def test_draws_losses_and_gradients_do_not_depend_on_the_default_device():
    inputs, network = made()
    expected = of_everything("torch", torch.float32, inputs, network)
    with torch.device("meta"):
        assert_same_bits(of_everything("torch", torch.float32, inputs, network), expected)


def test_data_are_read_and_shuffled_on_the_cpu_whatever_the_default_device(tmp_path):
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("what 1 2 3\nis 4 5 6\n")

    def run() -> tuple[list[Any], Tensor]:
        train = load("questions", fraction=0.1).train
        vocabulary = Vocabulary.build(train.sentences)
        examples = Examples.of(vocabulary.encode(train.sentences), train.labels, torch.device("cpu"))
        batches = Batches(examples.by_length(), 8, seed=2)
        batch = next(iter(batches))
        torch.manual_seed(0)
        table = embedding_table(vocabulary, read_vectors(vectors, vocabulary.words))
        return [hold_out(100, torch.Generator()), leave_fold_out(100, 3), train.labels], [*batch, table]

    expected = run()
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        found = run()
    assert found[0] == expected[0]
    assert_same_bits(found[1], expected[1])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_nonlinear_mixup_does_not_depend_on_the_default_dtype(default):
    model = NonlinearMixup(TextCNN(9, 64, embedding_dim=D), num_classes=3, length=6, width=D)
    ids, labels = torch.randint(1, 9, (B, 6)), torch.randint(3, (B,))

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        return with_grads(model.loss(ids, labels), list(model.parameters()))

    expected = run()
    torch.set_default_dtype(default)
    assert_same_bits(run(), expected)
