"""Mixed word embeddings and the gradient of the table, on both backends."""

import pytest
import torch
import torch.nn.functional as F
from conftest import HAS_GPU, INTERPRETED, TOLERANCE
from hypothesis import given
from hypothesis import strategies as st
from layers import draw, gradient, rows
from strategies import DRAWS, assert_case_holds

from fastamp import functional, reference
from fastamp.conformance import EmbeddingCase

EMBEDDINGS = {
    "shape": st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 11)),
    "vocabulary": st.sampled_from([1, 2, 5, 40]),
    "padding_idx": st.sampled_from([None, 0, -1]),
    "outside": st.booleans(),
}


def assert_embeddings_hold(shape, vocabulary, padding_idx, **drawn):
    assert_case_holds(EmbeddingCase("any", shape, vocabulary, padding_idx), **drawn)


@INTERPRETED
@given(**EMBEDDINGS, **DRAWS)
def test_embeddings_hold_the_contract(backend, **drawn):
    assert_embeddings_hold(**drawn)


@INTERPRETED
@given(**EMBEDDINGS, **DRAWS)
def test_embeddings_of_many_pieces_hold_the_contract(tiny_tiles, **drawn):
    assert_embeddings_hold(**drawn)


@pytest.mark.parametrize(
    "ids",
    [[0] * 24, [0] * 4 + [1] * 4 + [2] * 16, [1] * 5 + [3] * 11 + [4] * 8, [0, 1, 2, 3] * 6, [0] * 23 + [4]],
    ids=str,
)
def test_runs_that_begin_and_end_anywhere_in_a_chunk(poisoned_empty, tiny_tiles, ids):
    """Sums are of small integers: exact."""
    order = torch.randperm(24)
    ids = torch.tensor(ids)[order].view(4, 6)
    table = torch.zeros(5, 10, requires_grad=True)
    upstream = torch.randint(-8, 8, (4, 6, 10)).float()
    lam, partner = torch.tensor([0.5, 0.25, 0.0, 1.0]), torch.tensor([1, 2, 3, 0])
    ours = gradient(functional.embedding_mix(ids, table, lam, partner), table, upstream)
    mixed = reference.mix(F.embedding(ids, table), lam, partner)
    assert torch.equal(ours, gradient(mixed, table, upstream))


def test_the_padding_gets_no_gradient_and_is_mixed_all_the_same(backend):
    ids, table = torch.tensor([[0, 2, 0], [1, 0, 0]]), rows(3, 4).requires_grad_()
    lam, partner = torch.tensor([0.3, 0.6]), torch.tensor([1, 0])
    mixed = functional.embedding_mix(ids, table, lam, partner, padding_idx=-3)
    torch.testing.assert_close(mixed, functional.mix(F.embedding(ids, table), lam, partner))
    grad = gradient(mixed, table, torch.ones_like(mixed))
    assert (grad[0] == 0).all()
    assert (grad[1:] != 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (3, 0, 4, 2), (3, 2, 4, 0)])
def test_no_tokens_pass(backend, shape):
    batch, length, size, depth = shape
    table = torch.zeros(size, depth, requires_grad=True)
    mixed = functional.embedding_mix(torch.zeros(batch, length, dtype=torch.int64), table, *draw(batch))
    assert mixed.shape == (batch, length, depth)
    assert torch.autograd.grad(mixed.sum(), table)[0].abs().sum() == 0


@pytest.mark.skipif(HAS_GPU, reason="values are looked at on the CPU only")
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ids": torch.zeros(2, 3)}, TypeError, "ids must be int64"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, ValueError, r"ids must be \(B, T\), got shape \(2,\)"),
        ({"ids": torch.tensor([[0, 4], [0, 0]])}, ValueError, r"ids must lie in 0..3, .*from 0 to 4"),
        ({"ids": torch.tensor([[0, -1], [0, 0]])}, ValueError, r"ids must lie in 0..3, .*from -1 to 0"),
        ({"ids": [[0]]}, TypeError, "ids must be a tensor, got list"),
        ({"table": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "table must be float16"),
        ({"table": torch.zeros(4)}, ValueError, "table must have 2 dimensions"),
        ({"lam": torch.zeros(3)}, ValueError, r"lam must have shape \(2,\)"),
        ({"partner": torch.tensor([0, 0])}, ValueError, "partner must be a permutation"),
        ({"padding_idx": 4}, ValueError, r"padding_idx must lie in -4..3 .*got 4"),
        ({"padding_idx": True}, TypeError, "padding_idx must be an int or None, got True"),
    ],
    ids=str,
)
def test_wrong_arguments_of_embedding_mix_are_named(changed, error, message):
    given = {"ids": torch.zeros(2, 3, dtype=torch.int64), "table": torch.zeros(4, 2)}
    given |= {"lam": torch.rand(2), "partner": torch.tensor([1, 0]), **changed}
    with pytest.raises(error, match=message):
        functional.embedding_mix(**given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_frequent_word_is_summed_in_float32(backend, dtype):
    ids, table = torch.zeros(4, 128, dtype=torch.int64), torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    mixed = functional.embedding_mix(ids, table, *draw(4))
    grad = gradient(mixed, table, torch.full(mixed.shape, 0.125, dtype=dtype))
    torch.testing.assert_close(grad[0], torch.full((3,), 64.0, dtype=dtype), rtol=TOLERANCE[dtype], atol=0)
