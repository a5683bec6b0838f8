"""The numerics contract: closed forms and Triton kernels against the reference in float64."""

import subprocess

import pytest
import torch
from conftest import DTYPES, INTERPRETED, assert_contract, by_definition, by_library, random_case
from hypothesis import given, settings
from strategies import LAYOUTS, cases, laid_out

import fastamp
from fastamp.functional import amp_cross_entropy
from fastamp.mixing import draw
from fastamp.policy import Policy

LOSSES = ("cross_entropy", "softmax_bce")
MODES = ("amp", "maxop", "mixup")


@given(case=cases(max_batch=40))
def test_closed_forms_are_no_worse_than_the_composition(case):
    with fastamp.set_backend("torch"):
        assert_contract(case)


@INTERPRETED
@given(case=cases())
def test_kernels_with_the_batch_in_one_program_are_no_worse_than_the_composition(triton_backend, case):
    assert_contract(case)


def test_the_fixtures_take_the_kernels_that_they_name(small_tiles, request):
    from fastamp.kernels.config import forward_config

    policy = Policy()
    assert not forward_config(4, 9, 4, policy).in_registers
    assert forward_config(4, 8, 4, policy).in_registers
    request.getfixturevalue("many_programs")
    assert forward_config(9, 5, 4, policy).block_b < 9


@settings(max_examples=14)
@given(case=cases(max_batch=6, min_classes=9, max_classes=27))
def test_looping_kernels_are_no_worse_than_the_composition(small_tiles, case):
    assert_contract(case)


@INTERPRETED
@given(case=cases(max_classes=20))
def test_kernels_over_several_programs_are_no_worse_than_the_composition(many_programs, case):
    assert_contract(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", MODES)
def test_every_dtype_loss_and_mode_holds_the_contract(backend, mode, loss, dtype):
    assert_contract(random_case(7, 6, dtype=dtype, mode=mode, loss=loss, step_size=0.3))


@pytest.mark.parametrize("classes", [1000, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_a_thousand_classes_holds_the_contract(backend, dtype, classes):
    assert_contract(random_case(5, classes, dtype=dtype))


def test_a_row_longer_than_registers_holds_the_contract(triton_backend):
    case = random_case(3, 8195)
    ours = assert_contract(case)
    assert ours.mask.all()


def test_a_batch_larger_than_one_program_holds_the_contract(backend):
    assert_contract(random_case(131, 3, step_size=0.3))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pairing", ["permutation", "matching"])
@pytest.mark.parametrize("batch", [1, 2, 5, 6])
def test_both_pairings_hold_the_contract(backend, batch, pairing, loss):
    lam, partner = draw(batch, pairing=pairing)
    assert_contract(random_case(batch, 5, loss=loss)._replace(lam=lam, partner=partner))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (1, 4), (4, 1), (3, 2)])
def test_one_row_and_one_class_are_ordinary(backend, batch, classes, loss):
    assert_contract(random_case(batch, classes, loss=loss))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_empty_batch_gives_what_cross_entropy_gives(backend, reduction):
    logits = torch.empty(0, 3, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int64)
    loss, stats = amp_cross_entropy(logits, empty, torch.empty(0), empty, reduction=reduction, return_stats=True)
    expected = torch.nn.functional.cross_entropy(logits, empty, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.sum().backward()
    assert logits.grad.shape == (0, 3)
    assert all(field.shape == (0,) for field in stats[:5])


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_labels_hold_the_contract(backend, loss):
    case = random_case(6, 4, loss=loss)
    assert_contract(case._replace(target=torch.full_like(case.target, 2)))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_paired_with_itself_has_its_own_loss_and_no_step(backend, loss):
    case = random_case(5, 4, loss=loss, step_size=0.3, reduction="none")
    case = case._replace(partner=torch.tensor([0, 2, 1, 3, 4]))
    ours = assert_contract(case)
    alone = [0, 3, 4]
    assert (ours.grad[alone] == 0).all()
    assert (ours.delta[alone] == 0).all()
    assert torch.equal(ours.lam_adv[alone], case.lam[alone])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["logits", "target", "soft target", "lam", "partner", "weight"])
def test_any_strides_give_the_values_of_the_contiguous_tensor(backend, argument, layout):
    case = random_case(6, 5, step_size=0.3, weight=0.5 + torch.rand(5))
    if argument == "soft target":
        case = case._replace(target=torch.rand(6, 5).softmax(1))
    field = argument.split()[-1]
    if field == "weight":
        strided = case._replace(options={**case.options, "weight": laid_out(case.options["weight"], layout)})
    else:
        strided = case._replace(**{field: laid_out(getattr(case, field), layout)})
    if layout == "expanded" and field in ("logits", "target"):
        case = case._replace(**{field: getattr(strided, field).contiguous()})
    for name, plain, other in zip(("loss", "gradient"), by_library(case), by_library(strided), strict=False):
        torch.testing.assert_close(other, plain, msg=name)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [5, 21])
def test_every_output_element_is_written(poisoned_empty, small_tiles, classes, reduction, loss):
    ours = by_library(random_case(6, classes, loss=loss, reduction=reduction))
    for name, value in ours._asdict().items():
        assert value.isfinite().all(), name


def test_every_output_element_is_written_over_several_programs(poisoned_empty, many_programs):
    ours = by_library(random_case(7, 5))
    for name, value in ours._asdict().items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("loss", LOSSES)
def test_float64_is_computed_in_float64_with_lambda_in_float64(backend, loss):
    case = random_case(6, 5, dtype=torch.float64, loss=loss)
    lam = torch.rand(6, dtype=torch.float64)
    ours, truth = by_library(case._replace(lam=lam)), by_definition(case._replace(lam=lam), torch.float64)
    assert ours.lam_adv.dtype == torch.float64
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad_logits, truth.grad_logits, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_logits_get_a_step_that_their_own_dtype_could_not_hold(backend, dtype):
    # The spacing of bfloat16 near 0.5 is twice the step.
    case = random_case(8, 5, dtype=dtype, step_size=1e-4)._replace(lam=torch.full((8,), 0.5))
    ours = assert_contract(case)
    moved = (ours.lam_adv - 0.5).abs()
    assert ((moved > 0) & (moved <= 1.01e-4))[case.partner != torch.arange(8)].all()


def test_delta_is_free_of_cancellation(backend):
    # The loss is about 2, its change about 1e-9: in float32 the difference of two losses has no digit of it.
    case = random_case(8, 6, step_size=1e-9, tie_tol=0.0, grad_clip=None)
    ours, truth = by_library(case), by_definition(case, torch.float64)
    other = case.partner != torch.arange(8)
    change = (truth.grad * truth.grad * 1e-9)[other]  # to first order; float64 has 7 digits of δ left
    step = ours.lam_adv - case.lam
    exact = (step.double() * truth.grad)[other]
    assert change.min() > 1e-12
    torch.testing.assert_close(ours.delta[other].double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("error", "is_translated"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), True),
        (RuntimeError("0 active drivers ([]). There should only be one."), True),
        (RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"), True),
        (subprocess.CalledProcessError(1, ["gcc"]), True),
        (AssertionError("libcuda.so cannot found!"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (KeyboardInterrupt(), False),
    ],
    ids=str,
)
def test_where_triton_cannot_work_the_error_names_the_other_backend(triton_backend, monkeypatch, error, is_translated):
    from fastamp.kernels.rows_grad import _amp_total_kernel

    def run(*given, **options):
        raise error

    case = random_case(6, 5)
    monkeypatch.setattr(type(_amp_total_kernel), "run", run)
    if is_translated:
        with pytest.raises(RuntimeError, match=r'fastamp\.set_backend\("torch"\)') as raised:
            by_library(case)
        assert raised.value.__cause__ is error
        assert str(error) in str(raised.value)
    else:
        with pytest.raises(type(error)) as raised:
            by_library(case)
        assert raised.value is error


def test_the_two_backends_agree_on_the_statistics(triton_backend):
    case = random_case(9, 7, step_size=0.3)
    ours = by_library(case)
    with fastamp.set_backend("torch"):
        other = by_library(case)
    torch.testing.assert_close(ours, other, rtol=2e-5, atol=1e-6)
