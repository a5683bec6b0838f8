"""What is measured against what: a training step's loss, by the peers of `peers` and by fastamp.

How a contender is called stands in `peers`; in `layers` its head is a network, and in `operations` it is one operation.
Without a `Mix` a contender draws its own λ and partners, which is how it is timed: drawing costs launches too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastamp import AMPLoss, Mix, functional
from fastamp.benchmarking import peers
from fastamp.benchmarking.peers import STEP_SIZE

if TYPE_CHECKING:
    from fastamp.benchmarking.workload import Workload

Loss = Callable[..., Any]
MIXUP = ("Mixup, two terms", "Mixup, soft targets")  # the faster of the two is what ratios are to
PLAIN, NAIVE = "cross-entropy", "AMP autograd"  # what else a row says its ratio to
DEFINITION_ELEMENTS = 1 << 24  # of the definition of the official code's AMP, which holds (B, C, C) in float64
AUTOTUNED_ELEMENTS = 1 << 20  # of logits: the compiler's search among products of more takes minutes
PAIRED_CLASSES = 1000  # from here on a kernel for pairs has rows long enough to be worth reading once


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss.

    Attributes:
        name: as results show it.
        mode: what it claims to compute: "none", "official", or a mode of `fastamp.AMPLoss`.
        loss: how.
        compiled: whether `loss` goes through torch.compile.
        takes: "hidden" (needs a head), "logits" (needs none) or "both".
        base: names of what its ratio is to: the fastest of them; the plain Mixups of its kind.
        compile_mode: torch.compile's.
        missing: says what keeps it from running on a workload, or None.
        matched: whether its partners are a matching, each the other's.
        capturable: whether its step can be captured in a CUDA graph, as far as is known.
    """

    name: str
    mode: str
    loss: Loss
    compiled: bool = False
    takes: str = "both"
    base: tuple[str, ...] = MIXUP
    compile_mode: str | None = None
    missing: Callable[[Workload], str | None] = lambda work: None
    matched: bool = False
    capturable: bool = True


class Criterion:
    """`fastamp.AMPLoss` as the README uses it, or with other partners."""

    def __init__(self, *, pairing: str = "permutation") -> None:
        self.criterion = AMPLoss(step_size=STEP_SIZE, pairing=pairing)

    def __call__(self, head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
        """The loss, as a peer gives it."""
        loss: Tensor = self.criterion(peers.logits_of(head, x), y, mix=mix)
        return loss


class LinearHead:
    """`linear_amp_cross_entropy`: the head inside the operation, `chunk_rows` rows of logits at a time."""

    def __init__(self, chunk_rows: int | None = None) -> None:
        self.criterion, self.chunk_rows = AMPLoss(step_size=STEP_SIZE), chunk_rows

    def __call__(self, head: nn.Linear | None, x: Tensor, y: Tensor, mix: Mix | None) -> Tensor:
        """The loss, as a peer gives it."""
        assert head is not None  # taken for hidden rows only
        lam, partner = self.criterion.sample(len(x), device=x.device) if mix is None else mix
        loss = functional.linear_amp_cross_entropy(
            x, head.weight, head.bias, y, lam, partner, step_size=STEP_SIZE, chunk_rows=self.chunk_rows
        )
        assert isinstance(loss, Tensor)
        return loss


def contenders(takes: str, *, compiled: bool) -> list[Contender]:
    """All that can be timed on one kind of input, whatever its shape, dtype and device.

    Args:
        takes: "hidden" or "logits".
        compiled: also those under torch.compile.
    """
    every = [
        Contender("cross-entropy", "none", peers.cross_entropy),
        Contender("Mixup, two terms", "mixup", peers.mixup_two_terms),
        Contender("Mixup, soft targets", "mixup", peers.mixup_soft_targets),
        Contender("AMP autograd", "amp", peers.amp_autograd, takes="hidden"),
        Contender("AMPLoss", "amp", Criterion()),
        Contender("linear_amp_cross_entropy", "amp", LinearHead(), takes="hidden"),
        Contender("cross-entropy, compiled", "none", peers.cross_entropy, compiled=True, takes="logits"),
        Contender("Mixup, compiled", "mixup", peers.mixup_two_terms, compiled=True),
        Contender("AMP torch.func, compiled", "amp", peers.amp_functorch, compiled=True, takes="hidden"),
        Contender("AMPLoss, compiled", "amp", Criterion(), compiled=True),
    ]
    return _taken(every, takes, compiled)


def conditional_contenders(takes: str, *, compiled: bool) -> list[Contender]:
    """Those that take a GPU, another package, or a small batch; `Contender.missing` says what a workload lacks."""
    every = [
        Contender("AMP, official code", "official", peers.amp_published, takes="hidden", missing=_definition_too_large),
        Contender(
            "AMP torch.func, max-autotune",
            "amp",
            peers.amp_functorch,
            compiled=True,
            takes="hidden",
            compile_mode="max-autotune-no-cudagraphs",
            missing=_not_autotuned,
        ),
        Contender(
            "AMPLoss, matching",
            "amp",
            Criterion(pairing="matching"),
            takes="logits",
            missing=_too_few_classes,
            matched=True,
        ),
        Contender(
            "Liger, no mixing",
            "none",
            peers.liger_cross_entropy,
            takes="hidden",
            missing=_no_liger,
            capturable=False,
        ),
        *FUSED_LINEAR,
    ]
    return _taken(every, takes, compiled)


def vocabulary_contenders(batch: int, *, whole: bool) -> list[Contender]:
    """Those of the suite "vocabulary", ratios being to a linear layer and cross-entropy.

    Args:
        batch: B.
        whole: `linear_amp_cross_entropy` holds all logits of itself; it is then timed in chunks, too.
    """
    every = [one for one in contenders("hidden", compiled=False) if one.name != "Mixup, soft targets"]
    if whole:
        rows = max(1, batch // 4 - 2)
        every.append(Contender(f"linear_amp_cross_entropy, chunks of {rows}", "amp", LinearHead(rows)))
    return [replace(one, base=(PLAIN,)) for one in [*every, *FUSED_LINEAR]]


def _taken(every: list[Contender], takes: str, compiled: bool) -> list[Contender]:
    return [one for one in every if one.takes in (takes, "both") and (compiled or not one.compiled)]


def _no_gpu(work: Workload) -> str | None:
    return None if work.device.type == "cuda" else "it takes a GPU"


def _not_autotuned(work: Workload) -> str | None:
    batch, _, classes = work.shape
    return "autotuning takes minutes" if batch * classes > AUTOTUNED_ELEMENTS else _no_gpu(work)


def _no_liger(work: Workload) -> str | None:
    if work.device.type == "cuda" and find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return _no_gpu(work)


def _no_fused_linear(work: Workload) -> str | None:
    return None if hasattr(nn, "LinearCrossEntropyOptions") else f"torch {torch.__version__} does not have it"


def _too_few_classes(work: Workload) -> str | None:
    return None if work.shape[2] >= PAIRED_CLASSES else f"kernels for pairs are for {PAIRED_CLASSES} classes or more"


def _definition_too_large(work: Workload) -> str | None:
    batch, _, classes = work.shape
    if work.dtype != "fp32":
        return "its binary cross-entropy of a softmax takes fp32"
    if batch * classes**2 > DEFINITION_ELEMENTS:
        return f"its definition would hold ({batch}, {classes}, {classes})"
    return None


FUSED_LINEAR = (
    Contender(
        "torch fused linear, no mixing",
        "none",
        peers.torch_linear_cross_entropy,
        takes="hidden",
        missing=_no_fused_linear,
    ),
    Contender(
        "Liger fused linear, no mixing",
        "none",
        peers.liger_linear_cross_entropy,
        takes="hidden",
        missing=_no_liger,
        capturable=False,  # it reads the number of labels back
    ),
)
