"""Models of the paper's experiments.

All of them keep to one protocol, `Model`: ids to logits, and a cut in two wherever the paper mixes.
"""

from fastamp.models.bilstm import AttentionBiLSTM
from fastamp.models.cut import Model, Rest, Split
from fastamp.models.encoder import PretrainedEncoder, TransformerClassifier
from fastamp.models.nonlinear_mixup import NonlinearMixup
from fastamp.models.textcnn import TextCNN

__all__ = [
    "AttentionBiLSTM",
    "Model",
    "NonlinearMixup",
    "PretrainedEncoder",
    "Rest",
    "Split",
    "TextCNN",
    "TransformerClassifier",
]
