"""How long a training step takes with plain Mixup, with AMP as one writes it, and with fastamp.

What is behind `fastamp bench` and the files in bench/.
"""

from fastamp.benchmarking import machine
from fastamp.benchmarking.compare import Change, Comparison, compare, print_comparison, read
from fastamp.benchmarking.contenders import MIXUP, Contender, LinearHead, conditional_contenders, contenders
from fastamp.benchmarking.layers import LayerWorkload, layer_contenders
from fastamp.benchmarking.measure import OF_SUITES, SUITES, BenchConfig, not_of, reduced, rehearse, run, write
from fastamp.benchmarking.networks import NETWORKS
from fastamp.benchmarking.operations import (
    HIDDEN_SHAPES,
    OPERATIONS,
    HiddenWork,
    operation_contenders,
    plain_lambda_grad,
    plain_mix,
    plain_remix,
)
from fastamp.benchmarking.peers import STEP_SIZE
from fastamp.benchmarking.plots import draw_all, draw_growth, draw_png, draw_roofline, draw_terminal
from fastamp.benchmarking.report import print_results
from fastamp.benchmarking.suites import GPU_ONLY, SHAPES, VOCABULARY
from fastamp.benchmarking.workload import DTYPES, Runner, Work, Workload, disagreement

__all__ = [
    "DTYPES",
    "GPU_ONLY",
    "HIDDEN_SHAPES",
    "MIXUP",
    "NETWORKS",
    "OF_SUITES",
    "OPERATIONS",
    "SHAPES",
    "STEP_SIZE",
    "SUITES",
    "VOCABULARY",
    "BenchConfig",
    "Change",
    "Comparison",
    "Contender",
    "HiddenWork",
    "LayerWorkload",
    "LinearHead",
    "Runner",
    "Work",
    "Workload",
    "compare",
    "conditional_contenders",
    "contenders",
    "disagreement",
    "draw_all",
    "draw_growth",
    "draw_png",
    "draw_roofline",
    "draw_terminal",
    "layer_contenders",
    "machine",
    "not_of",
    "operation_contenders",
    "plain_lambda_grad",
    "plain_mix",
    "plain_remix",
    "print_comparison",
    "print_results",
    "read",
    "reduced",
    "rehearse",
    "run",
    "write",
]
