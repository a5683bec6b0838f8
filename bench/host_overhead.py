"""What the host does for one eager call on the Triton backend, on any machine: launches, operators, microseconds.

    python bench/host_overhead.py [--json FILE] [--rounds N]

At the paper's shapes a GPU waits for the host, so the eager time of a step is what Python, PyTorch's dispatcher and
Triton's launcher take. Here kernels are compiled objects whose launch is replaced by a note of their name, and tensors
lie on the CPU, where the few operators that are left take about a microsecond, most of it the dispatcher's: what is
timed is the host's part but for Triton's own launches, of which there is the number. A value that the library looks at
on a CPU and not on a GPU is not looked at here either. Plain Mixup beside it has no kernels of its own: each of its
operators is a launch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # kernels that are compiled, not interpreted

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import fastamp
import fastamp.kernels
from fastamp import functional, reduction
from fastamp.benchmarking import machine, peers
from fastamp.benchmarking.networks import last_layer
from fastamp.ops import linear_amp_cross_entropy

CALLS = 200
SHAPES = ((50, 300, 6), (24, 768, 2), (256, 2048, 1000), (64, 1024, 32000))
# Views: no launch. By their whole names, for select_backward and the like are none.
VIEWS = frozenset(
    ["view", "_unsafe_view", "expand", "unsqueeze", "select", "slice", "t", "transpose", "permute", "alias", "detach"]
)
Call = Callable[[], Any]


class Operators(TorchDispatchMode):
    """Counts the operators that touch memory; views and aliases are free of a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.split(".")[0] not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches_of(call: Call) -> list[str]:
    """The names of the kernels that a call launches, in order."""
    noted.clear()
    call()
    return list(noted)


def operators_of(call: Call) -> list[str]:
    """The operators that a call runs, its backward included."""
    with Operators() as seen:
        call()
    return seen.names


def microseconds(call: Call, rounds: int) -> float:
    """The median over rounds of the mean time of a call."""
    call()
    means = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        means.append(1e6 * (time.perf_counter() - began) / CALLS)
    return statistics.median(means)


noted: list[str] = []


def without_kernels() -> None:
    """Launches become notes, and CPU tensors are taken for a GPU's."""

    def run(kernel: JITFunction, *_: Any, **__: Any) -> None:
        noted.append(kernel.__name__)

    JITFunction.run = run
    os.environ["TRITON_INTERPRET"] = "1"  # from here on only a permission to take CPU tensors
    reduction.all_kept = lambda *_: False
    linear_amp_cross_entropy.checked_mix = lambda lam, *_, **__: lam


def calls(batch: int, width: int, classes: int) -> dict[str, Call]:
    """One training step of every kind, from logits or from hidden rows to their gradients."""
    logits = torch.randn(batch, classes, requires_grad=True)
    target = torch.randint(classes, (batch,))
    criterion, matching = fastamp.AMPLoss(), fastamp.AMPLoss(pairing="matching")
    head, alone = nn.Linear(width, classes), last_layer(nn.Identity())
    hidden = torch.randn(batch, width, requires_grad=True)

    def linear() -> Tensor:
        mix = criterion.sample(batch, device=hidden.device)
        return functional.linear_amp_cross_entropy(hidden, head.weight, head.bias, target, *mix)

    to_logits = {
        "AMPLoss": lambda: criterion(logits, target),
        "AMPLoss, matching": lambda: matching(logits, target),
        "AMPLoss, statistics": lambda: criterion(logits, target, return_stats=True)[0],
        "Mixup, two terms": lambda: peers.mixup_two_terms(alone, logits, target, None),
        "Mixup, soft targets": lambda: peers.mixup_soft_targets(alone, logits, target, None),
        "AMP autograd": lambda: peers.amp_autograd(alone, logits, target, None),
    }
    made: dict[str, Call] = {
        name: lambda loss=loss: torch.autograd.grad(loss(), logits) for name, loss in to_logits.items()
    }
    if classes <= 16:
        leaves = (hidden, head.weight, head.bias)
        made["linear_amp_cross_entropy"] = lambda: torch.autograd.grad(linear(), leaves)
    return made


def main() -> None:
    """Count, time, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the numbers go, beside the table")
    parser.add_argument("--rounds", type=int, default=15, help=f"of {CALLS} calls, whose median is taken")
    given = parser.parse_args()
    torch.set_num_threads(1)
    without_kernels()
    rows = []
    table = Table(title="Forward and backward from logits, on the host")
    for name in ("(B, C)", "step", "kernels", "operators", "µs without launches"):
        table.add_column(name, overflow="fold")
    for batch, width, classes in SHAPES:
        for name, call in calls(batch, width, classes).items():
            ours = "AMPLoss" in name or name.startswith("linear")
            with fastamp.set_backend("triton" if ours else "torch"):
                row: dict[str, Any] = {"shape": [batch, width, classes], "step": name}
                row |= {"kernels": launches_of(call), "operators": operators_of(call)}
                # Operators of other steps compute; only where ours do nothing else is the time the host's.
                row["us"] = round(microseconds(call, given.rounds), 1) if ours else None
            rows.append(row)
            cells = [str(len(row["kernels"])), str(len(row["operators"])), "" if row["us"] is None else str(row["us"])]
            table.add_row(f"({batch}, {classes})", name, *cells)
    Console(width=100).print(table)
    if given.json is not None:
        facts = {"device": machine.device_name(torch.device("cpu")), "versions": machine.versions()}
        given.json.write_text(json.dumps({**facts, "checkout": machine.commit(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
