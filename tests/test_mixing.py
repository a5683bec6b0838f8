"""The law of λ, the partners, and that draws are as repeatable as the generator."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TRITON_DEVICE
from scipy import stats
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastamp
import fastamp.mixing
from fastamp.mixing import Mix, draw

REJECT = 1e-3  # seeds are fixed: a test that passes once passes always


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@pytest.mark.parametrize("alpha", [0.02, 0.1, 1.0, 5.0])
def test_lambda_follows_the_beta_law(alpha):
    """At small α both gammas underflow, which piles λ up at one half."""
    lam = draw(20_000, alpha=alpha, generator=seeded()).lam
    assert_beta(lam, alpha)
    assert alpha > 0.1 or (lam == 0.5).sum() == 0
    assert abs((lam > 0.5).double().mean().item() - 0.5) < 4 * 0.5 / 20_000**0.5


def assert_beta(lam: Tensor, alpha: float) -> None:
    """By the distance of Kolmogorov and Smirnov, and by what lies about 0.5."""
    lam = lam.double().numpy()
    law = stats.beta(alpha, alpha)
    # The Kolmogorov-Smirnov distance over points that float32 can tell apart from 0 and 1: at α = 0.02 half of
    # the mass lies within 1e-15 of them.
    small = np.logspace(-30, np.log10(0.5), 200)
    points = np.concatenate([small, 1 - small[small > 1e-6]])
    distance = abs((lam[:, None] <= points).mean(0) - law.cdf(points)).max()
    assert distance < math.sqrt(math.log(2 / REJECT) / (2 * len(lam)))
    half = abs(lam - 0.5) < 1e-3
    expected = law.cdf(0.501) - law.cdf(0.499)
    assert stats.binomtest(int(half.sum()), len(lam), expected).pvalue > REJECT


class WithoutFloat64(TorchFunctionMode):
    """ "cpu:0" stands for a device that has no double precision, and refuses it as MPS does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        values = [*args, *(kwargs or {}).values()]
        wide = any(
            value is torch.float64 or (isinstance(value, Tensor) and value.dtype == torch.float64) for value in values
        )
        if wide and any(isinstance(value, torch.device) and value.index == 0 for value in values):
            raise TypeError(f"{func}: no float64 on this device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def narrow_device(monkeypatch):
    monkeypatch.setattr(fastamp.mixing, "_has_float64", lambda device: device.index != 0)
    with WithoutFloat64():
        yield torch.device("cpu", 0)


@pytest.mark.parametrize("alpha", [0.02, 1.0])
def test_a_device_without_float64_draws_by_the_same_law(narrow_device, alpha):
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(2, dtype=torch.float64, device=narrow_device)
    assert_beta(draw(20_000, alpha=alpha, device=narrow_device).lam, alpha)


def test_a_device_without_float64_draws_for_several_processes(narrow_device, monkeypatch):
    monkeypatch.setattr(fastamp.mixing, "_rank", lambda: (1, 3))
    mix = draw(7, alpha=0.3, device=narrow_device)
    assert mix.lam.dtype == torch.float32
    assert mix.partner.sort().values.tolist() == list(range(7))


def test_a_generator_on_a_device_without_float64_is_refused_where_that_is_needed(monkeypatch):
    monkeypatch.setattr(fastamp.mixing, "_has_float64", lambda device: False)
    with pytest.raises(ValueError, match="generator is on cpu, which has no float64"):
        draw(7, alpha=0.3, generator=seeded())
    assert draw(7, generator=seeded()).lam.shape == (7,)


def test_float64_is_known_to_be_missing_where_it_is(monkeypatch):
    assert fastamp.mixing._has_float64(torch.device("cuda", 0))
    assert fastamp.mixing._has_float64(torch.device("cpu"))
    assert not fastamp.mixing._has_float64(torch.device("mps"))
    for has in (True, False):
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, has=has: SimpleNamespace(has_fp64=has))
        assert fastamp.mixing._has_float64(torch.device("xpu")) == has


def test_a_cpu_generator_is_refused_while_a_cuda_graph_is_captured(monkeypatch):
    """The graph would copy from memory that is free when it is replayed."""
    monkeypatch.setattr(fastamp.mixing, "capturing", lambda device: device.type == "cuda")
    generator = seeded()
    before = generator.get_state()
    with pytest.raises(RuntimeError, match="a CPU generator cannot draw while a CUDA graph is captured"):
        draw(6, device="cuda", generator=generator)
    with pytest.raises(RuntimeError, match="register_generator_state"):
        fastamp.AMPLoss(generator=generator).sample(6, device="cuda:1")
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 1.0, 1e4])
def test_lambda_is_float32_in_the_unit_interval(alpha):
    lam = draw(5000, alpha=alpha).lam
    assert lam.dtype == torch.float32
    assert ((lam >= 0) & (lam <= 1)).all()


def test_rows_draw_their_lambda_independently():
    lam = torch.stack([draw(2, alpha=0.5).lam for _ in range(2000)])
    assert stats.pearsonr(lam[:, 0], lam[:, 1]).pvalue > REJECT


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_partners_are_a_uniform_random_permutation(backend, alpha):
    generator = seeded()
    batch, draws = (3, 120) if backend == "triton" else (4, 2400)  # the interpreter is slow
    counts = Counter(tuple(draw(batch, alpha=alpha, generator=generator).partner.tolist()) for _ in range(draws))
    assert set(counts) == set(itertools.permutations(range(batch)))
    assert stats.chisquare(list(counts.values())).pvalue > REJECT


def test_a_matching_is_an_involution_with_a_fixed_point_only_in_an_odd_batch(backend):
    for batch in (0, 1, 2, 3, 4, 7, 50, 101, 1025):
        partner = draw(batch, pairing="matching", generator=seeded()).partner
        rows = torch.arange(batch)
        assert torch.equal(partner[partner], rows)
        assert (partner == rows).sum() == batch % 2


@pytest.mark.parametrize("batch", [6, 7])
def test_processes_draw_matchings_as_well(backend, monkeypatch, batch):
    monkeypatch.setattr(fastamp.mixing, "_rank", lambda: (1, 3))
    partner = draw(batch, pairing="matching").partner
    rows = torch.arange(batch)
    assert torch.equal(partner[partner], rows)
    assert (partner == rows).sum() == batch % 2


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [*itertools.product((1, 2, 3, 50), (torch.float32, torch.float64)), (257, torch.float64), (1024, torch.float32)],
    ids=str,
)
def test_a_kernel_ranks_keys_of_which_some_are_alike(triton_backend, monkeypatch, batch, dtype):
    """By what they are, and then by their rows' numbers: also the last of the 48 or 53 bits counts."""
    from fastamp import kernels

    if batch == 1024 and TRITON_DEVICE == "cpu":  # in larger tiles, for the interpreter is slow
        monkeypatch.setattr("fastamp.kernels.draw.DRAW_ROWS", 512)
        monkeypatch.setattr("fastamp.kernels.draw.DRAW_COLUMNS", 512)
    bits, count = (24, 2) if dtype == torch.float32 else (53, 1)
    keys = torch.randint(2**bits - 3, 2**bits, (count, batch)).to(dtype) / 2**bits
    order = sorted(range(batch), key=lambda r: (*keys[:, r].tolist(), r))
    rank = torch.empty(batch, dtype=torch.int64).index_copy_(0, torch.tensor(order), torch.arange(batch))
    assert torch.equal(kernels.draw_partner(keys, False), rank)
    pairs = [order[start : start + 2] for start in range(0, batch, 2)]
    neighbour = {row: other for pair in pairs for row, other in zip(pair, pair[::-1], strict=True)}
    assert kernels.draw_partner(keys, True).tolist() == [neighbour[row] for row in range(batch)]


def test_a_kernel_draws_a_lambda_by_the_same_law_and_partners_that_do_not_depend_on_it(triton_backend):
    for alpha in (0.3, 1.0):
        mixes = [draw(200, alpha=alpha, generator=seeded(seed)) for seed in range(3)]
        assert_beta(torch.cat([mix.lam for mix in mixes]).cpu(), alpha)
        for lam, partner in mixes:
            assert stats.spearmanr(lam.cpu(), partner.cpu()).pvalue > REJECT


@pytest.mark.parametrize(("batch", "count"), [(4, 3), (5, 15)])
def test_every_matching_is_equally_likely(backend, batch, count):
    generator = seeded()
    each = 10 if backend == "triton" else 100  # the interpreter is slow
    draws = (draw(batch, pairing="matching", generator=generator).partner for _ in range(count * each))
    counts = Counter(tuple(partner.tolist()) for partner in draws)
    assert len(counts) == count
    assert stats.chisquare(list(counts.values())).pvalue > REJECT


def assert_same_draw(one, other):
    assert torch.equal(one.lam, other.lam)
    assert torch.equal(one.partner, other.partner)


@pytest.mark.parametrize("pairing", ["permutation", "matching"])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_a_draw_depends_on_the_generator_alone_and_leaves_the_global_one(backend, alpha, pairing):
    options = {"alpha": alpha, "pairing": pairing}
    first = draw(9, **options, generator=seeded(3))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert_same_draw(first, draw(9, **options, generator=seeded(3)))
    here = torch.get_default_device()
    assert_same_draw(first, fastamp.AMPLoss(**options, generator=seeded(3)).sample(9, device=here))
    assert not torch.equal(first.lam, draw(9, **options, generator=seeded(4)).lam)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_seed_draws_on_a_cpu_stays_what_it_was():
    """Recorded results come from such draws."""
    mix, generator = draw(9, generator=seeded(3)), seeded(3)
    assert torch.equal(mix.lam, torch.rand(9, generator=generator))
    assert torch.equal(mix.partner, torch.randperm(9, generator=generator))
    mix = draw(6, alpha=0.3, pairing="matching", generator=seeded(3))
    assert mix.partner.tolist() == [1, 0, 4, 5, 2, 3]
    torch.testing.assert_close(mix.lam[:3], torch.tensor([0.99727863, 0.43305287, 0.06616830]))


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_without_a_generator_the_global_seed_decides(backend, alpha):
    torch.manual_seed(5)
    first, second = draw(9, alpha=alpha), draw(9, alpha=alpha)
    torch.manual_seed(5)
    assert_same_draw(first, draw(9, alpha=alpha))
    assert not torch.equal(first.lam, second.lam)


@pytest.mark.parametrize("pairing", ["permutation", "matching"])
def test_a_draw_lies_where_it_was_asked_for(pairing):
    for device in ("cpu", "meta"):
        mix = draw(6, pairing=pairing, device=device, generator=seeded())
        assert isinstance(mix, Mix)
        assert mix.lam.device.type == mix.partner.device.type == device
        assert mix.partner.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_the_union_of_masks_keeps_what_either_row_keeps(dtype):
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]).to(dtype)
    union = Mix(torch.full((3,), 0.5), torch.tensor([2, 1, 0])).union(mask)
    assert union.dtype == dtype
    assert union.tolist() == mask[[2, 1, 2]].tolist()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_the_union_of_lengths_is_the_longer_one(dtype):
    mix = Mix(torch.full((4,), 0.5), torch.tensor([2, 0, 1, 3]))
    union = mix.union(torch.tensor([5, 2, 4, 3]).to(dtype))
    assert union.tolist() == [5, 5, 4, 3]
    assert union.dtype == dtype


@pytest.mark.parametrize(("value", "low", "high"), [(2, 0, 2), (-1, -1, 1)])
def test_the_union_of_other_integers_and_of_additive_masks_is_refused(value, low, high):
    mix = Mix(torch.full((2,), 0.5), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=rf"mask must be 0 or 1, or \(B,\) lengths, got values from {low} to {high}"):
        mix.union(torch.tensor([[1, 1, value], [1, 0, 0]]))
    with pytest.raises(TypeError, match=r"mask must be boolean or integer, got torch.float32"):
        mix.union(torch.zeros(2, 1, 1, 5))


def test_a_draw_lies_with_the_generator_unless_a_device_is_named():
    criterion = fastamp.AMPLoss()
    assert criterion.sample(3).lam.device.type == "cpu"
    with torch.device("meta"):
        assert criterion.sample(3).lam.is_meta
        criterion.generator = torch.Generator().manual_seed(2)
        assert criterion.sample(3).lam.device.type == "cpu"


def test_a_draw_moves_to_another_device():
    mix = fastamp.AMPLoss().sample(3)
    moved = mix.to("meta")
    assert isinstance(moved, Mix)
    assert moved.lam.is_meta
    assert moved.partner.is_meta
    assert_same_draw(mix.to("cpu"), mix)


@pytest.mark.gpu
@pytest.mark.parametrize("alpha", [1.0, 0.02])
def test_a_generator_on_the_cpu_serves_the_gpu(alpha):
    mix = draw(64, alpha=alpha, device="cuda", generator=seeded())
    assert mix.lam.is_cuda
    assert mix.partner.is_cuda
    assert_same_draw(mix.to("cpu"), draw(64, alpha=alpha, generator=seeded()))
    assert draw(64, alpha=alpha, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).lam.is_cuda
