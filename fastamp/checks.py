"""Checks of tensor arguments: a clear error before anything is computed or changed.

Shapes, dtypes and devices are checked everywhere. Values are checked on CPU tensors only: on a GPU that would
synchronise; there the kernels assert on the device (labels) or the documentation says what is assumed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from fastamp.policy import Policy, check_number

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What to do with an argument of three dimensions or more.
_TOO_DEEP = {
    "logits": "; AMP mixes rows: make every position one, by logits.flatten(0, -2), or where classes are dimension 1 "
    "logits.movedim(1, -1).flatten(0, -2), and target.flatten()",
    "hidden": "; AMP mixes rows: make every position one, by hidden.flatten(0, -2) and target.flatten()",
    "f's output": "; a row of hidden has one target: pool over positions in f, or, for a target at every position, "
    "call the criterion itself on logits.flatten(0, -2) and target.flatten()",
}


class NonFiniteError(ValueError):
    """The user's f returned NaN or +inf."""


def check_float_rows(name: str, value: object, *, dims: int | None = None) -> None:
    """`value` is a plain floating-point tensor (B, ...), of `dims` dimensions if given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if is_dtensor(value):
        raise TypeError(
            f"{name} is a DTensor, which fastamp does not take; pass the local shard of whole rows "
            f"({name}.to_local()) or the replicated tensor ({name}.full_tensor())"
        )
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}" + _floats_from(value.dtype)
        )
    if dims is not None and value.dim() != dims:
        advice = _TOO_DEEP.get(name, "") if value.dim() > dims else ""
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}{advice}")
    if value.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, got a scalar")


def _floats_from(dtype: torch.dtype) -> str:
    if dtype == torch.uint8:
        return "; make pixels floating point first, as by .float() / 255"
    if dtype == torch.bool or dtype.is_complex:
        return ""
    return "; embed integer ids first: they cannot be mixed"


def is_dtensor(value: Tensor) -> bool:
    """Whether `value` is a distributed tensor; does not import torch.distributed.tensor."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(value, distributed.DTensor)


def check_hidden(hidden: object) -> list[Tensor]:
    """`hidden` is a floating-point tensor (B, ...) or a dict, tuple or list of them on one device; its tensors."""
    if isinstance(hidden, Mapping):
        named = [(f"hidden[{name!r}]", part) for name, part in hidden.items()]
    elif isinstance(hidden, (tuple, list)):
        named = [(f"hidden[{index}]", part) for index, part in enumerate(hidden)]
    elif isinstance(hidden, Tensor):
        named = [("hidden", hidden)]
    else:
        raise TypeError(f"hidden must be a tensor or a dict or tuple of tensors, got {type(hidden).__name__}")
    if not named:
        raise ValueError("hidden must have at least one tensor, got none")
    first_name, first = named[0]
    for name, part in named:
        check_float_rows(name, part)
        if part.shape[0] != first.shape[0]:
            raise ValueError(
                f"the parts of hidden must have one batch size, got {first.shape[0]} rows in {first_name} "
                f"and {part.shape[0]} in {name}"
            )
        check_device(name, part, first.device)
    return [part for _, part in named]


def check_context(context: object, batch: int, device: torch.device) -> None:
    """`context` is None, or tensors (B, ...) on `device` (or None in their place) by the names of f's arguments."""
    if context is None:
        return
    if not isinstance(context, Mapping):
        raise TypeError(f"context must be a dict of tensors or None, got {type(context).__name__}")
    for name, value in context.items():
        if not isinstance(name, str):
            raise TypeError(f"context must have the names of f's arguments as keys, got {name!r}")
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"context[{name!r}] must be a tensor or None, got {type(value).__name__}")
        if value.dim() == 0 or value.shape[0] != batch:
            raise ValueError(
                f"context[{name!r}] must have {batch} rows, one a row of hidden, got shape {tuple(value.shape)}; "
                "what all rows share belongs into f itself"
            )
        check_device(f"context[{name!r}]", value, device)


def checked_row_target(target: object, batch: int, device: torch.device) -> Tensor:
    """As far as it can be told before the number of classes is known: `checked_target`."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    soft = target.dtype.is_floating_point
    if soft and target.dim() != 2:
        raise ValueError(
            f"target of probabilities must have shape (B, C), got {tuple(target.shape)}; class indices must be int64"
        )
    classes = target.shape[1] if soft else 1
    return checked_target(target, torch.empty((), device=device).expand(batch, classes))


def check_outputs(logits: object, batch: int, *, classes: int | None = None, sub_batch: bool = False) -> Tensor:
    """What f returned is (B, C) floating point, on the CPU also without NaN and +inf."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"f must return logits, a tensor (B, C), got {type(logits).__name__}"
            + ("; take its .logits" if hasattr(logits, "logits") else "")
        )
    if not logits.dtype.is_floating_point:
        raise TypeError(f"f's output must be logits, floating point, got {logits.dtype}; does it take the argmax?")
    check_logits("f's output", logits)
    if logits.shape[0] != batch:
        why = (
            f"f was given {batch} of the rows and returned {logits.shape[0]}: giving context, even empty, promises "
            "that f treats rows independently at any batch size, with all that belongs to a row in hidden and context; "
            "leave context out (None) where f uses anything else of the whole batch"
            if sub_batch
            else f"f must return a row of logits for each of hidden's {batch} rows, got shape {tuple(logits.shape)}"
        )
        raise ValueError(why)
    if classes is not None and logits.shape[1] != classes:
        raise ValueError(
            f"f must return the same number of classes in every pass, got {classes}, then {logits.shape[1]}"
        )
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~(logits.detach() < torch.inf).all(1)
        if bool(wrong.any()):
            first = int(wrong.int().argmax())
            raise NonFiniteError(f"f returned NaN or +inf in {int(wrong.sum())} of {batch} rows, first in row {first}")
    return logits


def check_logits(name: str, logits: object) -> None:
    """`logits` is (B, C) floating point with C >= 1."""
    if not isinstance(logits, Tensor) and hasattr(logits, "logits"):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}; take its .logits")
    check_float_rows(name, logits, dims=2)
    assert isinstance(logits, Tensor)
    if logits.shape[1] == 0:
        raise ValueError(f"{name} must have at least one class, got shape {tuple(logits.shape)}")


def checked_target(target: object, logits: Tensor) -> Tensor:
    """`target`: (B,) int64 (uint8 becomes that) or (B, C) floating point, on the device of `logits` (B, C)."""
    batch, classes = logits.shape
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.dtype.is_floating_point:
        if target.shape != (batch, classes):
            raise ValueError(
                f"target of probabilities must have the shape of the logits, ({batch}, {classes}), "
                f"got {tuple(target.shape)}; class indices must be int64"
            )
    elif target.shape != (batch,):
        raise ValueError(
            f"target of class indices must have shape ({batch},), one a row of logits, got {tuple(target.shape)}"
        )
    elif target.dtype == torch.uint8:
        target = target.long()
    elif target.dtype != torch.int64:
        raise TypeError(
            "target must be int64 or uint8 class indices or floating-point probabilities, "
            f"got {target.dtype}; pass target.long()"
        )
    check_device("target", target, logits.device)
    return target


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """`value` lies on `device`."""
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the rows to mix are on {device}; they must be together")


def check_class_vector(name: str, value: object, classes: int, device: torch.device) -> None:
    """`value` is None or (C,) floating point on `device`."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.shape != (classes,):
        raise ValueError(f"{name} must have shape ({classes},), one a class, got {tuple(value.shape)}")
    check_device(name, value, device)


def check_class_weight(weight: object, classes: int, device: torch.device, *, name: str = "weight") -> None:
    """`weight` is None or (C,) floating point on `device`, and asks for no gradient."""
    check_class_vector(name, weight, classes, device)
    if isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require a gradient: the losses have none to class weights, as nn.CrossEntropyLoss has "
            f"none; pass {name}.detach()"
        )


def checked_class_weights(
    weight: Tensor | None, pos_weight: Tensor | None, classes: int, rows: Tensor, loss: str
) -> Tensor | None:
    """What a `Mixture` is weighted by, see there; both are None or (C,) floating point on the device of the rows."""
    check_class_weight(weight, classes, rows.device)
    if loss != "binary_cross_entropy":
        if pos_weight is not None:
            raise ValueError(f"pos_weight belongs to loss='binary_cross_entropy', got loss={loss!r}")
        return weight
    check_class_weight(pos_weight, classes, rows.device, name="pos_weight")
    if pos_weight is None:
        return None if weight is None else weight.expand(2, -1)
    yes = pos_weight.to(torch.promote_types(rows.dtype, torch.float32))
    both = torch.stack([yes, torch.ones_like(yes)])
    return both if weight is None else both * weight.to(yes.dtype)


def check_head_dtypes(hidden: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """The tensors of a linear layer have one dtype, or autocast gives them one, which leaves float64 as it is."""
    for name, value in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if value is None or value.dtype == hidden.dtype:
            continue
        if not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(f"{name} must have hidden's dtype {hidden.dtype} outside torch.autocast, got {value.dtype}")
        if torch.float64 in (value.dtype, hidden.dtype):
            raise TypeError(
                f"{name} must have hidden's dtype {hidden.dtype}, got {value.dtype}: torch.autocast leaves float64 as "
                "it is"
            )


def check_partner(partner: object, batch: int, device: torch.device) -> None:
    """`partner` is (B,) int64 on `device`; on the CPU also: a permutation of 0..B-1."""
    if not isinstance(partner, Tensor):
        raise TypeError(f"partner must be a tensor, got {type(partner).__name__}")
    if partner.dtype != torch.int64:
        raise TypeError(f"partner must be int64, got {partner.dtype}; pass partner.long()")
    if partner.shape != (batch,):
        raise ValueError(f"partner must have shape ({batch},), one a row, got {tuple(partner.shape)}")
    check_device("partner", partner, device)
    if partner.device.type != "cpu" or torch.compiler.is_compiling() or batch == 0:
        return
    low, high = torch.aminmax(partner)
    if int(low) < 0 or int(high) >= batch:
        raise ValueError(f"partner must lie in 0..{batch - 1}, got values from {int(low)} to {int(high)}")
    counts = torch.bincount(partner, minlength=batch)
    if int(counts.max()) > 1:
        raise ValueError(
            f"partner must be a permutation of 0..{batch - 1}, but row {int(counts.argmax())} is the partner "
            f"of {int(counts.max())} rows"
        )


def checked_lam(lam: object, batch: int, device: torch.device) -> Tensor:
    """`lam` (B,) floating point; one number, (), becomes that of every row."""
    if not isinstance(lam, Tensor):
        raise TypeError(f"lam must be a tensor, got {type(lam).__name__}")
    if lam.dtype not in FLOATS:
        raise TypeError(f"lam must be floating point, got {lam.dtype}")
    if lam.dim() == 0:
        lam = lam.repeat(batch)
    elif lam.shape != (batch,):
        raise ValueError(f"lam must have shape ({batch},), one a row, or () for one of all, got {tuple(lam.shape)}")
    check_device("lam", lam, device)
    return lam


def checked_mix(
    lam: object, partner: object, batch: int, device: torch.device, *, pairing: str = "permutation"
) -> Tensor:
    """`lam` as `checked_lam` gives it, in [0, 1]; `partner` is a permutation, for "matching" its own inverse.

    Values are looked at on the CPU only.
    """
    lam = checked_lam(lam, batch, device)
    check_partner(partner, batch, device)
    if lam.device.type == "cpu" and not torch.compiler.is_compiling() and batch:
        low, high = torch.aminmax(lam)
        if not (float(low) >= 0 and float(high) <= 1):
            raise ValueError(f"lam must lie in [0, 1], got values from {float(low):g} to {float(high):g}")
        if pairing == "matching":
            assert isinstance(partner, Tensor)
            there_and_back = partner[partner]
            alone = there_and_back != torch.arange(batch, device=device)
            if bool(alone.any()):
                row = int(alone.int().argmax())
                raise ValueError(
                    f"partner must be its own inverse for pairing='matching', but row {row}'s partner is "
                    f"{int(partner[row])}, whose partner is {int(there_and_back[row])}"
                )
    return lam


def all_kept(target: Tensor, classes: int, policy: Policy) -> bool:
    """Whether it is known that nothing in the target equals ignore_index; ValueError for a label out of range.

    Only a CPU's values are looked at. Probabilities are ignored in binary cross-entropy only.
    """
    ignore_index, soft = policy.ignore_index, target.is_floating_point()
    if not target.shape[0] or (soft and policy.loss != "binary_cross_entropy"):
        return True
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if soft:
        return not bool((target == ignore_index).any())
    bounds = torch.aminmax(target)
    low, high = bounds[0].item(), bounds[1].item()
    if low >= 0 and high < classes and not 0 <= ignore_index < classes:
        return True
    kept = target != ignore_index
    wrong = kept & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        row = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            f"target must lie in 0..{classes - 1} or be ignore_index ({ignore_index}), "
            f"got {int(target[row])} in row {row}"
        )
    return bool(kept.all())


def checked_num_items(num_items: float | Tensor | None, device: torch.device) -> float | Tensor | None:
    """`num_items`: None, a positive number or a 0-d tensor. One on the CPU for rows elsewhere is given as a number.

    A copy of it to the device would wait for the device, and cannot be captured in a CUDA graph.
    """
    if isinstance(num_items, Tensor):
        if num_items.dim():
            raise ValueError(f"num_items must be a number or a 0-d tensor, got shape {tuple(num_items.shape)}")
        if num_items.device == device or num_items.device.type != "cpu" or torch.compiler.is_compiling():
            return num_items
        num_items = num_items.item()
    if num_items is not None and not torch.compiler.is_compiling():  # where it is a symbol, without a value
        check_number("num_items", num_items, low=0.0, open_low=True, also="None")
    return num_items
