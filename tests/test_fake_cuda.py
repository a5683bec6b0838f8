"""What shows on CUDA tensors only, on a machine without a GPU: on fake tensors, in a process of its own.

A library registers a device guard for CUDA that does nothing (`GUARD`). Operators then run by shape, dtype and device
alone, and refuse tensors of different devices and whatever would wait for the device; autograd's engine does not run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="the package triton is not installed")

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


def backend_auto_traces_a_whole_graph_with_the_kernels_in_it() -> None:
    """Every option in one graph; what decides the backend has to be traced as well."""
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
        assert "fastamp.draw_partner" in code
        assert "randperm" not in code
    hidden = torch.randn(B, D, device="cuda")
    criterion = fastamp.AMPLoss(mode="mixup")
    step = torch.compile(lambda h, y: criterion.step(network, h, y), fullgraph=True, backend=collect)
    assert step(hidden, batch()[1]).device.type == "cuda"
    assert "fastamp.mix" in graphs[-1].code, graphs[-1].code


def a_forward_pass_makes_and_reads_nothing_on_the_host() -> None:
    """Eager, closed forms: nothing is read back, nothing is made elsewhere."""
    import fastamp

    with fastamp.set_backend("torch"):
        _run_everything()


def what_surrounds_the_launches_makes_and_reads_nothing_on_the_host() -> None:
    """Eager, Triton: the launches are left out."""
    from triton.runtime.jit import JITFunction

    from fastamp.kernels import launch

    launched = []
    JITFunction.run = lambda self, *args, **kwargs: launched.append(self.__name__)
    assert launch.on_device_of(torch.empty(0, device="cuda")) is not None
    _run_everything()
    few = {"_draw_partner_kernel", "_amp_few_classes_kernel", "_linear_amp_cross_entropy_kernel", "_mix_kernel"}
    assert few <= set(launched), launched


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


CHECKS = (
    backend_auto_traces_a_whole_graph_with_the_kernels_in_it,
    a_forward_pass_makes_and_reads_nothing_on_the_host,
    what_surrounds_the_launches_makes_and_reads_nothing_on_the_host,  # last, for launches do nothing from then on
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """All checks in one process."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler, to register a device guard for CUDA")
    library = build(compiler, tmp_path_factory.mktemp("guard"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(library)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_cuda(run, check):
    assert f"{check}: holds" in run.stdout, run.stderr[-3000:]


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    torch.cuda.device = contextlib.nullcontext
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_rng_state = lambda device: torch.empty(16, dtype=torch.uint8, device=device)
    with FakeTensorMode():
        for check in CHECKS:
            check()
            print(f"{check.__name__}: holds", flush=True)
