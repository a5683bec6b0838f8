"""The options that define one AMP step, checked once; immutable, hashable and free of tensors."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch

CHOICES: dict[str, tuple[Any, ...]] = {
    "mode": ("amp", "maxop", "mixup"),
    "loss": ("cross_entropy", "softmax_bce"),
    "grad_scale": ("row", "mean"),
    "reduction": ("mean", "sum", "none"),
    "reweight": (None, "moving"),
    "pairing": ("permutation", "matching"),
    "dropout": ("shared", "redrawn"),
    "plan": ("auto", "merged", "both"),
}
TIE_ULPS = 4.0


class Policy(NamedTuple):
    """What a row of AMP does with its λ and its loss; `AMPLoss` documents each field."""

    mode: str = "amp"
    loss: str = "cross_entropy"
    step_size: float = 2e-3
    grad_clip: float | None = 1.0
    grad_scale: str = "row"
    clamp: bool = False
    tie_tol: float | str = "auto"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    pairing: str = "permutation"

    def tie_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """(absolute, relative) parts of the tie tolerance `absolute + relative·max(1, |ℓ|)` in `dtype`."""
        if isinstance(self.tie_tol, str):
            return 0.0, TIE_ULPS * torch.finfo(dtype).eps
        return float(self.tie_tol), 0.0

    @property
    def lam_reach(self) -> float:
        """An upper bound on |λ' - λ|; infinite without a clip."""
        if self.mode == "mixup":
            return 0.0
        return math.inf if self.grad_clip is None else self.step_size * self.grad_clip


def checked_policy(**options: Any) -> Policy:
    """A Policy of valid options; ValueError or TypeError naming the first that is not."""
    policy = Policy(**options)
    for name in ("mode", "loss", "grad_scale", "pairing"):
        check_choice(name, getattr(policy, name))
    check_number("step_size", policy.step_size, low=0.0)
    if policy.grad_clip is not None:
        check_number("grad_clip", policy.grad_clip, low=0.0, open_low=True, also="None")
    if not isinstance(policy.clamp, bool):
        raise TypeError(f"clamp must be True or False, got {policy.clamp!r}")
    if policy.tie_tol != "auto":
        check_number("tie_tol", policy.tie_tol, low=0.0, also="'auto'")
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
    if not math.isfinite(number) or number < low or number > high or (open_low and number == low):
        raise ValueError(f"{name} must be {taken}, got {value!r}")
