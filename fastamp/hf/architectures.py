"""Where the classification models of transformers can be cut."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers
from torch import nn

_WORDS = ("attention_mask", "token_type_ids", "position_ids")


class Architecture(NamedTuple):
    """Names of the parts of one architecture; all but `base` and `head_pooler` are paths inside the base model."""

    model: str  # the class in transformers
    base: str  # attribute of the base model
    word: str = "embeddings.word_embeddings"  # its output is what inputs_embeds stands for; for images, the projection
    layers: str = "encoder.layer"
    projection: str | None = None  # between embeddings and layers, where the config asks for it
    conv: str | None = None  # runs after layer 0 and takes its input as well: no cut lies between them
    norm: str | None = None  # between the last layer and the base model's output
    norm_in_states: bool = False  # transformers reports hidden_states[n] after the norm
    pooler: str | None = None  # the base model's pooler, where the head takes its output
    head_pooler: str | None = None  # the same, where it belongs to the head
    word_context: tuple[str, ...] = _WORDS  # inputs that the rest takes after the word embeddings
    layer_context: tuple[str, ...] = ("attention_mask",)  # and after the embedding block
    counts_positions: bool = False  # position ids come from the input ids, not from the places
    images: bool = False


_PLACES = ("attention_mask", "position_ids")

# By config.model_type.
ARCHITECTURES = {
    "bert": Architecture("BertForSequenceClassification", "bert", pooler="pooler"),
    "roberta": Architecture("RobertaForSequenceClassification", "roberta", counts_positions=True),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification", "distilbert", layers="transformer.layer", word_context=_PLACES
    ),
    "deberta-v2": Architecture(
        "DebertaV2ForSequenceClassification", "deberta", conv="encoder.conv", head_pooler="pooler"
    ),
    "electra": Architecture("ElectraForSequenceClassification", "electra", projection="embeddings_project"),
    "modernbert": Architecture(
        "ModernBertForSequenceClassification",
        "model",
        "embeddings.tok_embeddings",
        "layers",
        norm="final_norm",
        norm_in_states=True,
        word_context=_PLACES,
        layer_context=_PLACES,  # rotary embeddings are applied in every layer
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        "vit",
        "embeddings.patch_embeddings.projection",
        "layers",
        norm="layernorm",
        word_context=("attention_mask",),
        images=True,
    ),
}


class Cut(NamedTuple):
    """A place to mix at."""

    kind: str  # "word", "embedded", "layers", "norm", "last" or "pooler"
    layers: int = 0  # for "layers": how many have run


def architecture_of(model: nn.Module) -> Architecture:
    """The entry for a model; a ValueError that names its blocks of layers if there is none."""
    config = getattr(model, "config", None)
    entry = ARCHITECTURES.get(getattr(config, "model_type", ""))
    if entry is not None and isinstance(model, getattr(transformers, entry.model)):
        return entry
    known = ", ".join(entry.model for entry in ARCHITECTURES.values())
    blocks = [
        f"{name}.0 ... {name}.{len(module) - 1}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    raise ValueError(
        f"split does not know {type(model).__name__}; it knows {known}. For another model write g and f yourself and "
        f"pass f to AMPLoss.step. Modules to mix behind would be: {'; '.join(blocks) or 'none found'}"
    )


def submodule(module: nn.Module, path: str | None) -> nn.Module | None:
    """The module at a path, or None where there is none."""
    for name in path.split(".") if path is not None else ():
        found = module._modules.get(name)
        if found is None:
            return None
        module = found
    return module if path is not None else None


def layers_of(base: nn.Module, entry: Architecture) -> list[nn.Module]:
    """The encoder's layers."""
    return list(base.get_submodule(entry.layers).children())


def cuts_of(model: nn.Module, entry: Architecture) -> dict[str, Cut]:
    """Module path to the cut behind that module, in the order of the forward pass."""
    base, prefix = model.get_submodule(entry.base), entry.base + "."
    projected, has_conv = submodule(base, entry.projection), submodule(base, entry.conv) is not None
    cuts = {prefix + entry.word: Cut("word"), prefix + "embeddings": Cut("embedded" if projected else "layers")}
    if projected is not None:
        cuts[f"{prefix}{entry.projection}"] = Cut("layers")
    for index in range(len(layers_of(base, entry))):
        path = entry.conv if index == 0 and has_conv else f"{entry.layers}.{index}"
        cuts[f"{prefix}{path}"] = Cut("layers", index + 1)
    if entry.norm is not None:
        cuts[prefix + entry.norm] = Cut("norm")
    if submodule(base, entry.pooler) is not None:
        cuts[f"{prefix}{entry.pooler}"] = Cut("pooler")
    if entry.head_pooler is not None:
        cuts[entry.head_pooler] = Cut("pooler")
    return cuts


def cut_at(model: nn.Module, entry: Architecture, at: Any) -> Cut:
    """What `at` names; TypeError or ValueError that say what would do."""
    cuts = cuts_of(model, entry)
    count = len(layers_of(model.get_submodule(entry.base), entry))
    would_do = f'"embeddings", "last", 0 to {count}, or one of {", ".join(cuts)}'
    if isinstance(at, bool) or not isinstance(at, (int, str)):
        raise TypeError(f"at must be {would_do}; got {at!r}")
    if isinstance(at, int):
        if not 0 <= at <= count:
            raise ValueError(f"at must lie in 0 to {count} for a model of {count} layers, got {at}")
        return Cut("norm") if entry.norm_in_states and at == count else Cut("layers", at)
    if at in ("embeddings", "last"):
        return Cut("word" if at == "embeddings" else "last")
    if at not in cuts:
        raise ValueError(f"{type(model).__name__} cannot be cut at {at!r}; at must be {would_do}")
    return cuts[at]
