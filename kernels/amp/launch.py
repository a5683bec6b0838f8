"""What launchers share."""

from __future__ import annotations

import subprocess
from types import TracebackType

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from .config import INVERSE_BLOCK, cdiv
from .rows import ASSERTING

# What Triton raises where it finds no compiler or driver, or none for this GPU; besides RuntimeError, as torch does.
UNUSABLE = (
    CompilationError,
    OutOfResources,
    PTXASError,
    subprocess.CalledProcessError,
    OSError,
    ImportError,
    AssertionError,
)


class on_device_of:  # noqa: N801 - reads as a function, like torch.cuda.device
    """Make the tensor's GPU current: Triton launches on the current one, whatever its arguments are.

    Where Triton turns out to be of no use on this machine, its error leaves with a way out. That is at the first
    launch, the first time that it needs a compiler, a driver, or code for this GPU.
    """

    def __init__(self, tensor: Tensor) -> None:
        # By its number: torch takes microseconds over a torch.device.
        self._device = torch.cuda.device(tensor.get_device()) if tensor.is_cuda else None

    def __enter__(self) -> None:
        if self._device is not None:
            self._device.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device is not None:
            self._device.__exit__(kind, error, trace)
        if error is not None and _is_tritons(error):
            raise RuntimeError(
                f"Triton is installed, but cannot run this kernel here: {type(error).__name__}: {error}. "
                'fastamp.set_backend("torch") computes the same without Triton'
            ) from error


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device, which has to be the current one: see `on_device_of`."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_tritons(error: BaseException) -> bool:
    """Whether Triton could not get as far as a launch, whose own errors may be those of a kernel before it."""
    if isinstance(error, UNUSABLE):
        return True
    text = str(error)  # of errors of the driver only "device kernel image is invalid" and the like
    return type(error) is RuntimeError and (not text.startswith("Triton Error") or "kernel image" in text)


def alignment(*matrices: Tensor) -> int:
    """What the width and the stride of these rows are multiples of, as far as 16-byte loads can use it: 8 or 1."""
    usable = all(rows.stride(1) == 1 and rows.stride(0) % 8 == 0 for rows in matrices)
    return 8 if usable and matrices[0].shape[1] % 8 == 0 else 1


@triton.jit
def _inverse_kernel(
    partner_ptr,  # (B,) int64
    inverse_ptr,  # (B,) int64
    B,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    partner = tl.load(partner_ptr + row, mask=row < B, other=0)
    exists = (partner >= 0) & (partner < B)
    tl.device_assert(exists, "partner is no row")
    tl.store(inverse_ptr + partner, row, mask=(row < B) & exists)


def inverse_permutation(partner: Tensor) -> Tensor:
    """(B,) int64 q with partner[q[r]] = r."""
    partner = partner.contiguous()
    inverse = torch.empty_like(partner)
    batch = len(partner)
    with on_device_of(partner):
        _inverse_kernel[(cdiv(batch, INVERSE_BLOCK),)](partner, inverse, batch, BLOCK=INVERSE_BLOCK, **ASSERTING)
    return inverse


def memory_order(rows: Tensor) -> list[int] | None:
    """The dimensions of `rows` (B, ...) from the outermost of a row's in memory to the innermost; None: as they are."""
    if rows.dim() < 3 or rows.is_contiguous() or 0 in rows.stride()[1:]:
        return None
    inner = range(1, rows.dim())
    order = sorted(inner, key=rows.stride, reverse=True)
    return None if order == list(inner) else [0, *order]


def as_matrix(rows: Tensor, order: list[int] | None = None) -> Tensor:
    """`rows` (B, ...) as (B, N), elements in `memory_order`: a view where one exists, else a copy."""
    return (rows if order is None else rows.permute(order)).reshape(rows.shape[0], -1)


def empty_rows(rows: Tensor, order: list[int] | None) -> Tensor:
    """Memory for rows like these, one after the other, each in `memory_order`: channels_last stays what it is."""
    if order is None:
        return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    # Not a permuted view of other memory: autograd forbids writing to a view that an autograd function returns.
    strides, stride = [0] * len(order), 1
    for dim in reversed(order):
        strides[dim] = stride
        stride *= rows.shape[dim]
    return torch.empty_strided(rows.shape, strides, dtype=rows.dtype, device=rows.device)
