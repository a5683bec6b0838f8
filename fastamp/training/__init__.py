"""Training of the paper's models with and without mixing, resumable to the same numbers."""

from fastamp.training.config import METHODS, MODELS, TrainConfig
from fastamp.training.loop import DivergedError, Listener, TrainResult, train

__all__ = ["METHODS", "MODELS", "DivergedError", "Listener", "TrainConfig", "TrainResult", "train"]
