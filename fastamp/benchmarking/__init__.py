"""How long a training step takes with plain Mixup, with AMP as one writes it, and with fastamp.

What is behind `fastamp bench` and the files in bench/.
"""

from fastamp.benchmarking import machine
from fastamp.benchmarking.contenders import MIXUP, STEP_SIZE, Contender, contenders
from fastamp.benchmarking.measure import GPU_ONLY, SHAPES, BenchConfig, run, write
from fastamp.benchmarking.report import draw_png, draw_terminal, print_results
from fastamp.benchmarking.workload import DTYPES, Runner, Workload, disagreement

__all__ = [
    "DTYPES",
    "GPU_ONLY",
    "MIXUP",
    "SHAPES",
    "STEP_SIZE",
    "BenchConfig",
    "Contender",
    "Runner",
    "Workload",
    "contenders",
    "disagreement",
    "draw_png",
    "draw_terminal",
    "machine",
    "print_results",
    "run",
    "write",
]
