"""Views of a model: modules that share everything with an original but for some of their children.

A view runs the model's own `forward`, so masks, rotary embeddings and whatever else a model computes on the way keep
working; parts that a cut takes away are replaced by the stand-ins below. The original is never changed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


def view_of(origin: nn.Module, children: dict[str, nn.Module | None], **attributes: Any) -> nn.Module:
    """A module of origin's class that shares its parameters, buffers, hooks and all children not given here.

    A direct child that is None is taken away; attributes are those that are others in the view.
    """
    # Not copy.copy: FSDP2 gives modules a class whose __new__ undoes its wrapping.
    view: nn.Module = object.__new__(type(origin))
    view.__dict__.update(origin.__dict__)
    # An instance's own forward (accelerate sets one for autocast) is bound to the original.
    view.__dict__.pop("forward", None)
    view.__dict__["_modules"] = {**origin._modules, **children}
    view.__dict__.update(attributes)
    return view


def unregistered(module: nn.Module, **attributes: Any) -> nn.Module:
    """The module with attributes that nn.Module does not count among its children and parameters."""
    module.__dict__.update(attributes)
    return module


class Given(nn.Module):
    """Stands in for embeddings: what goes in as inputs_embeds (or as the only argument) comes out."""

    def forward(self, inputs: Tensor | None = None, inputs_embeds: Tensor | None = None, *_: Any, **__: Any) -> Any:
        """The embeddings as given, of whatever shape."""
        return inputs if inputs_embeds is None else inputs_embeds


class PassLayer(nn.Module):
    """Stands in for the layers of an encoder whose loop needs one: returns (hidden states, no attention weights)."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """The hidden states as given."""
        return hidden_states, None


class GivenBase(nn.Module):
    """Stands in for the base model under a classification head: what goes in is its last hidden state.

    Or, where it is `pooled`, the pooler's output already. Some heads take that of the base model's own pooler.
    """

    def __init__(self, pooler: nn.Module | None, *, pooled: bool = False) -> None:
        super().__init__()
        self.pooler, self.pooled = pooler, pooled

    def forward(
        self, inputs: Tensor | None = None, *_: Any, inputs_embeds: Tensor | None = None, **__: Any
    ) -> BaseModelOutputWithPooling:
        """(B, S, D) hidden states, or what the pooler made of them, as a base model's output."""
        hidden = inputs if inputs_embeds is None else inputs_embeds
        pooled = hidden if self.pooled or self.pooler is None else self.pooler(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


def follow_mode(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Give each (view, original) the original's train or eval mode."""
    for view, origin in pairs:
        if view.training != origin.training:
            view.training = origin.training


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model
