"""Calls of a linear head, whole or in chunks of rows, and what they make."""

import itertools

import torch
import torch.nn.functional as F
from conftest import assert_no_worse
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastamp import reference
from fastamp.functional import linear_amp_cross_entropy
from fastamp.mixing import draw

NAMES = ("hidden", "linear_weight", "linear_bias")


class Call:
    """One call, and what comes from above: in chunks, unless `chunk_rows` is None, which a ReLU or dropout needs."""

    def __init__(
        self,
        batch=7,
        depth=6,
        classes=11,
        *,
        dtype=torch.float32,
        chunk_rows=3,
        bias=True,
        relu=False,
        dropout=False,
        **options,
    ):
        self.hidden = torch.randn(batch, depth).to(dtype)
        self.linear_weight = (torch.randn(classes, depth) / depth**0.5).to(dtype)
        self.linear_bias = torch.randn(classes).to(dtype) if bias else None
        self.target = torch.randint(classes, (batch,))
        self.lam, self.partner = torch.rand(batch, dtype=torch.float64), torch.randperm(batch)
        self.keep = F.dropout(torch.ones(batch, depth), 0.4).to(dtype) if dropout else None
        self.relu, self.chunk_rows, self.options = relu, chunk_rows, options
        self.upstream = torch.randn(batch) if options.get("reduction") == "none" else torch.tensor(0.7)

    def leaves(self, dtype=None):
        tensors = (self.hidden, self.linear_weight, self.linear_bias)
        return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]

    def by_library(self, leaves=None, **changed):
        """Loss, statistics and leaves; each call's options may be changed."""
        leaves = self.leaves() if leaves is None else leaves
        chosen = {"chunk_rows": self.chunk_rows, "activation": "relu" if self.relu else None, "dropout_mask": self.keep}
        chosen |= {**self.options, **changed}
        batch = (self.target, self.lam, self.partner)
        loss, stats = linear_amp_cross_entropy(*leaves, *batch, return_stats=True, **chosen)
        return loss, stats, leaves

    def by_definition(self, dtype):
        leaves = self.leaves(dtype)
        target = self.target.to(dtype) if self.target.is_floating_point() else self.target

        def f(m):
            m = m.relu() if self.relu else m
            return F.linear(m if self.keep is None else m * self.keep.to(dtype), *leaves[1:])

        result = reference.amp(f, leaves[0], target, self.lam, self.partner, **self.options)
        return result.loss, result, leaves

    def gradients(self, loss, leaves, upstream=None, **kwargs):
        present = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        return torch.autograd.grad(loss, present, (self.upstream if upstream is None else upstream).to(loss), **kwargs)

    def assert_contract(self):
        """No worse than the composition in the dtype."""
        dtype = self.hidden.dtype
        runs = [self.by_library(), self.by_definition(torch.float64), self.by_definition(dtype)]
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        assert runs[0][0].dtype == runs[0][1].delta.dtype == compute
        assert_no_worse("loss", *[loss.detach() for loss, _, _ in runs], dtype)
        for name in ("lam_adv", "grad", "delta"):
            assert_no_worse(name, *[getattr(stats, name) for _, stats, _ in runs], dtype)
        truth = runs[1][1]
        noise = 64 * torch.finfo(compute).eps
        tie_tol = self.options.get("tie_tol", 0.0)
        doubtful = (truth.delta + (0.0 if tie_tol == "auto" else tie_tol)).abs() <= noise
        assert ((runs[0][1].mask == truth.mask) | doubtful).all()
        gradients = [self.gradients(loss, leaves) for loss, _, leaves in runs]
        if not self.target.is_floating_point() and (self.target == self.options.get("ignore_index", -100)).all():
            assert not any(mine.any() for mine in gradients[0])
            return
        for name, mine, true, other in zip(NAMES, *gradients, strict=False):
            assert mine.dtype == dtype
            assert_no_worse(f"gradient of {name}", mine, true, other, dtype)


def partners(kind, batch):
    """A permutation of 0..batch-1."""
    if kind == "one cycle":
        order = torch.randperm(batch)
        return torch.empty_like(order).scatter_(0, order, order.roll(-1))
    if kind == "matching":
        return draw(batch, pairing="matching").partner
    return torch.arange(batch) if kind == "self" else torch.randperm(batch)


KINDS = st.sampled_from(["permutation", "permutation", "one cycle", "matching", "self"])


class Made(TorchDispatchMode):
    """Counts operations, and notes shape and bytes of every tensor that one makes in memory of its own."""

    def __init__(self):
        super().__init__()
        self.operators, self.shapes, self.largest = 0, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        made = function(*args, **(kwargs or {}))
        given_memory = {one.untyped_storage()._cdata for one in args if isinstance(one, torch.Tensor)}
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, torch.Tensor) and one.untyped_storage()._cdata not in given_memory:
                self.shapes.add(tuple(one.shape))
                self.largest = max(self.largest, one.untyped_storage().nbytes())
        return made


def peak_bytes(step):
    """Bytes that a step allocates on the CPU at its peak, temporary tensors within operations included."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
