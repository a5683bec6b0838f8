"""AMPLoss.step with torch.compile: the whole step in one graph, or f compiled alone."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import HAS_GPU
from test_step import BATCH, CLASSES, WAVY_STEP, WIDTH, Wave, assert_same, problem
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import fastamp
from fastamp import AMPLoss, Mix

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
BACKEND = "inductor" if HAS_GPU else "aot_eager"


@pytest.mark.parametrize(
    ("backend", "mode", "form"),
    [("torch", "amp", "dict"), ("torch", "maxop", "tensor"), ("triton", "amp", "tensor"), ("triton", "mixup", "dict")],
    indirect=["backend"],
)
def test_a_whole_step_in_one_graph_gives_the_numbers_of_the_definition(backend, mode, form):
    p = problem()
    p.encoder.to(p.x.device)
    p.network.to(p.x.device)
    criterion = AMPLoss(mode=mode, **WAVY_STEP)
    scale = 1 + torch.rand(BATCH, 1, dtype=torch.float64)

    def f(mixed: Tensor | dict[str, Tensor], scale: Tensor) -> Tensor:
        whole = mixed if isinstance(mixed, Tensor) else torch.cat([mixed["a"], mixed["b"]], 1)
        return p.network(torch.relu_(whole * scale))

    @torch.compile(fullgraph=True, backend=BACKEND)
    def step(x: Tensor, target: Tensor, mix: Mix, scale: Tensor):
        hidden = p.encoder(x)
        hidden = hidden if form == "tensor" else {"a": hidden[:, :2], "b": hidden[:, 2:]}
        return criterion.step(f, hidden, target, mix=mix, context={"scale": scale}, return_stats=True)

    loss, stats = step(p.x, p.target, p.mix, scale)
    truth = p.truth(lambda m: p.network(torch.relu(m * scale)), mode=mode, **WAVY_STEP)
    assert_same((loss, stats, list(torch.autograd.grad(loss, p.parameters))), truth)
    assert stats.plan == {"amp": "merged", "maxop": "adversarial", "mixup": "mixup"}[mode]
    assert not counters["graph_break"]


def test_a_compiled_step_draws_a_new_lambda_in_every_call():
    p = problem(torch.float32)
    criterion = AMPLoss()

    @torch.compile(fullgraph=True, backend=BACKEND)
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        _, stats = criterion.step(p.network, p.encoder(x), p.target, return_stats=True)
        return stats.lam, stats.lam_adv

    draws = [step(p.x)]
    with torch.compiler.set_stance("fail_on_recompile"):
        draws += [step(p.x) for _ in range(3)]
    assert len({tuple(lam.tolist()) for lam, _ in draws}) == 4
    assert len({tuple(lam_adv.tolist()) for _, lam_adv in draws}) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_compiled_step_takes_a_smaller_last_batch(dropout):
    """Sizes that are symbols, in the draw and in the dropout masks."""
    network = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, CLASSES))
    criterion = AMPLoss(alpha=0.3, pairing="matching")

    @torch.compile(fullgraph=True, backend="eager")
    def step(hidden: Tensor, target: Tensor) -> tuple[Tensor, fastamp.MixStats, Mix]:
        mix = criterion.sample(len(hidden), device=hidden.device)
        return *criterion.step(network, hidden, target, mix=mix, return_stats=True), mix

    for size in (8, 5):
        hidden, target = torch.randn(size, WIDTH), torch.randint(CLASSES, (size,))
        loss, stats, mix = step(hidden, target)
        grads = torch.autograd.grad(loss, list(network.parameters()))
        if dropout:
            assert stats.delta.abs().max() < 0.02
        else:
            expected = criterion.step(network, hidden, target, mix=mix)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(grads, torch.autograd.grad(expected, list(network.parameters())))


def products(net: nn.Module, mode: str) -> dict[str, int]:
    """How many matrix products the forward and the backward graph of a compiled step have."""
    found = {}

    def count(name: str):
        def compiler(graph: torch.fx.GraphModule, _: object):
            found[name] = sum(node.op == "call_function" and "mm" in str(node.target) for node in graph.graph.nodes)
            return torch._functorch.aot_autograd.make_boxed_func(graph.forward)

        return compiler

    hidden = torch.randn(BATCH, WIDTH, requires_grad=True)
    target, mix = torch.randint(CLASSES, (BATCH,)), Mix(torch.rand(BATCH), torch.randperm(BATCH))
    criterion = AMPLoss(mode=mode)
    backend = aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"))
    torch._dynamo.reset()
    torch.compile(lambda h: criterion.step(net, h, target, mix=mix), fullgraph=True, backend=backend)(hidden).backward()
    return found


def test_the_first_pass_of_a_compiled_step_makes_no_gradients_of_parameters():
    """A linear layer is a product in a forward pass, one more back to its input, another back to its weight."""
    net = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    passes = {"mixup": 1, "maxop": 1 + 1 + 1, "amp": 1 + 1 + 1 + 1}  # ... and one back to hidden
    for mode, count in passes.items():
        found = products(net, mode)
        assert found["backward"] == 2 * 3, mode
        assert found["forward"] <= count * 3, mode


@pytest.mark.parametrize("whole", [True, False], ids=["step", "f"])
def test_compiled_passes_share_their_dropout_masks(whole):
    """With masks redrawn |δ| would be about 0.1."""
    p = problem(torch.float32)
    network = nn.Sequential(p.network[0], Wave(), nn.Dropout(0.5), p.network[2])
    criterion = AMPLoss(mode="amp")

    def step(x: Tensor, f: nn.Module) -> tuple[Tensor, fastamp.MixStats]:
        return criterion.step(f, p.encoder(x), p.target, return_stats=True)

    if whole:
        compiled = torch.compile(lambda x: step(x, network), fullgraph=True, backend="inductor")
    else:
        fast = torch.compile(network, backend="inductor", fullgraph=True)

        def compiled(x: Tensor) -> tuple[Tensor, fastamp.MixStats]:
            return step(x, fast)

    for _ in range(3):
        loss, stats = compiled(p.x)
        assert 0 < stats.delta.abs().max() < 0.02
        assert all((grad != 0).any() for grad in torch.autograd.grad(loss, p.parameters))
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("how", "plan"),
    [
        ("torch.compile", "auto"),
        ("torch.compile", "both"),
        ("module.compile", "auto"),
        ("module.compile", "merged"),
        ("closure", "both"),
    ],
)
def test_a_compiled_f_gives_the_numbers_of_the_definition(how, plan):
    p = problem()
    p.network[0].bias.requires_grad_(False)  # stays so
    truth = p.truth(**WAVY_STEP)
    fast = p.network
    if how == "module.compile":
        p.network.compile(backend=BACKEND, fullgraph=True)
    else:
        fast = torch.compile(p.network, backend=BACKEND, fullgraph=True)
    f = fast if how != "closure" else lambda m: fast(m)
    ours = p.step(f, plan=plan, context={}, **WAVY_STEP)
    assert_same(ours, truth)
    if plan == "auto" and how != "closure":
        assert ours[1].plan == "merged"  # f is not compiled for another number of rows
    assert not p.network[0].bias.requires_grad
    assert p.network[2].bias.requires_grad


class Normalised(nn.Module):
    """A network whose rows depend on each other. (A container of torch's own would not be compiled by .compile().)"""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.3), nn.Flatten(), nn.Linear(12, CLASSES)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize(
    ("how", "dropout"),
    [("torch.compile", "redrawn"), ("module.compile", "shared"), ("closure", "redrawn"), ("function", "shared")],
)
def test_a_compiled_f_with_batch_normalisation_takes_batches_of_any_size(how, dropout):
    """A graph for any batch size gives its buffers away in its backward, which may then run once only."""
    torch.manual_seed(0)
    plain = Normalised()
    network = copy.deepcopy(plain)
    compiled = network
    if how == "module.compile":
        network.compile(backend=BACKEND)
    else:
        compiled = torch.compile(network if how != "function" else lambda m: network(m), backend=BACKEND)
    f = compiled if how.endswith("compile") else lambda m: compiled(m)
    criterion = AMPLoss(dropout=dropout, step_size=0.4, grad_clip=None)
    for size in (8, 5):
        x, target = torch.randn(size, 2, 4, 4), torch.randint(CLASSES, (size,))
        mix = Mix(torch.rand(size), torch.randperm(size))
        runs = []
        for run, owner in ((plain, plain), (f, network)):
            torch.manual_seed(7)
            hidden = x.clone().requires_grad_()
            loss, stats = criterion.step(run, hidden, target, mix=mix, plan="both", return_stats=True)
            loss.backward()
            gradients = [hidden.grad, *(parameter.grad for parameter in owner.parameters())]
            # Batch normalisation inside a compiled function is not noticed, nor are its running statistics.
            runs.append((loss, stats[:5], gradients, torch.rand(2), [*owner.buffers()] if how != "function" else []))
        torch.testing.assert_close(runs[1], runs[0])
    assert counters["stats"]["unique_graphs"] > 1


def test_num_items_may_change_from_step_to_step():
    p = problem()
    criterion = AMPLoss()

    @torch.compile(fullgraph=True, backend=BACKEND)
    def step(hidden: Tensor, items: int | float | Tensor) -> Tensor:
        return criterion.step(p.network, hidden, p.target, mix=p.mix, num_items=items)

    hidden = p.encoder(p.x)
    expected = AMPLoss(reduction="sum").step(p.network, hidden, p.target, mix=p.mix)
    for items in (11, 12, 13.5, torch.tensor(14)):
        torch.testing.assert_close(step(hidden, items) * items, expected, check_dtype=False)


def test_what_cannot_be_traced_is_refused():
    p = problem()

    def compiled(network: nn.Module, **options):
        criterion = AMPLoss(dropout=options.pop("dropout", "shared"))
        step = torch.compile(
            lambda x: criterion.step(network, p.encoder(x), p.target, mix=p.mix, **options),
            fullgraph=True,
            backend=BACKEND,
        )
        return step(p.x)

    norm = nn.Sequential(p.network[0], nn.BatchNorm1d(16).double(), p.network[2])
    untracked = nn.Sequential(p.network[0], nn.BatchNorm1d(16, track_running_stats=False).double(), p.network[2])
    drop = nn.Sequential(p.network, nn.Dropout(0.5))
    for network, options, message in (
        (p.network, {"plan": "both"}, "compile f alone"),
        (norm, {}, "compile f alone"),
        (lambda m: untracked(m), {}, "compile f alone"),
        (nn.Sequential(p.network[0], nn.RReLU(), p.network[2]), {}, "rrelu"),
        (drop, {"dropout": "redrawn"}, "cannot be traced"),
        (nn.Sequential(p.network, nn.AlphaDropout(0.5)), {}, "alpha_dropout"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(network, **options)
