"""How long a training step takes with plain Mixup, with AMP as one writes it, and with fastamp: `fastamp bench`."""

from fastamp.benchmarking.compare import compare, print_comparison, read
from fastamp.benchmarking.heads import Workload, contenders
from fastamp.benchmarking.layers import LayerWorkload, layer_contenders
from fastamp.benchmarking.measure import rehearse, run, write
from fastamp.benchmarking.networks import NETWORKS
from fastamp.benchmarking.operations import OPERATIONS, HiddenWork, operation_contenders
from fastamp.benchmarking.report import print_results
from fastamp.benchmarking.suites import SHAPES, SUITES, BenchConfig, check_options, reduced
from fastamp.benchmarking.workload import DTYPES, Contender

__all__ = [
    "DTYPES",
    "NETWORKS",
    "OPERATIONS",
    "SHAPES",
    "SUITES",
    "BenchConfig",
    "Contender",
    "HiddenWork",
    "LayerWorkload",
    "Workload",
    "check_options",
    "compare",
    "contenders",
    "layer_contenders",
    "operation_contenders",
    "print_comparison",
    "print_results",
    "read",
    "reduced",
    "rehearse",
    "run",
    "write",
]
