"""All that a run reads, and the model for it."""

from __future__ import annotations

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
        vocabulary = vectors = covered = encoder = None
        if config.model == "bert":
            encoder = PretrainedEncoder.load(str(config.pretrained))
            ids, pad_id = [encoder.encode(split.texts) for split in corpus.splits], encoder.pad_id
        else:
            vocabulary, vectors, covered = _words(config, corpus)
            ids, pad_id = [vocabulary.encode(split.sentences) for split in corpus.splits], PAD
        train, dev, test = (
            Examples.of(of, split.labels, device, pad_id=pad_id) for of, split in zip(ids, corpus.splits, strict=True)
        )
        return cls(corpus, vocabulary, vectors, covered, encoder, train, dev.by_length(), test.by_length())

    @property
    def pad_id(self) -> int:
        """The id that pads sentences on the right."""
        return PAD if self.encoder is None else self.encoder.pad_id

    def model(self, config: TrainConfig, generator: torch.Generator | None = None) -> nn.Module:
        """A new model, its weights drawn from the global generator; what it draws itself is drawn from `generator`."""
        classes = self.corpus.num_classes
        if config.method != "nonlinear-mixup":
            return self._backbone(config, classes)
        backbone, length = self._backbone(config, NonlinearMixup.outputs(classes)), self.train.ids.shape[1]
        return NonlinearMixup(
            backbone,
            num_classes=classes,
            length=captured_length(length) if config.capture else length,
            width=backbone.embedding_dim,
            alpha=config.alpha,
            generator=generator,
        )

    def _backbone(self, config: TrainConfig, outputs: int) -> TextCNN | AttentionBiLSTM | TransformerClassifier:
        if self.encoder is not None:
            return self.encoder.classifier(outputs)
        assert self.vocabulary is not None
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
        return {
            "dataset files": self.corpus.fingerprint() if self.encoder is None else self.corpus.text_fingerprint(),
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
    # All words of the data set, whatever part of it is trained on: the file is then read once for all its runs.
    vectors = read_vectors(config.vectors, _all_words(_corpus(config, 1.0)))
    if config.embedding_dim not in (None, vectors.dim):
        raise ValueError(f"embedding_dim is {config.embedding_dim}, but {config.vectors} has width {vectors.dim}")
    known = [word for word in _all_words(corpus) if word in vocabulary or vectors.find(word) is not None]
    sentences = (sentence for split in corpus.splits for sentence in split.sentences)
    return Vocabulary(known), vectors, coverage(sentences, vectors)


def _all_words(corpus: Corpus) -> tuple[str, ...]:
    return Vocabulary.build(*(split.sentences for split in corpus.splits)).words
