"""The options that define one AMP step, checked once; immutable, hashable and free of tensors."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import torch

Mode = Literal["amp", "maxop", "mixup"]
Loss = Literal["cross_entropy", "binary_cross_entropy", "softmax_bce"]
GradScale = Literal["row", "mean"]
Kind = Literal["mean", "sum", "none"]
Pairing = Literal["permutation", "matching"]
Dropout = Literal["shared", "redrawn"]
Plan = Literal["auto", "merged", "both"]

CHOICES: dict[str, tuple[Any, ...]] = {
    "mode": get_args(Mode),
    "loss": get_args(Loss),
    "grad_scale": get_args(GradScale),
    "reduction": get_args(Kind),
    "reweight": (None, "moving"),
    "pairing": get_args(Pairing),
    "dropout": get_args(Dropout),
    "plan": get_args(Plan),
}
TIE_ULPS = 4.0


class Policy(NamedTuple):
    """What a row of AMP does with its λ and its loss; `AMPLoss` documents each field.

    Kernels are compiled for a policy, and read its fields: newer Tritons hand them a tuple without methods. ε is not
    among them: it may change with every step.
    """

    mode: str = "amp"
    loss: str = "cross_entropy"
    grad_clip: float | None = 1.0
    grad_scale: str = "row"
    clamp: bool = False
    tie_tol: float | None = None  # None is "auto"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    pairing: str = "permutation"
    sum_classes: bool = False  # of binary cross-entropy: the sum over classes in place of their mean
    keeps_all: bool = False  # promises that every row takes λ': see `known_to_keep_all`

    def tie_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """(absolute, relative) parts of the tie tolerance `absolute + relative·max(1, |ℓ|)` in `dtype`."""
        return (0.0, TIE_ULPS * torch.finfo(dtype).eps) if self.tie_tol is None else (self.tie_tol, 0.0)

    def mangle(self) -> str:
        """The part of a device function's name that stands for this policy."""
        return "_".join(map(str, self)).translate(str.maketrans(".", "d", "+")).replace("-", "m")


def checked_policy(**options: Any) -> Policy:
    """A Policy of valid options, tie_tol as users give it; ValueError or TypeError naming the first that is not."""
    if options.get("tie_tol") == "auto":
        options["tie_tol"] = None
    elif "tie_tol" in options:
        check_number("tie_tol", options["tie_tol"], low=0.0, also="'auto'")
        options["tie_tol"] = float(options["tie_tol"])
    policy = Policy(**options)
    for name in ("mode", "loss", "grad_scale", "pairing"):
        check_choice(name, getattr(policy, name))
    if policy.grad_clip is not None:
        check_number("grad_clip", policy.grad_clip, low=0.0, open_low=True, also="None")
    for name in ("clamp", "sum_classes"):
        if not isinstance(getattr(policy, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(policy, name)!r}")
    if policy.sum_classes and policy.loss != "binary_cross_entropy":
        raise ValueError(f"sum_classes belongs to loss='binary_cross_entropy', got loss={policy.loss!r}")
    if isinstance(policy.ignore_index, bool) or not isinstance(policy.ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {policy.ignore_index!r}")
    check_number("label_smoothing", policy.label_smoothing, low=0.0, high=1.0)
    return policy


def check_choice(name: str, value: object) -> None:
    """ValueError unless `value` is one of the option's choices."""
    if value not in CHOICES[name]:
        taken = ", ".join(repr(choice) for choice in CHOICES[name])
        raise ValueError(f"{name} must be one of {taken}; got {value!r}")


def check_number(
    name: str, value: object, *, low: float, high: float = math.inf, open_low: bool = False, also: str = ""
) -> None:
    """TypeError unless `value` is a real number, ValueError unless it is finite and in [low, high]."""
    above = f"> {low:g}" if open_low else f">= {low:g}"
    taken = f"a finite number {above}" + (f" and <= {high:g}" if high < math.inf else "")
    taken += f" or {also}" if also else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {taken}, got {value!r}")
    number = float(value)
    # By comparisons, which torch.compile can make of a number that is a symbol.
    if not low <= number <= high or number == math.inf or (open_low and number == low):
        raise ValueError(f"{name} must be {taken}, got {value!r}")
