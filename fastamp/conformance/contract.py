"""Runs the cases and holds them to the contract."""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastamp.backend import has_triton, interpreting, set_backend
from fastamp.conformance.case import Case, Outcome
from fastamp.conformance.cases import cases
from fastamp.training.config import usable_device

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
TIE_ULPS = 32  # two losses this near may be told apart by rounding alone: the tie tolerance, and as much again


class Place(NamedTuple):
    """Where an operation can run."""

    device: torch.device
    backend: str


@dataclass(frozen=True)
class Row:
    """One operation on one device, backend and dtype."""

    op: str  # its name in fastamp.functional
    device: str  # as torch writes it
    backend: str  # "torch" or "triton"
    dtype: str  # of the inputs, as "float32"
    cases: int  # how many were run
    worst: float  # the largest |ours - truth| of all elements of all outputs and gradients
    worst_pytorch: float  # the same of the definition in that dtype
    failures: tuple[str, ...]  # what broke the contract, a line each

    @property
    def ok(self) -> bool:
        """Whether the contract was kept."""
        return not self.failures


@dataclass(frozen=True)
class Report:
    """What a check found."""

    rows: tuple[Row, ...]
    absent: tuple[str, ...]  # backends that could not be checked here, and what it would take

    @property
    def ok(self) -> bool:
        """Whether everything that was run kept the contract."""
        return all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {
            "ok": self.ok,
            "absent": list(self.absent),
            "rows": [{**asdict(row), "ok": row.ok} for row in self.rows],
        }


def places(devices: Sequence[str] | None = None) -> tuple[list[Place], list[str]]:
    """Where operations can run on this machine, and of what is missing, a line each on what it would take.

    Args:
        devices: as in torch.device; None takes the CPU and, where there is one, the first GPU.

    Raises:
        ValueError: a device that is not there, or neither a CPU nor a GPU.
    """
    gpu = torch.cuda.is_available()
    absent = []
    found = []
    for name in ["cpu", *(["cuda"] if gpu else [])] if devices is None else devices:
        device = torch.empty(0, device=usable_device(name)).device
        found.append(Place(device, "torch"))
        if has_triton() and (device.type == "cuda" or interpreting()):
            found.append(Place(device, "triton"))
    if not has_triton():
        absent.append("triton: not installed")
    elif not any(place.backend == "triton" for place in found):
        where = "no GPU" if not gpu else "no GPU among the devices asked for"
        absent.append(f"triton: {where}; set TRITON_INTERPRET=1 to interpret its kernels on the CPU")
    if devices is None and not gpu:
        absent.append("cuda: torch finds no GPU")
    return found, absent


def check(
    devices: Sequence[str] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = tuple(TOLERANCES),
    ops: Sequence[str] | None = None,
    quick: bool = False,
    seed: int = 0,
    listener: Callable[[str], None] = lambda line: None,
) -> Report:
    """Compares every operation on every backend and dtype with its definition.

    Args:
        devices: as in torch.device; None takes all that are here.
        dtypes: of the inputs.
        ops: names in fastamp.functional; None takes all.
        quick: fewer cases.
        seed: of the inputs.
        listener: is called with what is about to be run.

    Raises:
        ValueError: a device that cannot be used.
    """
    found, absent = places(devices)
    by_op: dict[str, list[Case]] = {}
    for case in cases(quick=quick):
        if ops is None or case.op in ops:
            by_op.setdefault(case.op, []).append(case)
    rows = []
    for device, backend in found:
        for op, its_cases in by_op.items():
            for dtype in dtypes:
                listener(f"{op} {backend} on {device} in {_name(dtype)}")
                rows.append(check_op(op, its_cases, Place(device, backend), dtype, seed=seed))
    return Report(tuple(rows), tuple(absent))


def check_op(op: str, its_cases: Iterable[Case], place: Place, dtype: torch.dtype, *, seed: int = 0) -> Row:
    """Holds cases of one operation to the contract; the rest as `check_case` takes it."""
    worst = worst_pytorch = 0.0
    failures = []
    its_cases = list(its_cases)
    for case in its_cases:
        try:
            finding = check_case(case, place.device, place.backend, dtype, seed=seed)
        except Exception as error:  # whatever an operation raises here is a finding, and ends the check in a failure
            message = str(error).strip().splitlines()
            failures.append(f"{case.name}: {type(error).__name__}: {message[0] if message else ''}")
            continue
        worst = max(worst, finding.worst)
        worst_pytorch = max(worst_pytorch, finding.worst_pytorch)
        failures += [f"{case.name}: {line}" for line in finding.failures]
    return Row(
        op, str(place.device), place.backend, _name(dtype), len(its_cases), worst, worst_pytorch, tuple(failures)
    )


class Finding(NamedTuple):
    """What one case showed."""

    worst: float
    worst_pytorch: float
    failures: list[str]


def check_case(case: Case, device: torch.device | str, backend: str, dtype: torch.dtype, *, seed: int = 0) -> Finding:
    """Holds one case to the contract.

    Args:
        case: see `fastamp.conformance.cases`.
        device: where its inputs go.
        backend: "torch" or "triton".
        dtype: of its inputs.
        seed: of its inputs, together with its name.
    """
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(f"{case.op} {case.name}".encode()))
    with torch.device("cpu"):
        drawn = case.draw(dtype, generator)
    inputs = {name: _moved(x, torch.device(device)) for name, x in drawn.items()}
    before = {name: x.clone() for name, x in inputs.items()}
    with set_backend(backend), _poisoned_memory():
        ours = case.ours(inputs)
    failures = [
        f"wrote to its input {name}"
        for name, x in inputs.items()
        if not torch.equal(x.nan_to_num(), before[name].nan_to_num())
    ]
    truth = case.defined(inputs, torch.float64, None)
    mask = _shared_mask(ours, truth, dtype)
    if mask is not None and ours.mask is not None and truth.mask is not None:
        wrong = int((mask != ours.mask).sum())
        if wrong:
            failures.append(f"{wrong} of {len(mask)} rows took the other of the two losses")
        if bool((mask != truth.mask).any()):
            truth = case.defined(inputs, torch.float64, mask)
    pytorch = case.defined(inputs, dtype, mask)
    worst = worst_pytorch = 0.0
    for name, expected in truth.values.items():
        error = _error(ours.values[name], expected)
        allowed = _error(pytorch.values[name], expected)
        worst, worst_pytorch = max(worst, _largest(error)), max(worst_pytorch, _largest(allowed))
        beyond = error > allowed + TOLERANCES[dtype]
        if bool(beyond.any()):
            at = int((error - allowed).nan_to_num(nan=0.0).masked_fill(~beyond, -1).flatten().argmax())
            failures.append(
                f"{name}: {int(beyond.sum())} of {error.numel()} elements; error {float(error.flatten()[at]):.2g}, "
                f"PyTorch's {float(allowed.flatten()[at]):.2g}, tolerance {TOLERANCES[dtype]:.0e}"
            )
    return Finding(worst, worst_pytorch, failures)


def _shared_mask(ours: Outcome, truth: Outcome, dtype: torch.dtype) -> Tensor | None:
    """The truth's choice between the two losses, but ours where they are as good as equal."""
    if ours.mask is None or truth.mask is None or truth.delta is None or truth.loss is None:
        return None
    computed_in = dtype if ours.delta is None else ours.delta.dtype
    tie = TIE_ULPS * torch.finfo(computed_in).eps * truth.loss.abs().clamp(min=1)
    return torch.where(truth.delta.abs() <= tie, ours.mask, truth.mask)


def _error(value: Tensor, expected: Tensor) -> Tensor:
    value, expected = value.double(), expected.double()
    error = (value - expected).abs().masked_fill(value == expected, 0)  # equal infinities
    return error.masked_fill(error.isnan(), torch.inf).masked_fill(value.isnan() & expected.isnan(), 0)


def _largest(error: Tensor) -> float:
    return float(error.max()) if error.numel() else 0.0


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device with the strides and the misalignment that it has here."""
    if device.type == "cpu":
        return x
    memory = x.new_empty(0).set_(x.untyped_storage()).to(device)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that an output which nobody wrote shows."""
    were = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(were[0], warn_only=were[1])
        settings.fill_uninitialized_memory = filled


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
