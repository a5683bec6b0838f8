"""Bad input: what is raised, and that the message names the argument, what was given and what is taken."""

import sys
import types

import pytest
import torch

import fastamp
from fastamp import AMPLoss, Mix
from fastamp import functional as F


def args(**changed):
    """Arguments of amp_cross_entropy for 4 rows of 3 classes."""
    mix = {"lam": torch.full((4,), 0.5), "partner": torch.tensor([1, 0, 3, 2])}
    return {"logits": torch.zeros(4, 3), "target": torch.tensor([0, 1, 2, 0]), **mix, **changed}


def head(**changed):
    """Arguments of linear_amp_cross_entropy for 4 rows of 5 features and 3 classes."""
    given = {"hidden": torch.zeros(4, 5), "linear_weight": torch.zeros(3, 5), "linear_bias": torch.zeros(3), **args()}
    del given["logits"]
    return {**given, **changed}


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


FLOATS = "float16, bfloat16, float32 or float64"
ROWS = [
    ({"logits": [[0.0, 1.0]]}, TypeError, "logits must be a tensor, got list"),
    ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, rf"logits must be {FLOATS}, got torch\.int64; embed"),
    ({"logits": torch.zeros(4, 3, dtype=torch.complex64)}, TypeError, r"logits must be .* got torch\.complex64"),
    ({"logits": torch.zeros(4)}, ValueError, r"logits must have 2 dimensions, got shape \(4,\)"),
    (
        {"logits": torch.zeros(4, 3, 1)},
        ValueError,
        r"logits must have 2 dimensions, got shape \(4, 3, 1\); AMP mixes rows: make every position one, by "
        r"logits\.flatten\(0, -2\), or where classes are dimension 1 logits\.movedim\(1, -1\)\.flatten\(0, -2\), and "
        r"target\.flatten\(\)",
    ),
    ({"logits": types.SimpleNamespace(logits=0)}, TypeError, r"logits must be a tensor, got .*; take its \.logits"),
    ({"logits": torch.zeros(4, 0)}, ValueError, r"logits must have at least one class, got shape \(4, 0\)"),
    ({"target": [0, 1, 2, 0]}, TypeError, "target must be a tensor, got list"),
    ({"target": torch.tensor([0, 1, 2])}, ValueError, r"target of class indices must have shape \(4,\).*got \(3,\)"),
    ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, r"target must be int64 or uint8 .*target\.long\(\)"),
    ({"target": torch.zeros(4, dtype=torch.bool)}, TypeError, r"target must be int64 .*got torch\.bool; pass"),
    ({"target": torch.zeros(4, 2)}, ValueError, r"target of probabilities must .*\(4, 3\), got \(4, 2\)"),
    ({"target": torch.tensor([0, 3, 2, 0])}, ValueError, r"must lie in 0\.\.2 .*ignore_index \(-100\), got 3 in row 1"),
    ({"target": torch.tensor([0, 1, -1, 0])}, ValueError, r"target must lie in 0\.\.2 .*got -1 in row 2"),
    ({"target": meta(4, dtype=torch.int64)}, ValueError, "target is on meta, the rows to mix are on cpu"),
    ({"lam": 0.5}, TypeError, "lam must be a tensor, got float"),
    ({"lam": torch.ones(4, dtype=torch.int64)}, TypeError, r"lam must be floating point, got torch\.int64"),
    ({"lam": torch.rand(3)}, ValueError, r"lam must have shape \(4,\), one a row, or \(\).*, got \(3,\)"),
    ({"lam": torch.tensor(1.5)}, ValueError, r"lam must lie in \[0, 1\], got values from 1\.5 to 1\.5"),
    ({"lam": torch.tensor([0.0, 1.5, 0.5, 0.5])}, ValueError, r"lam must lie in \[0, 1\], got values from 0 to 1\.5"),
    ({"lam": torch.tensor([-0.25, 1, 0.5, 0.5])}, ValueError, r"lam must lie in \[0, 1\], got values from -0\.25 to 1"),
    ({"lam": torch.tensor([torch.nan, 1, 0.5, 0.5])}, ValueError, r"lam must lie in \[0, 1\], got values from nan"),
    ({"lam": meta(4)}, ValueError, "lam is on meta, the rows to mix are on cpu"),
    ({"partner": [1, 0, 3, 2]}, TypeError, "partner must be a tensor, got list"),
    ({"partner": torch.tensor([1.0, 0, 3, 2])}, TypeError, r"partner must be int64, got torch\.float32"),
    ({"partner": torch.tensor([1, 0, 3, 2]).int()}, TypeError, r"partner must be .* torch\.int32; pass partner\.long"),
    ({"partner": torch.tensor([1, 0, 2])}, ValueError, r"partner must have shape \(4,\), one a row, got \(3,\)"),
    ({"partner": torch.tensor([1, 0, 4, 2])}, ValueError, r"partner must lie in 0\.\.3, got values from 0 to 4"),
    ({"partner": torch.tensor([1, 0, 1, 2])}, ValueError, r"a permutation of 0\.\.3, but row 1 is .* 2 rows"),
    ({"partner": meta(4, dtype=torch.int64)}, ValueError, "partner is on meta, the rows to mix are on cpu"),
    ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight must be a tensor or None, got list"),
    ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, r"weight must be floating point, got torch\.int64"),
    ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(3,\), one a class, got \(4,\)"),
    ({"weight": meta(3)}, ValueError, "weight is on meta"),
    ({"num_items": torch.ones(1)}, ValueError, r"num_items must be a number or a 0-d tensor, got shape \(1,\)"),
    ({"num_items": 0}, ValueError, "num_items must be a finite number > 0 or None, got 0"),
    ({"num_items": "4"}, TypeError, "num_items must be .*, got '4'"),
    ({"num_items": float("nan")}, ValueError, "num_items must be .*, got nan"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of 'mean', 'sum', 'none'; got 'batchmean'"),
]
OPTIONS = [
    ({"mode": "adversarial"}, ValueError, "mode must be one of 'amp', 'maxop', 'mixup'; got 'adversarial'"),
    (
        {"loss": "bce"},
        ValueError,
        "loss must be one of 'cross_entropy', 'binary_cross_entropy', 'softmax_bce'; got 'bce'",
    ),
    ({"grad_scale": 2}, ValueError, "grad_scale must be one of 'row', 'mean'; got 2"),
    ({"step_size": float("nan")}, ValueError, "step_size must be a finite number >= 0, got nan"),
    ({"step_size": -1e-3}, ValueError, r"step_size must be a finite number >= 0, got -0\.001"),
    ({"step_size": "small"}, TypeError, "step_size must be a finite number >= 0, got 'small'"),
    ({"step_size": True}, TypeError, "step_size must be .*, got True"),
    ({"step_size": torch.tensor(0.1)}, TypeError, r"step_size must be .*, got tensor\(0\.1"),
    ({"grad_clip": 0}, ValueError, "grad_clip must be a finite number > 0 or None, got 0"),
    ({"clamp": "no"}, TypeError, "clamp must be True or False, got 'no'"),
    ({"tie_tol": "exact"}, TypeError, "tie_tol must be a finite number >= 0 or 'auto', got 'exact'"),
    ({"tie_tol": -1.0}, ValueError, r"tie_tol must be .*, got -1\.0"),
    ({"ignore_index": 1.0}, TypeError, r"ignore_index must be an int, got 1\.0"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be a finite number >= 0 and <= 1, got 1\.5"),
    ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be .*, got -0\.1"),
]


@pytest.mark.parametrize(("changed", "error", "message"), ROWS + OPTIONS)
def test_amp_cross_entropy_names_what_is_wrong(changed, error, message):
    with pytest.raises(error, match=message):
        F.amp_cross_entropy(**args(**changed))


@pytest.mark.parametrize("call", [lambda: F.amp_cross_entropy(**args(epsilon=1)), lambda: AMPLoss(epsilon=1)])
def test_an_option_that_does_not_exist_is_refused(call):
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        call()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        *[row for row in ROWS + OPTIONS if "logits" not in row[0]],
        ({"hidden": [[0.0]]}, TypeError, "hidden must be a tensor, got list"),
        ({"hidden": torch.zeros(4, 5).long()}, TypeError, r"hidden must be .*got torch\.int64; embed integer"),
        ({"hidden": torch.zeros(4, 5, 1)}, ValueError, r"hidden must have 2 dimensions, .*hidden\.flatten\(0, -2\)"),
        ({"linear_weight": torch.zeros(3)}, ValueError, r"linear_weight must have 2 dimensions, got shape \(3,\)"),
        ({"linear_weight": torch.zeros(3, 4)}, ValueError, r"linear_weight must be \(C, 5\) .*got \(3, 4\)"),
        ({"linear_weight": torch.zeros(0, 5)}, ValueError, r"linear_weight must have at least one class, .*\(0, 5\)"),
        ({"linear_weight": [0.0]}, TypeError, "linear_weight must be a tensor, got list"),
        ({"linear_weight": meta(3, 5)}, ValueError, "linear_weight is on meta"),
        ({"linear_bias": torch.zeros(4)}, ValueError, r"linear_bias must have shape \(3,\).*got \(4,\)"),
        ({"linear_bias": 0.0}, TypeError, "linear_bias must be a tensor or None, got float"),
        ({"activation": "gelu"}, ValueError, "activation must be None or 'relu'; got 'gelu'"),
        ({"dropout_mask": torch.ones(4, 3)}, ValueError, r"dropout_mask must have .* \(4, 5\), got \(4, 3\)"),
        ({"dropout_mask": torch.ones(4, 5, dtype=torch.bool)}, TypeError, r"dropout_mask must be .*got torch\.bool"),
        ({"dropout_mask": meta(4, 5)}, ValueError, "dropout_mask is on meta"),
    ],
)
def test_linear_amp_cross_entropy_names_what_is_wrong(changed, error, message):
    with pytest.raises(error, match=message):
        F.linear_amp_cross_entropy(**head(**changed))


HIDDEN, LAM, PARTNER = torch.zeros(4, 2, 3), torch.full((4,), 0.5), torch.tensor([1, 0, 3, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.mix(HIDDEN.long(), LAM, PARTNER), TypeError, r"hidden must be .*got torch\.int64; embed"),
        (
            lambda: F.mix(torch.tensor(1.0), LAM, PARTNER),
            ValueError,
            "hidden must have a batch dimension",
        ),
        (lambda: F.mix(HIDDEN.byte(), LAM, PARTNER), TypeError, r"torch\.uint8; make pixels .* by \.float\(\) / 255"),
        (lambda: F.mix(HIDDEN.bool(), LAM, PARTNER), TypeError, r"got torch\.bool$"),
        (lambda: F.mix(HIDDEN, LAM[:3], PARTNER), ValueError, r"lam must have shape \(4,\), one a row, .*, got \(3,\)"),
        (lambda: F.mix(HIDDEN, LAM, PARTNER * 2), ValueError, r"partner must lie in 0\.\.3"),
        (lambda: F.mix(HIDDEN, meta(4), PARTNER), ValueError, "lam is on meta"),
        (lambda: F.lambda_grad(HIDDEN[:3], HIDDEN, PARTNER), ValueError, r"grad_mixed must .* shape \(4, 2, 3\)"),
        (lambda: F.lambda_grad(None, HIDDEN, PARTNER), TypeError, "grad_mixed must be a tensor, got NoneType"),
        (lambda: F.lambda_grad(meta(4, 2, 3), HIDDEN, PARTNER), ValueError, "grad_mixed is on meta"),
        (lambda: F.remix([1.0], LAM, PARTNER, HIDDEN), TypeError, "hidden must be a tensor, got list"),
        (lambda: F.remix(HIDDEN, LAM, PARTNER, HIDDEN, step_size=-1), ValueError, "step_size must be"),
        (lambda: F.remix(HIDDEN, LAM, PARTNER, HIDDEN, grad_clip=0), ValueError, "grad_clip must be"),
        (lambda: F.remix(HIDDEN, LAM, PARTNER, HIDDEN, clamp=1), TypeError, "clamp must be True or False, got 1"),
        (lambda: F.select_loss(LAM, LAM[:3]), ValueError, r"loss_adv must have loss's shape \(4,\), got \(3,\)"),
        (lambda: F.select_loss(LAM[:, None], LAM), ValueError, "loss must have 1 dimensions"),
        (lambda: F.select_loss(LAM, LAM, tie_tol="none"), TypeError, "tie_tol must be"),
        (lambda: F.select_loss(LAM.long(), LAM), TypeError, "loss must be float16"),
    ],
)
def test_the_other_functions_name_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *OPTIONS,
        ({"alpha": 0}, ValueError, "alpha must be a finite number > 0, got 0"),
        ({"alpha": None}, TypeError, "alpha must be .*, got None"),
        ({"pairing": "any"}, ValueError, "pairing must be one of 'permutation', 'matching'; got 'any'"),
        ({"reduction": None}, ValueError, "reduction must be one of 'mean', 'sum', 'none'; got None"),
        ({"reweight": "static"}, ValueError, "reweight must be one of None, 'moving'; got 'static'"),
        ({"weight": [1.0]}, TypeError, r"weight must be .*tensor or None, got \[1\.0\]"),
        ({"weight": torch.ones(2, 2)}, TypeError, r"weight must be a \(C,\) tensor or None"),
        ({"weight": torch.ones(2, dtype=torch.int64)}, TypeError, r"weight must be floating point, got torch\.int64"),
        ({"generator": 42}, TypeError, r"generator must be a torch\.Generator or None, got 42"),
    ],
)
def test_the_criterion_names_the_option_that_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        AMPLoss(**options)
    criterion = AMPLoss(torch.ones(3))
    before = dict(vars(criterion), weight=criterion.weight)
    ((name, value),) = options.items()
    with pytest.raises(error, match=message):
        setattr(criterion, name, value)
    assert dict(vars(criterion), weight=criterion.weight) == before


def test_class_weights_that_require_a_gradient_are_refused_whenever_they_are_set():
    criterion = AMPLoss()
    with pytest.raises(ValueError, match=r"weight must not require a gradient"):
        criterion.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"weight must be .*, got 0\.5; other options go by name"):
        AMPLoss(0.5)
    assert not list(criterion.parameters())


Z, Y = args()["logits"], args()["target"]


def mixed(lam=LAM, partner=PARTNER):
    return {"mix": Mix(lam, partner)}


@pytest.mark.parametrize(
    ("logits", "target", "kwargs", "error", "message"),
    [
        *[
            (given.get("logits", Z), given.get("target", Y), {}, error, message)
            for given, error, message in ROWS
            if given.keys() <= {"logits", "target"}
        ],
        (torch.zeros(4, 5), Y, {}, ValueError, r"weight must have shape \(5,\), .*got \(3,\)"),
        (Z, Y, mixed(LAM[:3]), ValueError, r"lam must have shape \(4,\)"),
        (Z, Y, mixed(LAM * 4), ValueError, r"lam must lie in \[0, 1\]"),
        (Z, Y, mixed(LAM, PARTNER * 0), ValueError, "partner must be a permutation"),
        (Z, Y, {"mix": LAM}, TypeError, r"mix must be a fastamp\.Mix\(lam, partner\), got Tensor"),
        (Z, Y, {"mix": (LAM,)}, TypeError, r"mix must be a fastamp\.Mix\(lam, partner\)"),
        (Z, Y, {"num_items": -2}, ValueError, "num_items must be .*, got -2"),
    ],
)
def test_the_criterion_names_the_argument_that_is_wrong(logits, target, kwargs, error, message):
    with pytest.raises(error, match=message):
        AMPLoss(weight=torch.ones(3))(logits, target, **kwargs)


@pytest.mark.parametrize("shape", [(4, 3, 7), (4, 7, 3), (4, 3, 2, 5)])
def test_logits_of_every_position_go_as_the_error_says(shape):
    """As nn.CrossEntropyLoss has them, (B, C, ...), or (B, ..., C)."""
    logits, last = torch.randn(shape), shape == (4, 7, 3)
    target = torch.randint(3, (shape[0], *(shape[1:-1] if last else shape[2:])))
    with pytest.raises(ValueError, match="make every position one"):
        AMPLoss()(logits, target)
    rows = (logits if last else logits.movedim(1, -1)).flatten(0, -2)
    AMPLoss()(rows, target.flatten())
    expected = torch.nn.functional.cross_entropy(logits.movedim(-1, 1) if last else logits, target)
    torch.testing.assert_close(AMPLoss().eval()(rows, target.flatten()), expected)


def test_the_criterion_names_what_eval_mode_does_not_take():
    criterion = AMPLoss().eval()
    for kwargs in (mixed(), {"return_stats": True}):
        with pytest.raises(ValueError, match="mix and return_stats need train mode: in eval mode nothing is mixed"):
            criterion(Z, Y, **kwargs)


@pytest.mark.parametrize("size", [-1, 2.0, True, "4", None])
def test_sample_takes_a_batch_size(size):
    with pytest.raises((TypeError, ValueError), match=f"batch_size must be .*got {size!r}"):
        AMPLoss().sample(size, device="cpu")


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset must be one of 'paper', 'official'; got 'original'"):
        AMPLoss.preset("original")
    with pytest.raises(ValueError, match="alpha must be"):
        AMPLoss.preset("paper", alpha=-1)


def test_a_window_on_another_device_is_named():
    criterion = AMPLoss(reweight="moving").to("meta")
    with pytest.raises(ValueError, match=r"window is on meta, the rows are on cpu: move it .*\.to\('cpu'\)"):
        criterion(Z, Y)


def test_a_dtensor_is_refused_by_name(monkeypatch):
    from torch.distributed.tensor import DTensor

    assert sys.modules["torch.distributed.tensor"].DTensor is DTensor

    class Sharded(torch.Tensor):
        """Stands in for a DTensor, which needs a process group."""

    monkeypatch.setattr(sys.modules["torch.distributed.tensor"], "DTensor", Sharded)
    rows = torch.zeros(4, 3).as_subclass(Sharded)
    for name, call in (
        ("logits", lambda: F.amp_cross_entropy(**args(logits=rows))),
        ("hidden", lambda: F.linear_amp_cross_entropy(**head(hidden=rows, linear_weight=torch.zeros(3, 3)))),
        ("logits", lambda: AMPLoss()(rows, args()["target"])),
        ("hidden", lambda: F.mix(rows, LAM, PARTNER)),
    ):
        with pytest.raises(TypeError, match=rf"{name} is a DTensor.*{name}\.to_local\(\).*{name}\.full_tensor\(\)"):
            call()


def test_a_real_dtensor_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        rows = distribute_tensor(torch.zeros(4, 3), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(TypeError, match="logits is a DTensor, which fastamp does not take"):
            AMPLoss()(rows, args()["target"])
    finally:
        dist.destroy_process_group()


def test_the_public_names_are_there():
    assert set(fastamp.__all__) == {"AMPLoss", "Mix", "MixStats", "functional", "reference", "set_backend"}
    assert all(hasattr(fastamp, name) for name in fastamp.__all__)
    assert isinstance(fastamp.functional, types.ModuleType)
