"""What every table and figure of the paper consists of.

The paper's text was not at hand when this was written. Table 2's extent, Table 3's being nine shares of the training
data, and what Figure 2 shows are the paper's; which shares, data sets and backbones Tables 3 to 5 have, and that
Table 4 is of α and Table 5 the ablation, is inferred. Every command takes others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastamp.data import DATASETS
from fastamp.training.recipes import RECIPES


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        label: as it is printed.
        fields: fields of `TrainConfig`.
    """

    label: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def _method(label: str, method: str, **fields: Any) -> Method:
    return Method(label, {"method": method, **fields})


ALPHAS = (0.2, 0.5, 1.0, 1.5)
STEP_SIZES = (0.002, 0.01, 0.03, 0.1, 0.3, 1.0)
RATIOS = (0.03, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)

_LEVELS = {"word": "Word", "sent": "Sent"}

METHODS: dict[str, Method] = {
    "none": _method("Baseline", "none"),
    "word-mixup": _method("WordMixup", "word-mixup"),
    "sent-mixup": _method("SentMixup", "sent-mixup"),
    "nonlinear-mixup": _method("Non-linear Mixup (reimplemented)", "nonlinear-mixup"),
    "word-amp": _method("WordAMP", "word-amp"),
    "sent-amp": _method("SentAMP", "sent-amp"),
    "word-maxop": _method("Word +MaxOp", "word-maxop"),
    "sent-maxop": _method("Sent +MaxOp", "sent-maxop"),
    "double-softmax": _method("Baseline of the published code (double softmax)", "double-softmax"),
}
for _level, _label in _LEVELS.items():
    for _alpha in ALPHAS:
        if _alpha != 1.0:  # the default, which is there without a suffix
            for _kind, _name in (("mixup", "Mixup"), ("amp", "AMP")):
                METHODS[f"{_level}-{_kind}@alpha={_alpha:g}"] = _method(
                    f"{_label}{_name}, α = {_alpha:g}", f"{_level}-{_kind}", alpha=_alpha
                )
    for _epsilon in STEP_SIZES[1:]:
        METHODS[f"{_level}-amp@eps={_epsilon:g}"] = _method(
            f"{_label}AMP, ε = {_epsilon:g}", f"{_level}-amp", step_size=_epsilon
        )
    METHODS |= {
        f"{_level}-amp@redrawn": _method(
            f"{_label}AMP, dropout redrawn between the passes", f"{_level}-amp", pass_dropout="redrawn"
        ),
        f"{_level}-amp@eps=0+redrawn": _method(
            f"{_label}AMP, ε = 0, dropout redrawn (the worse of two dropout draws)",
            f"{_level}-amp",
            step_size=0.0,
            pass_dropout="redrawn",
        ),
        f"{_level}-mixup@official": _method(
            f"{_label}Mixup as in the published code", f"{_level}-mixup", preset="official"
        ),
        f"{_level}-amp@official": _method(f"{_label}AMP as in the published code", f"{_level}-amp", preset="official"),
        f"{_level}-amp@official+no-reweight": _method(
            f"{_label}AMP as in the published code, without its re-weighting",
            f"{_level}-amp",
            preset="official",
            reweight="none",
        ),
        f"{_level}-amp@official+shared": _method(
            f"{_label}AMP as in the published code, dropout shared",
            f"{_level}-amp",
            preset="official",
            pass_dropout="shared",
        ),
        f"{_level}-amp@paper": _method(f"{_label}AMP as printed in the paper", f"{_level}-amp", preset="paper"),
    }


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        dataset: one of fastamp.data.DATASETS.
        model: one of fastamp.training.recipes.RECIPES.
        method: one of `METHODS`.
        ratio: share of the training data, in (0, 1].
        seed: of everything.
    """

    dataset: str
    model: str
    method: str
    ratio: float
    seed: int

    @property
    def key(self) -> str:
        """Names the run in a results folder."""
        return f"{self.dataset}/{self.model}/{self.method}/{self.ratio:g}/{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper, or one beyond it.

    Attributes:
        title: what it shows.
        datasets, models, methods, ratios: its full extent; a command may ask for less.
        columns: "dataset" or "ratio": what the table's columns are. Its rows are models and methods.
        comparisons: (method, baseline): whose difference is tested, and relative improvement given.
        labels: of methods that the paper's table names otherwise than `METHODS`.
    """

    title: str
    datasets: tuple[str, ...]
    models: tuple[str, ...]
    methods: tuple[str, ...]
    ratios: tuple[float, ...] = (1.0,)
    columns: str = "dataset"
    comparisons: tuple[tuple[str, str], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    def runs(
        self,
        *,
        datasets: Sequence[str] | None = None,
        models: Sequence[str] | None = None,
        methods: Sequence[str] | None = None,
        ratios: Sequence[float] | None = None,
        seeds: Sequence[int],
    ) -> Iterator[Run]:
        """The runs, all of a seed before those of the next; None asks for the full extent.

        What is asked for need not belong to the experiment's own extent.

        Raises:
            ValueError: an unknown name, a ratio outside (0, 1], or nothing asked for.
        """
        asked = {
            "datasets": (datasets if datasets is not None else self.datasets, DATASETS),
            "models": (models if models is not None else self.models, RECIPES),
            "methods": (methods if methods is not None else self.methods, METHODS),
        }
        for name, (values, known) in asked.items():
            if not values:
                raise ValueError(f"{name} must name at least one")
            for value in values:
                if value not in known:
                    raise ValueError(f"unknown {name[:-1]} {value!r}; takes {', '.join(known)}")
        shares = tuple(self.ratios if ratios is None else ratios)
        for ratio in shares:
            if not 0 < ratio <= 1:
                raise ValueError(f"ratios must be in (0, 1], got {ratio}")
        if not shares or not seeds:
            raise ValueError(f"{'ratios' if not shares else 'seeds'} must hold at least one")
        return (
            Run(dataset, model, method, ratio, seed)
            for seed in dict.fromkeys(seeds)
            for dataset in dict.fromkeys(asked["datasets"][0])
            for model in dict.fromkeys(asked["models"][0])
            for ratio in dict.fromkeys(shares)
            for method in dict.fromkeys(asked["methods"][0])
        )


_FIVE_SETS = ("trec", "sst1", "sst2", "subj", "mr")
_FIVE_MODELS = ("cnn-rand", "cnn-glove", "lstm-rand", "lstm-glove", "bert")
_SIX_METHODS = ("none", "word-mixup", "sent-mixup", "nonlinear-mixup", "word-amp", "sent-amp")
_AMP_AGAINST_MIXUP = (("word-amp", "word-mixup"), ("sent-amp", "sent-mixup"))
_AGAINST_BASELINE = (("word-mixup", "none"), ("sent-mixup", "none"))


_ALPHA_ROWS = tuple(
    f"{level}-{kind}" + ("" if alpha == 1.0 else f"@alpha={alpha:g}")
    for level in _LEVELS
    for alpha in ALPHAS
    for kind in ("mixup", "amp")
)
_CONTROLS = (
    *(f"@eps={epsilon:g}" for epsilon in STEP_SIZES[1:]),
    "@redrawn",
    "@eps=0+redrawn",
    "@paper",
    "@official",
    "@official+no-reweight",
    "@official+shared",
)
_CONTROL_ROWS = (
    "none",
    "double-softmax",
    *(
        f"{level}-{row}"
        for level in _LEVELS
        for row in ("mixup", "mixup@official", "amp", *(f"amp{control}" for control in _CONTROLS))
    ),
)

EXPERIMENTS: dict[str, Experiment] = {
    "table2": Experiment(
        "Test error of five backbones on five data sets",
        _FIVE_SETS,
        _FIVE_MODELS,
        _SIX_METHODS,
        comparisons=(*_AMP_AGAINST_MIXUP, *_AGAINST_BASELINE, ("nonlinear-mixup", "none")),
    ),
    "table3": Experiment(
        "Test error with a share of the training data",
        ("trec", "sst2"),
        ("lstm-glove",),
        ("none", "word-mixup", "sent-mixup", "word-amp", "sent-amp"),
        RATIOS,
        "ratio",
        comparisons=(*_AMP_AGAINST_MIXUP, *_AGAINST_BASELINE),
    ),
    "table4": Experiment(
        "Test error by the distribution of the mixing coefficient, λ ~ Beta(α, α)",
        ("trec", "sst1", "sst2"),
        ("lstm-glove",),
        ("none", *_ALPHA_ROWS),
        comparisons=tuple((name, name.replace("amp", "mixup", 1)) for name in _ALPHA_ROWS if "-amp" in name),
    ),
    "table5": Experiment(
        "Ablation: what each operation adds",
        ("trec", "sst1", "sst2"),
        ("lstm-glove",),
        ("none", *(f"{level}-{kind}" for level in _LEVELS for kind in ("mixup", "maxop", "amp"))),
        comparisons=tuple(
            pair
            for level in _LEVELS
            for pair in (
                (f"{level}-mixup", "none"),
                (f"{level}-maxop", f"{level}-mixup"),
                (f"{level}-amp", f"{level}-maxop"),
            )
        ),
        labels={f"{level}-mixup": f"{label} +RandOp ({label}Mixup)" for level, label in _LEVELS.items()},
    ),
    "figure2": Experiment(
        "Loss against λ, for two random pairs and for the test set",
        ("trec",),
        ("cnn-rand",),
        ("none", "word-mixup", "sent-mixup", "word-amp", "sent-amp"),
        comparisons=_AMP_AGAINST_MIXUP,
    ),
    "controls": Experiment(
        "Beyond the paper: what acts, the step of λ, the dropout, or the re-weighting",
        ("trec",),
        ("cnn-rand",),
        _CONTROL_ROWS,
        comparisons=(
            *_AGAINST_BASELINE,
            *((f"{level}-mixup", "double-softmax") for level in _LEVELS),
            *(
                pair
                for level in _LEVELS
                for pair in (
                    (f"{level}-amp", f"{level}-mixup"),
                    *((f"{level}-amp{c}", f"{level}-mixup") for c in _CONTROLS if "official" not in c),
                    (f"{level}-amp@redrawn", f"{level}-amp@eps=0+redrawn"),
                    *((f"{level}-amp{c}", f"{level}-mixup@official") for c in _CONTROLS if "official" in c),
                    (f"{level}-amp@official", f"{level}-amp@official+no-reweight"),
                )
            ),
            ("double-softmax", "none"),
        ),
    ),
}
