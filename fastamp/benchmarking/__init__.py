"""How long a training step takes with plain Mixup, with AMP as one writes it, and with fastamp.

What is behind `fastamp bench` and the files in bench/.
"""

from fastamp.benchmarking import machine
from fastamp.benchmarking.contenders import MIXUP, STEP_SIZE, Contender, contenders
from fastamp.benchmarking.layers import LayerWorkload, layer_contenders
from fastamp.benchmarking.measure import GPU_ONLY, SHAPES, SUITES, BenchConfig, run, write
from fastamp.benchmarking.networks import NETWORKS
from fastamp.benchmarking.report import draw_png, draw_terminal, print_results
from fastamp.benchmarking.workload import DTYPES, Runner, Workload, disagreement

__all__ = [
    "DTYPES",
    "GPU_ONLY",
    "MIXUP",
    "NETWORKS",
    "SHAPES",
    "STEP_SIZE",
    "SUITES",
    "BenchConfig",
    "Contender",
    "LayerWorkload",
    "Runner",
    "Workload",
    "contenders",
    "disagreement",
    "draw_png",
    "draw_terminal",
    "layer_contenders",
    "machine",
    "print_results",
    "run",
    "write",
]
