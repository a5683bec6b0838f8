"""Networks with random weights, cut at their word vectors: what `layers` times whole steps of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastamp import Mix
from fastamp.models import TextCNN

CLASSES = 6
PAD = 0


@dataclass(frozen=True)
class Cut:
    """A network in two parts.

    Attributes:
        g: ids (B, T), or pixels, to the hidden state (B, ...).
        f: a module; f(hidden, **context) are logits (B, C).
        context: ids and the mix of the batch, or None where nothing is mixed, to what f takes by keyword.
    """

    g: Callable[[Tensor], Tensor]
    f: nn.Module
    context: Callable[[Tensor, Mix | None], dict[str, Tensor]]


@dataclass(frozen=True)
class Network:
    """A network, and where it is cut.

    Attributes:
        model: its parameters are what a step differentiates by.
        plain: the cut at the word vectors or pixels, written by hand: what Mixup as one writes it mixes.
        split: the cut that fastamp offers.
        later: whether that mixes behind them, where mixing gives the same.
    """

    model: nn.Module
    plain: Cut
    split: Cut
    later: bool = False


@dataclass(frozen=True)
class Spec:
    """A network's sizes.

    Attributes:
        title: names it in results.
        build: makes it, given `options`, the number of words and of classes.
        options: of `build`.
        batch: B.
        lengths: of the shortest sentence, and of the longest, T; of images, how many tokens they become.
        vocabulary: number of ids, the padding's 0 included; 0 of images.
        width: of a word vector, or of a patch's.
        dtype: of parameters, a key of DTYPES.
        needs_gpu: a CPU would take minutes, or has no use for the result.
        large: its step is bound by arithmetic, so that it is neither captured in a CUDA graph nor compiled.
        package: what it needs besides torch.
        side: pixels of an image's side, where images (B, 3, side, side) take the place of sentences.
    """

    title: str
    build: Callable[..., Network]
    options: dict[str, Any]
    batch: int
    lengths: tuple[int, int]
    vocabulary: int
    width: int
    dtype: str = "fp32"
    needs_gpu: bool = False
    large: bool = False
    package: str | None = None
    side: int | None = None

    def missing(self) -> str | None:
        """The package that is needed and not installed."""
        return self.package if self.package is not None and find_spec(self.package) is None else None

    def network(self, device: torch.device, dtype: torch.dtype, seed: int) -> Network:
        """The network in training mode, its weights drawn on the CPU; no dropout, which contenders would redraw."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            read = {"vocabulary": self.vocabulary} if self.side is None else {"side": self.side}
            network = self.build(width=self.width, **read, **self.options)
        # As after training: logits far enough apart for λ to matter, which random weights alone do not give.
        with torch.no_grad():
            head = network.model.get_submodule("classifier").weight
            assert isinstance(head, Tensor)
            head.mul_(4 / (head.std() * head.shape[1] ** 0.5))
        network.model.to(device, dtype).train()
        return network

    def batch_of(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        """Token ids (B, T), padded on the right, words by Zipf's law, or float32 images; labels (B,)."""
        generator = torch.Generator().manual_seed(seed)
        if self.side is not None:
            images = torch.randn(self.batch, 3, self.side, self.side, generator=generator)
            labels = torch.randint(CLASSES, (self.batch,), generator=generator)
            return images.to(device), labels.to(device)
        low, high = self.lengths
        frequencies = 1 / torch.arange(1, self.vocabulary)
        words = 1 + torch.multinomial(frequencies, self.batch * high, replacement=True, generator=generator)
        lengths = torch.randint(low, high + 1, (self.batch,), generator=generator)
        lengths[0] = high
        ids = words.view(self.batch, high).masked_fill(torch.arange(high) >= lengths[:, None], PAD)
        labels = torch.randint(CLASSES, (self.batch,), generator=generator)
        return ids.to(device), labels.to(device)


def _masked(ids: Tensor, mix: Mix | None) -> Tensor:
    mask = ids != PAD
    return mask if mix is None else mix.union(mask)


class _BertRest(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(inputs_embeds=words, attention_mask=attention_mask).logits


def bert(*, vocabulary: int, width: int, layers: int, heads: int) -> Network:
    """The encoder with a classification head, by transformers."""
    from transformers import BertConfig, BertForSequenceClassification

    from fastamp import hf

    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=CLASSES,
        )
    )
    words = model.get_input_embeddings()
    plain = Cut(words, _BertRest(model), lambda ids, mix: {"attention_mask": _masked(ids, mix)})
    g, f = hf.split(model, at="embeddings")
    split = Cut(
        lambda ids: g(input_ids=ids),
        f,
        lambda ids, mix: f.context({"input_ids": ids, "attention_mask": ids != PAD}, mix),
    )
    return Network(model, plain, split)


class _Pixels(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).logits


def vit(*, side: int, width: int, patch: int, layers: int, heads: int) -> Network:
    """A vision transformer, by transformers; its split mixes behind the projection of patches."""
    from transformers import ViTConfig, ViTForImageClassification

    from fastamp import hf

    model = ViTForImageClassification(
        ViTConfig(
            image_size=side,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            num_labels=CLASSES,
        )
    )
    plain = Cut(lambda pixels: pixels, _Pixels(model), lambda pixels, mix: {})
    g, f = hf.split(model, at="embeddings")
    split = Cut(lambda pixels: g(pixel_values=pixels), f, lambda pixels, mix: f.context({"pixel_values": pixels}, mix))
    return Network(model, plain, split, later=True)


class _CNNRest(nn.Module):
    def __init__(self, model: TextCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.model.classifier(self.model.pool(self.model.convolve(words), mask))


def textcnn(*, vocabulary: int, width: int) -> Network:
    """Kim's CNN; its split mixes behind the convolution."""
    model = TextCNN(vocabulary, CLASSES, embedding_dim=width, dropout=0.0)
    plain = Cut(model.embed, _CNNRest(model), lambda ids, mix: {"mask": _masked(ids, mix)})
    g, f = model.split("word")
    return Network(model, plain, Cut(g, f, f.context), later=True)


class _BiLSTM(nn.Module):
    def __init__(self, vocabulary: int, width: int, states: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.lstm = nn.LSTM(width, states, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(2 * states, CLASSES)


class _LSTMRest(nn.Module):
    def __init__(self, model: _BiLSTM) -> None:
        super().__init__()
        self.lstm, self.classifier = model.lstm, model.classifier

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.classifier(TextCNN.pool(self.lstm(words)[0], mask))


def bilstm(*, vocabulary: int, width: int, states: int) -> Network:
    """A bidirectional LSTM, the maximum of its states over time, a linear classifier."""
    model = _BiLSTM(vocabulary, width, states)
    cut = Cut(model.embedding, _LSTMRest(model), lambda ids, mix: {"mask": _masked(ids, mix)})
    return Network(model, cut, cut)


_BASE: dict[str, Any] = {
    "build": bert,
    "options": {"layers": 12, "heads": 12},
    "vocabulary": 30522,
    "width": 768,
    "dtype": "bf16",
    "needs_gpu": True,
    "package": "transformers",
}
_VIT: dict[str, Any] = {"options": {"patch": 16, "layers": 12, "heads": 12}, "side": 224, "width": 768}
# A vocabulary of a thousand in the small BERT: the dense gradient of a large table, which is the same for everyone,
# would hide what passes through the network cost.
NETWORKS = {
    "textcnn": Spec("TextCNN", textcnn, {}, 50, (10, 37), 8000, 300),
    "bert": Spec("BERT 6x384", bert, {"layers": 6, "heads": 12}, 24, (12, 24), 1000, 384, package="transformers"),
    "bilstm": Spec("BiLSTM 2x512", bilstm, {"states": 512}, 50, (10, 37), 8000, 300, needs_gpu=True),
    "bert-base-24x64": Spec("BERT-base", batch=24, lengths=(32, 64), **_BASE),
    "bert-base-256x128": Spec("BERT-base", batch=256, lengths=(64, 128), large=True, **_BASE),
    "vit-base-64": Spec(
        "ViT-B/16",
        vit,
        batch=64,
        lengths=(197, 197),
        vocabulary=0,
        dtype="bf16",
        needs_gpu=True,
        large=True,
        package="transformers",
        **_VIT,
    ),
}
