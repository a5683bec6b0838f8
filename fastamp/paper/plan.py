"""What every table and figure of the paper consists of. Every command takes other data sets, backbones and methods."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastamp.training.recipes import RECIPES

ALPHAS = (0.2, 0.5, 1.0, 1.5)
STEP_SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)  # beside the paper's 0.002
# A step of λ of a few roundings: what it changes is what chaos makes of any change.
PLACEBO, PLACEBO_LABEL = 1e-6, "placebo (ε = 1e-6)"
RATIOS = (0.03, 0.04, 0.05, 0.1, 0.15, 0.2, 0.4, 0.8, 1.0)

_LEVELS = {"word": "Word", "sent": "Sent"}


@dataclass(frozen=True)
class Method:
    """A row of a table: its name in print, and its fields of `TrainConfig`."""

    label: str
    fields: Mapping[str, Any]


# Name of a variant to what follows the method's label, and to fields of `TrainConfig`.
_MIXUP_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"@alpha={alpha:g}": (f", α = {alpha:g}", {"alpha": alpha}) for alpha in ALPHAS if alpha != 1.0},
    "@official": (", published code", {"preset": "official"}),
}
_AMP_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **_MIXUP_VARIANTS,
    "@placebo": (f", {PLACEBO_LABEL}", {"step_size": PLACEBO}),
    **{f"@eps={step:g}": (f", ε = {step:g}", {"step_size": step}) for step in STEP_SIZES},
    "@redrawn": (", dropout redrawn", {"pass_dropout": "redrawn"}),
    "@eps=0+redrawn": (
        ", ε = 0, dropout redrawn",
        {"step_size": 0.0, "pass_dropout": "redrawn"},
    ),
    "@official+no-reweight": (
        ", published code, not re-weighted",
        {"preset": "official", "reweight": "none"},
    ),
    "@official+shared": (
        ", published code, dropout shared",
        {"preset": "official", "pass_dropout": "shared"},
    ),
    "@paper": (", preset paper", {"preset": "paper"}),
}

METHODS: dict[str, Method] = {
    name: Method(label, {"method": name})
    for name, label in {
        "none": "Baseline",
        "word-mixup": "WordMixup",
        "sent-mixup": "SentMixup",
        "nonlinear-mixup": "Non-linear Mixup (ours)",
        "word-amp": "WordAMP",
        "sent-amp": "SentAMP",
        "word-maxop": "Word +MaxOp",
        "sent-maxop": "Sent +MaxOp",
        "double-softmax": "Baseline, double softmax",
    }.items()
} | {
    f"{level}-{kind}{variant}": Method(f"{label}{name}{suffix}", {"method": f"{level}-{kind}", **fields})
    for level, label in _LEVELS.items()
    for kind, name, variants in (("mixup", "Mixup", _MIXUP_VARIANTS), ("amp", "AMP", _AMP_VARIANTS))
    for variant, (suffix, fields) in variants.items()
}


@dataclass(frozen=True)
class Cell:
    """What is averaged over seeds."""

    dataset: str  # one of fastamp.data.DATASETS
    model: str  # one of fastamp.training.RECIPES
    method: str  # one of METHODS
    ratio: float = 1.0  # share of the training data, in (0, 1]


@dataclass(frozen=True)
class Run(Cell):
    """One training run; `seed` is that of everything."""

    seed: int = 0

    @property
    def key(self) -> str:
        """Names the run in a results folder."""
        return f"{self.dataset}/{self.model}/{self.method}/{self.ratio:g}/{self.seed}"


@dataclass(frozen=True)
class Request:
    """What a command asks for: every combination of these, for the table or figure of that name."""

    experiment: str
    datasets: Sequence[str]
    models: Sequence[str]
    methods: Sequence[str]
    ratios: Sequence[float]
    seeds: Sequence[int]

    def runs(self, overrides: Collection[str] = ()) -> list[Run]:
        """The runs, each once, all of a seed before those of the next; `overrides` names fields of TrainConfig set.

        Non-linear Mixup is run where the paper prints it.
        """
        runs = (
            Run(dataset, model, method if _DECIDE_MINOP & {*overrides} else same_method(model, method), ratio, seed)
            for seed in self.seeds
            for dataset in self.datasets
            for model in self.models
            for ratio in self.ratios
            for method in self.methods
            if method != "nonlinear-mixup" or model in _WITH_NONLINEAR
        )
        return list(dict.fromkeys(runs))


_WITH_NONLINEAR = ("cnn-glove", "cnn-glove-tuned")
# With these a head that is affine in λ does not make +MaxOp AMP.
_DECIDE_MINOP = {"preset", "pass_dropout", "reweight"}


def same_method(model: str, method: str) -> str:
    """What a method is with a backbone: of two that train the same, bit for bit, one name.

    Behind its sentence vectors a CNN is dropout and a linear layer, so that the loss is convex in λ. A step along its
    slope cannot lower it, MinOp has nothing to reject, and +MaxOp is AMP.
    """
    return "sent-amp" if (method, RECIPES[model].fields["model"]) == ("sent-maxop", "textcnn") else method


def in_figure2(run: Cell) -> bool:
    """Whether Figure 2 draws a run's loss against λ."""
    figure, fields = EXPERIMENTS["figure2"], ("dataset", "model", "method", "ratio")
    return all(getattr(run, field) in getattr(figure, f"{field}s") for field in fields)


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper, or one beyond it, and its full extent; a command may ask for less, or others."""

    title: str
    datasets: tuple[str, ...]
    models: tuple[str, ...]
    methods: tuple[str, ...]
    ratios: tuple[float, ...] = (1.0,)
    comparisons: tuple[tuple[str, str], ...] = ()  # (method, baseline) whose difference is tested
    labels: Mapping[str, str] = field(default_factory=dict)  # of methods that the table names otherwise than METHODS


def _at_both(*names: str) -> tuple[str, ...]:
    """The names with "word-" and with "sent-" before them."""
    return tuple(f"{level}-{name}" for level in _LEVELS for name in names)


def _pairs(*pairs: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """(method, baseline) with "word-" and with "sent-" before both; a baseline of another kind stays as it is."""
    known = {name.partition("-")[2] for name in METHODS}
    return tuple(
        (f"{level}-{method}", f"{level}-{baseline}" if baseline in known else baseline)
        for level in _LEVELS
        for method, baseline in pairs
    )


_OURS = ("@redrawn", "@eps=0+redrawn", "@paper")
_OFFICIAL = ("@official", "@official+no-reweight", "@official+shared")
_CONTROLS = (
    "amp@placebo",
    *(f"amp@eps={step:g}" for step in STEP_SIZES),
    *(f"amp{name}" for name in (*_OURS, *_OFFICIAL)),
)
_ALPHAS = tuple("" if alpha == 1.0 else f"@alpha={alpha:g}" for alpha in ALPHAS)

EXPERIMENTS: dict[str, Experiment] = {
    "table2": Experiment(
        "Test error of five backbones on five data sets",
        ("trec", "sst1", "sst2", "subj", "mr"),
        ("lstm-rand", "lstm-glove", "cnn-rand", "cnn-glove", "bert"),
        ("none", "nonlinear-mixup", "sent-mixup", "sent-amp", "word-mixup", "word-amp"),
        comparisons=(*_pairs(("amp", "mixup")), *_pairs(("mixup", "none")), ("nonlinear-mixup", "none")),
    ),
    "table3": Experiment(
        "Test error with a share of the training data",
        ("trec",),
        ("bert",),
        ("sent-mixup", "sent-amp"),
        RATIOS,
        comparisons=(("sent-amp", "sent-mixup"),),
    ),
    "table4": Experiment(
        "Ablation: what each operation adds",
        ("trec",),
        ("cnn-glove", "bert"),
        ("none", *_at_both("mixup", "maxop", "amp")),
        comparisons=_pairs(("mixup", "none"), ("maxop", "mixup"), ("amp", "maxop")),
        labels={f"{level}-mixup": f"{label} +RandOp ({label}Mixup)" for level, label in _LEVELS.items()},
    ),
    "table5": Experiment(
        "Test error by the distribution of the mixing coefficient, λ ~ Beta(α, α)",
        ("trec", "sst2", "mr"),
        ("bert",),
        tuple(f"word-{kind}{alpha}" for alpha in _ALPHAS for kind in ("mixup", "amp")),
        comparisons=tuple((f"word-amp{alpha}", f"word-mixup{alpha}") for alpha in _ALPHAS),
    ),
    "figure2": Experiment(
        "Loss against λ, for two pairs and for the test set",
        ("trec",),
        ("bert",),
        ("sent-mixup", "sent-amp"),
        (0.03,),
        comparisons=(("sent-amp", "sent-mixup"),),
    ),
    "controls": Experiment(
        "Beyond the paper: what acts, the step of λ, the dropout, or the re-weighting",
        ("trec",),
        ("cnn-glove",),
        ("none", "double-softmax", *_at_both("mixup", "mixup@official", "amp", *_CONTROLS)),
        comparisons=(
            *_pairs(("mixup", "none")),
            *_pairs(("mixup", "double-softmax")),
            *_pairs(
                ("amp", "mixup"),
                *((name, "mixup") for name in _CONTROLS if "official" not in name),
                ("amp", "amp@placebo"),
                ("amp@redrawn", "amp@eps=0+redrawn"),
                *((f"amp{name}", "mixup@official") for name in _OFFICIAL),
                ("amp@official", "amp@official+no-reweight"),
            ),
            ("double-softmax", "none"),
        ),
    ),
}
