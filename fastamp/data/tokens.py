"""The tokenisers of Kim, "Convolutional Neural Networks for Sentence Classification", EMNLP 2014."""

from __future__ import annotations

import re

_OTHER = re.compile(r"[^A-Za-z0-9(),!?'`]")
_SUFFIX = re.compile(r"('s|'ve|n't|'re|'d|'ll)")
_PUNCTUATION = re.compile(r"([,!()?])")


def clean_str(text: str, *, lower: bool = True) -> list[str]:
    """Tokens of a sentence by Kim's `clean_str`, which splits off contractions and punctuation.

    There are none where the text holds no ASCII letter, digit or one of `` (),!?'` ``. Kim keeps the case of TREC only.
    """
    text = _OTHER.sub(" ", text)
    text = _PUNCTUATION.sub(r" \1 ", _SUFFIX.sub(r" \1", text))
    return (text.lower() if lower else text).split()


def clean_str_sst(text: str, *, lower: bool = True) -> list[str]:
    """Tokens by Kim's `clean_str_sst`, for treebank sentences, which are split already; see `clean_str`."""
    text = _OTHER.sub(" ", text)
    return (text.lower() if lower else text).split()
