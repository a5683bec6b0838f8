"""The operations of a step at any layer under torch.compile, and their registered operators."""

import pytest
import torch
from conftest import HAS_GPU
from layers import formatted

from fastamp import functional, mixing
from fastamp.mixing import Mixture
from fastamp.ops import embedding_mix, mix, remix, select_cross_entropy
from fastamp.policy import Policy

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager", **options)


def assert_same_compiled(function, *leaves):
    """Values and gradients of eager mode; in a training step, and without gradients."""
    upstream = None
    runs = []
    for run in (function, compiled(function)):
        first, *others = run(*leaves)
        upstream = torch.randn(first.shape, dtype=first.dtype) if upstream is None else upstream
        assert not any(other.requires_grad for other in others)
        runs.append((first.detach(), *others, *torch.autograd.grad(first, leaves, upstream)))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(function)(*leaves)[0], runs[0][0], **CLOSE)


def test_compiled_layers_give_the_numbers_of_eager_mode(backend):
    values, grad_mixed = torch.randn(4, 3, 2, requires_grad=True), torch.randn(4, 3, 2)
    lam, partner = torch.rand(4), torch.randperm(4)

    def step(values):
        grad = functional.lambda_grad(grad_mixed, values, partner)
        lam_adv, mixed = functional.remix(values, lam, partner, grad_mixed, step_size=0.3)
        return functional.mix(values * 2, lam, partner) + mixed, grad, lam_adv

    assert_same_compiled(step, values)


@pytest.mark.parametrize("form", ["channels_last", "cropped channels_last"])
def test_compiled_layers_keep_the_memory_format(backend, form):
    values, (lam, partner) = formatted(form).requires_grad_(), (torch.rand(3), torch.randperm(3))

    def step(values):
        mixed = functional.mix(values, lam, partner)
        return mixed, functional.remix(values, lam, partner, mixed.detach(), step_size=0.3)[1]

    found, expected = compiled(step)(values), step(values)
    torch.testing.assert_close(found, expected, **CLOSE)
    strides = (0.5 * values).stride()
    upstream = torch.randn(values.shape).as_strided(values.shape, strides)
    for mixed in found:
        assert mixed.stride() == strides
        assert torch.autograd.grad(mixed, values, upstream, retain_graph=True)[0].stride() == strides


def test_compiled_embeddings_give_the_numbers_of_eager_mode(backend):
    ids, table = torch.randint(5, (4, 6)), torch.randn(5, 3, requires_grad=True)
    lam, partner = torch.rand(4), torch.randperm(4)
    assert_same_compiled(lambda table: (functional.embedding_mix(ids, table, lam, partner, padding_idx=1),), table)


def test_a_compiled_selection_gives_the_numbers_of_eager_mode(backend):
    logits, change = torch.randn(5, 4, requires_grad=True), 0.3 * torch.randn(5, 4)
    target, lam, partner = torch.randint(4, (5,)), torch.rand(5), torch.randperm(5)
    options = {"loss": "softmax_bce", "weight": torch.arange(1.0, 5.0)}

    def step(logits):
        return functional.select_cross_entropy(logits, logits + change, target, lam, partner, **options)

    assert_same_compiled(step, logits)


def test_batches_of_any_size_pass_one_dynamic_graph(backend):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(values, ids, table, lam, partner):
        return functional.mix(values, lam, partner).sum() + functional.embedding_mix(ids, table, lam, partner).sum()

    fast = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for size in (4, 7, 3):
        arguments = torch.randn(size, 5), torch.randint(6, (size, 2)), torch.randn(6, 3)
        arguments = *arguments, torch.rand(size), torch.randperm(size)
        torch.testing.assert_close(fast(*arguments), step(*arguments), **CLOSE)
    assert len(graphs) <= 2  # the compiler may begin again once


OPERATORS = {
    "mix": mix.forward,
    "mix_backward": mix.backward,
    "lambda_grad": remix.forward_grad,
    "remix": remix.forward,
    "embedding_mix": embedding_mix.forward,
    "embedding_mix_backward": embedding_mix.backward,
    "select_cross_entropy": select_cross_entropy.forward,
    "draw_partner": mixing.draw_partner,
}


def operator_arguments(name, layout, dtype):
    def rows(*shape):
        values = torch.randn(shape).to(dtype)
        if layout == "channels_last" and shape == (4, 6):
            return torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last)
        if layout == "stride 0":
            return values[:, :1].expand(shape)
        return values if layout in ("contiguous", "channels_last") else torch.stack([values, values], -1)[..., 0]

    lam, partner = torch.rand(4), torch.tensor([1, 2, 3, 0])
    if name == "draw_partner":
        return torch.rand(2, 4), True
    if name in ("mix", "mix_backward"):
        return rows(4, 6), lam, partner
    if name == "lambda_grad":
        return rows(4, 6), rows(4, 6), partner
    if name == "remix":
        return rows(4, 6), rows(4, 6), lam, partner, torch.tensor(2.0), Policy(clamp=True), 0.1
    if name == "embedding_mix":
        return rows(5, 3), torch.randint(5, (4, 2)), lam, partner
    if name == "embedding_mix_backward":
        return rows(4, 2, 3), torch.randint(5, (4, 2)), lam, partner, 5, 1
    adv = rows(4, 3) if layout == "contiguous" else None
    mixture = Mixture(torch.randint(3, (4,)), lam, partner, torch.rand(3))
    return rows(4, 3), adv, mixture, Policy(), 0.0, 1e-6


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "stride 0"])
def test_every_operator_passes_opcheck(triton_backend, name, layout):
    dtype = torch.bfloat16 if layout == "strided" else torch.float32
    operator = OPERATORS[name]
    torch.library.opcheck(operator.registered, operator.unpacked(*operator_arguments(name, layout, dtype)))


@pytest.mark.parametrize("name", ["mix", "mix_backward", "lambda_grad", "remix"])
def test_an_operator_of_rows_passes_opcheck_in_another_memory_format(triton_backend, name):
    test_every_operator_passes_opcheck(triton_backend, name, "channels_last")


def test_every_operator_is_tested(triton_backend):
    names = [name.removeprefix("fastamp::") for name in torch._C._dispatch_get_all_op_names() if "fastamp::" in name]
    assert {*names} == {*OPERATORS, "amp_cross_entropy", "amp_cross_entropy_backward"}
