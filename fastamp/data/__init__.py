"""Sentence-classification corpora as the paper uses them, their vocabulary, and pre-trained word vectors."""

from fastamp.data.corpora import DATASETS, Corpus, Split, load
from fastamp.data.files import read_tsv
from fastamp.data.tokens import clean_str, clean_str_sst
from fastamp.data.vectors import Coverage, WordVectors, embedding_table, read_vectors
from fastamp.data.vocabulary import PAD, UNK, Vocabulary

__all__ = [
    "DATASETS",
    "PAD",
    "UNK",
    "Corpus",
    "Coverage",
    "Split",
    "Vocabulary",
    "WordVectors",
    "clean_str",
    "clean_str_sst",
    "embedding_table",
    "load",
    "read_tsv",
    "read_vectors",
]
