"""A model in two parts: what comes before a mixed hidden state, and what comes after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from fastamp.mixing import Mix
from fastamp.models.words import PAD


class Rest(nn.Module):
    """f of a split: a model from a cut on. Its modules are the model's own, and the first one's mode is its mode."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)

    @property
    def training(self) -> bool:
        """The model's mode; `train` and `eval` set it through the modules."""
        return next(self.children()).training

    @training.setter
    def training(self, mode: bool) -> None:
        pass

    def context(self, ids: Tensor, mix: Mix | None = None) -> dict[str, Tensor]:
        """What f takes beside the mixed hidden state: nothing, unless a subclass says otherwise.

        It is of ids (B, T), int64, of the unmixed rows, and of the mix of the batch; without one of the unmixed rows.
        """
        return {}


class MaskedRest(Rest):
    """A rest that has yet to know which positions hold a word."""

    def context(self, ids: Tensor, mix: Mix | None = None) -> dict[str, Tensor]:
        """A mask (B, T), bool: which positions hold a word in either row; arguments as `Rest.context`."""
        mask = ids != PAD
        return {"mask": mask if mix is None else mix.union(mask)}


class Split(NamedTuple):
    """Both parts of a model: in eval mode f(g(ids), **f.context(ids)) are its logits."""

    g: Callable[[Tensor], Tensor]
    f: Rest


class Model(Protocol):
    """What every model here is, beside an nn.Module. `AMPLoss.step` takes its parts:

        g, f = model.split("word")
        mix = criterion.sample(len(y), device=y.device)
        loss = criterion.step(f, g(ids), y, mix=mix, context=f.context(ids, mix))

    The logits of a sentence depend neither on how far its batch is padded nor on the other rows.
    """

    @property
    def pad_id(self) -> int:
        """The id that pads, on the right."""

    @property
    def embedding_dim(self) -> int:
        """Width D of a word vector."""

    def __call__(self, ids: Tensor, /) -> Tensor:
        """Logits (B, C) of token ids (B, T), int64."""

    def split(self, at: str) -> Split:
        """The model in two parts, with what is to be mixed between them.

        Both parts share the model's parameters and its mode. Split again after replacing one of its modules.

        Args:
            at: "sentence": the sentence's representation, where SentMixup and SentAMP mix. "embedding": the word
                vectors (B, T, D). "word": the latest place where mixing, with one λ a row, is mixing the word vectors.

        Returns:
            Split(g, f): g(ids) is the hidden state, f, a module, maps it and f.context(ids, mix) to the logits (B, C).
            f treats rows independently.

        Raises:
            ValueError: another name.
        """


def cut_at(cuts: Mapping[str, Callable[[], Any]], at: str) -> Any:
    """What is made at the place that `at` names; a ValueError that lists the places for another name."""
    if at not in cuts:
        raise ValueError(f"at must be one of {', '.join(map(repr, cuts))}; got {at!r}")
    return cuts[at]()
