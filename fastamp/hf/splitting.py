"""Cut a transformers classification model in two: g before the mixed hidden state, f after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastamp.hf.architectures import Architecture, Cut, architecture_of, cut_at, layers_of, submodule
from fastamp.hf.views import Given, GivenBase, PassLayer, follow_mode, unregistered, unwrapped, view_of
from fastamp.mixing import Mix

# What models are asked for in a part of a pass: no loss, and no states whose hooks would be installed on a view.
_PLAIN = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}
_NOT_INPUTS = ("labels", "num_items_in_batch", *_PLAIN)


class _Part(nn.Module):
    """A part of a model: its modules and its mode are the model's own."""

    origin: Any

    def __init__(self, model: nn.Module, entry: Architecture, cut: Cut) -> None:
        super().__init__()
        self.__dict__["origin"] = model  # not a child: the parameters of a part are those that it uses
        self.entry, self.cut = entry, cut
        self.pairs: list[tuple[nn.Module, nn.Module]] = [(self, model)]

    def train(self, mode: bool = True) -> _Part:
        """Set the mode of the model, and with it of both parts."""
        self.origin.train(mode)
        follow_mode(self.pairs)
        return self

    def _view(self, origin: nn.Module, children: dict[str, nn.Module | None], **attributes: Any) -> nn.Module:
        view = view_of(origin, children, **attributes)
        self.pairs.append((view, origin))
        return view

    def _base_view(
        self, base: nn.Module, layers: list[nn.Module], children: dict[str, nn.Module | None], *, conv: bool
    ) -> nn.Module:
        """A view of the base model with these layers, these children, and with or without what follows layer 0."""
        holder, _, name = self.entry.layers.rpartition(".")
        trimmed: dict[str, nn.Module | None] = {name: nn.ModuleList(layers)}
        if not holder:
            return self._view(base, {**children, **trimmed})
        if self.entry.conv is not None and not conv:
            trimmed[self.entry.conv.rpartition(".")[2]] = None
        return self._view(base, {**children, holder: self._view(base.get_submodule(holder), trimmed)})


class Front(_Part):
    """g: the model's inputs to the hidden state that is mixed. Made by `split`."""

    def __init__(self, model: nn.Module, entry: Architecture, cut: Cut) -> None:
        super().__init__(model, entry, cut)
        base = model.get_submodule(entry.base)
        self.pooler: nn.Module | None = None
        if cut.kind == "word":
            # For images not the projection itself: FSDP2 gathers the parameters of the module around it.
            self.body: nn.Module = base.get_submodule(entry.word.removesuffix(".projection"))
            return
        layers = layers_of(base, entry)
        without: dict[str, nn.Module | None] = {"pooler": None} if "pooler" in base._modules else {}
        if cut.kind in ("embedded", "layers"):
            layers = layers[: cut.layers]
            if entry.norm is not None:
                without[entry.norm] = nn.Identity()
            if cut.kind == "embedded" and entry.projection is not None:
                without[entry.projection] = nn.Identity()
            if not layers and entry.conv is not None:
                layers = [PassLayer()]  # DeBERTa's loop has no result without a layer
            self.body = self._base_view(base, layers, without, conv=cut.layers > 0)
        else:
            self.body = self._view(base, without)
            if cut.kind == "pooler":
                self.pooler = submodule(base, entry.pooler) or submodule(model, entry.head_pooler)

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        """The hidden state to mix.

        Args:
            *args: none; a TypeError says so.
            **inputs: what the model takes, (B, ...) each; labels are ignored.

        Returns:
            (B, S, D) floating point; (B, 1, D) for at="last", (B, D) behind a pooler, (B, D, H, W) behind a patch
            projection.

        Raises:
            TypeError: an input that the model needs is missing, or given without its name.
            ValueError: in front of a patch projection, images that are not of the model's size.
        """
        if args:
            raise TypeError("g takes the model's inputs by name: g(**inputs)")
        follow_mode(self.pairs)
        inputs = {name: value for name, value in inputs.items() if name not in _NOT_INPUTS and value is not None}
        if self.cut.kind == "word":
            if "inputs_embeds" in inputs:
                return inputs["inputs_embeds"]
            name = "pixel_values" if self.entry.images else "input_ids"
            if name not in inputs:
                raise TypeError(f"g takes what the model takes, {name} among it; got {', '.join(inputs) or 'nothing'}")
            if inputs.get("interpolate_pos_encoding"):
                raise ValueError(
                    "interpolate_pos_encoding=True cannot be passed on from behind the patch projection, where "
                    'at="embeddings" cuts, to f, which adds the positions: cut behind the embedding block, at=0'
                )
            return self._patches(inputs[name]) if self.entry.images else self.body(inputs[name])
        hidden = self.body(**inputs, **_PLAIN).last_hidden_state
        if self.cut.kind == "pooler":
            assert self.pooler is not None
            return self.pooler(hidden)
        return _read_by_head(hidden, self.origin, inputs.get("attention_mask")) if self.cut.kind == "last" else hidden

    def _patches(self, pixel_values: Tensor) -> Tensor:
        """(B, D, H, W) embedded patches of images."""
        patches: Any = self.body
        size, expected = tuple(pixel_values.shape[2:]), tuple(patches.image_size)
        if size != expected:  # f would say so of patches
            raise ValueError(
                f"images must be of {' x '.join(map(str, expected))} pixels, got pixel_values of shape "
                f"{tuple(pixel_values.shape)}"
            )
        grid = [pixels // patch for pixels, patch in zip(size, patches.patch_size, strict=True)]
        # The model casts in front of the modules that the view holds.
        return patches(pixel_values.to(patches.projection.weight.dtype)).transpose(1, 2).unflatten(2, grid)


class Rest(_Part):
    """f: mixed hidden states to logits. Made by `split`."""

    holder: Any

    def __init__(self, model: nn.Module, entry: Architecture, cut: Cut, holder: nn.Module) -> None:
        super().__init__(model, entry, cut)
        self.__dict__["holder"] = holder  # the model or what wraps it, whichever FSDP2 has sharded
        base = model.get_submodule(entry.base)
        children: dict[str, nn.Module | None] = {}
        if cut.kind == "word" and entry.images:
            children[entry.base] = self._behind_patches(base)
        elif cut.kind == "embedded":
            children[entry.base] = self._view(base, {"embeddings": Given()})
        elif cut.kind == "layers" and (cut.layers < len(layers_of(base, entry)) or entry.norm is not None):
            given: nn.Module = Given()
            if entry.images:
                # The model reads the dtype of the projection's weight from its embeddings.
                given = unregistered(given, patch_embeddings=base.get_submodule("embeddings.patch_embeddings"))
            over: dict[str, nn.Module | None] = {"embeddings": given}
            if submodule(base, entry.projection) is not None:
                over[str(entry.projection)] = nn.Identity()
            children[entry.base] = self._base_view(
                base, layers_of(base, entry)[cut.layers :], over, conv=cut.layers == 0
            )
        elif cut.kind == "pooler":
            children[entry.base] = GivenBase(None, pooled=True)
            if entry.head_pooler is not None:
                children[entry.head_pooler] = nn.Identity()
        elif cut.kind != "word":
            children[entry.base] = GivenBase(submodule(base, entry.pooler))
        self.body = self._view(model, children)

    def _behind_patches(self, base: nn.Module) -> nn.Module:
        """A view of an image model that takes the projection's output (B, D, H, W) for an image of H x W pixels."""
        embeddings: Any = base.get_submodule("embeddings")
        patches = embeddings.patch_embeddings
        sizes = patches.image_size, patches.patch_size
        grid = tuple(pixels // patch for pixels, patch in zip(*sizes, strict=True))
        given = unregistered(Given(), weight=patches.projection.weight)
        view = self._view(patches, {"projection": given}, num_channels=patches.projection.out_channels)
        outer = self._view(embeddings, {"patch_embeddings": view}, image_size=grid, patch_size=1)
        return self._view(base, {"embeddings": outer})

    def context(self, inputs: Mapping[str, Any], mix: Mix | None = None) -> dict[str, Tensor]:
        """What f takes beside the mixed hidden state: pass it as `context` to `AMPLoss.step`.

        Args:
            inputs: the model's inputs, tensors (B, ...), as g takes them.
            mix: the mix that `AMPLoss.step` is given. None: the context of unmixed rows, and of those only: where the
                partner of a row is longer, its last tokens would stay masked, and the loss would silently be another.

        Returns:
            Keyword arguments for f. An attention mask is the union of both rows' masks; token types and positions
            are those of the row itself, except that RoBERTa, which counts positions without padding, counts those
            of the union.

        Raises:
            TypeError: an attention mask that is neither boolean nor integer.
        """
        kind, entry = self.cut.kind, self.entry
        names = entry.word_context if kind == "word" else entry.layer_context if kind in ("embedded", "layers") else ()
        if kind == "norm" and getattr(self.origin.config, "classifier_pooling", "cls") == "mean":
            names = ("attention_mask",)
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        ids = inputs.get("input_ids")
        if kind == "word" and entry.counts_positions and ids is not None and "position_ids" not in given:
            padding = self.origin.get_submodule(entry.base + ".embeddings").padding_idx
            counted = _union(ids != padding, mix).int()
            given["position_ids"] = (counted.cumsum(1) * counted).long() + padding
        if "attention_mask" in given:
            given["attention_mask"] = _union(given["attention_mask"], mix)
        if "position_ids" in given and given["position_ids"].shape[0] == 1:
            counted_in = ("input_ids", "inputs_embeds", "pixel_values", "attention_mask")
            rows = next((inputs[name].shape[0] for name in counted_in if inputs.get(name) is not None), 1)
            given["position_ids"] = given["position_ids"].expand(rows, -1)
        return given

    def forward(self, mixed: Tensor, **context: Any) -> Tensor:
        """Logits (B, C) of mixed hidden states, of the shape that g returns, and of what `context` returns."""
        follow_mode(self.pairs)
        if not torch.compiler.is_compiling() and hasattr(self.holder, "unshard"):
            # FSDP2 takes the end of any backward pass, that of the λ-gradient too, for the end of the step, and gives
            # up the parameters that the model holds during its forward pass.
            self.holder.unshard()
        name = "pixel_values" if self.entry.images else "inputs_embeds"
        # The view's forward, not its call: hooks of the whole model (FSDP's are such) belong to the whole pass.
        return self.body.forward(**{name: mixed}, **context, **_PLAIN).logits


class Split(NamedTuple):
    """Both parts of a model: f(g(**inputs), **f.context(inputs)) are its logits."""

    g: Front
    f: Rest


def split(model: nn.Module, at: str | int = "embeddings") -> Split:
    """Cut a classification model in two at the hidden state that is to be mixed.

        g, f = split(model, at="embeddings")
        mix = criterion.sample(len(labels), device=labels.device)
        loss = criterion.step(f, g(**inputs), labels, mix=mix, context=f.context(inputs, mix))

    Both parts are views: they share all parameters and buffers with the model, follow its train or eval mode and
    its moves between devices and dtypes, and run its own forward code. The model itself is not changed. Split again
    after replacing modules of the model.

    Rows of different lengths need the context above: the union of both rows' masks, by the very mix that `step` is
    given. Without it, or by another mix, the loss is another and nothing notices.

    Args:
        model: BertForSequenceClassification, or the same of RoBERTa, DistilBERT, DeBERTa-v2, ELECTRA or ModernBERT,
            or ViTForImageClassification; also inside DistributedDataParallel or torch.compile. A model sharded by
            FSDP2 must run g and f inside its own forward, as `AMPTrainer` does.
        at: where to mix.
            "embeddings": word embeddings (for images, the patch projection), before positions are added;
            "last": what the classification head takes, (B, 1, D): the last hidden state at the first position, or
            its mean for a ModernBERT that classifies by the mean;
            an int k: transformers' hidden_states[k], 0 being the output of the embedding block and k that of the
            encoder's layer k;
            a module path: the output of that module, such as "bert.encoder.layer.3".

    Returns:
        Split(g, f): g(**inputs) is the hidden state (B, ...), f(mixed, **context) the logits (B, C), and
        f.context(inputs, mix) the context.

    Raises:
        TypeError, ValueError: a model or a place that is not one of these; the message lists what would do.
    """
    inner = unwrapped(model)
    entry = architecture_of(inner)
    cut = cut_at(inner, entry, at)
    return Split(Front(inner, entry, cut), Rest(inner, entry, cut, model))


def _union(mask: Tensor, mix: Mix | None) -> Tensor:
    if mask.is_floating_point():
        raise TypeError(f"attention_mask must be boolean or integer to form the union of two rows, got {mask.dtype}")
    return mask if mix is None else mix.union(mask)


def _read_by_head(hidden: Tensor, model: Any, attention_mask: Tensor | None) -> Tensor:
    """(B, 1, D) of (B, S, D): the first position, or the mean where the head takes that."""
    if getattr(model.config, "classifier_pooling", "cls") != "mean":
        return hidden[:, :1]
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    total = (hidden * attention_mask.unsqueeze(-1)).sum(dim=1)
    return (total / attention_mask.sum(dim=1, keepdim=True)).unsqueeze(1)
