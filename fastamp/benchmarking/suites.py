"""The suites of `fastamp bench`: which workloads each has on which device, and who is timed there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fastamp.benchmarking.contenders import (
    MIXUP,
    Contender,
    conditional_contenders,
    contenders,
    vocabulary_contenders,
)
from fastamp.benchmarking.layers import LayerWorkload, layer_contenders
from fastamp.benchmarking.networks import NETWORKS
from fastamp.benchmarking.operations import (
    GPU_HIDDEN_SHAPES,
    HIDDEN_SHAPES,
    OPERATIONS,
    HiddenWork,
    operation_contenders,
)
from fastamp.benchmarking.workload import DTYPES, Work, Workload, copies_to_exceed_cache
from fastamp.chunked_head import automatic_rows

Shape = tuple[int, int, int]
# (B, D, C): the paper's CNN on TREC, its LSTM on two classes, BERT-base on five and on two; images of a thousand
# classes and of ImageNet-21k's; and a vocabulary.
SHAPES: tuple[Shape, ...] = (
    (50, 300, 6),
    (50, 1024, 2),
    (24, 768, 5),
    (24, 768, 2),
    (256, 2048, 1000),
    (1024, 1024, 21841),
    (4096, 1024, 32000),
)
VOCABULARY: dict[str, tuple[Shape, ...]] = {
    "cuda": ((4096, 4096, 32000), (8192, 2048, 128256)),
    "cpu": ((512, 256, 16000),),
}
PAPER = SHAPES[:4]
# Besides, in bf16 on a GPU, logits of the largest vocabulary: 2 GB a tensor, and the check needs about 55 GB.
WIDE: Shape = (8192, 2048, 128256)
MANY_CLASSES = 32000
GPU_ONLY = 1 << 24  # logits of a batch beyond which a CPU would take minutes
INPUTS = ("hidden", "logits")
# What grows, in what: the input, the shape (B, D, C) without it, and its sizes: eleven powers of two, the smaller ones
# to show where the time is that of the calls themselves. At most 2^24 elements a batch on a CPU, 2^27 on a GPU.
GROWTH: dict[str, tuple[tuple[str, str, Shape, tuple[int, ...]], ...]] = {
    "cuda": (
        ("B", "logits", (0, 0, 1024), tuple(2**i for i in range(7, 18))),
        ("C", "logits", (1024, 0, 0), tuple(2**i for i in range(7, 18))),
        ("D", "hidden", (8192, 0, 16), tuple(2**i for i in range(4, 15))),
    ),
    "cpu": (
        ("B", "logits", (0, 0, 128), tuple(2**i for i in range(5, 16))),
        ("C", "logits", (128, 0, 0), tuple(2**i for i in range(5, 16))),
        ("D", "hidden", (1024, 0, 16), tuple(2**i for i in range(4, 15))),
    ),
}
GROWING = (*MIXUP, "AMPLoss")


def dtypes_of(given: Sequence[str] | None, device: torch.device) -> Sequence[str]:
    """Those given, or fp32 on a CPU, fp32 and bf16 on a GPU."""
    return given or (("fp32",) if device.type == "cpu" else ("fp32", "bf16"))


def heads(
    shapes: Sequence[Shape] | None,
    dtypes: Sequence[str] | None,
    inputs: Sequence[str],
    device: torch.device,
    note: Callable[[str], None],
) -> Iterator[Work]:
    """The workloads of the suite "head", one at a time, first those that bench/README.md has a target for.

    Args:
        shapes: (B, D, C) each; None for SHAPES.
        dtypes: keys of DTYPES; None as in `dtypes_of`.
        inputs: of INPUTS.
        device: where.
        note: hears what is not run, and why.
    """
    every = [
        (takes, dtype, shape) for takes in inputs for dtype in dtypes_of(dtypes, device) for shape in shapes or SHAPES
    ]
    if shapes is None and device.type == "cuda" and ("logits", "bf16", SHAPES[0]) in every:
        every.append(("logits", "bf16", WIDE))
    for takes, dtype, shape in sorted(every, key=lambda one: not _has_target(*one)):
        if device.type == "cpu" and shape[0] * shape[2] > GPU_ONLY:
            note(f"{shape} {dtype} {takes}: not run, it takes a GPU")
        else:
            yield Workload(shape, dtype, takes, device, _copies(shape, dtype, takes, device))


def _has_target(takes: str, dtype: str, shape: Shape) -> bool:
    return shape in PAPER if takes == "hidden" else dtype == "bf16" and shape[2] >= MANY_CLASSES


def _copies(shape: Shape, dtype: str, takes: str, device: torch.device) -> int:
    """How many inputs to rotate over: a step reads one, and makes logits, or a gradient, of (B, C)."""
    batch, width, classes = shape
    elements = batch * (width if takes == "hidden" else classes) + batch * classes
    return copies_to_exceed_cache(elements * DTYPES[dtype].itemsize, device)


def networks(names: Sequence[str] | None, device: torch.device, note: Callable[[str], None]) -> Iterator[Work]:
    """The workloads of the suite "layers", one at a time: a large one's memory is free again before the next.

    Args:
        names: keys of NETWORKS; None for those that suit the device.
        device: where.
        note: hears what is not run, and why.
    """
    for name in names or NETWORKS:
        spec = NETWORKS[name]
        if (missing := spec.missing()) is not None:
            note(f"{name}: not run, {missing} is not installed")
        elif names is None and spec.needs_gpu and device.type == "cpu":
            note(f"{name}: not run, it takes a GPU")
        else:
            yield LayerWorkload(spec, device)


def rows(dtypes: Sequence[str] | None, device: torch.device) -> Iterator[Work]:
    """The workloads of the suite "rows", one at a time."""
    for dtype in dtypes_of(dtypes, device):
        for shape in HIDDEN_SHAPES if device.type == "cpu" else GPU_HIDDEN_SHAPES:
            for op in OPERATIONS:
                yield HiddenWork(op, shape, dtype, device)


def scaling(device: torch.device, note: Callable[[str], None]) -> Iterator[Work]:
    """The workloads of the suite "scaling", one at a time, in fp32."""
    if device.type == "cpu":
        note("scaling: up to 2^24 elements a batch, for a CPU; on a GPU up to 2^27")
    for size, takes, shape, values in GROWTH[device.type]:
        for value in values:
            batch, width, classes = (value if name == size else fixed for name, fixed in zip("BDC", shape, strict=True))
            sizes = (batch, max(1, width), classes)
            yield Workload(sizes, "fp32", takes, device, _copies(sizes, "fp32", takes, device), varies=size)


def vocabulary(
    shapes: Sequence[Shape] | None, dtypes: Sequence[str] | None, device: torch.device, note: Callable[[str], None]
) -> Iterator[Work]:
    """The workloads of the suite "vocabulary", one at a time; not captured, for graphs keep their memory.

    Args:
        shapes: (B, D, C) each; None for those of the device in VOCABULARY.
        dtypes: keys of DTYPES; None for fp32 on a CPU, bf16 on a GPU.
        device: where.
        note: hears what is reduced.
    """
    if shapes is None and device.type == "cpu":
        note(f"vocabulary: {VOCABULARY['cpu'][0]}, for a CPU; on a GPU {', '.join(map(str, VOCABULARY['cuda']))}")
    for dtype in dtypes or ("fp32" if device.type == "cpu" else "bf16",):
        for shape in shapes or VOCABULARY[device.type]:
            yield Workload(shape, dtype, "hidden", device, captured=False)


def contenders_of(
    suite: str, work: Work, *, compiled: bool, autotuned: bool, note: Callable[[str], None]
) -> list[Contender]:
    """Who is timed on a workload.

    Args:
        suite: the workload's.
        work: what.
        compiled: also what goes through torch.compile.
        autotuned: also, with `compiled`, what it searches the fastest products for.
        note: hears who is not, and why.
    """
    if isinstance(work, LayerWorkload):
        return layer_contenders(work, compiled=compiled)
    if isinstance(work, HiddenWork):
        return operation_contenders(work.op, compiled=compiled)
    assert isinstance(work, Workload)
    if suite == "scaling":
        return [one for one in contenders(work.takes, compiled=False) if one.name in GROWING]
    if suite == "vocabulary":
        whole = automatic_rows(work.inputs[0][0], work.shape[2], (True, True, True)) is None
        every = vocabulary_contenders(work.shape[0], whole=whole)
    else:
        every = contenders(work.takes, compiled=compiled) + conditional_contenders(work.takes, compiled=compiled)
    taken = []
    for one in every:
        missing = "autotuning is left out" if one.compile_mode and not autotuned else one.missing(work)
        if missing is None:
            taken.append(one)
        else:
            note(f"{one.name}: not run, {missing}")
    return taken
