"""Mixed word embeddings from the table: reads a row of it for every token, writes m; back to a dense gradient."""

import pytest
import torch
import torch.nn.functional as F
from support import DIRECTIONS, checked, shapes_of

from fastamp import functional
from fastamp.benchmarking import plain_mix
from fastamp.conformance import EmbeddingCase

# B, T, V, D
SHAPES = ((50, 20, 9_000, 300), (24, 40, 30_522, 768), (256, 128, 30_522, 768))


@pytest.mark.parametrize("whose", ["fastamp", "PyTorch"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", shapes_of(SHAPES))
def test_embedding_mix(measure, benchmark, device, shape, dtype, whose, direction):
    batch, length, vocabulary, depth = shape
    x = checked(EmbeddingCase("benchmark", shape=(batch, length, depth), vocabulary=vocabulary), dtype, device)
    table = x["table"].requires_grad_()
    lam = x["lam"] if whose == "fastamp" else x["lam"].to(table.dtype)
    benchmark.group = f"embedding_mix {shape} {dtype} {direction}"

    def forward(_=None):
        if whose == "fastamp":
            return functional.embedding_mix(x["ids"], table, lam, x["partner"])
        return plain_mix(F.embedding(x["ids"], table), lam, x["partner"])

    def backward(mixed):
        return torch.autograd.grad(mixed, table, x["upstream"])

    size, ids = table.element_size(), 8 * batch * length
    there = 2 * batch * length * depth * size + ids  # a row of the table for every token, and m
    back = (batch * length * depth + vocabulary * depth) * size + ids  # the gradient of m, and of the table
    if direction == "forward":
        measure(forward, moved=there)
    elif direction == "backward":
        measure(backward, prepare=forward, moved=back)
    else:
        measure(lambda _: backward(forward()), moved=there + back)
