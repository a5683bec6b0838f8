"""Steps from the last hidden rows or from logits on: the suites "head", "scaling" and "vocabulary".

Without a `Mix` a contender draws its own λ and partners, which is how it is timed: drawing costs launches as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastamp import AMPLoss, Mix, functional
from fastamp.benchmarking import peers
from fastamp.benchmarking.networks import Network, last_layer
from fastamp.benchmarking.peers import STEP_SIZE
from fastamp.benchmarking.workload import DTYPES, MIXUP, Contender, Note, Steps, copies_to_exceed_cache
from fastamp.policy import Pairing

PLAIN = "cross-entropy"
DEFINITION_ELEMENTS = 1 << 24  # of the definition of the official code's AMP, which holds (B, C, C) in float64
GROWING = (*MIXUP, "AMPLoss")  # of the suite "scaling"
WITH_VOCABULARY = (PLAIN, MIXUP[0], "AMP autograd", "AMPLoss", "linear_amp_cross_entropy")
AUTOTUNED_ELEMENTS = 1 << 20  # of logits: the compiler's search among products of more takes minutes
PAIRED_CLASSES = 1000  # from here on a kernel for pairs has rows long enough to be worth reading once
# The definition holds some twenty tensors of logits in float64: so many elements of each at a time.
TRUTH_ELEMENTS = 1 << 22


class Workload(Steps):
    """A linear layer, or nothing, and what comes before it.

    Args:
        shape: (B, D, C).
        dtype: a key of DTYPES.
        takes: "hidden": x is (B, D), and a linear layer follows; "logits": x is (B, C).
        device: where.
        captured: whether its steps are also to be timed as CUDA graphs, and rotate over several inputs.
        varies: the size whose growth it is a point of, or None.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: str,
        takes: str,
        device: torch.device,
        *,
        captured: bool = True,
        varies: str | None = None,
    ) -> None:
        self.shape, self.captured, self.varies = shape, captured, varies
        batch, width, classes = shape
        made: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
        columns = width if takes == "hidden" else classes
        # A step reads an input, and makes logits, or a gradient, of (B, C).
        moved = batch * (columns + classes) * DTYPES[dtype].itemsize
        inputs = []
        for _ in range(copies_to_exceed_cache(moved, device) if captured else 1):
            x = torch.randn(batch, columns, **made).to(DTYPES[dtype]).requires_grad_()
            inputs.append((x, torch.randint(classes, (batch,), **made)))
        head = nn.Linear(width, classes) if takes == "hidden" else nn.Identity()
        head.to(device, DTYPES[dtype])
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(torch.randn(parameter.shape, **made) * 2 / width**0.5)
        super().__init__(
            last_layer(head), inputs, max(1, TRUTH_ELEMENTS // max(width, classes)), dtype=dtype, takes=takes
        )
        self.sizes = {"B": batch, "D": width if takes == "hidden" else None, "C": classes}
        self.name = f"({batch}, {width}) -> {classes}" if takes == "hidden" else f"logits ({batch}, {classes})"
        if takes == "logits":
            self.least_bytes, self.moves = 2 * batch * classes * DTYPES[dtype].itemsize, "read B·C and write B·C"


def criterion(pairing: Pairing = "permutation") -> Callable[..., Any]:
    """`fastamp.AMPLoss` as the README uses it, or with other partners."""
    loss = AMPLoss(step_size=STEP_SIZE, pairing=pairing)
    return lambda network, x, y, mix: loss(network.model(x), y, mix=mix)


def linear_head(chunk_rows: int | None = None) -> Callable[..., Any]:
    """`linear_amp_cross_entropy`: the head inside the operation, `chunk_rows` rows of logits at a time."""
    amp = AMPLoss(step_size=STEP_SIZE)

    def loss(network: Network, x: Tensor, y: Tensor, mix: Mix | None) -> Any:
        lam, partner = amp.sample(len(x), device=x.device) if mix is None else mix
        weight, bias = network.model.parameters()
        return functional.linear_amp_cross_entropy(
            x, weight, bias, y, lam, partner, step_size=STEP_SIZE, chunk_rows=chunk_rows
        )

    return loss


def contenders() -> list[Contender]:
    """All there are, whatever the shape, dtype and device; new ones, so that nothing compiled is kept."""
    compiled, hidden = {"compiled": True}, {"takes": "hidden"}
    liger = {"takes": "hidden", "capturable": False}  # its steps read from the device
    searched = {"compile_mode": "max-autotune-no-cudagraphs", **compiled, **hidden}
    every: tuple[tuple[str, str, Callable[..., Any], dict[str, Any]], ...] = (
        (PLAIN, "none", peers.cross_entropy, {}),
        ("Mixup, two terms", "mixup", peers.mixup_two_terms, {}),
        ("Mixup, soft targets", "mixup", peers.mixup_soft_targets, {}),
        ("AMP autograd", "amp", peers.amp_autograd, hidden),
        ("AMPLoss", "amp", criterion(), {}),
        ("linear_amp_cross_entropy", "amp", linear_head(), hidden),
        ("cross-entropy, compiled", "none", peers.cross_entropy, {"takes": "logits", **compiled}),
        ("Mixup, compiled", "mixup", peers.mixup_two_terms, compiled),
        ("AMP torch.func, compiled", "amp", peers.amp_functorch, {**compiled, **hidden}),
        ("AMPLoss, compiled", "amp", criterion(), compiled),
        ("AMP, official code", "official", peers.amp_official, hidden),
        ("AMP torch.func, max-autotune", "amp", peers.amp_functorch, searched),
        ("AMPLoss, matching", "amp", criterion("matching"), {"takes": "logits", "matched": True}),
        ("Liger, no mixing", "none", peers.liger_cross_entropy, liger),
        ("torch fused linear, no mixing", "none", peers.torch_linear_cross_entropy, hidden),
        ("Liger fused linear, no mixing", "none", peers.liger_linear_cross_entropy, liger),
    )
    return [Contender(name, mode, loss, **options) for name, mode, loss, options in every]


def missing(work: Workload) -> dict[str, str | None]:
    """What keeps some contenders from running on a workload, by name; None where nothing does."""
    batch, _, classes = work.shape
    gpu = None if work.device.type == "cuda" else "it takes a GPU"
    liger = gpu or (None if find_spec("liger_kernel") else "liger_kernel is not installed")
    official = None if work.dtype == "fp32" else "its binary cross-entropy of a softmax takes fp32"
    if batch * classes**2 > DEFINITION_ELEMENTS:
        official = official or f"its definition would hold ({batch}, {classes}, {classes})"
    few = f"kernels for pairs are for {PAIRED_CLASSES} classes or more"
    return {
        "AMP, official code": official,
        "AMP torch.func, max-autotune": "autotuning takes minutes" if batch * classes > AUTOTUNED_ELEMENTS else gpu,
        "AMPLoss, matching": few if classes < PAIRED_CLASSES else None,
        "torch fused linear, no mixing": None if hasattr(nn, "LinearCrossEntropyOptions") else "this torch lacks it",
        "Liger, no mixing": liger,
        "Liger fused linear, no mixing": liger,
    }


def of_vocabulary(work: Workload) -> list[Contender]:
    """Who belongs to the suite "vocabulary", ratios being to a linear layer and cross-entropy.

    On a CPU `linear_amp_cross_entropy` is timed in chunks of a quarter of the rows as well.
    """
    every = [one for one in contenders() if one.name in WITH_VOCABULARY or "fused linear" in one.name]
    if work.device.type == "cpu":
        rows = max(1, work.shape[0] // 4 - 2)
        every.append(Contender(f"linear_amp_cross_entropy, chunks of {rows}", "amp", linear_head(rows)))
    return [replace(one, base=(PLAIN,)) for one in every]


def present(work: Workload, every: list[Contender], note: Note) -> list[Contender]:
    """Who of them can run on a workload; `note` is called with who cannot, and why."""
    taken, reasons = [], missing(work)
    for one in every:
        if one.takes in (work.takes, "both"):
            if reasons.get(one.name) is None:
                taken.append(one)
            else:
                note(f"{one.name}: not run, {reasons[one.name]}")
    return taken
