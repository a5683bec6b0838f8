"""AMPLoss.step around what a network keeps or draws: dropout, batch statistics, autocast, checkpointing, processes."""

from __future__ import annotations

import copy
import importlib
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from test_step import BATCH, CLASSES, PLANS, WAVY_STEP, WIDTH, Problem, assert_same, problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastamp import AMPLoss, Mix, reference
from fastamp.step import batch_statistics
from fastamp.step.randomness import RecordedMasks, capturing


def with_dropout(p: Problem) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(0.3), p.network[0], p.network[1], nn.Dropout(0.5), p.network[2])


def masked(p: Problem, seed: int):
    """The network with dropout, as a function: the masks that it draws from this state, written out."""
    torch.manual_seed(seed)
    one, two = (F.dropout(torch.ones(BATCH, n, dtype=torch.float64), q) for n, q in ((WIDTH, 0.3), (16, 0.5)))
    return lambda m: p.network[2](two * p.network[1](p.network[0](one * m)))


@PLANS
@pytest.mark.parametrize("context", [None, {}], ids=["closure", "rows"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_both_passes_share_their_dropout_masks(checkpointed, context, plan):
    p = problem(seed=3)
    truth = p.truth(masked(p, seed=7), **WAVY_STEP)
    assert p.rejected(truth[0]) > 0
    network = with_dropout(p)
    torch.manual_seed(7)
    f = (lambda m: checkpoint(network, m, use_reentrant=False)) if checkpointed else network
    ours = p.step(f, context=context, plan=plan, **WAVY_STEP)
    assert_same(ours, truth)
    assert ours[1].plan == ("both" if plan == "both" else "merged")  # no sub-batch: its masks could not be had


@PLANS
def test_redrawn_dropout_is_the_published_codes_and_costs_nothing_where_there_is_none(plan):
    p = problem(seed=3)
    network = with_dropout(p)
    torch.manual_seed(7)
    truth = p.truth(network, **WAVY_STEP)  # which calls f once a pass
    torch.manual_seed(7)
    ours = p.step(network, dropout="redrawn", plan=plan, context={}, **WAVY_STEP)
    assert_same(ours, truth)
    assert ours[1].plan == "both"
    assert p.step(dropout="redrawn", **WAVY_STEP)[1].plan == "merged"


@PLANS
@pytest.mark.parametrize("mode", ["amp", "maxop", "mixup"])
def test_a_step_takes_as_many_random_numbers_as_one_pass(mode, plan):
    p = problem(seed=3)
    network = with_dropout(p)
    torch.manual_seed(7)
    network(p.encoder(p.x))
    expected = torch.get_rng_state()
    torch.manual_seed(7)
    p.step(network, plan=plan, mode=mode)
    assert torch.equal(torch.get_rng_state(), expected)


def test_recorded_masks_stand_in_for_the_generators():
    """Where a CUDA graph is captured the generators cannot be set back."""
    p = problem()
    network = nn.Sequential(with_dropout(p), nn.Unflatten(1, (1, 2, 2)), nn.Dropout2d(0.5), nn.Flatten())
    masks = RecordedMasks()
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    with masks:
        first = network(x)
    with masks.again():
        second = network(x)
    with masks.again():
        third = network(x)
    assert masks.drew
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(first, network(x))
    kept = (masks.masks[0] != 0).double().mean()
    assert 0.4 < kept < 0.95
    torch.testing.assert_close(masks.masks[0].max(), torch.tensor(1 / 0.7, dtype=torch.float64))
    network.eval()
    with RecordedMasks() as none:
        assert torch.equal(network(x), network(x))
    assert not none.drew


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x + torch.randn_like(x),
        lambda x: x * torch.rand(x.shape),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: F.gumbel_softmax(x),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.1)[0],
        lambda x: torch.dropout(x, 0.5, True),
        lambda x: F.rrelu(x, training=True),
        lambda x: nn.RReLU()(x),
        lambda x: x.clone().exponential_(),
        lambda x: nn.init.uniform_(x.clone()),
        lambda x: torch.poisson(x.abs()),
        lambda x: torch.feature_dropout(x, 0.5, True),
        nn.LSTM(8, 3, num_layers=2, dropout=0.5),
        nn.Sequential(nn.Flatten(), nn.GRU(8, 3, num_layers=2, dropout=0.5)),
    ],
)
def test_other_random_numbers_cannot_be_recorded(draw):
    x = torch.randn(4, 8)
    with RecordedMasks(), pytest.raises(NotImplementedError, match="f draws random numbers by"):
        draw(x)


def test_recurrent_layers_without_dropout_between_them_are_let_pass():
    lstm, gru = nn.LSTM(8, 3, num_layers=2), nn.GRU(8, 3, num_layers=2, dropout=0.5).eval()
    x = torch.randn(4, 8)
    with RecordedMasks() as masks:
        lstm(x)
        gru(x)
    assert not masks.drew


@pytest.mark.filterwarnings("ignore:dropout2d")
@pytest.mark.parametrize(
    ("layer", "shape", "channels"),
    [
        (nn.Dropout1d, (3, 4, 5), 2),
        (nn.Dropout1d, (4, 5), 1),
        (nn.Dropout2d, (3, 4, 5, 6), 2),
        (nn.Dropout2d, (3, 4, 5), 2),
        (nn.Dropout3d, (2, 3, 4, 5, 6), 2),
        (nn.Dropout3d, (3, 4, 5, 6), 1),
    ],
)
def test_channels_are_dropped_as_torch_drops_them(layer, shape, channels):
    x = torch.ones(shape)
    for _ in range(5):  # torch's own, to know what is asked for
        dropped = (layer(0.5)(x) == 0).flatten(channels)
        assert (dropped.all(-1) | ~dropped.any(-1)).all()
    with RecordedMasks() as masks:
        layer(0.5)(x)
    assert masks.masks[0].shape == shape[:channels] + (1,) * (len(shape) - channels)


@pytest.fixture
def in_capture(monkeypatch):
    """As while a CUDA graph is captured: generators can neither be read nor set."""
    monkeypatch.setattr("fastamp.step.plans.capturing", lambda device: True)
    monkeypatch.setattr("fastamp.step.randomness.capturing", lambda device: True)

    def forbidden(*_):
        raise RuntimeError("not permitted when stream is capturing")

    monkeypatch.setattr(torch, "get_rng_state", forbidden)
    monkeypatch.setattr(torch, "set_rng_state", forbidden)


def test_whether_a_graph_is_captured_is_asked_of_the_tensors_device(monkeypatch):
    """Device 1 captures while device 0 is the current one."""
    current = [0]

    def exchange(index):
        current[0], before = index, current[0]
        return before

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current == [1])
    assert capturing(torch.device("cuda", 1))
    assert not capturing(torch.device("cuda", 0))
    assert current == [0]
    assert not capturing(torch.device("cpu"))


def test_a_captured_step_decides_nothing_by_values(in_capture, monkeypatch):
    p = problem()
    truth = p.truth(**WAVY_STEP)
    for name in ("nonzero", "__bool__", "__int__", "__float__", "item"):
        # Labels and logits on the CPU are looked at; a mask of rows is not.
        original = getattr(Tensor, name)

        def looked_at(self, *args, original=original):
            assert self.shape != (BATCH,), "a decision by row"
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, looked_at)
    ours = p.step(context={}, **WAVY_STEP)
    monkeypatch.undo()
    assert ours[1].plan == "merged"
    assert_same(ours, truth)


def test_a_captured_step_records_its_dropout_masks(in_capture):
    p = problem(torch.float32)
    network = with_dropout(p).float()
    stats = p.step(network)[1]
    assert 0 < stats.delta.abs().max() < 0.05  # with masks redrawn about 0.5
    assert stats.plan == "merged"
    redrawn = p.step(network, dropout="redrawn")[1]
    assert redrawn.plan == "both"
    assert redrawn.delta.abs().max() > 0.1


class Bag:
    """Hides a network from whoever looks at a closure's variables."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, mixed: Tensor) -> Tensor:
        return self.network(mixed)


@PLANS
@pytest.mark.parametrize("hidden_in", ["module", "closure", "object"])
def test_batch_statistics_are_those_of_the_whole_batch_and_updated_once(hidden_in, plan):
    p = problem(seed=2)
    norm = nn.BatchNorm1d(16).double()
    network = nn.Sequential(p.network[0], norm, p.network[1], p.network[2])
    p = p._replace(network=network)
    once = copy.deepcopy(network)
    once(reference.mix(p.encoder(p.x), *p.mix))
    truth_of = copy.deepcopy(p)
    truth = truth_of.truth(**WAVY_STEP)
    assert p.rejected(truth[0]) > 0
    f = {"module": network, "closure": lambda m: network(m), "object": Bag(network)}[hidden_in]
    buffers = dict(network.named_buffers())
    ours = p.step(f, plan=plan, context={}, **WAVY_STEP)
    assert ours[1].plan == "both"
    assert_same(ours, truth)
    for name, buffer in network.named_buffers():
        assert buffer is buffers[name]
        torch.testing.assert_close(buffer, dict(once.named_buffers())[name])
    assert norm.num_batches_tracked == 1


def test_what_the_user_filters_of_warnings_stays():
    before = list(warnings.filters)
    importlib.reload(batch_statistics)
    assert warnings.filters == before


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("first", ["fresh", "used"])
def test_batch_statistics_of_a_compiled_module_are_noticed_every_time(first):
    p = problem(seed=2)
    fast = torch.compile(normalised(p), backend="eager")
    if first == "used":
        fast(p.encoder(p.x))
    for f in (fast, lambda m: fast(m)):
        for _ in range(3):
            assert p.step(f, context={}, **WAVY_STEP)[1].plan == "both"


def normalised(p: Problem) -> nn.Sequential:
    return nn.Sequential(p.network[0], nn.BatchNorm1d(16).double(), p.network[1], p.network[2])


def test_batch_statistics_are_noticed_where_a_module_hides_them():
    p = problem(seed=2)

    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = (normalised(p),)  # not registered

        def forward(self, x):
            return self.hidden[0](x)

    assert p.step(Hiding(), context={}, **WAVY_STEP)[1].plan == "both"


def test_threads_do_not_see_each_others_batch_statistics():
    def plans(index: int) -> set[str]:
        torch.manual_seed(index)
        middle = nn.BatchNorm1d(16) if index % 2 else nn.Identity()
        network = nn.Sequential(nn.Linear(WIDTH, 16), middle, nn.Linear(16, CLASSES))
        hidden, target = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
        steps = [AMPLoss().step(lambda m: network(m), hidden, target, return_stats=True) for _ in range(15)]
        return {stats.plan for _, stats in steps}

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(plans, range(4)))
    assert found[1] == found[3] == {"both"}
    assert "both" not in found[0] | found[2]


def test_frozen_batch_statistics_couple_nothing():
    p = problem()

    def norm(**options):
        return nn.Sequential(p.network[0], nn.BatchNorm1d(16, **options).double().eval(), *p.network[1:])

    ours = p.step(norm(), context={}, **WAVY_STEP)
    assert ours[1].plan == "sub-batch"
    assert_same(ours, p.truth(norm(), **WAVY_STEP))
    assert p.step(norm(track_running_stats=False), context={}, **WAVY_STEP)[1].plan == "both"


def test_instance_statistics_are_updated_once():
    p = problem()
    norm = nn.InstanceNorm1d(1, track_running_stats=True).double()
    network = nn.Sequential(nn.Unflatten(1, (1, WIDTH)), norm, nn.Flatten(), p.network)
    once = copy.deepcopy(norm)
    once(reference.mix(p.encoder(p.x), *p.mix)[:, None])
    assert p.step(network, context={}, **WAVY_STEP)[1].plan == "sub-batch"  # rows do not see each other
    torch.testing.assert_close(norm.running_mean, once.running_mean)


@PLANS
def test_under_autocast_no_parameter_loses_its_gradient(plan):
    """Weights that a pass without gradients cast to bfloat16 must not be taken from autocast's cache by a later one."""
    p = problem()
    truth = p.truth()
    p = p._replace(
        network=p.network.float(), encoder=p.encoder.float(), x=p.x.float(), mix=Mix(p.mix.lam.float(), p.mix.partner)
    )
    hidden = p.encoder(p.x)
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = AMPLoss().step(p.network, hidden, p.target, mix=p.mix, plan=plan, return_stats=True)
    assert loss.dtype == torch.float32
    assert stats.mask.all()  # bfloat16 hides so small a step: a tie
    grads = torch.autograd.grad(loss, p.parameters)
    norm = sum(grad.norm() for grad in truth[1])
    for grad, true in zip(grads, truth[1], strict=True):
        assert (grad - true).norm() < 0.05 * norm
        assert (grad != 0).any()


def test_random_states_are_as_before_after_an_error():
    generator = torch.Generator().manual_seed(1)
    criterion = AMPLoss(generator=generator)
    p = problem()
    own, default = generator.get_state(), torch.get_rng_state()

    def broken(m):
        raise RuntimeError(f"broken after {torch.rand(3)}")

    with pytest.raises(RuntimeError, match="broken after"):
        criterion.step(broken, p.encoder(p.x), p.target)
    with pytest.raises(ValueError, match="target must lie in"):
        criterion.step(p.network, p.encoder(p.x), torch.full((BATCH,), CLASSES))
    assert torch.equal(generator.get_state(), own)
    assert torch.equal(torch.get_rng_state(), default)


def test_deep_graphs_are_let_go():
    """Outside of "both" the first pass's graph is gone when the step returns."""
    p = problem()
    alive = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    def f(m):
        out = Watched.apply(m)
        if out.grad_fn is not None:
            alive.append(weakref.ref(out.grad_fn))
        return p.network(out)

    for plan, graphs in (("auto", 1), ("merged", 1), ("both", 2)):
        alive.clear()
        loss = AMPLoss(step_size=1e-6).step(f, p.encoder(p.x), p.target, mix=Mix(*p.mix), plan=plan)
        assert sum(ref() is not None for ref in alive) == graphs, plan
        del loss
