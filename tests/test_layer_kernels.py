"""Mixing, ∇λ, and remixing, and what they share with mixed embeddings, on both backends."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, HAS_GPU
from hypothesis import given
from hypothesis import strategies as st
from layers import FORMATS, draw, formatted, gradient, rows
from strategies import DRAWS, assert_case_holds

import fastamp
from fastamp import Mix, functional
from fastamp.conformance import OperationCase
from fastamp.ops import mix, remix
from fastamp.policy import checked_policy

ROWS = {
    "op": st.sampled_from(["mix", "lambda_grad", "remix"]),
    "shape": st.lists(st.integers(1, 9), min_size=1, max_size=4),
    "clip": st.sampled_from([0.4, None]),
    "outside": st.booleans(),
}


def assert_rows_hold(op, shape, clip, outside, **drawn):
    options = {"step_size": 0.7, "grad_clip": clip, "clamp": not outside} if op == "remix" else {}
    assert_case_holds(OperationCase(op, "any", tuple(shape), options=options), outside=outside, **drawn)


@given(**ROWS, **DRAWS)
def test_rows_of_any_shape_and_layout_hold_the_contract(backend, **drawn):
    assert_rows_hold(**drawn)


@given(**ROWS, **DRAWS)
def test_rows_cut_into_many_parts_hold_the_contract(tiny_tiles, **drawn):
    assert_rows_hold(**drawn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_have_the_dtype_of_their_rows_and_lambda_that_of_arithmetic(backend, dtype):
    values, (lam, partner) = rows(3, 4, dtype=dtype).requires_grad_(), draw(3, dtype=dtype)
    grad = functional.lambda_grad(values, values, partner)
    lam_adv, again = functional.remix(values, lam, partner, values)
    mixed = functional.mix(values, lam, partner)
    embedded = functional.embedding_mix(torch.tensor([[0], [2], [1]]), values, lam, partner)
    assert mixed.dtype == again.dtype == embedded.dtype == dtype
    assert lam_adv.dtype == grad.dtype == lam.dtype
    assert not grad.requires_grad


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0,), (3, 2, 0)])
def test_rows_without_elements_pass(backend, shape):
    values = torch.zeros(shape, requires_grad=True)
    lam, partner = draw(shape[0])
    mixed = functional.mix(values, lam, partner)
    assert mixed.shape == shape
    assert torch.autograd.grad(mixed.sum(), values)[0].shape == shape
    assert functional.lambda_grad(values, values, partner).tolist() == [0.0] * shape[0]
    lam_adv, again = functional.remix(values, lam, partner, values)
    assert torch.equal(lam_adv, lam)
    assert again.shape == shape


def test_a_row_mixed_with_itself_stays_as_it_is(backend):
    values = rows(4, 7)
    assert torch.equal(functional.mix(values, torch.rand(4), torch.arange(4)), values)


def test_infinities_give_what_arithmetic_gives(backend):
    values = torch.tensor([[1.0, torch.inf], [2.0, 3.0]])
    mixed = functional.mix(values, torch.tensor([0.5, 0.5]), torch.tensor([1, 0]))
    assert mixed[:, 0].tolist() == [1.5, 1.5]
    assert not mixed[:, 1].isfinite().any()


@pytest.mark.parametrize("form", ["stride 0", "transposed", "sliced"])
def test_upstream_gradients_of_any_strides(backend, form):
    """A sum hands stride 0 down, cat and transpose others."""
    values = rows(3, 6, 4).requires_grad_()
    lam, partner = draw(3)
    upstream = {
        "stride 0": torch.tensor(0.7).expand(3, 6, 4),
        "transposed": torch.randn(4, 6, 10)[..., :3].transpose(0, 2),
        "sliced": torch.randn(3, 13, 4)[:, ::2][:, :6],
    }[form]
    for mixed in (
        functional.mix(values, lam, partner),
        functional.remix(values, lam, partner, upstream)[1],
    ):
        expected = gradient(mixed, values, upstream.contiguous())
        assert torch.equal(gradient(mixed, values, upstream), expected)


@pytest.mark.parametrize("form", FORMATS)
def test_the_memory_format_of_rows_is_kept(backend, form):
    """As by any elementwise operation of torch."""
    values = formatted(form).requires_grad_()
    upstream, grad_mixed = torch.randn(values.shape), torch.randn(values.shape)
    alike = upstream.clone().as_strided(values.shape, (0.5 * values).stride()).copy_(upstream)
    lam, partner = draw(3)
    plain = values.detach().contiguous().requires_grad_()
    for op in (
        lambda h: (functional.mix(h, lam, partner),),
        lambda h: functional.remix(h, lam, partner, grad_mixed, step_size=0.5)[::-1],
    ):
        (mixed, *step), (expected, *plain_step) = op(values), op(plain)
        assert mixed.stride() == (0.5 * values).stride()
        torch.testing.assert_close([mixed, *step], [expected, *plain_step])
        for given_upstream in (alike, upstream):  # of the format of the gradient from above
            grad = gradient(mixed, values, given_upstream)
            assert grad.stride() == given_upstream.stride()
            torch.testing.assert_close(grad, gradient(expected, plain, upstream))
        written = mixed.relu_()  # an autograd function must not return a view
        torch.testing.assert_close(gradient(written, values, alike), gradient(expected.relu(), plain, upstream))
    slopes = [functional.lambda_grad(grad_mixed, h, partner) for h in (values, plain)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("divisor", [3, torch.tensor(3.0), torch.tensor(0.0)], ids=["number", "tensor", "zero"])
@pytest.mark.parametrize("width", [5, 40])
def test_the_lambda_gradient_is_divided(tiny_tiles, divisor, width):
    values, grad_mixed = rows(4, width), rows(4, width)
    lam, partner = draw(4)
    policy = checked_policy(grad_scale="mean", clamp=True)
    grad, lam_adv, mixed = remix.dispatch(values, grad_mixed, Mix(lam, partner), policy, 0.5, divisor)
    expected = functional.lambda_grad(grad_mixed, values, partner) / 3 if divisor != 0 else torch.zeros(4)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(lam_adv, (lam + 0.5 * grad.clamp(-1, 1)).clamp(0, 1))
    torch.testing.assert_close(mixed, functional.mix(values, lam_adv, partner))


def test_two_runs_give_the_same_bits(tiny_tiles):
    values, grad_mixed, upstream = (rows(5, 37) for _ in range(3))
    lam, partner = draw(5)
    ids, table = torch.randint(3, (5, 4)), rows(3, 9).requires_grad_()
    runs = []
    for _ in range(2):
        leaf = values.clone().requires_grad_()
        lam_adv, mixed = functional.remix(leaf, lam, partner, grad_mixed)
        embedded = functional.embedding_mix(ids, table, lam, partner)
        grad = gradient(embedded, table, torch.ones(()).expand(embedded.shape))
        runs.append((lam_adv, mixed, gradient(mixed, leaf, upstream), embedded, grad))
    assert all(map(torch.equal, *runs))


def test_backward_twice_gives_the_same_and_keeps_what_it_gave(backend):
    values, table = rows(4, 6).requires_grad_(), rows(5, 3).requires_grad_()
    lam, partner = draw(4)
    for leaf, output in (
        (values, functional.mix(values, lam, partner)),
        (values, functional.remix(values, lam, partner, rows(4, 6))[1]),
        (table, functional.embedding_mix(torch.randint(5, (4, 6)), table, lam, partner)),
    ):
        upstream = torch.randn(output.shape)
        first = gradient(output, leaf, upstream)
        copy = first.clone()
        gradient(output, leaf, 2 * upstream)
        assert torch.equal(first, copy)
        assert torch.equal(gradient(output, leaf, upstream), copy)


def test_linear_operations_can_be_differentiated_twice(backend):
    """Right, since what is linear has a gradient that is linear in the upstream gradient."""
    lam, partner = draw(3, dtype=torch.float64)
    ids = torch.tensor([[0, 2], [2, 2], [1, 0]])
    values, table = rows(3, 2, dtype=torch.float64), rows(3, 1, dtype=torch.float64)

    def embedded(table, padding_idx=None):
        return functional.embedding_mix(ids, table, lam, partner, padding_idx=padding_idx)

    def composed(table):
        return functional.mix(F.embedding(ids, table, 2), lam, partner)

    def again(values):
        return functional.remix(values, lam, partner, torch.ones(3, 2, dtype=torch.float64))[1]

    def mixed(values):
        return functional.mix(values, lam, partner)

    for op, leaf in ((mixed, values), (embedded, table)):
        assert torch.autograd.gradcheck(op, leaf.requires_grad_(), check_batched_grad=False)
        assert torch.autograd.gradgradcheck(lambda x, op=op: op(x).square(), leaf, check_batched_grad=False)
    # λ' is a constant, which numerical differentiation does not know.
    (grad,) = torch.autograd.grad(again(values).square().sum(), values, create_graph=True)
    assert gradient(grad, values, torch.ones_like(grad)).isfinite().all()
    # Nor does it know of a row of the table whose gradient is left out.
    seconds = []
    for embeddings_mixed in (embedded(table, 2), composed(table)):
        (grad,) = torch.autograd.grad(embeddings_mixed.square().sum(), table, create_graph=True)
        seconds.append(gradient(grad, table, torch.ones_like(grad)))
    torch.testing.assert_close(*seconds)


def test_lambda_is_a_constant(backend):
    lam, partner = draw(4)
    mixed = functional.mix(rows(4, 3).requires_grad_(), lam.requires_grad_(), partner)
    mixed.sum().backward()
    assert lam.grad is None


def test_torch_func_passes_through_mixing(backend):
    values, upstream = rows(4, 3), torch.randn(4, 3)
    lam, partner = draw(4)
    ids = torch.randint(5, (4, 6))
    for op, leaf in (
        (lambda h: (functional.mix(h, lam, partner) * upstream).sum(), values),
        (lambda e: functional.embedding_mix(ids, e, lam, partner, padding_idx=1).square().sum(), rows(5, 2)),
    ):
        ours = torch.func.grad(op)(leaf)
        leaf = leaf.requires_grad_()
        torch.testing.assert_close(ours, torch.autograd.grad(op(leaf), leaf)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    """Arithmetic is float32, or float64, whatever runs around it."""
    values, table, logits = (rows(4, 5, dtype=dtype).requires_grad_() for _ in range(3))
    ids, target = torch.randint(4, (4, 6)), torch.randint(5, (4,))
    lam, partner = draw(4, dtype=dtype)

    def run():
        outputs = [functional.mix(values, lam, partner), *functional.remix(values, lam, partner, logits)]
        outputs.append(functional.embedding_mix(ids, table, lam, partner))
        outputs.append(functional.select_cross_entropy(logits, 2 * logits, target, lam, partner)[0])
        total = sum(output.double().square().sum() for output in outputs)
        return *outputs, *torch.autograd.grad(total, (values, table, logits))

    expected = run()
    with torch.autocast(values.device.type, torch.bfloat16):
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)


@pytest.mark.large
@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31(backend):
    if backend == "torch" or not HAS_GPU:
        pytest.skip("takes a GPU")
    values = torch.zeros(3, 2**30 + 8, dtype=torch.bfloat16)
    values[2, -8:], values[1, :8] = 1.0, 3.0
    lam, partner = torch.tensor([0.5, 0.25, 0.5]), torch.tensor([1, 2, 0])
    mixed = functional.mix(values, lam, partner)
    assert (mixed[1, -8:] == 0.75).all()
    assert (mixed[2, -8:] == 0.5).all()
    assert (mixed[0, :8] == 1.5).all()
    assert functional.lambda_grad(mixed, values, partner).tolist() == [8 * 1.5 * -3, 8 * (0.75 * 3 - 0.75), 4.0]


def test_the_backend_that_is_set_takes_the_call(monkeypatch):
    pytest.importorskip("triton", reason="the package triton is not installed")
    taken = []
    monkeypatch.setattr(mix, "forward", lambda *arguments: taken.append(arguments) or arguments[0])
    values, draws = torch.zeros(2, 3, device="cuda" if HAS_GPU else "cpu"), draw(2)
    with fastamp.set_backend("torch"):
        functional.mix(values.cpu(), *draws)
    assert not taken
    with fastamp.set_backend("triton"):
        functional.mix(values, *(x.to(values.device) for x in draws))
    assert taken
