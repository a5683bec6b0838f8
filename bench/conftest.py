"""The device, and a clock that also knows bytes over seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastamp.benchmarking import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastamp")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="as in torch.device")
    group.addoption("--threads", default=1, type=int, help="CPU threads")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    torch.set_num_threads(request.config.getoption("threads"))
    return torch.empty(0, device=request.config.getoption("device")).device


@pytest.fixture(scope="session")
def facts(device: torch.device) -> dict[str, Any]:
    return {
        "device": machine.device_name(device),
        "threads": torch.get_num_threads(),
        "copy_gb_s": machine.copy_bandwidth(device),
        **machine.versions(),
        "checkout": machine.commit(),
    }


@pytest.fixture
def measure(benchmark: Any, device: torch.device, facts: dict[str, Any]) -> Callable[..., None]:
    """Times `run(prepared)`; `prepare()` is outside the time. `moved`: bytes that have to be read and written."""

    def measured(
        run: Callable[[Any], object], *, prepare: Callable[[], Any] = lambda: None, moved: int | None = None
    ) -> None:
        def once(prepared: Any) -> object:
            result = run(prepared)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return result

        benchmark.pedantic(once, setup=lambda: ((prepare(),), {}), rounds=60, warmup_rounds=5)
        benchmark.extra_info.update(facts)
        if moved is not None:
            gb_s = moved / benchmark.stats.stats.median / 1e9
            percent = 100 * gb_s / facts["copy_gb_s"]
            benchmark.extra_info.update(bytes=moved, gb_s=gb_s, percent_of_copy=percent)

    return measured
