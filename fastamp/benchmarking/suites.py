"""The suites of `fastamp bench`: which workloads each has on which device, and who is timed there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastamp.benchmarking.heads import GROWING, Workload, contenders, of_vocabulary, present
from fastamp.benchmarking.layers import LayerWorkload, layer_contenders
from fastamp.benchmarking.networks import NETWORKS
from fastamp.benchmarking.operations import OPERATIONS, HiddenWork, operation_contenders
from fastamp.benchmarking.workload import DTYPES, Contender, Note, Work
from fastamp.training.config import usable_device

Shape = tuple[int, int, int]
Works = Iterator[tuple[Work, list[Contender]]]  # one at a time, with who is timed there
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
# What grows: the size, the input, the shape (B, D, C) without it, and its values: eleven powers of two, the smaller
# ones to show where the time is that of the calls themselves. At most 2^24 elements a batch on a CPU, 2^27 on a GPU.
Growing = tuple[str, str, Shape, tuple[int, ...]]
_POWERS = tuple(2**i for i in range(4, 18))
GROWTH: dict[str, tuple[Growing, ...]] = {
    "cuda": (
        ("B", "logits", (0, 0, 1024), _POWERS[3:]),
        ("C", "logits", (1024, 0, 0), _POWERS[3:]),
        ("D", "hidden", (8192, 0, 16), _POWERS[:11]),
    ),
    "cpu": (
        ("B", "logits", (0, 0, 128), _POWERS[1:12]),
        ("C", "logits", (128, 0, 0), _POWERS[1:12]),
        ("D", "hidden", (1024, 0, 16), _POWERS[:11]),
    ),
}
OPTIONS = ("shapes", "dtypes", "networks", "compiled")  # each of some suites only


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Raises:
        ValueError: a value out of range, an option that the suite does not take, or a device that is not there.
    """

    suite: str = "head"  # a key of SUITES
    shapes: tuple[Shape, ...] | None = None  # (B, D, C) each; None for the suite's own
    dtypes: tuple[str, ...] | None = None  # keys of DTYPES; None for fp32 on a CPU, also bf16 on a GPU
    networks: tuple[str, ...] | None = None  # keys of NETWORKS; None for those that suit the device
    rounds: int = 40  # in each of which every contender runs once
    threads: int = 1  # intra-op, on a CPU
    device: str = "cpu"  # as in torch.device
    compiled: bool | None = None  # also time what goes through torch.compile; None for yes
    autotuned: bool = True  # and what it searches the fastest products for, which takes minutes
    inputs: tuple[str, ...] = INPUTS  # of the suite "head"
    notes: tuple[str, ...] = ()  # what the results are to say of themselves

    def __post_init__(self) -> None:
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        given = (("suite", (self.suite,), SUITES), ("dtype", self.dtypes or (), DTYPES))
        for kind, names, taken in (*given, ("inputs", self.inputs, INPUTS), ("network", self.networks or (), NETWORKS)):
            for one in names:
                if one not in taken:
                    raise ValueError(f"unknown {kind} {one!r}; takes {', '.join(taken)}")
        check_options(self.suite, SUITES[self.suite].options, vars(self))
        for shape in self.shapes or ():
            if len(shape) != 3 or min(shape) < 1:
                raise ValueError(f"a shape is (B, D, C), each at least 1, got {shape}")
        self.torch_device()

    def torch_device(self) -> torch.device:
        """The device, found to be there."""
        return torch.empty(0, device=usable_device(self.device)).device

    @property
    def with_compiled(self) -> bool:
        """Whether what goes through torch.compile is timed as well."""
        return self.compiled is not False

    def dtypes_on(self, device: torch.device) -> tuple[str, ...]:
        """Those given, or those for the device."""
        return self.dtypes or (("fp32",) if device.type == "cpu" else ("fp32", "bf16"))


def check_options(suite: str, taken: tuple[str, ...], given: Mapping[str, Any]) -> None:
    """Refuses, by a ValueError, one of OPTIONS that is given and not taken."""
    for name in OPTIONS:
        if given[name] is not None and name not in taken:
            raise ValueError(f"{name} is no option of the suite {suite}, which takes {', '.join(taken) or 'none'}")


def heads(config: BenchConfig, device: torch.device, note: Note) -> Works:
    """The suite "head", first what results are wanted for most."""
    dtypes, shapes = config.dtypes_on(device), config.shapes or SHAPES
    every = [(takes, dtype, shape) for takes in config.inputs for dtype in dtypes for shape in shapes]
    if config.shapes is None and device.type == "cuda" and ("logits", "bf16", SHAPES[0]) in every:
        every.append(("logits", "bf16", WIDE))
    for takes, dtype, shape in sorted(every, key=lambda one: not _is_wanted(*one)):
        if device.type == "cpu" and shape[0] * shape[2] > GPU_ONLY:
            note(f"{shape} {dtype} {takes}: not run, it takes a GPU")
        else:
            work = Workload(shape, dtype, takes, device)
            given = [one for one in contenders() if config.with_compiled or not one.compiled]
            if config.with_compiled and not config.autotuned:
                given = [one for one in given if one.compile_mode is None]
                note("torch.compile's search for the fastest products is left out")
            yield work, present(work, given, note)


def _is_wanted(takes: str, dtype: str, shape: Shape) -> bool:
    return shape in PAPER if takes == "hidden" else dtype == "bf16" and shape[2] >= MANY_CLASSES


def networks(config: BenchConfig, device: torch.device, note: Note) -> Works:
    """The suite "layers"."""
    for name in config.networks or NETWORKS:
        spec = NETWORKS[name]
        if (missing := spec.missing()) is not None:
            note(f"{name}: not run, {missing} is not installed")
        elif config.networks is None and spec.needs_gpu and device.type == "cpu":
            note(f"{name}: not run, it takes a GPU")
        else:
            work = LayerWorkload(spec, device)
            yield work, layer_contenders(work, compiled=config.with_compiled)


def rows(config: BenchConfig, device: torch.device, note: Note) -> Works:
    """The suite "rows"."""
    for dtype in config.dtypes_on(device):
        for op, operation in OPERATIONS.items():
            for shape in operation.shapes[device.type == "cuda"]:
                yield HiddenWork(op, shape, dtype, device), operation_contenders(op, compiled=config.with_compiled)


def scaling(config: BenchConfig, device: torch.device, note: Note) -> Works:
    """The suite "scaling", in fp32."""
    if device.type == "cpu":
        note("scaling: up to 2^24 elements a batch, for a CPU; on a GPU up to 2^27")
    for size, takes, shape, values in GROWTH[device.type]:
        for value in values:
            batch, width, classes = (value if name == size else fixed for name, fixed in zip("BDC", shape, strict=True))
            work = Workload((batch, max(1, width), classes), "fp32", takes, device, varies=size)
            yield work, [one for one in contenders() if one.name in GROWING]


def vocabulary(config: BenchConfig, device: torch.device, note: Note) -> Works:
    """The suite "vocabulary"; not captured, for graphs keep their memory."""
    if config.shapes is None and device.type == "cpu":
        note(f"vocabulary: {VOCABULARY['cpu'][0]}, for a CPU; on a GPU {', '.join(map(str, VOCABULARY['cuda']))}")
    for dtype in config.dtypes or ("fp32" if device.type == "cpu" else "bf16",):
        for shape in config.shapes or VOCABULARY[device.type]:
            work = Workload(shape, dtype, "hidden", device, captured=False)
            yield work, present(work, of_vocabulary(work), note)


class Suite(NamedTuple):
    """What `fastamp bench --suite NAME` measures."""

    options: tuple[str, ...]  # of OPTIONS
    works: Callable[[BenchConfig, torch.device, Note], Works]
    reduced: dict[str, Any]  # how it takes less than a minute on a CPU


UNCOMPILED = "reduced: nothing compiled"
SUITES = {
    "head": Suite(
        ("shapes", "dtypes", "compiled"),
        heads,
        {"shapes": SHAPES[:5:2], "compiled": False, "notes": (f"{UNCOMPILED}, three shapes",)},
    ),
    "layers": Suite(
        ("networks", "compiled"),
        networks,
        {"networks": ("textcnn",), "compiled": False, "notes": (f"{UNCOMPILED}, the TextCNN alone",)},
    ),
    "rows": Suite(("dtypes", "compiled"), rows, {"compiled": False, "notes": (UNCOMPILED,)}),
    "scaling": Suite((), scaling, {}),
    "vocabulary": Suite(("shapes", "dtypes"), vocabulary, {}),
}


def reduced(*, rounds: int, threads: int, device: str) -> tuple[BenchConfig, ...]:
    """Every suite in so few shapes that all take some minutes on two CPU cores; `notes` say what is left out."""
    common: dict[str, Any] = {"device": device, "rounds": rounds, "threads": threads}
    return tuple(BenchConfig(suite=name, **common, **suite.reduced) for name, suite in SUITES.items())
