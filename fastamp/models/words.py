"""What the models of word ids share: their word vectors, and the checks of what they are given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PAD = 0


class WordModel(nn.Module):
    """A classifier of sentences of word ids: word vectors, an encoder of its own, dropout, a linear layer.

    Args:
        vocab_size: number of ids V, the padding's 0 included.
        embedding_dim: width D of a word vector; `vectors` overrides it.
        vectors: (V, D) float word vectors to start from; row 0 is taken as zero. None draws from
            U(-0.25, 0.25) by the global generator.
        freeze: do not train the word vectors.

    Raises:
        ValueError: a size below 1, or vectors of another shape or dtype.
    """

    pad_id = PAD

    def __init__(self, vocab_size: int, embedding_dim: int, vectors: Tensor | None, freeze: bool) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, embedding_dim=embedding_dim)
        if vectors is None:
            table = torch.rand(vocab_size, embedding_dim) * 0.5 - 0.25
        elif vectors.ndim != 2 or len(vectors) != vocab_size or not vectors.is_floating_point():
            raise ValueError(
                f"vectors must be a float tensor of shape ({vocab_size}, D), "
                f"got {vectors.dtype} of shape {tuple(vectors.shape)}"
            )
        else:
            table = vectors.detach().to(torch.float32, copy=True)
        table[PAD] = 0  # and stays so
        self.embedding = nn.Embedding.from_pretrained(table, freeze=freeze, padding_idx=PAD)
        self.embedding_dim = self.embedding.embedding_dim

    def add_head(self, features: int, num_classes: int, dropout: float) -> None:
        """Adds dropout and classifier, whose weights are drawn after those of the encoder."""
        check_sizes(num_classes=num_classes)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(features, num_classes)

    def embed(self, ids: Tensor) -> Tensor:
        """Word vectors (B, T, D), float32, of ids (B, T), int64, T at least 1; the padding's is zero.

        Raises:
            TypeError: ids that are not int64.
            ValueError: ids of another shape.
        """
        check_ids(ids)
        return self.embedding(ids)


def check_sizes(**sizes: int) -> None:
    """Raises a ValueError that names the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_ids(ids: Tensor) -> None:
    """Raises a TypeError for ids that are not int64, a ValueError for a shape that is not (B, T) with T at least 1."""
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}; pass ids.long()")
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids must have shape (B, T) with T at least 1, got {tuple(ids.shape)}")
