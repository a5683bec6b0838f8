"""λ and partners: what a batch is mixed with, and how it is drawn."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastamp.backend import launches_on
from fastamp.ops.operator import operator
from fastamp.step.randomness import capturing

RANKED_ROWS = 1024  # a kernel makes the partners of so many, by comparing all with all


class Mix(NamedTuple):
    """One draw for a batch: row r becomes λ_r·row r + (1-λ_r)·row partner[r]."""

    lam: Tensor  # (B,) float32 (or float64), in [0, 1]; also taken: (), one λ for all rows
    partner: Tensor  # (B,) int64, a permutation of 0..B-1

    def to(self, device: torch.device | str) -> Mix:
        """The same draw on another device."""
        return Mix(self.lam.to(device), self.partner.to(device))

    def union(self, mask: Tensor) -> Tensor:
        """The attention mask of the mixed rows: a position counts where it counts in either row.

        Args:
            mask: (B, ...) boolean or 0/1 integer mask of the unmixed rows, or their lengths, (B,) integers.

        Returns:
            A mask of the same shape and dtype; of lengths, the longer one of either row.

        Raises:
            TypeError: a floating-point mask, which adds to attention scores rather than saying what counts.
            ValueError: on the CPU, an integer mask that is neither 0/1 nor lengths.
        """
        if mask.is_floating_point():
            raise TypeError(f"mask must be boolean or integer, got {mask.dtype}")
        on_host = mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and mask.dim() > 1 and mask.dtype != torch.bool and mask.numel():
            low, high = torch.aminmax(mask)
            if int(low) < 0 or int(high) > 1:
                raise ValueError(f"mask must be 0 or 1, or (B,) lengths, got values from {int(low)} to {int(high)}")
        return torch.maximum(mask, mask[self.partner])


class Mixture(NamedTuple):
    """What the rows of a batch become: mixed targets, and what they are weighted by."""

    target: Tensor  # (B,) int64 class indices or (B, C) probabilities, of the unmixed rows
    lam: Tensor  # (B,)
    partner: Tensor  # (B,) int64
    weight: Tensor | None  # (C,) class weights; for binary cross-entropy (2, C), of yes and of no

    def computed_in(self, dtype: torch.dtype) -> Mixture:
        """The same with λ a constant of `dtype`."""
        lam = self.lam
        return self._replace(lam=lam.detach().to(dtype)) if lam.requires_grad or lam.dtype != dtype else self


class MixStats(NamedTuple):
    """Facts of one step. Tensors are per row, on the device, detached; reading them is what synchronises."""

    lam: Tensor  # (B,) λ
    lam_adv: Tensor  # (B,) λ' (λ itself for mode="mixup")
    grad: Tensor  # (B,) ∇λ, after grad_scale and before the clip; NaN from `AMPLoss.step` with mode="mixup"
    delta: Tensor  # (B,) ℓ(λ') - ℓ(λ); from kernels, and where it decides nothing, to 1e-6 of the loss
    mask: Tensor  # (B,) bool: rows that took ℓ(λ')
    plan: str = "closed form"  # how: the passes that `AMPLoss.step` ran, see there


def draw(
    batch_size: int,
    *,
    alpha: float = 1.0,
    pairing: str = "permutation",
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Mix:
    """λ ~ Beta(alpha, alpha), one a row, and who mixes with whom; arguments as `AMPLoss` checks them.

    "permutation" makes partner a uniform random permutation. "matching" makes it a uniform random perfect matching,
    partner[partner[r]] = r; with odd B one random row is its own partner. Random numbers are drawn on the generator's
    device, and the result is moved to `device`; what needs float64, on the CPU in place of a device that has none.

    Processes of torch.distributed are mostly seeded alike. Drawing from the default generator, each of them therefore
    draws for all, and takes the part of its rank: independent draws, from one seed, without communication.

    Kernels rank random keys of 48 bits or more, drawn together with λ; two of B rows have the same one, and follow the
    order of their numbers, with a probability of 2⁻⁴⁹B² at most.
    """
    source = draw_device(device, generator)
    rank, processes = (0, 1) if generator is not None else _rank()
    ranked = processes == 1 and 1 <= batch_size <= RANKED_ROWS and launches_on(source)
    lam, keys = draw_beta(processes * batch_size, alpha, source, generator, with_keys=ranked)
    if keys is not None:
        partner = draw_partner(keys, pairing == "matching")
    elif processes == 1:
        partner = draw_permutation(batch_size, source, generator)
    else:
        # By turns: numbers of two ranks never coincide, even if their batches differ in size.
        lam = lam.view(batch_size, processes)[:, rank].contiguous()
        # Sorting random keys is a random permutation; double precision makes ties a matter of 1e-16·B².
        keys = torch.rand(batch_size, processes, dtype=torch.float64, device=_with_float64(source, generator))
        partner = keys[:, rank].argsort().to(source)
    if pairing == "matching" and not ranked:
        # Neighbours in a random order are paired; the last of an odd batch stays alone.
        order, alone = partner, batch_size % 2
        swapped = order[: batch_size - alone].view(-1, 2).flip(1).view(-1)
        if alone:
            swapped = torch.cat([swapped, order[-1:]])
        partner = torch.empty_like(order).scatter_(0, order, swapped)
    return Mix(moved(lam, device), moved(partner, device)) if generator is not None else Mix(lam, partner)


def draw_device(device: torch.device | str | None, generator: torch.Generator | None) -> torch.device:
    """Where the random numbers of a draw for `device` are made; RuntimeError where they could not be taken there."""
    if generator is None:
        return torch.get_default_device() if device is None else torch.device(device)
    if device is not None and generator.device.type == "cpu" and capturing(torch.device(device)):
        raise RuntimeError(
            "a CPU generator cannot draw while a CUDA graph is captured: every replay would copy the same numbers, "
            "from memory that is free by then. Leave generator out, give one on the GPU that the graph knows "
            "(graph.register_generator_state), or pass mix, tensors on the GPU that are filled before each replay"
        )
    return generator.device


def moved(value: Tensor, device: torch.device | str | None) -> Tensor:
    """Of what was drawn by a generator of one's own: on `device`, or where it is for None."""
    if device is None or value.device == torch.device(device):
        return value
    # CUDA takes a copy of pageable memory before the call returns; that others do is not said anywhere.
    return value.to(device, non_blocking=torch.device(device).type == "cuda")


def _rank() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def draw_beta(
    batch_size: int, alpha: float, device: torch.device, generator: torch.Generator | None, *, with_keys: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(batch_size,) numbers, float32, from Beta(alpha, alpha), drawn on `device`, which is the generator's.

    And, at no further launch, keys for `draw_partner`; None if not wanted.
    """
    if alpha == 1.0:
        if not with_keys:
            return torch.rand(batch_size, dtype=torch.float32, device=device, **_given(generator)), None
        numbers = torch.rand(3, batch_size, dtype=torch.float32, device=device, **_given(generator))
        return numbers[0], numbers[1:]
    # Beta(α, α) = X / (X + Y) with X, Y ~ Gamma(α). For small α both gammas underflow, and λ would pile up
    # at 0.5, so the logarithms are drawn: log X = log Gamma(α+1) + log(U) / α (Marsaglia & Tsang 2000, §6).
    source = _with_float64(device, generator)
    shape = torch.full((2, batch_size), alpha + 1.0, dtype=torch.float64, device=source)
    log_gamma = torch._standard_gamma(shape, generator=generator).log()
    # 1 - U lies in (0, 1]: its logarithm is finite.
    uniform = torch.rand(2 + with_keys, batch_size, dtype=torch.float64, device=source, **_given(generator))
    log_x, log_y = log_gamma + torch.log1p(-uniform[:2]) / alpha
    return torch.sigmoid(log_x - log_y).float().to(device), uniform[2:] if with_keys else None


@operator("fastamp::draw_partner", lambda keys, _: torch.empty(keys.shape[1], dtype=torch.int64, device=keys.device))
def draw_partner(keys: Tensor, matching: bool) -> Tensor:
    """(B,) int64: a uniform random permutation or matching from uniform keys (2, B) float32 or (1, B) float64."""
    from fastamp import kernels

    return kernels.draw_partner(keys, matching)


def draw_permutation(size: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(size,) int64: a uniform random permutation, drawn on `device`, which is the generator's."""
    # With generator=None, for inductor of torch 2.13 fails at rows that are taken by randperm's other overload.
    return torch.randperm(size, device=device, generator=generator)


def _given(generator: torch.Generator | None) -> dict[str, Any]:
    """torch.rand's argument `generator`: left out rather than None, with which it takes no symbolic size."""
    return {} if generator is None else {"generator": generator}


def _with_float64(device: torch.device, generator: torch.Generator | None) -> torch.device:
    """`device`, or the CPU in place of one without double precision."""
    if _has_float64(device):
        return device
    if generator is not None:
        raise ValueError(
            f"generator is on {device}, which has no float64, and λ for alpha other than 1 is drawn in float64: pass a "
            "generator on the CPU"
        )
    return torch.device("cpu")


def _has_float64(device: torch.device) -> bool:
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"
