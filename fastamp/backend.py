"""Which implementation runs: Triton kernels on CUDA and ROCm tensors, closed forms in PyTorch elsewhere."""

from __future__ import annotations

import importlib.util
import os
from types import TracebackType

import torch

from fastamp.autograd import in_torch_func

BACKENDS = ("auto", "torch", "triton")
# Looked for once, without importing it: torch 2.11 cannot trace a search.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_current = "auto"


class set_backend:  # noqa: N801 - reads as a function, like torch.set_grad_enabled
    """Choose the backend, at once and until further notice, or for the length of a `with` block.

    Args:
        name: "auto" (Triton on CUDA/ROCm tensors where it is installed, PyTorch elsewhere), "torch", or
            "triton". With TRITON_INTERPRET=1 in the environment "triton" also takes CPU tensors.

    Raises:
        ValueError: an unknown name.
        RuntimeError: "triton" where Triton is not installed.
    """

    def __init__(self, name: str) -> None:
        global _current
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}")
        if name == "triton" and not has_triton():
            raise RuntimeError("backend 'triton' was asked for, but the package triton is not installed")
        self._previous, _current = _current, name

    def __enter__(self) -> set_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._previous


def has_triton() -> bool:
    """Whether the package triton is installed."""
    return _HAS_TRITON


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def takes_kernels(rows: torch.Tensor) -> bool:
    """Whether an operation on rows, of which there have to be some, goes to Triton; torch.func takes no kernels."""
    return uses_triton(rows) and rows.numel() > 0 and not in_torch_func()


def launches_on(device: torch.device) -> bool:
    """Whether kernels make what is new on `device`: as for tensors that lie there, but without a refusal."""
    if _current == "torch" or not has_triton() or in_torch_func():
        return False
    return device.type == "cuda" or (_current == "triton" and device.type == "cpu" and interpreting())


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether operations on `tensor` go to Triton; RuntimeError if it was forced and cannot take the tensor."""
    if _current == "torch" or (_current == "auto" and not (tensor.is_cuda and has_triton())):
        return False
    if not tensor.is_cuda and not (tensor.device.type == "cpu" and interpreting()):
        raise RuntimeError(
            f"backend 'triton' takes CUDA and ROCm tensors (and CPU tensors under TRITON_INTERPRET=1), "
            f"got a tensor on {tensor.device}"
        )
    return True
