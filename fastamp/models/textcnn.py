"""Kim's convolutional sentence classifier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastamp.models.cut import MaskedRest, Rest, Split, cut_at
from fastamp.models.words import PAD, WordModel, check_ids, check_sizes


class TextCNN(WordModel):
    """CNN of Kim, "Convolutional Neural Networks for Sentence Classification", EMNLP 2014.

    Word embeddings, convolutions of several widths, ReLU, maximum over time, dropout, a linear classifier.
    A window counts where its first word is one of the sentence, which is followed by as many zeros as the
    widest filter needs. So the logits of a sentence do not depend on how far its batch is padded.

    Args:
        vocab_size, embedding_dim, vectors, freeze: see `WordModel`.
        num_classes: number of classes C.
        widths: widths of the filters, in words.
        maps: number of filters of each width.
        dropout: probability of dropping a feature before the classifier.

    Raises:
        ValueError: a size below 1, a dropout outside [0, 1), or vectors of another shape.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        *,
        embedding_dim: int = 300,
        vectors: Tensor | None = None,
        freeze: bool = False,
        widths: Sequence[int] = (3, 4, 5),
        maps: int = 100,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(vocab_size, embedding_dim, vectors, freeze)
        check_sizes(maps=maps)
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be positive integers, at least one, got {tuple(widths)}")
        self.widths = tuple(widths)
        self.convolutions = nn.ModuleList(nn.Conv1d(self.embedding_dim, maps, width) for width in self.widths)
        self.add_head(maps * len(self.widths), num_classes, dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, C), float32, of token ids (B, T), int64; see `encode`."""
        return self.classifier(self.dropout(self.encode(ids)))

    def encode(self, ids: Tensor) -> Tensor:
        """Features of sentences before dropout, (B, maps * len(widths)), float32, non-negative, of ids (B, T), int64.

        T is at least 1; id 0 pads on the right.
        """
        return self.pool(self.windows(ids), ids != PAD)

    def split(self, at: str) -> Split:
        """The model in two parts; see `Model.split`.

        Args:
            at: "word" mixes the word vectors, under the union of both sentences' masks. Since the convolution is
                affine, that is mixing its responses: g includes it, and it runs once, on rows that are not mixed.
                "sentence" mixes the features, before dropout. "embedding" mixes the word vectors themselves, (B, T, D):
                slower than "word" and the same where a row has one λ; what mixes each number of a row for itself
                needs it.
        """
        head = {"dropout": self.dropout, "classifier": self.classifier}
        return cut_at(
            {
                "word": lambda: Split(self.windows, WordRest(**head)),
                "sentence": lambda: Split(self.encode, SentenceRest(**head)),
                "embedding": lambda: Split(self.embed, EmbeddingRest(**head, convolutions=self.convolutions)),
            },
            at,
        )

    def windows(self, ids: Tensor) -> Tensor:
        """`convolve(embed(ids))`, (B, T, maps * len(widths)), of ids as `encode` takes them."""
        check_ids(ids)
        # The number of distinct words depends on the data: asking for it would stall an accelerator.
        return self._convolve_words(ids) if ids.device.type == "cpu" else self.convolve(self.embed(ids))

    def convolve(self, embedded: Tensor) -> Tensor:
        """Filter responses before the non-linearity, (B, T, maps * len(widths)): affine in the word vectors (B, T, D).

        Those are zero where padded. Entry t is of the window that starts at word t.
        """
        return _convolved(self.convolutions, embedded)

    @staticmethod
    def pool(windows: Tensor, mask: Tensor) -> Tensor:
        """Maximum over time, (B, F), of the rectified filter responses (B, T, F) where a mask (B, T), bool, has a word.

        Zero where a row holds none.
        """
        # The maximum first: ReLU is monotone, and a masked -inf becomes the zero of an empty row.
        return windows.masked_fill(~mask[:, :, None], -torch.inf).max(1).values.relu()

    def _convolve_words(self, ids: Tensor) -> Tensor:
        """`convolve(embed(ids))` for the CPU, in the third of its time.

        A filter's response is a sum over its words, so each distinct word of the batch is multiplied once
        with each position of each filter, instead of every word, padding included, in every window it is in.
        """
        length = ids.shape[1]
        words, positions = torch.unique(F.pad(ids, (0, max(self.widths) - 1)), return_inverse=True)
        convolutions = [cast("nn.Conv1d", conv) for conv in self.convolutions]
        taps = [tap for conv in convolutions for tap in conv.weight.unbind(2)]  # each (maps, D)
        products = F.linear(self.embedding(words), torch.cat(taps))  # (U, taps * maps)
        product = iter(products.unflatten(1, (len(taps), -1)).unbind(1))
        responses = []
        for conv in convolutions:
            response = cast("Tensor", conv.bias)
            for tap in range(conv.kernel_size[0]):
                response = response + F.embedding(positions[:, tap : tap + length], next(product))
            responses.append(response)
        return torch.cat(responses, 2)


def _convolved(convolutions: Iterable[nn.Module], embedded: Tensor) -> Tensor:
    """`TextCNN.convolve` by its convolutions."""
    length, convs = embedded.shape[1], [cast("nn.Conv1d", conv) for conv in convolutions]
    padded = F.pad(embedded, (0, 0, 0, max(conv.kernel_size[0] for conv in convs) - 1)).transpose(1, 2)
    return torch.cat([conv(padded)[:, :, :length] for conv in convs], 1).transpose(1, 2)


class WordRest(MaskedRest):
    """f of `TextCNN.split("word")`."""

    dropout: nn.Dropout
    classifier: nn.Linear

    def forward(self, windows: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, C) of filter responses (B, T, F) under a mask (B, T), bool."""
        return self.classifier(self.dropout(TextCNN.pool(windows, mask)))


class EmbeddingRest(WordRest):
    """f of `TextCNN.split("embedding")`."""

    convolutions: nn.ModuleList

    def forward(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, C) of word vectors (B, T, D), zero where padded, under a mask (B, T), bool."""
        return super().forward(_convolved(self.convolutions, embedded), mask)


class SentenceRest(Rest):
    """f of `TextCNN.split("sentence")`."""

    dropout: nn.Dropout
    classifier: nn.Linear

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of features (B, F)."""
        return self.classifier(self.dropout(features))
