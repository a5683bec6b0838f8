"""AMPLoss.step against the definition: every plan, option and form of the hidden state; what it leaves alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from conftest import TOLERANCE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastamp import AMPLoss, Mix, MixStats, reference

BATCH, WIDTH, CLASSES = 9, 6, 4
PLANS = pytest.mark.parametrize("plan", ["auto", "merged", "both"])
# Large steps through a wavy network: MinOp rejects some rows and keeps others.
WAVY_STEP = {"step_size": 0.4, "grad_clip": None, "tie_tol": 0.0}


class Wave(nn.Module):
    """A layer whose loss is anything but convex in λ."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(5 * x)


class Problem(NamedTuple):
    """An encoder, the rest of the network, and a batch."""

    encoder: nn.Module
    network: nn.Sequential
    x: Tensor
    target: Tensor
    mix: Mix

    @property
    def parameters(self) -> list[nn.Parameter]:
        every = (*self.encoder.parameters(), *self.network.parameters())
        return [parameter for parameter in every if parameter.requires_grad]

    def rejected(self, result: reference.Result | MixStats) -> int:
        """How many rows kept a λ that λ' differs from."""
        return int((~result.mask & (result.lam_adv != self.mix.lam)).sum())

    def truth(self, f: Any = None, hidden: Any = None, **options: Any) -> tuple[reference.Result, list[Tensor]]:
        """The definition's result and gradients."""
        hidden = self.encoder(self.x) if hidden is None else hidden
        result = reference.amp(f or self.network, hidden, self.target, *self.mix, **options)
        upstream = torch.linspace(-1, 1, BATCH, dtype=result.loss.dtype) if result.loss.dim() else None
        return result, list(torch.autograd.grad(result.loss, self.parameters, upstream, allow_unused=True))

    def step(
        self, f: Any = None, *, plan: str = "auto", context: Any = None, hidden: Any = None, **options: Any
    ) -> tuple[Tensor, MixStats, list[Tensor]]:
        """Our loss, statistics and gradients."""
        hidden = self.encoder(self.x) if hidden is None else hidden
        loss, stats = AMPLoss(**options).step(
            f or self.network, hidden, self.target, mix=self.mix, plan=plan, context=context, return_stats=True
        )
        upstream = torch.linspace(-1, 1, BATCH, dtype=loss.dtype) if loss.dim() else None
        return loss, stats, list(torch.autograd.grad(loss, self.parameters, upstream, allow_unused=True))


def problem(dtype: torch.dtype = torch.float64, seed: int = 10) -> Problem:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(WIDTH, 16), Wave(), nn.Linear(16, CLASSES))
    return Problem(
        nn.Linear(5, WIDTH).to(dtype),
        network.to(dtype),
        torch.randn(BATCH, 5, dtype=dtype),
        torch.randint(CLASSES, (BATCH,)),
        Mix(torch.rand(BATCH, dtype=torch.float64 if dtype == torch.float64 else torch.float32), torch.randperm(BATCH)),
    )


def assert_same(ours: tuple[Tensor, MixStats, list[Tensor]], truth: tuple[reference.Result, list[Tensor]]) -> None:
    (loss, stats, grads), (result, true_grads) = ours, truth
    close: dict[str, Any] = {"rtol": 0, "atol": TOLERANCE[torch.float64]}
    assert torch.equal(stats.mask, result.mask)
    if stats.plan == "mixup":
        assert stats.grad.isnan().all()  # not asked for
    else:
        torch.testing.assert_close(stats.grad, result.grad, **close)
    for mine, other in ((loss, result.loss), (stats.lam_adv, result.lam_adv), (stats.delta, result.delta)):
        torch.testing.assert_close(mine, other, **close)
    for mine, other in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(mine, other, **close)


OPTIONS = {
    "defaults": {},
    "rejecting": WAVY_STEP,
    "as published": {**WAVY_STEP, "loss": "softmax_bce", "grad_scale": "mean", "step_size": 4.0},
    "binary": {**WAVY_STEP, "loss": "binary_cross_entropy", "pos_weight": torch.tensor([1.0, 2.0, 0.5, 3.0])},
    "weighted": {"weight": torch.tensor([0.5, 1.0, 2.0, 0.1]), "ignore_index": 1, "label_smoothing": 0.1},
    "clamped": {**WAVY_STEP, "clamp": True},
    "row by row": {**WAVY_STEP, "reduction": "none"},
    "summed": {**WAVY_STEP, "reduction": "sum"},
    "maxop": {**WAVY_STEP, "mode": "maxop"},
    "mixup": {"mode": "mixup"},
}
OPTIONS["weighted"] |= {**WAVY_STEP, "grad_scale": "mean", "step_size": 4.0}


@PLANS
@pytest.mark.parametrize("context", [None, {}], ids=["closure", "rows"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_plan_gives_the_numbers_of_the_definition(options, context, plan):
    p = problem()
    assert_same(p.step(plan=plan, context=context, **options), p.truth(**options))


def test_the_plan_that_ran_is_in_the_statistics():
    p = problem()
    rejected = p.rejected(p.truth(**WAVY_STEP)[0])
    assert 0 < 3 * rejected <= BATCH, f"{rejected} rejected rows: this problem tests no sub-batch"
    for ran, options in (
        ("merged", WAVY_STEP),
        ("sub-batch", {"context": {}, **WAVY_STEP}),
        ("merged", {"plan": "merged", "context": {}, **WAVY_STEP}),
        ("both", {"plan": "both", "context": {}, **WAVY_STEP}),
        ("adversarial", {"mode": "maxop"}),
        ("mixup", {"mode": "mixup"}),
        ("adversarial", {"step_size": 1e-6}),
    ):
        assert p.step(**options)[1].plan == ran


def test_many_rejected_rows_are_cheaper_merged():
    """A sub-batch of n rows costs 3n/B more, a merged pass 1."""
    p = problem(seed=2)
    options = {**WAVY_STEP, "step_size": 1.5}
    assert 3 * p.rejected(p.truth(**options)[0]) > BATCH
    ours = p.step(context={}, **options)
    assert ours[1].plan == "merged"
    assert_same(ours, p.truth(**options))


@given(
    st.integers(0, 2**16),
    st.sampled_from(["auto", "merged", "both"]),
    st.booleans(),
    st.sampled_from(["permutation", "self", "swap"]),
    st.sampled_from([1e-3, 0.3, 3.0]),
    st.sampled_from([0.0, 1e-2, "auto"]),
    st.booleans(),
)
def test_any_batch_gives_the_numbers_of_the_definition(seed, plan, context, pairing, step_size, tie_tol, soft):
    p = problem(seed=seed)
    rows = torch.arange(BATCH)
    partner = {"permutation": torch.randperm(BATCH), "self": rows, "swap": rows.flip(0)}[pairing]
    target = torch.rand(BATCH, CLASSES, dtype=torch.float64) if soft else p.target
    p = p._replace(mix=p.mix._replace(partner=partner), target=target)
    options = {"step_size": step_size, "grad_clip": None, "tie_tol": tie_tol, "reduction": "none"}
    truth = p.truth(**options)
    ours = p.step(plan=plan, context={} if context else None, **options)
    near = (truth[0].delta.abs() < 1e-12) & (truth[0].delta != 0)
    if not near.any():  # else either branch is right
        self_pairs = partner == torch.arange(BATCH)
        assert torch.equal(ours[1].mask | self_pairs, truth[0].mask | self_pairs)
        assert_same((ours[0], ours[1]._replace(mask=truth[0].mask), ours[2]), truth)


def test_a_row_that_is_its_own_partner_is_not_run_again():
    p = problem()
    p = p._replace(mix=p.mix._replace(partner=torch.arange(BATCH)))
    _, stats, _ = ours = p.step(tie_tol=0.0)
    assert stats.plan == "adversarial"
    assert not stats.mask.any()
    assert_same(ours, p.truth(tie_tol=0.0))


def test_an_empty_batch_and_a_batch_of_one():
    def first(size):
        mix = Mix(p.mix.lam[:size], torch.arange(size))
        return p._replace(x=p.x[:size], target=p.target[:size], mix=mix)

    p = problem()
    assert_same(first(1).step(), first(1).truth())
    for plan in ("auto", "merged", "both"):
        loss, stats, grads = first(0).step(reduction="sum", plan=plan, context={})
        assert loss == 0
        assert len(stats.mask) == 0
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("form", ["dict", "tuple", "list"])
@PLANS
def test_every_part_of_a_hidden_state_is_mixed_with_the_same_lambda(form, plan):
    p = problem()
    whole, unused = p.encoder(p.x), torch.randn(BATCH, 3, dtype=torch.float64)
    parts = {"words": whole[:, :2], "image": whole[:, 2:].reshape(BATCH, 2, 2), "unused": unused}
    hidden = parts if form == "dict" else {"tuple": tuple, "list": list}[form](parts.values())

    def f(mixed):
        assert isinstance(mixed, type(hidden))
        a, b, _ = mixed.values() if form == "dict" else mixed
        return p.network(torch.cat([a, b.flatten(1)], 1))

    ours = p.step(f, hidden=hidden, plan=plan, context={}, **WAVY_STEP)
    assert_same(ours, p.truth(**WAVY_STEP))


def test_context_is_passed_by_name_and_by_row():
    p = problem()
    scale = 1 + torch.rand(BATCH, 1, dtype=torch.float64)
    seen = []

    def f(mixed, *, scale, nothing):
        assert nothing is None
        seen.append(len(mixed))
        return p.network(mixed * scale)

    ours = p.step(f, context={"scale": scale, "nothing": None}, **WAVY_STEP)
    assert ours[1].plan == "sub-batch"
    assert seen == [BATCH, BATCH, p.rejected(ours[1])]
    assert_same(ours, p.truth(lambda mixed: p.network(mixed * scale), **WAVY_STEP))


@PLANS
def test_f_may_write_to_its_input(plan):
    p = problem()
    inplace = nn.Sequential(nn.ReLU(inplace=True), p.network)
    ours = p.step(inplace, plan=plan, **WAVY_STEP)
    assert_same(ours, p.truth(nn.Sequential(nn.ReLU(), p.network), **WAVY_STEP))


@pytest.mark.parametrize(
    ("options", "ran"),
    [
        ({"mode": "mixup"}, "mixup"),
        ({"mode": "maxop"}, "adversarial"),
        ({"context": {}}, "sub-batch"),
        ({"plan": "merged"}, "merged"),
        ({"plan": "both"}, "both"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_pass_gets_the_memory_format_of_hidden(backend, options, ran):
    torch.manual_seed(1)
    values, layout = torch.randn(BATCH, 3, 2, 2), torch.channels_last
    head, target = nn.Conv2d(3, CLASSES, 2).to(memory_format=layout), torch.randint(CLASSES, (BATCH,))
    mix = Mix(torch.rand(BATCH), torch.randperm(BATCH))
    options = {"mode": "amp", "context": None, "plan": "auto", **options}
    criterion = AMPLoss(**{**WAVY_STEP, "mode": options.pop("mode")})
    runs = []
    for hidden in (values.clone(), values.to(memory_format=layout)):
        formats = []

        def f(m, formats=formats):
            formats.append(m.is_contiguous(memory_format=layout))
            return head(torch.sin(m.mul_(3))).flatten(1)

        loss, stats = criterion.step(f, hidden.requires_grad_(), target, mix=mix, return_stats=True, **options)
        assert stats.plan == ran
        (grad,) = torch.autograd.grad(loss, hidden)
        runs.append((loss, grad, formats))
    torch.testing.assert_close(runs[1][:2], runs[0][:2])
    if ran != "sub-batch":  # torch's own indexing gives a contiguous gradient
        assert runs[1][1].is_contiguous(memory_format=layout)
    assert not any(runs[0][2])
    assert all(runs[1][2])


def test_hidden_without_a_gradient_of_its_own():
    """Pixels, or frozen embeddings."""
    p = problem()
    hidden = p.encoder(p.x).detach()
    for plan in ("auto", "merged", "both"):
        assert_same(p.step(hidden=hidden, plan=plan, **WAVY_STEP), p.truth(hidden=hidden, **WAVY_STEP))
    assert not hidden.requires_grad


def test_moving_weights_are_those_of_the_definition():
    history: list[Tensor] = []
    criterion = AMPLoss(reweight="moving", **WAVY_STEP)
    for seed in range(4):
        p = problem(seed=seed)
        loss = criterion.step(p.network, p.encoder(p.x), p.target, mix=p.mix)
        result = p.truth(reweight="moving", history=history, **WAVY_STEP)[0]
        torch.testing.assert_close(loss, result.loss, rtol=1e-6, atol=1e-6)  # the window is float32


def test_num_items_replaces_the_divisor():
    p = problem()
    loss = AMPLoss(reduction="sum").step(p.network, p.encoder(p.x), p.target, mix=p.mix)
    for items in (20.0, torch.tensor(20)):
        scaled = AMPLoss().step(p.network, p.encoder(p.x), p.target, mix=p.mix, num_items=items)
        torch.testing.assert_close(20 * scaled, loss)


def test_nothing_kept_gives_nan_and_no_gradient():
    p = problem()
    p = p._replace(target=torch.full((BATCH,), -100))
    for plan in ("auto", "merged", "both"):
        loss, _, grads = p.step(plan=plan)
        assert loss.isnan()
        assert all((grad == 0).all() for grad in grads)


def test_eval_mode_is_plain_cross_entropy():
    p = problem()
    criterion = AMPLoss().eval()
    hidden = p.encoder(p.x)
    loss = criterion.step(lambda m, shift: p.network(m) + shift, hidden, p.target, context={"shift": p.x[:, :4]})
    expected = nn.functional.cross_entropy(p.network(hidden) + p.x[:, :4], p.target)
    assert torch.equal(loss, expected)


@pytest.mark.filterwarnings("ignore:AMPLoss is in train mode")
def test_without_grad_mode_the_loss_is_the_same():
    p = problem()
    expected = p.truth(**WAVY_STEP)[0].loss
    with torch.no_grad():
        loss = AMPLoss(**WAVY_STEP).step(p.network, p.encoder(p.x), p.target, mix=p.mix)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)


@PLANS
def test_no_gradient_is_touched_before_backward(plan):
    """And hooks on parameters fire once."""
    p = problem()
    marks = [torch.randn_like(parameter) for parameter in p.parameters]
    fired = dict.fromkeys(range(len(marks)), 0)
    for i, (parameter, mark) in enumerate(zip(p.parameters, marks, strict=True)):
        parameter.grad = mark.clone()

        def note(_, i=i):
            fired[i] += 1

        parameter.register_hook(note)
    hidden = p.encoder(p.x)
    hidden.retain_grad()
    loss = AMPLoss(**WAVY_STEP).step(p.network, hidden, p.target, mix=p.mix, plan=plan, context={})
    assert all(torch.equal(parameter.grad, mark) for parameter, mark in zip(p.parameters, marks, strict=True))
    assert hidden.grad is None
    assert set(fired.values()) == {0}
    loss.backward()
    assert set(fired.values()) == {1}
    for parameter, mark, true in zip(p.parameters, marks, p.truth(**WAVY_STEP)[1], strict=True):
        torch.testing.assert_close(parameter.grad - mark, true, rtol=0, atol=1e-12)


def test_inputs_are_not_written_to_and_a_second_backward_adds_the_same():
    p = problem()
    hidden = p.encoder(p.x)
    before = hidden.detach().clone()
    loss = AMPLoss(**WAVY_STEP).step(p.network, hidden, p.target, mix=p.mix, context={})
    first = torch.autograd.grad(loss, p.parameters, retain_graph=True)
    second = torch.autograd.grad(loss, p.parameters)
    assert torch.equal(hidden, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_raises():
    p = problem()
    loss = AMPLoss().step(p.network, p.encoder(p.x), p.target, mix=p.mix)
    # By way of the layers below there would be one, but not all of it.
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(loss, p.network[0].weight, create_graph=True)


def test_it_is_the_criterion_where_f_is_the_identity(backend):
    torch.manual_seed(3)
    logits = torch.randn(8, 5, requires_grad=True)
    target, mix = torch.randint(5, (8,)), Mix(torch.rand(8), torch.randperm(8))
    criterion = AMPLoss()
    losses = [criterion(logits, target, mix=mix), criterion.step(nn.Identity(), logits, target, mix=mix)]
    torch.testing.assert_close(*losses, rtol=0, atol=2e-6)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*grads, rtol=0, atol=2e-6)


@PLANS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_networks_stay_near_the_definition(backend, dtype, plan):
    p = problem(torch.float64)
    hidden = p.encoder(p.x).detach()
    truth = p.truth(hidden=hidden)[0]
    narrow = nn.Sequential(*p.network).to(hidden.device, dtype)
    mix = Mix(p.mix.lam.float(), p.mix.partner)
    loss, stats = AMPLoss().step(narrow, hidden.to(dtype), p.target, mix=mix, plan=plan, return_stats=True)
    assert loss.dtype == stats.lam_adv.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), truth.loss, rtol=0, atol=40 * eps)
    torch.testing.assert_close(stats.grad.double(), truth.grad, rtol=0, atol=200 * eps)


def test_float16_has_room_for_class_weights():
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).half()
    hidden, target = torch.randn(16, 8).half(), torch.randint(3, (16,))
    weight, mix = torch.tensor([1e3, 1.0, 1.0]), Mix(torch.rand(16), torch.randperm(16))
    _, stats = AMPLoss(weight=weight).step(network, hidden, target, mix=mix, return_stats=True)
    truth = reference.amp(
        network.double(), hidden.double(), target, mix.lam.double(), mix.partner, weight=weight.double()
    )
    torch.testing.assert_close(stats.grad.double(), truth.grad, rtol=0.02, atol=0.02 * truth.grad.abs().max().item())


@PLANS
def test_a_row_without_finite_logits_at_lambda_adv_keeps_lambda(plan):
    p = problem()
    calls = []

    def f(m):
        calls.append(1)
        logits = p.network(m)
        return logits.index_fill(0, torch.tensor([4]), -torch.inf) if len(calls) == 2 else logits

    _, stats, grads = p.step(f, plan=plan, context={}, **WAVY_STEP)
    assert not stats.mask[4]
    assert all(grad.isfinite().all() for grad in grads)


def test_a_frozen_encoder_under_inference_mode():
    p = problem()
    with torch.inference_mode():
        hidden = p.encoder(p.x)
    truth = p.truth(hidden=hidden.clone().detach(), **WAVY_STEP)
    for plan in ("auto", "merged", "both"):
        assert_same(p.step(hidden=hidden, plan=plan, **WAVY_STEP), truth)


@pytest.mark.parametrize("widened", [False, True])
def test_float16_gradients_to_hidden_do_not_underflow(widened):
    """∂ℓ/∂m of 2^-22 has two bits in float16, also where f ends in float32."""
    hidden = torch.randn(64, 3, dtype=torch.float16)
    weight = torch.randn(3, 5, dtype=torch.float16)
    target, mix = torch.randint(5, (64,)), Mix(torch.rand(64), torch.randperm(64))

    def f(m):
        logits = (m * 2**-10) @ weight * 2**-8
        return logits.float() if widened else logits

    _, stats = AMPLoss().step(f, hidden, target, mix=mix, return_stats=True)
    truth = reference.amp(
        lambda m: (m * 2**-10) @ weight.double() * 2**-8, hidden.double(), target, mix.lam.double(), mix.partner
    )
    torch.testing.assert_close(stats.grad.double(), truth.grad, rtol=0.02, atol=2e-3 * truth.grad.abs().max().item())
