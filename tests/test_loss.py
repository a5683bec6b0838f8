"""AMPLoss as a criterion: defaults, eval mode, options, state."""

import copy
import io
import pickle

import pytest
import torch
from conftest import DTYPES, TOLERANCE, random_case
from torch import nn

import fastamp
from fastamp import AMPLoss, Mix, reference
from fastamp.functional import amp_cross_entropy, linear_amp_cross_entropy


def batch(size=8, classes=5, dtype=torch.float32):
    case = random_case(size, classes, dtype=dtype)
    return case.logits.requires_grad_(), case.target, Mix(case.lam, case.partner)


def run(criterion, logits, target, mix):
    loss = criterion(logits, target, mix=mix)
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    return loss, grad


# --- what it computes


def test_the_defaults_are_the_papers_adversarial_mixing_policy(backend):
    logits, target, mix = batch()
    loss, grad = run(AMPLoss(), logits, target, mix)
    double = logits.detach().double().requires_grad_()
    result = reference.amp(
        lambda m: m,
        double,
        target,
        *mix,
        mode="amp",
        loss="cross_entropy",
        step_size=2e-3,
        grad_clip=1.0,
        grad_scale="row",
        clamp=False,
        reduction="mean",
    )
    torch.testing.assert_close(loss.double(), result.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(result.loss, double)[0], rtol=1e-5, atol=1e-6)


def entries(dtype, options):
    """Every way to a loss and its statistics, as a function of return_stats: the result, and its leaves."""
    torch.manual_seed(4)
    target, mix = torch.randint(5, (9,)), Mix(torch.rand(9), torch.randperm(9))
    logits, hidden = torch.randn(9, 5).to(dtype), torch.randn(9, 6).to(dtype)
    linear = torch.randn(5, 6).to(dtype)
    leaves = [leaf.requires_grad_() for leaf in (logits, hidden, linear)]

    def head(**kwargs):
        return lambda stats: linear_amp_cross_entropy(
            hidden, linear, None, target, *mix, return_stats=stats, **kwargs, **options
        )

    def criterion(**kwargs):
        return lambda stats: AMPLoss(**kwargs, **options)(logits, target, mix=mix, return_stats=stats)

    def step(plan):
        return lambda stats: AMPLoss(**options).step(
            lambda m: m @ linear.mT, hidden, target, mix=mix, plan=plan, return_stats=stats
        )

    return leaves, {
        "AMPLoss": criterion(),
        "AMPLoss of weights": criterion(weight=torch.rand(5)),
        "AMPLoss of moving weights": criterion(reweight="moving"),
        "amp_cross_entropy": lambda stats: amp_cross_entropy(logits, target, *mix, return_stats=stats, **options),
        "an affine head": head(),
        "a head behind a ReLU": head(activation="relu"),
        "a head in chunks": head(chunk_rows=4),
        "step": step("auto"),
        "a merged step": step("merged"),
        "a step of both": step("both"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", ["amp", "maxop", "mixup"])
def test_statistics_change_no_bit_of_loss_and_gradient(backend, mode, reduction, dtype):
    """43."""
    leaves, calls = entries(dtype, {"mode": mode, "reduction": reduction, "step_size": 0.1})
    for name, call in calls.items():
        plain, (loss, stats) = call(False), call(True)
        assert len(stats.lam_adv) == 9
        assert torch.equal(plain, loss), name
        upstream = torch.linspace(-1, 1, 9).to(loss) if reduction == "none" else torch.tensor(0.7).to(loss)
        for one, other in zip(
            *(torch.autograd.grad(total, leaves, upstream, allow_unused=True) for total in (plain, loss)), strict=True
        ):
            assert one is other is None or torch.equal(one, other), name


def test_the_criterion_is_the_function_with_its_options(backend):
    logits, target, mix = batch()
    options = {
        "mode": "maxop",
        "loss": "softmax_bce",
        "step_size": 0.1,
        "grad_clip": 0.5,
        "grad_scale": "mean",
        "clamp": True,
        "tie_tol": 0.01,
        "ignore_index": 2,
        "label_smoothing": 0.1,
        "reduction": "sum",
        "weight": torch.rand(5),
    }
    expected = amp_cross_entropy(logits, target, *mix, **options)
    assert torch.equal(AMPLoss(**options)(logits, target, mix=mix), expected)


def test_statistics_come_with_the_loss_on_request(backend):
    logits, target, mix = batch()
    loss, stats = AMPLoss()(logits, target, mix=mix, return_stats=True)
    assert isinstance(stats, fastamp.MixStats)
    assert torch.equal(loss, AMPLoss()(logits, target, mix=mix)) or backend == "torch"
    assert torch.equal(stats.lam, mix.lam)
    assert stats.mask.dtype == torch.bool
    assert all(field.shape == (8,) and not field.requires_grad for field in stats[:5])


def test_every_call_draws_its_own_lambda(backend):
    criterion = AMPLoss()
    logits, target, _ = batch()
    first, second = (criterion(logits, target, return_stats=True)[1] for _ in range(2))
    assert not torch.equal(first.lam, second.lam)


def test_a_generator_decides_the_draws(backend):
    logits, target, _ = batch()
    device = logits.device
    losses = []
    for seed in (1, 1, 2):
        criterion = AMPLoss(generator=torch.Generator(device).manual_seed(seed))
        losses.append(criterion(logits, target).item())
    assert losses[0] == losses[1] != losses[2]


def test_num_items_replaces_the_divisor_of_the_mean(backend):
    logits, target, mix = batch()
    total, grad = run(AMPLoss(reduction="sum"), logits, target, mix)
    for items in (3, 2.5, torch.tensor(3), torch.tensor(2.5, dtype=torch.float64)):
        loss = AMPLoss()(logits, target, mix=mix, num_items=items)
        torch.testing.assert_close(loss, total / float(items), rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], grad / float(items), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"reweight": "moving"}], ids=["plain", "reweight"])
@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float16], ids=str)
def test_the_dtype_of_num_items_does_not_decide_that_of_the_loss(backend, dtype, return_stats, options):
    logits, target, mix = batch()
    out = AMPLoss(**options)(logits, target, mix=mix, num_items=torch.tensor(4, dtype=dtype), return_stats=return_stats)
    assert (out[0] if return_stats else out).dtype == torch.float32
    assert AMPLoss().eval()(logits, target, num_items=torch.tensor(4, dtype=dtype)).dtype == torch.float32


def test_num_items_changes_neither_a_sum_nor_the_rows(backend):
    logits, target, mix = batch()
    for reduction in ("sum", "none"):
        criterion = AMPLoss(reduction=reduction)
        expected = criterion(logits, target, mix=mix)
        assert torch.equal(criterion(logits, target, mix=mix, num_items=3), expected)


@pytest.mark.parametrize("mode", ["mixup", "maxop", "amp"])
def test_modes_are_randop_then_maxop_then_minop(backend, mode):
    logits, target, mix = batch(dtype=torch.float64)
    criterion = AMPLoss(mode=mode, loss="softmax_bce", step_size=1.0, tie_tol=0.0, reduction="none")
    loss, stats = criterion(logits, target, mix=mix, return_stats=True)
    at_lam = AMPLoss(mode="mixup", loss="softmax_bce", reduction="none")(logits, target, mix=mix)
    if mode == "mixup":
        assert torch.equal(stats.lam_adv, stats.lam.to(stats.lam_adv))
        assert not stats.mask.any()
    else:
        taken = stats.delta > 0 if mode == "amp" else torch.ones_like(stats.mask)
        assert torch.equal(stats.mask, taken)
        torch.testing.assert_close(loss, torch.where(taken, at_lam + stats.delta, at_lam))


def test_preset_paper_is_the_paper_to_the_letter():
    policy = AMPLoss.preset("paper").policy
    assert (policy.loss, policy.grad_scale, policy.grad_clip, policy.tie_tol) == ("cross_entropy", "row", 1.0, 0.0)
    assert (policy.mode, policy.step_size, policy.clamp) == ("amp", 0.002, False)


def test_preset_official_computes_what_the_published_code_computes(backend):
    logits, target, mix = batch(dtype=torch.float64)
    criterion, history = AMPLoss.preset("official"), []
    for _ in range(3):
        loss = criterion(logits, target, mix=mix)
        result = reference.amp(lambda m: m, logits.detach(), target, *mix, **reference.OFFICIAL, history=history)
        torch.testing.assert_close(loss.detach(), result.loss, rtol=1e-6, atol=0)


def test_what_overrides_a_preset_wins():
    criterion = AMPLoss.preset("official", reweight=None, step_size=0.5, alpha=3.0)
    assert criterion.reweight is None
    assert criterion.policy.step_size == 0.5
    assert criterion.alpha == 3.0
    assert criterion.policy.loss == "softmax_bce"


def test_the_representation_names_what_differs_from_the_defaults():
    assert AMPLoss().extra_repr() == "alpha=1, step_size=0.002, mode='amp'"
    text = repr(
        AMPLoss(
            alpha=0.5,
            mode="maxop",
            loss="softmax_bce",
            reweight="moving",
            pairing="matching",
            weight=torch.ones(3),
            reduction="sum",
            grad_clip=None,
        )
    )
    for part in (
        "AMPLoss(",
        "alpha=0.5",
        "mode='maxop'",
        "loss='softmax_bce'",
        "grad_clip=None",
        "reweight='moving'",
        "pairing='matching'",
        "reduction='sum'",
        "weight=(3,)",
    ):
        assert part in text, part
    assert "clamp" not in text


# --- eval mode


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [-100, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "softmax_bce"])
def test_eval_mode_is_cross_entropy_to_the_bit(loss, weighted, ignored, smoothing, reduction):
    logits, target, _ = batch()
    target[3] = ignored
    options = {"ignore_index": ignored, "label_smoothing": smoothing, "reduction": reduction}
    options["weight"] = torch.rand(5) if weighted else None
    value = AMPLoss(loss=loss, **options).eval()(logits, target)
    expected = nn.CrossEntropyLoss(**options)(logits, target)
    assert torch.equal(value, expected)
    grads = [torch.autograd.grad(x.sum(), logits)[0] for x in (value, expected)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eval_mode_takes_probabilities_of_any_dtype(dtype):
    logits, _, _ = batch(dtype=dtype)
    target = torch.rand(8, 5).softmax(1)
    value = AMPLoss(weight=torch.ones(5)).eval()(logits, target)
    assert torch.equal(value, nn.CrossEntropyLoss(weight=torch.ones(5, dtype=dtype))(logits, target.to(dtype)))
    assert value.dtype == dtype


def test_eval_mode_draws_nothing_and_takes_num_items():
    logits, target, _ = batch()
    criterion = AMPLoss(generator=torch.Generator().manual_seed(1)).eval()
    states = criterion.generator.get_state(), torch.get_rng_state()
    value = criterion(logits, target, num_items=4)
    assert torch.equal(value, nn.CrossEntropyLoss(reduction="sum")(logits, target) / 4)
    assert torch.equal(criterion.generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


def test_train_mode_after_eval_mixes_again():
    logits, target, mix = batch()
    criterion = AMPLoss()
    expected = criterion(logits, target, mix=mix)
    plain = criterion.eval()(logits, target)
    assert torch.equal(criterion.train()(logits, target, mix=mix), expected)
    assert not torch.equal(plain, expected)


# --- re-weighting


def moving_steps():
    """Seven batches; in the first no δ is positive, in the second exactly one."""
    for step in range(7):
        logits, target, mix = batch(dtype=torch.float64)
        if step == 0:
            mix = mix._replace(partner=torch.arange(8))
        if step == 1:
            target[1:] = -100
            lam, partner = torch.full((8,), 0.5), torch.arange(8)
            lam[:2], partner[:2] = torch.tensor([0.0, 0.3]), torch.tensor([1, 0])
            mix = Mix(lam, partner)
        yield logits, target, mix


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_moving_weights_are_the_references_over_seven_steps(backend, reduction):
    criterion, history = AMPLoss(reweight="moving", step_size=0.3, reduction=reduction), []
    counts, means = [], []
    for logits, target, mix in moving_steps():
        loss, stats = criterion(logits, target, mix=mix, return_stats=True)
        result = reference.amp(
            lambda m: m,
            logits,
            target,
            *mix,
            step_size=0.3,
            reweight="moving",
            history=history,
            reduction=reduction,
        )
        assert loss.isfinite().all()
        torch.testing.assert_close(loss, result.loss, rtol=1e-5, atol=1e-8)
        grads = [torch.autograd.grad(x.sum(), logits)[0] for x in (loss, result.loss)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)
        counts.append(int((stats.delta > 0).sum()))
        means.append(stats.delta.mean())
    assert counts[:2] == [0, 1]
    assert min(counts[2:]) > 2


def test_moving_weights_enter_the_mean_with_the_kept_weighted_mass(backend):
    logits, target, mix = batch(dtype=torch.float64)
    target[2] = -100
    weight = torch.rand(5, dtype=torch.float64)
    for items in (None, 2.5, torch.tensor(4)):
        loss = AMPLoss(reweight="moving", step_size=0.3, weight=weight)(logits, target, mix=mix, num_items=items)
        result = reference.amp(
            lambda m: m, logits, target, *mix, step_size=0.3, weight=weight, reweight="moving", num_items=items
        )
        torch.testing.assert_close(loss, result.loss, rtol=1e-5, atol=1e-8)


# --- state


@pytest.mark.parametrize("through_file", [False, True])
def test_a_resumed_criterion_goes_on_bit_for_bit(through_file):
    def make(seed):
        return AMPLoss(
            alpha=0.5,
            step_size=0.3,
            reweight="moving",
            weight=torch.arange(1.0, 6.0),
            generator=torch.Generator().manual_seed(seed),
        )

    logits, target, _ = batch()
    criterion, other = make(1), make(2)
    for _ in range(3):
        criterion(logits, target)
    state = copy.deepcopy(criterion.state_dict())
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    expected = [criterion(logits, target) for _ in range(7)]
    other.load_state_dict(state)
    assert [other(logits, target) for _ in range(7)] == expected


def test_a_generator_cannot_be_restored_into_a_criterion_without_one():
    state = AMPLoss(generator=torch.Generator()).state_dict()
    with pytest.raises(ValueError, match="the saved criterion had a generator of its own, this one has no generator"):
        AMPLoss().load_state_dict(state)
    with pytest.raises(ValueError, match="the saved criterion had no generator of its own, this one has one"):
        AMPLoss(generator=torch.Generator()).load_state_dict(AMPLoss().state_dict())


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_copy_goes_its_own_way(through, own_generator):
    logits, target, mix = batch()
    generator = torch.Generator().manual_seed(1) if own_generator else None
    criterion = AMPLoss(reweight="moving", step_size=0.3, generator=generator)
    criterion(logits, target, mix=mix)
    other = through(criterion)
    window = criterion.window.clone()
    if own_generator:
        state = criterion.generator.get_state()
        assert torch.equal(other.generator.get_state(), state)
        other(logits, target)
        assert torch.equal(criterion.generator.get_state(), state)
    else:
        other(2 * logits, target, mix=mix)
    assert torch.equal(criterion.window, window)
    assert not torch.equal(other.window, window)


def test_dtype_and_device_moves_take_the_buffers_along():
    criterion = AMPLoss(weight=torch.ones(5), reweight="moving").double()
    assert criterion.weight.dtype == torch.float64
    logits, target, mix = batch(dtype=torch.float64)
    assert criterion(logits, target, mix=mix).isfinite()


@pytest.mark.parametrize(
    ("logits", "target", "kwargs"),
    [
        (torch.zeros(3, 5), torch.tensor([0, 5, 1]), {}),
        (torch.zeros(3, 5), torch.tensor([0, 1]), {}),
        (torch.zeros(3, 4), torch.tensor([0, 1, 2]), {}),
        (torch.zeros(3, 5, dtype=torch.int64), torch.tensor([0, 1, 2]), {}),
        (torch.zeros(3, 5), torch.tensor([0, 1, 2]), {"num_items": -1}),
        (torch.zeros(3, 5), torch.tensor([0, 1, 2]), {"mix": Mix(torch.rand(3), torch.tensor([0, 0, 1]))}),
        (torch.zeros(3, 5), torch.tensor([0, 1, 2]), {"mix": Mix(torch.full((3,), 1.5), torch.arange(3))}),
    ],
    ids=["label", "batch", "weight", "dtype", "num_items", "partner", "lam"],
)
def test_bad_input_leaves_the_state_as_it_was(backend, logits, target, kwargs):
    criterion = AMPLoss(weight=torch.ones(5), reweight="moving", generator=torch.Generator().manual_seed(1)).cpu()
    with fastamp.set_backend("torch"), torch.device("cpu"):
        criterion(torch.randn(3, 5), torch.tensor([0, 1, 2]), mix=Mix(torch.rand(3), torch.tensor([1, 2, 0])))
    before = copy.deepcopy(criterion.state_dict())
    global_state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError)):
        criterion(logits, target, **kwargs)
    after = criterion.state_dict()
    assert torch.equal(after["window"], before["window"])
    assert torch.equal(after["window_step"], before["window_step"])
    assert torch.equal(after["_extra_state"]["generator"], before["_extra_state"]["generator"])
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_is_float32_or_float64_with_a_gradient_of_the_logits_dtype(backend, dtype):
    logits, target, mix = batch(dtype=dtype)
    loss, grad = run(AMPLoss(), logits, target, mix)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    wide = logits.detach().double()
    truth = reference.amp(lambda m: m, wide, target, *mix).loss
    torch.testing.assert_close(loss.double(), truth, rtol=TOLERANCE[torch.float32], atol=0)
