"""The one table of tolerances, the numerics contract, and what every test shares."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

import fastamp
from fastamp import functional, reference
from fastamp.backend import has_triton, uses_triton
from fastamp.mixing import draw

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Decided when a kernel is decorated, so before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"


def _patch_the_language_once_a_launch() -> None:
    """Triton's interpreter does so again in every function that a kernel calls, for most of its time."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[tuple[bool, ...]] = set()

    @functools.cache
    def seen_by(fn: Any) -> tuple[bool, ...]:
        modules = {id(value) for value in fn.__globals__.values()}
        return tuple(id(module) in modules for module in (language, language.core))

    def patch_once(fn: Any) -> Any:
        if seen_by(fn) in patched:
            return None
        patched.add(seen_by(fn))
        return patch(fn)

    def launch_afresh(*args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


if not HAS_GPU and has_triton():
    _patch_the_language_once_a_launch()

torch.set_num_threads(1)
# torch.device as a context keeps the functions that it found at its first use, which a fixture may have replaced.
with torch.device("cpu"):
    torch.empty(0)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)
# Where Triton kernels run: in its interpreter, on CPU tensors, unless there is a GPU.
TRITON_DEVICE = "cuda" if HAS_GPU else "cpu"

_OURS = {"derandomize": True, "deadline": None, "database": None}
_OURS["suppress_health_check"] = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("fastamp", max_examples=20, **_OURS)
settings.register_profile("thorough", max_examples=200, **_OURS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fastamp"))
INTERPRETED = settings(max_examples=settings.default.max_examples * 2 // 5)  # the interpreter is slow


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes with NumPy, which warns of -inf - -inf; on a GPU nothing does.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def _fused(self, x, y, z):
    """As hardware has it, and unlike Triton's interpreter: the product is not rounded."""
    from triton.runtime.interpreter import TensorHandle

    wide = x.data.astype("float64") * y.data + z.data
    return TensorHandle(wide.astype(x.data.dtype), z.dtype.scalar)


if os.environ.get("TRITON_INTERPRET") == "1" and has_triton():
    importlib.import_module("triton.runtime.interpreter").InterpreterBuilder.create_fma = _fused


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled is left from the test before, or for the one after."""
    dynamo = importlib.import_module("torch._dynamo")
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn; tensors made in the test lie where it runs."""
    if request.param == "triton" and not has_triton():
        pytest.skip("the package triton is not installed")
    device = TRITON_DEVICE if request.param == "triton" else "cpu"
    with fastamp.set_backend(request.param), torch.device(device):
        yield request.param


@pytest.fixture
def triton_backend() -> Iterator[str]:
    """The Triton backend alone."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    with fastamp.set_backend("triton"), torch.device(TRITON_DEVICE):
        yield "triton"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch, triton_backend: str) -> None:
    """Rows of more than 8 classes go through the looping kernels, 8 classes a tile; shorter ones through registers."""
    words = ("REGISTER_WORDS", "LOOP_WORDS", "GRAD_WORDS", "SELECT_WORDS", "LEAST_WORDS")
    _set_constants(monkeypatch, dict.fromkeys(words, 8) | {"FEW_CLASSES": 0, "CAREFUL_COLUMNS": 4})


@pytest.fixture(params=["torch", "triton", "loops"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The closed form, kernels of whole rows, and kernels that loop over 8 classes a tile, in turn."""
    if request.param != "torch":
        request.getfixturevalue({"triton": "triton_backend", "loops": "small_tiles"}[request.param])
        yield request.param
        return
    with fastamp.set_backend("torch"), torch.device("cpu"):
        yield "torch"


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch, triton_backend: str) -> None:
    """Tiles of a few elements, so that short rows take many programs, many parts and many pieces."""
    small = {"MIX_BYTES": 32, "MIX_ROWS": 2, "REMIX_WORDS": 8, "REMIX_WORDS_PER_WARP": 8, "PART_TILES": 1}
    small |= {"MAX_PARTS": 4, "EMBEDDING_PIECE": 4, "EMBEDDING_ROWS": 2, "EMBEDDING_WORDS": 8}
    _set_constants(monkeypatch, small)


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch, triton_backend: str) -> None:
    """Two rows of few classes to a program, and totals in two steps from the third row on."""
    _set_constants(monkeypatch, {"FEW_ROWS": 2, "TOTAL_BLOCK": 2, "TOTAL_TURNS": 1, "SEARCH_ROWS": 2})


def _set_constants(monkeypatch: pytest.MonkeyPatch, values: dict[str, int]) -> None:
    """Replace launch constants, wherever they have been imported to."""
    config = importlib.import_module("fastamp.kernels.config")
    assert values.keys() <= vars(config).keys()
    importlib.import_module("fastamp.kernels")
    for module in [module for name, module in sys.modules.items() if name.startswith("fastamp.kernels")]:
        for name, value in values.items():
            if name in vars(module):
                monkeypatch.setattr(module, name, value)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated and not written reads as NaN."""

    def poisoned(make: Any) -> Any:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", poisoned(torch.empty_strided))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


class Case(NamedTuple):
    """The arguments of one call of `amp_cross_entropy`, and the gradient that comes from above."""

    logits: Tensor  # (B, C)
    target: Tensor  # (B,) int64 or (B, C)
    lam: Tensor  # (B,)
    partner: Tensor  # (B,)
    options: dict[str, Any]
    upstream: Tensor  # () or (B,)


class Outcome(NamedTuple):
    """What a call made of a Case, by name; every tensor detached."""

    loss: Tensor
    grad_logits: Tensor
    lam_adv: Tensor
    grad: Tensor
    delta: Tensor
    mask: Tensor


def random_case(batch: int, classes: int, *, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """Normal logits of scale 3, uniform labels, λ and partners, and an upstream gradient that is not 1."""
    upstream = torch.randn(batch) if options.get("reduction") == "none" else torch.tensor(0.7)
    return Case(
        (3 * torch.randn(batch, classes)).to(dtype),
        torch.randint(classes, (batch,)),
        torch.rand(batch),
        torch.randperm(batch),
        options,
        upstream,
    )


def paired_case(batch: int, classes: int, **options: Any) -> Case:
    """A random case whose partners are a matching, and are promised to be one."""
    _, partner = draw(batch, pairing="matching")
    return random_case(batch, classes, pairing="matching", **options)._replace(partner=partner)


def by_definition(case: Case, dtype: torch.dtype) -> Outcome:
    """The reference in `dtype`, on the values of the case."""
    logits = case.logits.detach().to(dtype).clone().requires_grad_()
    target = case.target.to(dtype) if case.target.is_floating_point() else case.target
    options = {name: value for name, value in case.options.items() if name != "pairing"}  # is but a promise
    result = reference.amp(lambda m: m, logits, target, case.lam, case.partner, **options)
    (grad,) = torch.autograd.grad(result.loss, logits, case.upstream.to(result.loss.dtype))
    return Outcome(result.loss.detach(), grad, result.lam_adv, result.grad, result.delta, result.mask)


def by_library(case: Case) -> Outcome:
    """The library on the backend that is set; neither inputs nor their strides are changed."""
    before = case.logits.detach().clone()
    logits = case.logits.detach().requires_grad_()
    loss, stats = functional.amp_cross_entropy(
        logits, case.target, case.lam, case.partner, return_stats=True, **case.options
    )
    (grad,) = torch.autograd.grad(loss, logits, case.upstream.to(loss.dtype))
    assert grad.dtype == logits.dtype
    assert grad.shape == logits.shape
    assert torch.equal(case.logits.detach(), before) or before.isnan().any()
    assert not any(field.requires_grad for field in stats[:5])
    if not uses_triton(logits):
        # Statistics change no bit.
        short = functional.amp_cross_entropy(logits, case.target, case.lam, case.partner, **case.options)
        (short_grad,) = torch.autograd.grad(short, logits, case.upstream.to(loss.dtype))
        torch.testing.assert_close(short, loss, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(short_grad, grad, rtol=0, atol=0, equal_nan=True)
    return Outcome(loss.detach(), grad, stats.lam_adv, stats.grad, stats.delta, stats.mask)


def assert_no_worse(name: str, ours: Tensor, truth: Tensor, composed: Tensor, dtype: torch.dtype) -> None:
    """|ours - truth| <= |composition in dtype - truth| + tolerance, elementwise; infinities and NaN are the same."""
    ours, truth, composed = ours.double(), truth.double(), composed.double()
    assert ours.shape == truth.shape, name
    # A composition that broke down excuses nothing.
    slack = (composed - truth).abs().nan_to_num(nan=0, posinf=0)
    tolerance = TOLERANCE[dtype] * truth.abs().clamp(min=1)
    exact = (ours == truth) | (ours.isnan() & truth.isnan())
    same = torch.where(truth.isfinite(), (ours - truth).abs() <= slack + tolerance, exact)
    worst = (ours - truth).abs().where(~same, 0).max() if same.numel() else 0
    values = f"ours\n{ours}\ntruth\n{truth}\ncomposition\n{composed}"
    assert same.all(), f"{name} ({dtype}): off by up to {worst:.3g}\n{values}"


def assert_contract(case: Case) -> Outcome:
    """Hold the library to the reference in float64 and to the composition in the case's dtype."""
    dtype = case.logits.dtype
    ours, truth, composed = by_library(case), by_definition(case, torch.float64), by_definition(case, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert ours.loss.dtype == ours.delta.dtype == ours.lam_adv.dtype == compute
    for name in ("loss", "lam_adv", "grad", "delta"):
        assert_no_worse(name, getattr(ours, name), getattr(truth, name), getattr(composed, name), dtype)
    if not case.target.is_floating_point() and (case.target == case.options.get("ignore_index", -100)).all():
        assert (ours.grad_logits == 0).all()  # of a mean that is 0/0, as nn.CrossEntropyLoss has it
        return ours
    # Where δ is rounding noise either branch is right; its gradient is that of another λ*.
    tied = ours.mask != truth.mask
    tie_tol = case.options.get("tie_tol", "auto")
    noise = 32 * torch.finfo(compute).eps * ours.loss.double().abs().max().clamp(min=1)
    excess = (truth.delta + (0.0 if tie_tol == "auto" else tie_tol)).abs() if tie_tol != 0.0 else truth.delta.abs()
    assert (excess[tied] <= noise).all(), f"mask: {ours.mask} is not {truth.mask}, delta {truth.delta}"
    free = ~(tied | torch.zeros_like(tied).index_put_((case.partner,), tied))
    assert_no_worse("gradient", ours.grad_logits[free], truth.grad_logits[free], composed.grad_logits[free], dtype)
    return ours
