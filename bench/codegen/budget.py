"""What GPUs can issue while memory moves an element, what bounds a kernel, and the times that follow."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

PIPES = ("fma", "alu", "mufu", "lsu", "rest")
Row = Mapping[str, Any]


class Device(NamedTuple):
    """What a GPU of a target does in a second, by its data sheet: A100 80GB SXM, H200 SXM, HGX B200, MI300X.

    An SM issues four warps a clock, and its MUFU gives 16 results (CUDA C++ Programming Guide, "Arithmetic
    Instructions"). A CU has four vector units of 16 lanes, a quarter of that for exp, log and 1/x (CDNA3 ISA).
    """

    name: str
    units: int
    ghz: float
    tb_s: float
    lanes: int = 128  # whose instruction is issued in a clock of a unit
    mufu: int = 16  # of them by MUFU

    def instructions(self, nbytes: float, lanes: int) -> float:
        """Those of so many lanes a clock and unit, while memory moves so many bytes."""
        return nbytes / self.tb_s * self.units * self.ghz * lanes / 1e3


DEVICES = {
    "sm_80": Device("A100", 108, 1.41, 2.04),
    "sm_90": Device("H200", 132, 1.98, 4.3),  # measured; 4.8 on the data sheet
    "sm_100": Device("B200", 148, 1.85, 8.0),
    "gfx942": Device("MI300X", 304, 2.1, 5.3, lanes=64),
}


def an_element(row: Row, pipes: Iterable[str] = PIPES) -> float:
    """Thread instructions an element of a row of the report, on these pipes."""
    return float(sum(row["instructions"][pipe] for pipe in pipes) * 32 * row["warps"] / row["elements"])


def picoseconds(row: Row) -> dict[str, float]:
    """What an element takes of each resource of the whole device; the largest is the bound."""
    device = DEVICES[row["target"]]
    memory = row["floor"] / device.tb_s
    return {
        "memory": memory,
        "issue": memory * an_element(row) / device.instructions(row["floor"], device.lanes),
        "MUFU": memory * an_element(row, ["mufu"]) / device.instructions(row["floor"], device.mufu),
    }


class Launch(NamedTuple):
    """A launch of a main shape: its row of the report, and a pattern of its name where launches are timed."""

    kernel: str
    case: str
    shape: tuple[int, ...]
    name: str

    def microseconds(self, row: Row) -> dict[str, float]:
        """The time of each resource, by its row of the report."""
        return {resource: math.prod(self.shape) / 1e6 * time for resource, time in picoseconds(row).items()}


ROWS, LOOP, GRAD = "_amp_cross_entropy_kernel", "_amp_rows_kernel", "_amp_rows_grad_kernel"
MATCHED = "_amp_cross_entropy_kernel torch.bfloat16 .*_matching_.* B<=4096 C="
PERMUTED = MATCHED.replace("matching", "permutation")
HIDDEN, LONG = (256, 128, 768), "bf16 N=30720"  # every row so long or longer has its launch
# Large ones: in others a launch's latency is more than all the rest. bench/gpu_steps.py times some by themselves.
MAIN = (
    Launch(ROWS, "plain, matched bf16 B=4096 C=1000", (4096, 1000), MATCHED + "1000"),
    Launch(ROWS, "plain bf16 B=4096 C=1000", (4096, 1000), PERMUTED + "1000"),
    Launch(ROWS, "plain, matched bf16 B=4096 C=4096", (4096, 4096), MATCHED + "4096"),
    Launch(ROWS, "plain bf16 B=4096 C=4096", (4096, 4096), PERMUTED + "4096"),
    Launch(LOOP, "plain, matched bf16 B=64 C=32000", (4096, 32000), MATCHED + "32000"),
    Launch(LOOP, "plain bf16 B=64 C=32000", (4096, 32000), PERMUTED + "32000"),
    Launch(GRAD, "plain bf16 C=32000", (4096, 32000), PERMUTED.replace(ROWS, GRAD) + "32000"),
    *(
        Launch(kernel, LONG, HIDDEN, f"{kernel} torch.bfloat16 B<=256 N=98304")
        for kernel in ("_mix_kernel", "_mix_grad_kernel", "_inner_product_kernel")
    ),
)


def over_predicted(timed: Mapping[str, Any], rows: Iterable[Row]) -> list[str]:
    """Measured over predicted, a line a launch of MAIN that has been timed.

    Args:
        timed: a file of `fastamp.kernels.tuning`: by name, milliseconds of candidates, that of config.py first.
        rows: of the report, for one target.
    """
    known = {(row["kernel"], row["case"]): row for row in rows}
    lines = []
    for launch in MAIN:
        times = launch.microseconds(known[launch.kernel, launch.case])
        predicted, bound = max((time, resource) for resource, time in times.items())
        for name, found in timed.items():
            measured = next(iter(found["ms"].values()))
            if measured and re.fullmatch(launch.name, name):
                lines.append(
                    f"{launch.kernel} [{launch.case}] at {launch.shape}: {1e3 * measured:.1f} us measured, "
                    f"{predicted:.1f} us predicted ({bound}): {1e3 * measured / predicted:.2f}"
                )
    return lines
