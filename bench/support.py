"""Parametrisations, and inputs that are checked before they are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastamp.benchmarking import DTYPES, GPU_ONLY, SHAPES, Contender, Workload, contenders, disagreement
from fastamp.conformance import Case, OperationCase, check_case

DIRECTIONS = ("forward", "backward", "both")
HIDDEN_SHAPES = ((50, 300), (24, 768), (24, 40, 768), (256, 128, 768))


def steps(takes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Every contender in every shape, dtype and direction."""
    every = [pytest.param(one, id=one.name.replace(" ", "_")) for one in contenders(takes, compiled=True)]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for name, values in (
            ("direction", DIRECTIONS),
            ("contender", every),
            ("dtype", ["fp32", "bf16"]),
            ("shape", shapes_of(SHAPES)),
        ):
            test = pytest.mark.parametrize(name, values)(test)
        return test

    return decorate


def measure_step(
    measure: Callable[..., None],
    benchmark: Any,
    device: torch.device,
    takes: str,
    shape: tuple[int, int, int],
    dtype: str,
    contender: Contender,
    direction: str,
) -> None:
    """Times one direction of a contender that agrees with the definition; fails if it does not."""
    if device.type == "cpu" and shape[0] * shape[2] > GPU_ONLY:
        pytest.skip("takes a GPU")
    work = Workload(shape, dtype, takes, device)
    benchmark.group = f"{work.label} {direction}"
    torch.compiler.reset()
    runner = work.bind(contender)
    reason = disagreement(runner, contender.mode)
    assert reason is None, f"{contender.name} is not timed: {reason}"
    if direction == "forward":
        measure(lambda _: runner.forward(0))
    elif direction == "backward":
        measure(lambda loss: runner.backward(0, loss), prepare=lambda: runner.forward(0))
    else:
        measure(
            lambda _: runner.backward(0, runner.forward(0)),
            moved=work.least_bytes,
        )


def checked_inputs(op: str, shape: tuple[int, ...], dtype: str, device: torch.device) -> dict[str, Tensor]:
    """Inputs of one of the paper's operations, on which it has just kept the contract."""
    return checked(OperationCase(op, "benchmark", shape=shape), dtype, device)


def checked(case: Case, dtype: str, device: torch.device) -> dict[str, Tensor]:
    """Inputs of a case, on which its operation has just kept the contract."""
    finding = check_case(case, device, "auto", DTYPES[dtype])
    assert not finding.failures, f"{case.op} is not timed: {finding.failures[0]}"
    drawn = case.draw(DTYPES[dtype], torch.Generator().manual_seed(0))
    return {name: value.to(device) for name, value in drawn.items()}


def shapes_of(shapes: tuple[tuple[int, ...], ...]) -> list[Any]:
    """Shapes to parametrise by, with readable names."""
    return [pytest.param(shape, id="x".join(map(str, shape))) for shape in shapes]


def operations(test: Callable[..., None]) -> Callable[..., None]:
    """Ours beside PyTorch's composition, in every shape and dtype."""
    test = pytest.mark.parametrize("whose", ["fastamp", "PyTorch"])(test)
    test = pytest.mark.parametrize("dtype", ["fp32", "bf16"])(test)
    return pytest.mark.parametrize("shape", shapes_of(HIDDEN_SHAPES))(test)
