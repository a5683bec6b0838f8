"""What hypothesis draws from: shapes, dtypes, strides, targets and options of AMP on logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from conftest import DTYPES, Case
from hypothesis import strategies as st
from torch import Tensor

from fastamp.backend import uses_triton
from fastamp.conformance import check_case

LAYOUTS = ("contiguous", "transposed", "columns sliced", "every second", "misaligned", "expanded")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values with other strides, inside a buffer whose other elements are NaN (0 for integers)."""
    poison = torch.nan if values.is_floating_point() else 0
    shape = values.shape
    if layout == "transposed" and values.dim() == 2:
        out = values.new_full((shape[1], shape[0] + 3), poison)[:, 1:-2].t()
    elif layout == "columns sliced" and values.dim() == 2:
        out = values.new_full((shape[0], shape[1] + 5), poison)[:, 2:-3]
    elif layout == "every second":
        out = values.new_full([2 * size + 1 for size in shape], poison)[tuple(slice(1, None, 2) for _ in shape)]
    elif layout == "misaligned":
        out = values.new_full((values.numel() + 3,), poison)[3:].view(shape)
    elif layout == "expanded" and values.dim() == 2:
        return values[:1].clone().expand(shape)
    else:
        return values.clone()
    out.copy_(values)
    return out


class Strided(NamedTuple):
    """A case of fastamp.conformance whose tensors all have other strides, and λ that may lie outside [0, 1]."""

    case: Any
    layout: str
    outside: bool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.case, name)

    def draw(self, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
        inputs = self.case.draw(dtype, generator)
        inputs["lam"] = 3 * inputs["lam"] - 1 if self.outside else inputs["lam"]
        return {name: laid_out(value, self.layout) for name, value in inputs.items()}


DRAWS = {"layout": st.sampled_from(LAYOUTS), "dtype": st.sampled_from(DTYPES), "seed": st.integers(0, 2**16)}


def assert_case_holds(case: Any, layout: str, dtype: torch.dtype, seed: int, *, outside: bool = False) -> None:
    """On the backend that is set, where tensors are made; memory that is not written is NaN."""
    backend = "triton" if uses_triton(torch.empty(0)) else "torch"
    finding = check_case(Strided(case, layout, outside), torch.get_default_device(), backend, dtype, seed=seed)
    assert not finding.failures, finding.failures


@st.composite
def options(draw: st.DrawFn, batch: int, classes: int, *, soft: bool) -> dict[str, Any]:
    """Any combination of the options of `amp_cross_entropy`."""
    grad_clip = draw(st.sampled_from([1.0, 1.0, 0.1, None]))
    chosen = {
        "mode": draw(st.sampled_from(["amp", "amp", "maxop", "mixup"])),
        "loss": draw(st.sampled_from(["cross_entropy", "binary_cross_entropy", "softmax_bce"])),
        "step_size": draw(st.sampled_from([2e-3, 0.3] if grad_clip is None else [2e-3, 0.3, 1.0])),
        "grad_clip": grad_clip,
        "grad_scale": draw(st.sampled_from(["row", "mean"])),
        "clamp": draw(st.booleans()),
        "tie_tol": draw(st.sampled_from(["auto", 0.0, 1e-3])),
        "ignore_index": -100 if soft else draw(st.sampled_from([-100, classes + 1, 0, classes - 1])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "num_items": draw(st.sampled_from([None, None, 2.5, torch.tensor(3)])),
        "weight": draw(st.sampled_from([None, "random"])),
    }
    if chosen["loss"] == "binary_cross_entropy":
        chosen |= {"sum_classes": draw(st.booleans()), "pos_weight": draw(st.sampled_from([None, "random"]))}
    return chosen


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    max_batch: int = 9,
    max_classes: int = 40,
    min_classes: int = 1,
) -> Case:
    """One call of `amp_cross_entropy`: every argument, option, dtype and layout may vary."""
    batch, classes = draw(st.integers(1, max_batch)), draw(st.integers(min_classes, max_classes))
    dtype = draw(st.sampled_from(DTYPES))
    soft = draw(st.booleans())
    chosen = draw(options(batch, classes, soft=soft))
    layout = st.sampled_from(LAYOUTS)
    torch.manual_seed(draw(st.integers(0, 2**16)))

    logits = draw(st.sampled_from([0.1, 1.0, 4.0])) * torch.randn(batch, classes)
    logits = (logits + draw(st.sampled_from([0.0, 0.0, 30.0]))).to(dtype)
    if soft:
        target = torch.rand(batch, classes).softmax(1) * (1 if draw(st.booleans()) else 0.8)
        target = target.to(draw(st.sampled_from(DTYPES)))
        if chosen["loss"] == "binary_cross_entropy" and draw(st.booleans()):
            target[torch.rand(batch, classes) < 0.3] = -100
    else:
        target = torch.randint(classes, (batch,))
        if chosen["ignore_index"] != -100 and draw(st.booleans()):
            target[draw(st.integers(0, batch - 1))] = chosen["ignore_index"]
    for name in ("weight", "pos_weight"):
        if chosen.get(name) is not None:
            chosen[name] = laid_out(0.25 + torch.rand(classes), draw(layout))
    lam = torch.rand(batch, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if chosen["reduction"] == "none":
        upstream = laid_out(torch.randn(batch), draw(layout))
        upstream = upstream if draw(st.booleans()) else torch.ones(()).expand(batch)
    else:
        upstream = torch.tensor(draw(st.sampled_from([1.0, 0.37, -2.0])))
    rows = torch.arange(batch)
    kind = draw(st.sampled_from(["permutation", "self", "swap"]))
    partner = {"permutation": torch.randperm(batch), "self": rows, "swap": rows.flip(0)}[kind]
    strided = (laid_out(value, draw(layout)) for value in (logits, target, lam, partner))
    return Case(*strided, chosen, upstream)
