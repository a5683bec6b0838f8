"""BERT and other pre-trained encoders of transformers, as models of this package."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fastamp.data.files import update_digest
from fastamp.mixing import Mix
from fastamp.models.cut import Rest, Split, cut_at
from fastamp.models.words import check_ids, check_sizes

if TYPE_CHECKING:
    from fastamp.hf.splitting import Rest as HFRest

T = TypeVar("T")

# No sentence of the paper's data sets comes near it, and a stray document must not stretch its whole batch.
MAX_LENGTH = 256


class TransformerClassifier(nn.Module):
    """A classification model of transformers that takes token ids alone.

    What is padding is seen from the ids, so that the logits of a sentence do not depend on how far its batch is padded.

    Args:
        model: BertForSequenceClassification or another text model that `fastamp.hf.split` knows.

    Raises:
        ValueError: a model that fastamp.hf.split does not know, or whose configuration names no padding.
    """

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.embedding_dim: int = _hf().split(model, at="embeddings").g.body.embedding_dim
        pad_id = self.model.config.pad_token_id
        if pad_id is None:
            raise ValueError(f"the configuration of {type(model).__name__} has no pad_token_id")
        self.pad_id: int = pad_id

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, C), float32, of ids (B, T), int64, special tokens included; `pad_id` pads on the right."""
        return self.model(**self._inputs(ids)).logits

    def split(self, at: str) -> Split:
        """The model in two parts; see `Model.split`.

        Args:
            at: "word" and "embedding" mix the word embeddings (B, T, D), before positions are added, under the union of
                both sentences' masks. "sentence" mixes what the classification head takes, (B, 1, D): the last hidden
                state of the first token, for BERT before its pooler.
        """

        def words(place: str = "embeddings") -> Split:
            g, f = _hf().split(self.model, at=place)
            return Split(lambda ids: g(**self._inputs(ids)), EncoderRest(f, self._inputs))

        return cut_at({"word": words, "sentence": lambda: words("last"), "embedding": words}, at)

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """What the model itself takes."""
        check_ids(ids)
        return {"input_ids": ids, "attention_mask": (ids != self.pad_id).long()}


class EncoderRest(Rest):
    """f of `TransformerClassifier.split`: f of fastamp.hf.split, and what makes its model's inputs of ids."""

    body: HFRest

    def __init__(self, body: HFRest, inputs: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__(body=body)
        self._inputs = inputs

    @property
    def training(self) -> bool:
        """The model's mode; its parts take it over when they run."""
        return self.body.origin.training

    @training.setter
    def training(self, mode: bool) -> None:
        pass

    def context(self, ids: Tensor, mix: Mix | None = None) -> dict[str, Tensor]:
        """Attention mask and positions, where f takes them; arguments as `Rest.context`."""
        return self.body.context(self._inputs(ids), mix)

    def forward(self, mixed: Tensor, **context: Tensor) -> Tensor:
        """Logits (B, C) of hidden states as g returns them."""
        return self.body(mixed, **context)


@dataclass(frozen=True)
class PretrainedEncoder:
    """A pre-trained encoder that sentences are encoded for before a classifier is made of it; see `load`."""

    name: str  # its folder, or its name on the Hugging Face hub
    tokenizer: Any  # transformers' own
    pad_id: int
    digest: str  # tells whether another run read the same: of a folder the SHA-256 of its files, else name and commit
    max_length: int  # of a sentence, in ids

    @classmethod
    def load(cls, name_or_dir: str | Path) -> PretrainedEncoder:
        """Loads the tokenizer.

        Args:
            name_or_dir: a folder, or a name on the Hugging Face hub, which needs the network or its cache.

        Raises:
            ImportError: transformers is not installed.
            ValueError: nothing that can be loaded there.
        """
        _hf()
        from transformers import AutoTokenizer
        from transformers.utils import cached_file

        tokenizer = _loaded(AutoTokenizer.from_pretrained, name_or_dir)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer of {name_or_dir} has no padding token")
        config = Path(_loaded(lambda name: cached_file(name, "config.json"), name_or_dir))
        digest = _digest(config.parent) if Path(name_or_dir).is_dir() else f"{name_or_dir}@{config.parent.name}"
        # RoBERTa counts positions from behind the padding's id.
        positions = json.loads(config.read_text()).get("max_position_embeddings") or math.inf
        length = int(min(MAX_LENGTH, positions - tokenizer.pad_token_id - 1))
        return cls(str(name_or_dir), tokenizer, tokenizer.pad_token_id, digest, length)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Ids (N, T), int64, on the CPU, of N sentences, at least one, special tokens included.

        `pad_id` pads on the right; the end of a sentence longer than `max_length` is cut off.
        """
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        return self.tokenizer(list(texts), **options)["input_ids"].cpu()  # where the default device put it

    def classifier(self, num_classes: int) -> TransformerClassifier:
        """The encoder under a new classifier, whose weights are drawn from the global generator.

        A classifier for as many classes that was saved with the encoder is kept.

        Raises:
            ValueError: num_classes below 1, a model that cannot be loaded, or one that pads by another id.
        """
        check_sizes(num_classes=num_classes)
        from transformers import AutoModelForSequenceClassification

        # A classifier with another number of classes gives its encoder only.
        options = {"num_labels": num_classes, "ignore_mismatched_sizes": True, "dtype": torch.float32}
        load = AutoModelForSequenceClassification.from_pretrained
        model = _loaded(lambda name: load(name, **options), self.name)
        classifier = TransformerClassifier(model)
        if classifier.pad_id != self.pad_id:
            raise ValueError(
                f"{self.name} pads by id {self.pad_id}, but its model takes {classifier.pad_id} for padding"
            )
        return classifier


def _hf() -> Any:
    """fastamp.hf, or an ImportError that says what to install."""
    import fastamp.hf

    return fastamp.hf


def _loaded(load: Callable[[str], T], name_or_dir: str | Path) -> T:
    """What transformers loads from a place, without its reports; a ValueError that says what would do."""
    name = str(name_or_dir)
    takes = "takes a folder that holds config.json, weights and tokenizer, or a name on the Hugging Face hub"
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"there is no folder {name}; pretrained {takes}")
    try:
        with _silent():
            return load(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"cannot load a pre-trained encoder from {name!r}: {reason} (pretrained {takes}; without network, one that "
            "is in the cache)"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' progress bars and its report on new weights, which are meant to be new."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _digest(folder: Path) -> str:
    """SHA-256 of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        update_digest(digest, path)
    return digest.hexdigest()
