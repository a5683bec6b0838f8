"""All that a run reads, and the model for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastamp.data import PAD, Corpus, Coverage, Vocabulary, WordVectors, embedding_table, load, read_vectors
from fastamp.data.vectors import coverage
from fastamp.models import AttentionBiLSTM, NonlinearMixup, PretrainedEncoder, TextCNN, TransformerClassifier
from fastamp.training.batches import Examples, captured_length
from fastamp.training.config import DEFAULT_EMBEDDING_DIM, TrainConfig


@dataclass(frozen=True)
class Task:
    """All that a run reads: data, vocabulary, vectors, and for "bert" a pre-trained encoder instead of these two."""

    corpus: Corpus
    vocabulary: Vocabulary | None
    vectors: WordVectors | None
    coverage: Coverage | None
    encoder: PretrainedEncoder | None
    train: Examples
    dev: Examples
    test: Examples

    @classmethod
    def load(cls, config: TrainConfig, device: torch.device) -> Task:
        """Loads the data of a run.

        The vocabulary is that of the training sentences; with pre-trained vectors also the words of dev and
        test that have one, as if the whole file were the vocabulary.
        """
        corpus = _corpus(config, config.fraction)
        splits = (corpus.train, corpus.dev, corpus.test)
        if config.model == "bert":
            encoder = PretrainedEncoder.load(str(config.pretrained))
            train, dev, test = (
                Examples.of(encoder.encode(split.texts), split.labels, device, pad_id=encoder.pad_id)
                for split in splits
            )
            return cls(corpus, None, None, None, encoder, train, dev.by_length(), test.by_length())
        vocabulary, vectors, covered = _words(config, corpus)
        train, dev, test = (Examples.of(vocabulary.encode(s.sentences), s.labels, device) for s in splits)
        return cls(corpus, vocabulary, vectors, covered, None, train, dev.by_length(), test.by_length())

    @property
    def pad_id(self) -> int:
        """The id that pads sentences on the right."""
        return PAD if self.encoder is None else self.encoder.pad_id

    def model(self, config: TrainConfig, generator: torch.Generator | None = None) -> nn.Module:
        """A new model, its weights drawn from the global generator.

        Args:
            config: the run.
            generator: of what the model draws itself, as Non-linear Mixup does; not needed to evaluate it.
        """
        if config.method != "nonlinear-mixup":
            return self._backbone(config, self.corpus.num_classes)
        classes = self.corpus.num_classes
        backbone = self._backbone(config, NonlinearMixup.outputs(classes))
        return NonlinearMixup(
            backbone,
            num_classes=classes,
            length=captured_length(self.train.ids.shape[1]) if config.capture else self.train.ids.shape[1],
            width=backbone.embedding_dim,
            alpha=config.alpha,
            generator=generator,
        )

    def _backbone(self, config: TrainConfig, outputs: int) -> TextCNN | AttentionBiLSTM | TransformerClassifier:
        if self.encoder is not None:
            return self.encoder.classifier(outputs)
        if self.vocabulary is None:
            raise ValueError("a model over words needs a vocabulary")
        options: dict[str, Any] = {
            "embedding_dim": config.embedding_dim or DEFAULT_EMBEDDING_DIM,
            "vectors": None if self.vectors is None else embedding_table(self.vocabulary, self.vectors),
            "freeze": config.freeze_vectors,
            "dropout": config.dropout,
        }
        if config.model == "bilstm":
            return AttentionBiLSTM(len(self.vocabulary), outputs, hidden_size=config.hidden_size, **options)
        return TextCNN(len(self.vocabulary), outputs, **options)

    def fingerprint(self) -> dict[str, str | None]:
        """Digests that tell whether another run saw the same data."""
        data = self.corpus.fingerprint()
        if self.encoder is not None:
            # It reads the texts, of which the corpus's tokens keep neither case nor all characters.
            corpus = self.corpus
            texts = [text for split in (corpus.train, corpus.dev, corpus.test) for text in split.texts]
            data = hashlib.sha256("\n".join([data, *texts]).encode()).hexdigest()
        return {
            "dataset files": data,
            "word vectors": None if self.vectors is None else self.vectors.digest,
            "pretrained encoder": None if self.encoder is None else self.encoder.digest,
        }


def _corpus(config: TrainConfig, fraction: float) -> Corpus:
    return load(
        config.dataset,
        data_dir=config.data_dir,
        seed=config.seed,
        lower=config.lower,
        fold=config.fold,
        fraction=fraction,
    )


def _words(config: TrainConfig, corpus: Corpus) -> tuple[Vocabulary, WordVectors | None, Coverage | None]:
    vocabulary = Vocabulary.build(corpus.train.sentences)
    if config.vectors is None:
        return vocabulary, None, None
    # All words of the data set, whatever part of it is trained on: the file is then read once for all runs.
    vectors = read_vectors(config.vectors, _all_words(_corpus(config, 1.0)))
    if config.embedding_dim not in (None, vectors.dim):
        raise ValueError(f"embedding_dim is {config.embedding_dim}, but {config.vectors} has width {vectors.dim}")
    known = [word for word in _all_words(corpus) if word in vocabulary or vectors.find(word) is not None]
    covered = coverage(
        (sentence for split in (corpus.train, corpus.dev, corpus.test) for sentence in split.sentences), vectors
    )
    return Vocabulary(known), vectors, covered


def _all_words(corpus: Corpus) -> tuple[str, ...]:
    return Vocabulary.build(*(split.sentences for split in (corpus.train, corpus.dev, corpus.test))).words
