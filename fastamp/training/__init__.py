"""Training of the paper's models with and without mixing, resumable to the same numbers."""

from fastamp.training.config import METHODS, MODELS, TrainConfig
from fastamp.training.loop import DivergedError, Listener, TrainResult, train
from fastamp.training.recipes import RECIPES, recipe

__all__ = [
    "METHODS",
    "MODELS",
    "RECIPES",
    "DivergedError",
    "Listener",
    "TrainConfig",
    "TrainResult",
    "recipe",
    "train",
]
