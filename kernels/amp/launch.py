"""What launchers share."""

from __future__ import annotations

import subprocess

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

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


class on_device_of(torch.cuda.device):  # noqa: N801 - reads as a function, like torch.cuda.device
    """Make the tensor's GPU current: Triton launches on the current one, whatever its arguments are.

    Where Triton turns out to be of no use on this machine, its error leaves with a way out. That is at the first
    launch, the first time that it needs a compiler, a driver, or code for this GPU.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.get_device())  # -1, a CPU, makes no difference

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        super().__exit__(kind, error, trace)
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


def inverse_permutation(partner: Tensor) -> Tensor:
    """(B,) int64 q with partner[q[r]] = r."""
    index = torch.arange(len(partner), device=partner.device)
    return torch.empty_like(partner).scatter_(0, partner, index)


def as_matrix(rows: Tensor) -> Tensor:
    """`rows` (B, ...) as (B, N): a view where one exists, a copy where the inner dimensions allow none."""
    return rows.reshape(rows.shape[0], -1)
