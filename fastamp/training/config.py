"""What a training run is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args, get_type_hints

import torch

from fastamp.data import DATASETS
from fastamp.data.corpora import check_part

MODELS = ("textcnn", "bilstm", "bert")
METHODS = (
    "none",
    "double-softmax",
    *(f"{at}-{kind}" for at in ("word", "sent") for kind in ("mixup", "maxop", "amp")),
    "nonlinear-mixup",
)
PRESETS = ("default", "paper", "official")
PASS_DROPOUTS = ("shared", "redrawn")
REWEIGHTS = ("none", "moving")
DEFAULT_EMBEDDING_DIM = 300

_NAMES = {
    "dataset": DATASETS,
    "model": MODELS,
    "method": METHODS,
    "preset": PRESETS,
    "pass_dropout": (*PASS_DROPOUTS, None),
    "reweight": (*REWEIGHTS, None),
}
_ABOVE_ZERO = ("lr", "alpha", "clip_norm")


def usable_device(name: str) -> torch.device:
    """The device of that name; makes no context on it, as using it would.

    Raises:
        ValueError: no device, or one that this machine does not have.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} cannot be used; takes cpu or cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name!r} cannot be used: torch finds {count} CUDA devices here")
    return device


def unused_fields(model: str, method: str) -> dict[str, str]:
    """The fields of `TrainConfig` that a run of this model and method does not use, each with what it is for."""
    unused: dict[str, str] = {}
    if model == "bert":
        words = f"models over words, not for {model!r}"
        unused |= dict.fromkeys(("vectors", "freeze_vectors", "embedding_dim", "dropout"), words)
    else:
        unused["pretrained"] = f"model 'bert', not for {model!r}"
    if model != "bilstm":
        unused["hidden_size"] = f"model 'bilstm', not for {model!r}"
    if not method.startswith(("word-", "sent-")):
        unused["preset"] = f"methods that mix by AMPLoss, not for {method!r}"
        if method != "nonlinear-mixup":
            unused["alpha"] = f"methods that mix, not for {method!r}"
    if not method.endswith(("-maxop", "-amp")):
        step = f"methods with an adversarial step, not for {method!r}"
        unused |= dict.fromkeys(("step_size", "pass_dropout", "reweight"), step)
    return unused


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run's numbers; defaults are the paper's for its CNN and LSTM where it states them.

    Attributes:
        dataset: one of fastamp.data.DATASETS.
        data_dir: folder with the data sets' folders; None reads from the Hugging Face hub. `questions` needs none.
        fold: 0 to 9, the tenth that is tested on of a set for cross-validation (subj, mr); None is seed % 10.
        fraction: share of each class of the training sentences to train on, in (0, 1]; see fastamp.data.load.
        model: "textcnn", "bilstm" or "bert".
        pretrained: of "bert": name or folder of an encoder that transformers can load.
        method: "none" is cross-entropy, "double-softmax" cross-entropy of probabilities taken for logits, as in the
            published code. Others mix word vectors ("word-") or sentence vectors, before their dropout ("sent-"):
            "-mixup" at random, "-maxop" always at λ', "-amp" as AMP. "nonlinear-mixup": see
            fastamp.models.NonlinearMixup.
        preset: options of AMPLoss for the methods that use it: its own, or a preset of it.
        pass_dropout: of "-maxop" and "-amp": both passes drop out the same ("shared") or not ("redrawn"); None as in
            the preset.
        reweight: "none" or "moving", see AMPLoss; None as in the preset.
        seed: of the splits, the initial weights, shuffling, dropout, and mixing.
        steps: number of updates.
        batch_size: sentences in a batch; the last one of an epoch may be smaller.
        lr: Adam's learning rate.
        l2: weight decay, as Adam's L2 term.
        clip_norm: gradients are scaled down to this norm over all parameters; None leaves them.
        alpha: mixing coefficients are drawn from Beta(alpha, alpha).
        step_size: the adversarial step ε.
        dropout: before the classifier; of "bert" its own configuration decides.
        embedding_dim: width of the word vectors; None takes that of the vectors file, or 300.
        hidden_size: width of the "bilstm"'s states, both directions together; what the paper's 1024 counts it does not
            say.
        vectors: GloVe text file, plain or .gz, to start the word vectors from.
        freeze_vectors: do not train the word vectors.
        lower: lower-case the text; of "bert" its tokeniser decides.
        eval_every: steps between evaluations; the last step is always evaluated.
        checkpoint_every: steps between resume checkpoints.
        threads: intra-op CPU threads; None leaves torch's setting. The same numbers need the same threads.
        device: as in torch.device.
        capture: of a cuda device: record each training step once as a CUDA graph, and replay it.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range, an unknown name, or fields that do not go together.
    """

    dataset: str = "questions"
    data_dir: str | None = None
    fold: int | None = None
    fraction: float = 1.0
    model: str = "textcnn"
    pretrained: str | None = None
    method: str = "none"
    preset: str = "default"
    pass_dropout: str | None = None
    reweight: str | None = None
    seed: int = 0
    steps: int = 8000
    batch_size: int = 50
    lr: float = 2e-4
    l2: float = 1e-8
    clip_norm: float | None = None
    alpha: float = 1.0
    step_size: float = 2e-3
    dropout: float = 0.5
    embedding_dim: int | None = None
    hidden_size: int = 1024
    vectors: str | None = None
    freeze_vectors: bool = False
    lower: bool = True
    eval_every: int = 100
    checkpoint_every: int = 500
    threads: int | None = None
    device: str = "cpu"
    capture: bool = False

    def __post_init__(self) -> None:
        for name, taken in _NAMES.items():
            if getattr(self, name) not in taken:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; takes one of {', '.join(map(str, taken))}")
        for name, hint in get_type_hints(TrainConfig).items():
            self._check(name, get_args(hint) or (hint,))
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if self.dropout >= 1:
            raise ValueError(f"dropout must be below 1, got {self.dropout}")
        check_part(self.dataset, self.fold, self.fraction)
        for name, purpose in unused_fields(self.model, self.method).items():
            if getattr(self, name) != getattr(TrainConfig, name):  # the class has the default
                raise ValueError(f"{name} is for {purpose}")
        if self.model == "bert" and self.pretrained is None:
            raise ValueError("model 'bert' needs pretrained: the name or folder of an encoder")
        if self.freeze_vectors and self.vectors is None:
            raise ValueError("freeze_vectors needs vectors")
        if self.capture and self.device.partition(":")[0] != "cuda":
            raise ValueError(f"capture needs a cuda device, got device {self.device!r}")

    def _check(self, name: str, kinds: tuple[type, ...]) -> None:
        """Holds a field to its types, and a number to its bounds."""
        value = getattr(self, name)
        taken = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, taken) or (isinstance(value, bool) and bool not in kinds):
            shown = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise TypeError(f"{name} must be {shown}, got {value!r}")
        if bool in kinds or str in kinds or value is None or name in ("seed", "fold", "fraction"):
            return
        number: Any = value
        if float in kinds and not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if name in _ABOVE_ZERO and value == 0:
            raise ValueError(f"{name} must be above 0, got 0")
        if int in kinds and number < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

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
            if name not in ("data_dir", "vectors", "pretrained") and value != other.get(name)
        ]
