"""What a training run is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastamp.data import DATASETS

MODELS = ("textcnn",)
METHODS = ("none", "sent-mixup", "sent-amp", "word-mixup", "word-amp")
DEFAULT_EMBEDDING_DIM = 300


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run's numbers; defaults are the paper's where it states them.

    Attributes:
        dataset: one of fastamp.data.DATASETS.
        data_dir: folder with the data sets' folders; `questions` needs none.
        model: "textcnn".
        method: "none" (cross-entropy); Mixup or AMP of the features after dropout, "sent-mixup" and "sent-amp"; or of
            the word vectors, "word-mixup" and "word-amp".
        seed: of the splits, the initial weights, shuffling, dropout, and mixing.
        steps: number of updates.
        batch_size: sentences in a batch; the last one of an epoch may be smaller.
        lr: Adam's learning rate.
        l2: weight decay, as Adam's L2 term.
        alpha: mixing coefficients are drawn from Beta(alpha, alpha).
        step_size: the adversarial step ε.
        dropout: before the classifier.
        embedding_dim: width of the word vectors; None takes that of the vectors file, or 300.
        vectors: GloVe text file, plain or .gz, to start the word vectors from.
        lower: lower-case the text.
        eval_every: steps between evaluations; the last step is always evaluated.
        checkpoint_every: steps between resume checkpoints.
        threads: intra-op CPU threads; None leaves torch's setting. The same numbers need the same threads.
        device: as in torch.device.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range or an unknown name.
    """

    dataset: str = "questions"
    data_dir: str | None = None
    model: str = "textcnn"
    method: str = "none"
    seed: int = 0
    steps: int = 2000
    batch_size: int = 50
    lr: float = 2e-4
    l2: float = 1e-8
    alpha: float = 1.0
    step_size: float = 2e-3
    dropout: float = 0.5
    embedding_dim: int | None = None
    vectors: str | None = None
    lower: bool = True
    eval_every: int = 100
    checkpoint_every: int = 500
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, taken in (("dataset", DATASETS), ("model", MODELS), ("method", METHODS)):
            if getattr(self, name) not in taken:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; takes one of {', '.join(taken)}")
        for name in ("data_dir", "vectors"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name} must be a str or None, got {getattr(self, name)!r}")
        if not isinstance(self.device, str):
            raise TypeError(f"device must be a str, got {self.device!r}")
        if not isinstance(self.lower, bool):
            raise TypeError(f"lower must be a bool, got {self.lower!r}")
        self._check_int("seed", low=0, high=2**32 - 1)
        for name in ("steps", "batch_size", "eval_every", "checkpoint_every"):
            self._check_int(name, low=1)
        for name in ("embedding_dim", "threads"):
            if getattr(self, name) is not None:
                self._check_int(name, low=1)
        for name in ("lr", "l2", "alpha", "step_size", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        for name in ("lr", "alpha"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0, got 0")
        if self.dropout >= 1:
            raise ValueError(f"dropout must be below 1, got {self.dropout}")

    def _check_int(self, name: str, *, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name} must be {bounds}, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, fit for JSON."""
        return asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Lines "name: this, there other" for the fields in which the mapping differs.

        Paths are left out: the data that they lead to are compared instead.
        """
        return [
            f"{name} {value!r} (there {other.get(name)!r})"
            for name, value in self.to_dict().items()
            if name not in ("data_dir", "vectors") and value != other.get(name)
        ]
