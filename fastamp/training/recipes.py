"""The paper's five backbones as named training recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastamp.training.config import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """How a backbone is trained: the paper's name for it, fields of `TrainConfig`, and whether it needs vectors."""

    label: str
    fields: Mapping[str, Any]
    vectors: bool = False


# Adam with L2 1e-8 throughout, which the paper states for CNN and LSTM. What it leaves open is TrainConfig's default.
_CNN = {"model": "textcnn", "batch_size": 50, "lr": 2e-4, "l2": 1e-8, "steps": 8000, "dropout": 0.5}
_LSTM = {**_CNN, "model": "bilstm"}
_BERT = {"model": "bert", "batch_size": 24, "lr": 1e-5, "l2": 1e-8, "steps": 8000, "pretrained": "bert-base-uncased"}

RECIPES: dict[str, Recipe] = {
    "cnn-rand": Recipe("CNN-rand", _CNN),
    "cnn-glove": Recipe("CNN-glove", {**_CNN, "freeze_vectors": True}, vectors=True),
    "cnn-glove-tuned": Recipe("CNN-glove, tuned vectors", _CNN, vectors=True),
    "lstm-rand": Recipe("LSTM-rand", _LSTM),
    "lstm-glove": Recipe("LSTM-glove", {**_LSTM, "freeze_vectors": True}, vectors=True),
    "lstm-glove-tuned": Recipe("LSTM-glove, tuned vectors", _LSTM, vectors=True),
    "bert": Recipe("BERT", _BERT),
}

# Kim (2014) keeps the case of TREC's questions.
_BY_DATASET: dict[str, dict[str, Any]] = {"trec": {"lower": False}}


def recipe(name: str, **fields: Any) -> TrainConfig:
    """The configuration of a backbone by name.

    Args:
        name: one of `RECIPES`.
        **fields: fields of `TrainConfig`; these win. One that is None leaves the recipe's.

    Raises:
        TypeError: a field that TrainConfig does not have, or a value of another type.
        ValueError: an unknown name, missing vectors, or a value out of range.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; takes one of {', '.join(RECIPES)}")
    given = {key: value for key, value in fields.items() if value is not None}
    if RECIPES[name].vectors and "vectors" not in given:
        raise ValueError(f"{name} needs vectors, a GloVe text file: give --vectors, or choose another model")
    return TrainConfig(**{**RECIPES[name].fields, **_BY_DATASET.get(given.get("dataset", ""), {}), **given})
