"""A bidirectional LSTM that attends to its words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastamp.models.cut import MaskedRest, Rest, Split, cut_at
from fastamp.models.words import PAD, WordModel, check_sizes


class AttentionBiLSTM(WordModel):
    """LSTM of both directions with attention over time, as in Wang et al., EMNLP 2016, and Zhou et al., ACL 2016.

        H = BiLSTM(embedding(ids)),   α = softmax_t(wᵀ tanh(H_t)),   s = Σ_t α_t H_t,
        logits = W dropout(relu(s)) + b

    The attention is Zhou et al.'s, on the states of both directions side by side. That a ReLU stands behind s, and that
    sentences are mixed before it, is read off the published code of AMP, whose LSTM has two layers where the paper says
    one. The logits of a sentence do not depend on how far its batch is padded, and padding gets no attention.

    On a GPU cuDNN's LSTM has a backward pass in train mode only, and torch.compile breaks its graph at an LSTM:
    compile f of the split at "sentence", or none.

    Args:
        vocab_size, embedding_dim, vectors, freeze: see `WordModel`.
        num_classes: number of classes C.
        hidden_size: width of s: half of it is the forward direction's, half the backward one's.
        dropout: probability of dropping a feature before the classifier.

    Raises:
        ValueError: a size below 1, an odd hidden_size, a dropout outside [0, 1), or vectors of another shape.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        *,
        embedding_dim: int = 300,
        vectors: Tensor | None = None,
        freeze: bool = False,
        hidden_size: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(vocab_size, embedding_dim, vectors, freeze)
        self.encoder = AttentionEncoder(self.embedding_dim, hidden_size)
        self.add_head(hidden_size, num_classes, dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, C), float32, of token ids (B, T), int64; see `encode`."""
        return self.classifier(self.dropout(self.encode(ids).relu()))

    def encode(self, ids: Tensor) -> Tensor:
        """Features of sentences before the ReLU, (B, hidden_size), float32, of ids (B, T), int64, T at least 1.

        Id 0 pads on the right. Zero where a row holds no word.
        """
        return self.encoder(self.embed(ids), ids != PAD)

    def split(self, at: str) -> Split:
        """The model in two parts; see `Model.split`.

        Args:
            at: "word" and "embedding" mix the word vectors (B, T, D), under the union of both sentences' masks.
                "sentence" mixes the features (B, hidden_size), before the ReLU.
        """
        head = {"dropout": self.dropout, "classifier": self.classifier}

        def words() -> Split:
            return Split(self.embed, EmbeddingRest(**head, encoder=self.encoder))

        def sentences() -> Split:
            return Split(self.encode, SentenceRest(**head))

        return cut_at({"word": words, "sentence": sentences, "embedding": words}, at)


class AttentionEncoder(nn.Module):
    """The states of an LSTM of both directions, summed by attention: width D to an even `hidden_size`."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size)
        if hidden_size % 2:
            raise ValueError(f"hidden_size counts both directions and must be even, got {hidden_size}")
        # Two modules rather than a bidirectional one, which would begin the backward direction in the padding. Packed
        # sequences keep to the words as well, but need the lengths on the host, and are slower on a CPU in training.
        self.forwards = nn.LSTM(width, hidden_size // 2, batch_first=True)
        self.backwards = nn.LSTM(width, hidden_size // 2, batch_first=True)
        self.score = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """Features (B, hidden_size) of word vectors (B, T, D), floating point; zero where a row holds no word.

        The mask (B, T), bool, tells which positions hold a word: those on the left of a row.
        """
        states = self.states(embedded, mask)
        return torch.bmm(self.attention(states, mask)[:, None], states)[:, 0]

    def states(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """States (B, T, hidden_size) of both directions, the forward one's first; any number at padding."""
        # The place in the row (B, T, 1) of what stands at t when its words are read from the last to the first.
        place, length = torch.arange(mask.shape[1], device=mask.device), mask.sum(1, keepdim=True)
        turned = torch.where(place < length, length - 1 - place, place)[:, :, None]
        forwards, _ = self.forwards(embedded)
        backwards, _ = self.backwards(embedded.gather(1, turned.expand_as(embedded)))
        return torch.cat([forwards, backwards.gather(1, turned.expand_as(backwards))], 2)

    def attention(self, states: Tensor, mask: Tensor) -> Tensor:
        """Weights (B, T) of states (B, T, hidden_size), each row's sum 1; exactly zero at padding."""
        scores = self.score(states.tanh())[:, :, 0]
        # The least finite number, not -inf: a row without a word would come out as NaN.
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(1)
        return weights.masked_fill(~mask, 0)


class EmbeddingRest(MaskedRest):
    """f of `AttentionBiLSTM.split("word")`."""

    dropout: nn.Dropout
    classifier: nn.Linear
    encoder: AttentionEncoder

    def forward(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, C) of word vectors (B, T, D) under a mask (B, T), bool."""
        return self.classifier(self.dropout(self.encoder(embedded, mask).relu()))


class SentenceRest(Rest):
    """f of `AttentionBiLSTM.split("sentence")`."""

    dropout: nn.Dropout
    classifier: nn.Linear

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of features (B, hidden_size)."""
        return self.classifier(self.dropout(features.relu()))
