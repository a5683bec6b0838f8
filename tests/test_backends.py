"""The numerics contract: closed forms and Triton kernels against the reference in float64."""

import subprocess

import pytest
import torch
from conftest import DTYPES, INTERPRETED, assert_contract, by_definition, by_library, random_case
from hypothesis import given
from strategies import LAYOUTS, cases, laid_out

import fastamp
from fastamp.functional import amp_cross_entropy
from fastamp.policy import Policy

LOSSES = ("cross_entropy", "binary_cross_entropy", "softmax_bce")


@given(case=cases(max_batch=40))
def test_closed_forms_are_no_worse_than_the_composition(case):
    with fastamp.set_backend("torch"):
        assert_contract(case)


@INTERPRETED
@given(case=cases())
def test_kernels_with_the_batch_in_one_program_are_no_worse_than_the_composition(triton_backend, poisoned_empty, case):
    assert_contract(case)


@pytest.mark.parametrize(
    ("tiles", "classes", "rows", "in_registers"),
    [("small_tiles", 9, 1, False), ("small_tiles", 8, 1, True), ("many_programs", 5, 2, True)],
)
def test_the_fixtures_take_the_kernels_that_they_name(request, tiles, classes, rows, in_registers):
    from fastamp.kernels.config import forward_config

    request.getfixturevalue(tiles)
    launch = forward_config(9, classes, 4, Policy(), dense_target=False)
    assert (launch.block_b, launch.in_registers) == (rows, in_registers)


@INTERPRETED
@given(case=cases(max_batch=4, min_classes=9, max_classes=21))
def test_looping_kernels_are_no_worse_than_the_composition(small_tiles, poisoned_empty, case):
    assert_contract(case)


@INTERPRETED
@given(case=cases(max_batch=6, max_classes=12))
def test_kernels_over_several_programs_are_no_worse_than_the_composition(many_programs, poisoned_empty, case):
    assert_contract(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "loss"), [*(("amp", loss) for loss in LOSSES), ("maxop", LOSSES[0])])
def test_every_dtype_loss_and_mode_holds_the_contract(backend, mode, loss, dtype):
    assert_contract(random_case(7, 6, dtype=dtype, mode=mode, loss=loss, step_size=0.3))


@pytest.mark.parametrize(("dtype", "classes"), [(torch.float32, 1000), (torch.bfloat16, 1025)], ids=str)
def test_a_row_of_a_thousand_classes_holds_the_contract(backend, dtype, classes):
    assert_contract(random_case(3, classes, dtype=dtype))


def test_a_batch_larger_than_one_program_holds_the_contract(triton_backend):
    assert_contract(random_case(131, 3, step_size=0.3))


@pytest.mark.parametrize("loss", LOSSES)
def test_one_row_one_class_and_equal_labels_are_ordinary(backend, loss):
    for batch, classes in ((1, 1), (1, 4), (4, 1)):
        assert_contract(random_case(batch, classes, loss=loss))
    assert_contract(random_case(6, 4, loss=loss)._replace(target=torch.full((6,), 2)))


def test_an_empty_batch_gives_what_cross_entropy_gives(backend):
    empty = torch.empty(0, dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        logits = torch.empty(0, 3, requires_grad=True)
        loss, stats = amp_cross_entropy(logits, empty, torch.empty(0), empty, reduction=reduction, return_stats=True)
        expected = torch.nn.functional.cross_entropy(logits, empty, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert torch.autograd.grad(loss.sum(), logits)[0].shape == (0, 3)
        assert all(field.shape == (0,) for field in stats[:5])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_paired_with_itself_has_its_own_loss_and_no_step(backend, loss):
    case = random_case(5, 4, loss=loss, step_size=0.3, reduction="none")
    case = case._replace(partner=torch.tensor([0, 2, 1, 3, 4]))
    ours = assert_contract(case)
    alone = [0, 3, 4]
    assert (ours.grad[alone] == 0).all()
    assert (ours.delta[alone] == 0).all()
    assert torch.equal(ours.lam_adv[alone], case.lam[alone])


@pytest.mark.parametrize(("layout", "soft"), [(layout, i % 2 == 1) for i, layout in enumerate(LAYOUTS)])
def test_any_strides_give_the_values_of_the_contiguous_tensor(backend, layout, soft):
    case = random_case(6, 5, step_size=0.3, weight=0.5 + torch.rand(5))
    if soft:
        case = case._replace(target=torch.rand(6, 5).softmax(1))
    strided = case._replace(**{name: laid_out(getattr(case, name), layout) for name in case._fields[:4]})
    strided = strided._replace(options={**case.options, "weight": laid_out(case.options["weight"], layout)})
    plain = case._replace(logits=strided.logits.contiguous(), target=strided.target.contiguous())
    torch.testing.assert_close(by_library(strided), by_library(plain))


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
    exact = ((ours.lam_adv - case.lam).double() * truth.grad)[other]  # to first order
    assert (truth.grad**2 * 1e-9)[other].min() > 1e-12
    torch.testing.assert_close(ours.delta[other].double(), exact, rtol=1e-4, atol=0)


TRANSLATED = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    RuntimeError("0 active drivers ([]). There should only be one."),
    RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"),
    subprocess.CalledProcessError(1, ["gcc"]),
    AssertionError("libcuda.so cannot found!"),
]
PASSED_ON = [
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    torch.OutOfMemoryError("CUDA out of memory."),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", TRANSLATED + PASSED_ON, ids=str)
def test_where_triton_cannot_work_the_error_names_the_other_backend(triton_backend, monkeypatch, error):
    from fastamp.kernels.rows_grad import _amp_total_kernel

    def run(*given, **options):
        raise error

    case = random_case(6, 5)
    monkeypatch.setattr(type(_amp_total_kernel), "run", run)
    if error in PASSED_ON:
        with pytest.raises(type(error)) as raised:
            by_library(case)
        assert raised.value is error
        return
    with pytest.raises(RuntimeError, match=r'fastamp\.set_backend\("torch"\)') as raised:
        by_library(case)
    assert raised.value.__cause__ is error
    assert str(error) in str(raised.value)
