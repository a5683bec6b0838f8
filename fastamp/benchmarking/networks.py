"""Networks with random weights, cut at their word vectors or pixels: what the suite "layers" times whole steps of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastamp import Mix
from fastamp.models import AttentionBiLSTM, TextCNN

CLASSES = 6
PAD = 0


class Cut(NamedTuple):
    """A network in two parts."""

    g: Callable[[Tensor], Tensor]  # ids (B, T), or pixels, to the hidden state (B, ...)
    f: Callable[..., Tensor]  # f(hidden, **context) are logits (B, C)
    context: Callable[[Tensor, Mix | None], dict[str, Tensor]]  # of ids and the mix of the batch; None: unmixed


class Network(NamedTuple):
    """A network, and where it is cut."""

    model: nn.Module
    plain: Cut  # at the word vectors or pixels: what Mixup as one writes it mixes
    split: Cut  # where fastamp offers to cut
    later: bool = False  # whether that is behind them, where mixing gives the same


def last_layer(head: nn.Module) -> Network:
    """A network that is its last layer, cut before it."""
    cut = Cut(lambda x: x, head, lambda x, mix: {})
    return Network(head, cut, cut)


@dataclass(frozen=True)
class Spec:
    """A network's sizes."""

    title: str  # names it in results
    build: Callable[..., Network]  # given the width, the vocabulary or the side of an image, and `options`
    options: dict[str, Any]
    batch: int
    lengths: tuple[int, int]  # of the shortest sentence, and of the longest, T; of images, how many tokens they become
    vocabulary: int  # number of ids, the padding's 0 included; 0 of images
    width: int  # of a word vector, or of a patch's
    dtype: str = "fp32"  # of parameters, a key of DTYPES
    needs_gpu: bool = False  # a CPU would take minutes, or has no use for the result
    large: bool = False  # its step is bound by arithmetic: neither captured in a CUDA graph nor compiled
    package: str | None = None  # what it needs besides torch
    side: int | None = None  # pixels, where images (B, 3, side, side) take the place of sentences

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
            x, cut = self.batch_of(torch.device("cpu"), seed)[0][:4], network.plain
            head = network.model.get_submodule("classifier").weight
            assert isinstance(head, Tensor)
            head.mul_(2 / cut.f(cut.g(x), **cut.context(x, None)).std())
        network.model.to(device, dtype).train()
        return network

    def batch_of(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        """Token ids (B, T), padded on the right, words by Zipf's law, or float32 images; labels (B,)."""
        generator = torch.Generator().manual_seed(seed)
        if self.side is not None:
            x = torch.randn(self.batch, 3, self.side, self.side, generator=generator)
        else:
            low, high = self.lengths
            frequencies = 1 / torch.arange(1, self.vocabulary)
            words = 1 + torch.multinomial(frequencies, self.batch * high, replacement=True, generator=generator)
            lengths = torch.randint(low, high + 1, (self.batch,), generator=generator)
            lengths[0] = high
            x = words.view(self.batch, high).masked_fill(torch.arange(high) >= lengths[:, None], PAD)
        labels = torch.randint(CLASSES, (self.batch,), generator=generator)
        return x.to(device), labels.to(device)


def textcnn(*, vocabulary: int, width: int) -> Network:
    """Kim's CNN; its split mixes behind the convolution."""
    return _cut(TextCNN(vocabulary, CLASSES, embedding_dim=width, dropout=0.0), later=True)


def bilstm(*, vocabulary: int, width: int, states: int) -> Network:
    """An LSTM of both directions with attention."""
    # Vectors of variance 1: by those it starts from otherwise, sentences are hardly told apart before training.
    vectors = torch.randn(vocabulary, width)
    return _cut(AttentionBiLSTM(vocabulary, CLASSES, vectors=vectors, hidden_size=2 * states, dropout=0.0))


def _cut(model: TextCNN | AttentionBiLSTM, *, later: bool = False) -> Network:
    plain, split = model.split("embedding"), model.split("word")
    return Network(model, Cut(*plain, plain.f.context), Cut(*split, split.f.context), later=later)


def bert(*, vocabulary: int, width: int, layers: int, heads: int) -> Network:
    """The encoder with a classification head, by transformers."""
    from transformers import BertConfig, BertForSequenceClassification

    from fastamp import hf

    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=vocabulary, intermediate_size=4 * width, num_labels=CLASSES, **sizes, **dropout)
    model = BertForSequenceClassification(config)

    def rest(words: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = model(inputs_embeds=words, attention_mask=attention_mask).logits
        return logits

    def mask(ids: Tensor, mix: Mix | None) -> dict[str, Tensor]:
        return {"attention_mask": ids != PAD if mix is None else mix.union(ids != PAD)}

    g, f = hf.split(model, at="embeddings")
    split = Cut(
        lambda ids: g(input_ids=ids),
        f,
        lambda ids, mix: f.context({"input_ids": ids, "attention_mask": ids != PAD}, mix),
    )
    return Network(model, Cut(model.get_input_embeddings(), rest, mask), split)


def vit(*, side: int, width: int, patch: int, layers: int, heads: int) -> Network:
    """A vision transformer, by transformers; its split mixes behind the projection of patches."""
    from transformers import ViTConfig, ViTForImageClassification

    from fastamp import hf

    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = ViTConfig(image_size=side, patch_size=patch, intermediate_size=4 * width, num_labels=CLASSES, **sizes)
    model = ViTForImageClassification(config)
    plain = Cut(lambda pixels: pixels, lambda pixels: model(pixel_values=pixels).logits, lambda pixels, mix: {})
    g, f = hf.split(model, at="embeddings")
    split = Cut(lambda pixels: g(pixel_values=pixels), f, lambda pixels, mix: f.context({"pixel_values": pixels}, mix))
    return Network(model, plain, split, later=True)


_TRANSFORMERS: dict[str, Any] = {"package": "transformers"}
_BASE: dict[str, Any] = {"dtype": "bf16", "needs_gpu": True, "width": 768, **_TRANSFORMERS}
_LAYERS = {"layers": 12, "heads": 12}
# A vocabulary of a thousand in the small BERT: the dense gradient of a large table, which is the same for everyone,
# would hide what passes through the network cost.
NETWORKS = {
    "textcnn": Spec("TextCNN", textcnn, {}, 50, (10, 37), 8000, 300),
    "bert": Spec("BERT 6x384", bert, {"layers": 6, "heads": 12}, 24, (12, 24), 1000, 384, **_TRANSFORMERS),
    "bilstm": Spec("BiLSTM 2x512", bilstm, {"states": 512}, 50, (10, 37), 8000, 300, needs_gpu=True),
    "bert-base-24x64": Spec("BERT-base", bert, _LAYERS, 24, (32, 64), 30522, **_BASE),
    "bert-base-256x128": Spec("BERT-base", bert, _LAYERS, 256, (64, 128), 30522, large=True, **_BASE),
    "vit-base-64": Spec("ViT-B/16", vit, {"patch": 16, **_LAYERS}, 64, (197, 197), 0, large=True, side=224, **_BASE),
}
