"""CUDA fake tensors where PyTorch has no CUDA: python fake_cuda.py LIBRARY CHECK, in a process of its own.

The library registers a device guard for CUDA that does nothing (`GUARD`). Operators then run by shape, dtype and device
alone, and refuse tensors of different devices and whatever would wait for the device; autograd's engine does not run.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""
B, C, D = 6, 5, 4
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"alpha": 0.3, "pairing": "matching"},
    {"mode": "mixup", "reduction": "none"},
    {"loss": "softmax_bce", "grad_scale": "mean", "grad_clip": None, "reweight": "moving"},
    {"ignore_index": 2, "label_smoothing": 0.1, "tie_tol": 0.0},
)


def build(compiler: str, folder: Path) -> Path:
    """Compile the guard, in two or three seconds."""
    from torch.utils.cpp_extension import include_paths, library_paths

    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    command = [compiler, "-std=c++20", "-O0", "-fPIC", "-shared", str(source), "-o", str(library), "-lc10"]
    command += [f"-isystem{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    subprocess.run(command, check=True)
    return library


def batch(soft: bool = False) -> tuple[Any, Any]:
    logits = torch.randn(B, C, device="cuda", requires_grad=True)
    return logits, torch.rand(B, C, device="cuda") if soft else torch.randint(C, (B,), device="cuda")


def check_auto_traces_whole() -> None:
    """Backend "auto", every option: one graph, with the kernels in it."""
    import fastamp

    graphs: list[torch.fx.GraphModule] = []

    def collect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    network = nn.Linear(D, C, device="cuda")
    for options in OPTIONS:
        criterion = fastamp.AMPLoss(**options).to("cuda")
        loss = torch.compile(criterion, fullgraph=True, backend=collect)(*batch())
        assert loss.device.type == "cuda"
        assert loss.shape == ((B,) if options.get("reduction") == "none" else ())
        code = graphs[-1].print_readable(print_output=False)
        assert ("fastamp.amp_cross_entropy" in code) == (criterion.loss == "cross_entropy"), code
    hidden = torch.randn(B, D, device="cuda")
    criterion = fastamp.AMPLoss(mode="mixup")
    step = torch.compile(lambda h, y: criterion.step(network, h, y), fullgraph=True, backend=collect)
    assert step(hidden, batch()[1]).device.type == "cuda"
    assert "fastamp.mix" in graphs[-1].code, graphs[-1].code


def check_forward_stays_on_the_device() -> None:
    """Eager, closed forms: nothing is read back, nothing is made elsewhere."""
    import fastamp

    with fastamp.set_backend("torch"):
        _run_everything()


def check_launchers_stay_on_the_device() -> None:
    """Eager, Triton: the same of what surrounds the launches, which are left out."""
    from triton.runtime.jit import JITFunction

    from fastamp.kernels import launch

    launched = []
    JITFunction.run = lambda self, *args, **kwargs: launched.append(self.__name__)
    assert launch.on_device_of(torch.empty(0, device="cuda")) is not None
    _run_everything()
    assert {"_amp_cross_entropy_kernel", "_linear_amp_cross_entropy_kernel", "_mix_kernel"} <= set(launched), launched


class OnTheDevice(TorchDispatchMode):
    """Every tensor of every operator lies on the GPU: from elsewhere it would be copied, and perhaps waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            assert not isinstance(leaf, torch.Tensor) or leaf.device.type == "cuda", f"{func}: {leaf}"
        return out


def _run_everything() -> None:
    from fastamp import AMPLoss, functional
    from fastamp.loss import OPTIONS as POLICY

    with torch.device("cuda"):
        criteria = [AMPLoss(weight=torch.rand(C), **options) for options in OPTIONS]
        network, hidden = nn.Linear(D, C), torch.randn(B, D)
        ids, table = torch.randint(7, (B, 3)), torch.randn(7, D)
    head = (hidden, network.weight, network.bias)
    with OnTheDevice():
        for logits, target in (batch(), batch(soft=True)):
            for criterion in criteria:
                mix = criterion.sample(B, device="cuda")
                criterion(logits, target, num_items=3)
                criterion(logits, target, return_stats=True)
                options = {"step_size": criterion.step_size} | {name: getattr(criterion, name) for name in POLICY}
                for more in ({}, {"activation": "relu"}, {"chunk_rows": 2}):
                    functional.linear_amp_cross_entropy(*head, target, *mix, **more, **options)
                functional.select_cross_entropy(logits, logits, target, *mix)
            AMPLoss(mode="mixup").step(network, hidden, target)
        functional.remix(hidden, *mix, functional.mix(hidden, *mix))
        functional.embedding_mix(ids, table, *mix)


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    torch.cuda.device = contextlib.nullcontext
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_rng_state = lambda device: torch.empty(16, dtype=torch.uint8, device=device)
    with FakeTensorMode():
        globals()[f"check_{sys.argv[2]}"]()
