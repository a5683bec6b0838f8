"""AMPLoss as a criterion: defaults, eval mode, options, state."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from conftest import DTYPES, random_case
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

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


def test_the_defaults_are_the_papers_adversarial_mixing_policy(backend):
    logits, target, mix = batch()
    loss, grad = run(AMPLoss(), logits, target, mix)
    double = logits.detach().double().requires_grad_()
    paper = {"mode": "amp", "loss": "cross_entropy", "step_size": 2e-3, "grad_clip": 1.0, "grad_scale": "row"}
    result = reference.amp(lambda m: m, double, target, *mix, clamp=False, reduction="mean", **paper)
    torch.testing.assert_close(loss.double(), result.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(result.loss, double)[0], rtol=1e-5, atol=1e-6)
    assert {name: getattr(AMPLoss.preset("paper"), name) for name in (*paper, "tie_tol")} == {**paper, "tie_tol": 0.0}


def entries(dtype, options):
    """Every way to a loss and its statistics, as a function of return_stats: the result, and its leaves."""
    target, mix = torch.randint(5, (9,)), Mix(torch.rand(9), torch.randperm(9))
    logits, hidden, linear = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((9, 5), (9, 6), (5, 6)))

    def head(**kwargs):
        batch = (hidden, linear, None, target, *mix)
        return lambda stats: linear_amp_cross_entropy(*batch, return_stats=stats, **kwargs, **options)

    def criterion(**kwargs):
        return lambda stats: AMPLoss(**kwargs, **options)(logits, target, mix=mix, return_stats=stats)

    def step(plan):
        criterion, given = AMPLoss(**options), {"mix": mix, "plan": plan}
        return lambda stats: criterion.step(lambda m: m @ linear.mT, hidden, target, return_stats=stats, **given)

    return (logits, hidden, linear), {
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


@pytest.mark.parametrize(
    ("mode", "reduction", "dtype"),
    [
        ("amp", "mean", torch.float32),
        ("amp", "none", torch.bfloat16),
        ("maxop", "sum", torch.float32),
        ("mixup", "none", torch.float32),
        ("mixup", "mean", torch.bfloat16),
    ],
    ids=str,
)
def test_statistics_change_no_bit_of_loss_and_gradient(backend, mode, reduction, dtype):
    leaves, calls = entries(dtype, {"mode": mode, "reduction": reduction, "step_size": 0.1})
    for name, call in calls.items():
        plain, (loss, stats) = call(False), call(True)
        assert isinstance(stats, fastamp.MixStats)
        assert stats.mask.dtype == torch.bool
        assert all(field.shape == (9,) and not field.requires_grad for field in stats[:5])
        assert torch.equal(plain, loss), name
        upstream = torch.linspace(-1, 1, 9).to(loss) if reduction == "none" else torch.tensor(0.7).to(loss)
        for one, other in zip(
            *(torch.autograd.grad(total, leaves, upstream, allow_unused=True) for total in (plain, loss)), strict=True
        ):
            assert one is other is None or torch.equal(one, other), name


def test_the_criterion_is_the_function_with_its_options(backend):
    logits, target, mix = batch()
    options = {"mode": "maxop", "loss": "softmax_bce", "step_size": 0.1, "grad_clip": 0.5, "grad_scale": "mean"}
    options |= {"clamp": True, "tie_tol": 0.01, "ignore_index": 2, "label_smoothing": 0.1, "reduction": "sum"}
    weight = torch.rand(5)
    expected = amp_cross_entropy(logits, target, *mix, weight=weight, **options)
    assert torch.equal(AMPLoss(weight, **options)(logits, target, mix=mix), expected)  # as in nn.CrossEntropyLoss


@pytest.mark.parametrize("options", [{}, {"reweight": "moving"}], ids=["plain", "reweight"])
def test_num_items_replaces_the_divisor_of_the_mean_and_nothing_else(backend, options):
    logits, target, mix = batch()
    total, grad = run(AMPLoss(reduction="sum", **options), logits, target, mix)
    every = [torch.tensor(3, dtype=dtype) for dtype in (torch.float64, torch.int64, torch.float16)]
    for items in (3, 2.5, *every):
        loss, _ = AMPLoss(**options)(logits, target, mix=mix, num_items=items, return_stats=True)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, total / float(items), rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], grad / float(items), rtol=1e-5, atol=1e-7)
        assert AMPLoss(**options)(logits, target, mix=mix, num_items=items).dtype == torch.float32
        assert AMPLoss(**options).eval()(logits, target, num_items=items).dtype == torch.float32
    for reduction in ("sum", "none"):
        losses = [AMPLoss(reduction=reduction, **options)(logits, target, mix=mix, num_items=n) for n in (None, 3)]
        assert torch.equal(*losses)


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


def test_uint8_labels_are_class_indices_as_in_cross_entropy(backend):
    logits, target, mix = batch()
    target[2] = 255
    criterion = AMPLoss(ignore_index=255, reduction="none")
    assert torch.equal(criterion(logits, target.byte(), mix=mix), criterion(logits, target, mix=mix))
    for evaluated in (criterion.eval()(logits, target.byte()), criterion.step(lambda m: m, logits, target.byte())):
        assert torch.equal(evaluated, nn.CrossEntropyLoss(ignore_index=255, reduction="none")(logits, target.byte()))


def test_one_lambda_serves_all_rows_and_each_is_moved_by_itself(backend):
    logits, target, mix = batch()
    one = Mix(mix.lam[0], mix.partner)
    _, stats = AMPLoss(step_size=0.3)(logits, target, mix=one, return_stats=True)
    assert torch.equal(stats.lam, mix.lam[:1].repeat(8))
    assert stats.lam_adv.unique().numel() > 1


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
    assert criterion.step_size == 0.5
    assert criterion.alpha == 3.0
    assert criterion.policy.loss == "softmax_bce"


def test_the_representation_names_what_differs_from_the_defaults():
    assert AMPLoss().extra_repr() == "alpha=1, step_size=0.002, mode='amp'"
    changed = {"alpha": 0.5, "mode": "maxop", "loss": "softmax_bce", "reweight": "moving", "pairing": "matching"}
    changed |= {"reduction": "sum", "grad_clip": None, "dropout": "redrawn"}
    text = repr(AMPLoss(weight=torch.ones(3), **changed))
    for part in ("AMPLoss(", "weight=(3,)", *(f"{name}={value!r}" for name, value in changed.items())):
        assert part in text, part
    assert "clamp" not in text


CHANGES = [
    ("alpha", 0.3),
    ("step_size", 0.7),
    ("mode", "mixup"),
    ("loss", "softmax_bce"),
    ("grad_clip", None),
    ("grad_scale", "mean"),
    ("clamp", True),
    ("tie_tol", 100.0),
    ("pairing", "matching"),
    ("ignore_index", 2),
    ("label_smoothing", 0.2),
    ("reduction", "none"),
    ("dropout", "redrawn"),
    ("reweight", "moving"),
    ("weight", torch.arange(1.0, 6.0)),
]


@pytest.mark.parametrize(("name", "value"), CHANGES, ids=[name for name, _ in CHANGES])
def test_an_option_that_is_set_later_acts_as_one_that_was_given(name, value):
    def run_of(criterion):
        torch.manual_seed(3)
        logits = (10 * torch.randn(8, 5)).requires_grad_()
        target, keep = torch.randint(5, (8,)), nn.Dropout(0.5)
        forward, stats = criterion(logits, target, return_stats=True)
        return forward, criterion.step(lambda m: 3 * keep(m).sin(), logits, target), *stats[:5]

    given, changed = AMPLoss(**{"step_size": 0.5, name: value}), AMPLoss(step_size=0.5)
    unchanged = run_of(changed)
    setattr(changed, name, value)
    assert getattr(changed, name) is value or getattr(changed, name) == value
    assert repr(changed) == repr(given)
    results = run_of(changed)
    torch.testing.assert_close(results, run_of(given), rtol=0, atol=0, equal_nan=True)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(results, unchanged, strict=True))
    assert list(changed.state_dict()) == list(given.state_dict())
    for other in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        assert repr(other) == repr(changed)


def test_the_options_of_cross_entropy_are_read_by_its_names():
    options = {"weight": torch.rand(5), "ignore_index": 3, "label_smoothing": 0.1, "reduction": "sum"}
    ours, theirs = AMPLoss(**options), nn.CrossEntropyLoss(**options)
    assert all(getattr(ours, name) is getattr(theirs, name) for name in options)


def test_class_weights_that_are_set_later_are_a_buffer():
    criterion = AMPLoss()
    criterion.weight = torch.rand(5)
    assert list(criterion.state_dict()) == ["weight"]
    assert criterion.double().weight.dtype == torch.float64
    criterion.weight = None
    assert not criterion.state_dict()


def test_a_window_comes_and_goes_with_the_re_weighting():
    logits, target, mix = batch()
    criterion = AMPLoss(step_size=0.3)
    plain = criterion(logits, target, mix=mix)
    for _ in range(2):
        criterion.reweight = "moving"
        assert criterion.window_step == 0
        assert not torch.equal(criterion(logits, target, mix=mix), plain)
    criterion.reweight = None
    assert not criterion.state_dict()
    assert torch.equal(criterion(logits, target, mix=mix), plain)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [-100, 1])
@pytest.mark.parametrize("loss", ["cross_entropy", "softmax_bce"])
def test_eval_mode_is_cross_entropy_to_the_bit(loss, ignored, smoothing, reduction):
    logits, target, _ = batch()
    target[3] = ignored
    for weight in (None, torch.rand(5)):
        options = {"ignore_index": ignored, "label_smoothing": smoothing, "reduction": reduction, "weight": weight}
        value = AMPLoss(loss=loss, **options).eval()(logits, target)
        expected = nn.CrossEntropyLoss(**options)(logits, target)
        assert torch.equal(value, expected)
        assert torch.equal(*[torch.autograd.grad(x.sum(), logits)[0] for x in (value, expected)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eval_mode_takes_probabilities_of_any_dtype(dtype):
    logits, _, _ = batch(dtype=dtype)
    target = torch.rand(8, 5).softmax(1)
    value = AMPLoss(weight=torch.ones(5)).eval()(logits, target)
    assert torch.equal(value, nn.CrossEntropyLoss(weight=torch.ones(5, dtype=dtype))(logits, target.to(dtype)))
    assert value.dtype == dtype


def test_eval_mode_draws_nothing_takes_num_items_and_may_end():
    logits, target, mix = batch()
    criterion = AMPLoss(generator=torch.Generator().manual_seed(1))
    expected = criterion(logits, target, mix=mix)
    states = criterion.generator.get_state(), torch.get_rng_state()
    value = criterion.eval()(logits, target, num_items=4)
    assert torch.equal(value, nn.CrossEntropyLoss(reduction="sum")(logits, target) / 4)
    assert torch.equal(criterion.generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert torch.equal(criterion.train()(logits, target, mix=mix), expected)


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
    options = {"reweight": "moving", "step_size": 0.3, "reduction": reduction}
    criterion, history, counts = AMPLoss(**options), [], []
    for logits, target, mix in moving_steps():
        loss, stats = criterion(logits, target, mix=mix, return_stats=True)
        result = reference.amp(lambda m: m, logits, target, *mix, history=history, **options)
        assert loss.isfinite().all()
        torch.testing.assert_close(loss, result.loss, rtol=1e-5, atol=1e-8)
        grads = [torch.autograd.grad(x.sum(), logits)[0] for x in (loss, result.loss)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)
        counts.append(int((stats.delta > 0).sum()))
    assert counts[:2] == [0, 1]
    assert min(counts[2:]) > 2


def test_moving_weights_enter_the_mean_with_the_kept_weighted_mass(backend):
    logits, target, mix = batch(dtype=torch.float64)
    target[2] = -100
    options = {"reweight": "moving", "step_size": 0.3, "weight": torch.rand(5, dtype=torch.float64)}
    for items in (None, 2.5, torch.tensor(4)):
        loss = AMPLoss(**options)(logits, target, mix=mix, num_items=items)
        result = reference.amp(lambda m: m, logits, target, *mix, num_items=items, **options)
        torch.testing.assert_close(loss, result.loss, rtol=1e-5, atol=1e-8)


def test_a_resumed_criterion_goes_on_bit_for_bit():
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return AMPLoss(0.1 + torch.rand(5), alpha=0.5, step_size=0.3, reweight="moving", generator=generator)

    logits, target, _ = batch()
    criterion, other, from_file = make(1), make(2), make(3)
    for _ in range(3):
        criterion(logits, target)
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    other.load_state_dict(criterion.state_dict())
    from_file.load_state_dict(torch.load(file, weights_only=True))
    expected = [criterion(logits, target) for _ in range(7)]
    for resumed in (other, from_file):
        assert [resumed(logits, target) for _ in range(7)] == expected


def test_a_generator_is_restored_into_a_criterion_that_has_one():
    own = AMPLoss(generator=torch.Generator())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "generator_state"'):
        AMPLoss().load_state_dict(own.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "generator_state"'):
        own.load_state_dict(AMPLoss().state_dict())
    assert AMPLoss().load_state_dict(own.state_dict(), strict=False).unexpected_keys == ["generator_state"]
    own.sample(4)
    before = own.generator.get_state()
    assert own.load_state_dict({}, strict=False).missing_keys == ["generator_state"]
    with pytest.raises(RuntimeError, match="size mismatch for generator_state"):  # of a generator on a GPU
        own.load_state_dict({"generator_state": torch.zeros(16, dtype=torch.uint8)})
    assert torch.equal(own.generator.get_state(), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_that_of_its_moment(assign):
    criterion = AMPLoss(generator=torch.Generator())
    state = criterion.state_dict()
    first = criterion.sample(4)
    assert not torch.equal(state["generator_state"], criterion.state_dict()["generator_state"])
    criterion.load_state_dict(state, assign=assign)
    assert torch.equal(criterion.sample(4).lam, first.lam)


def model_with(criterion):
    """A model that holds its criterion."""
    model = nn.Module()
    model.layer, model.criterion = nn.Linear(4, 5), criterion
    return model


def with_every_state():
    """A model whose criterion has class weights, a window and a generator."""
    return model_with(AMPLoss(torch.rand(5), reweight="moving", generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("weighted", [False, True])
def test_checkpoints_are_exchanged_with_cross_entropy(weighted):
    for kinds in ((AMPLoss, nn.CrossEntropyLoss), (nn.CrossEntropyLoss, AMPLoss)):
        source, goal = (model_with(kind(weight=torch.rand(5) if weighted else None)) for kind in kinds)
        goal.load_state_dict(source.state_dict())
        assert list(goal.state_dict()) == list(source.state_dict())
        assert not weighted or torch.equal(goal.criterion.weight, source.criterion.weight)


def test_a_model_that_holds_the_criterion_is_saved_by_safetensors(tmp_path):
    """Which takes no extra state that is no tensor."""
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = with_every_state(), with_every_state()
    model.criterion.sample(4)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.load_model(other, tmp_path / "model.safetensors")
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert torch.equal(model.criterion.sample(4).lam, other.criterion.sample(4).lam)


def test_a_model_that_holds_the_criterion_is_averaged_and_halved():
    model = with_every_state()
    state = model.state_dict()
    for use_buffers in (False, True):
        average = AveragedModel(model, use_buffers=use_buffers)
        for _ in range(2):
            average.update_parameters(model)
        assert all(map(torch.equal, average.module.state_dict().values(), state.values()))
    averaged = copy.deepcopy(model)  # as timm's ModelEmaV3 goes about it
    for mean, value in zip(averaged.state_dict().values(), state.values(), strict=True):
        mean.lerp_(value, 0.1) if mean.is_floating_point() else mean.copy_(value)
    assert all(map(torch.equal, averaged.state_dict().values(), state.values()))
    model.load_state_dict({name: value.half() for name, value in state.items()})
    assert torch.equal(model.criterion.generator.get_state(), state["criterion.generator_state"])
    model.half().load_state_dict(state)


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_checkpoint_whose_extra_state_is_a_dict_loads(own_generator):
    def generator(seed):
        return torch.Generator().manual_seed(seed) if own_generator else None

    model = model_with(AMPLoss(reweight="moving", generator=generator(5)))
    state, saved = model.state_dict(), generator(7)
    state.pop("criterion.generator_state", None)
    state["criterion._extra_state"] = {"generator": saved.get_state() if own_generator else None}
    model.load_state_dict(state)
    if own_generator:
        assert torch.equal(model.criterion.generator.get_state(), saved.get_state())
    other = model_with(AMPLoss(reweight="moving", generator=None if own_generator else torch.Generator()))
    with pytest.raises(RuntimeError, match=r'key\(s\) in state_dict: "criterion.generator_state"'):
        other.load_state_dict(state)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_goes_its_own_way(through):
    logits, target, _ = batch()
    criterion = AMPLoss(reweight="moving", step_size=0.3, generator=torch.Generator().manual_seed(1))
    criterion(logits, target)
    other = through(criterion)
    window, state = criterion.window.clone(), criterion.generator.get_state()
    assert torch.equal(other.generator.get_state(), state)
    other(2 * logits, target)
    assert torch.equal(criterion.generator.get_state(), state)
    assert torch.equal(criterion.window, window)
    assert not torch.equal(other.window, window)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_a_cast_leaves_the_window_in_float32(cast):
    model = with_every_state()
    logits, target, mix = batch()
    model.criterion(logits, target, mix=mix)
    before = model.criterion.window.clone()
    dtype = {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
    model.to(dtype) if cast == "to" else getattr(model, cast)()
    criterion = model.criterion
    assert criterion.window.dtype == torch.float32
    assert torch.equal(criterion.window, before)
    assert criterion.window_step.dtype == torch.int64
    assert criterion.weight.dtype == model.layer.weight.dtype == dtype
    assert criterion(logits.detach().to(dtype), target, mix=mix).isfinite()
    assert criterion.to("meta", torch.float16).window.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_decide_that_of_the_window(dtype):
    torch.set_default_dtype(dtype)
    try:
        criterion = AMPLoss(reweight="moving")
    finally:
        torch.set_default_dtype(torch.float32)
    assert criterion.window.dtype == torch.float32


def through_a_checkpoint(criterion, entry, mix=None, **options):
    """The loss and the gradient of a checkpointed head and criterion; without options, of the same by itself."""
    torch.manual_seed(1)
    head = nn.Linear(4, 5)
    x, target = torch.randn(8, 4, requires_grad=True), torch.randint(5, (8,))
    torch.manual_seed(2)

    def block(x):
        if entry == "step":
            return criterion.step(head, x, target, mix=mix)
        return criterion(head(x), target, mix=mix)

    loss = checkpoint(block, x, **options) if options else block(x)
    loss.backward()
    return loss.detach(), x.grad, head.weight.grad


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("entry", ["forward", "step"])
def test_an_activation_checkpoint_draws_the_same_lambda_or_is_refused(entry, use_reentrant):
    options = {"use_reentrant": use_reentrant}
    expected = through_a_checkpoint(AMPLoss(), entry)
    assert all(map(torch.equal, through_a_checkpoint(AMPLoss(), entry, **options), expected))

    def own():
        return AMPLoss(generator=torch.Generator().manual_seed(3))

    for preserved in (True, False):
        with pytest.raises(RuntimeError, match=r"draw another λ: its generator .* pass mix=criterion\.sample"):
            through_a_checkpoint(own(), entry, preserve_rng_state=preserved, **options)
    with pytest.raises(RuntimeError, match=r"draw another λ: preserve_rng_state=False .* pass mix=criterion\.sample"):
        through_a_checkpoint(AMPLoss(), entry, preserve_rng_state=False, **options)
    mix = own().sample(8)
    given = through_a_checkpoint(own(), entry, mix=mix, preserve_rng_state=False, **options)
    assert all(map(torch.equal, given, through_a_checkpoint(own(), entry)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("entry", ["forward", "step"])
def test_a_window_does_not_move_a_second_time_in_a_recomputation(entry, use_reentrant):
    criterion, expected = AMPLoss(reweight="moving"), AMPLoss(reweight="moving")
    through_a_checkpoint(expected, entry)
    with pytest.raises(RuntimeError, match=r"move the window of reweight='moving' a second time: leave the criterion"):
        through_a_checkpoint(criterion, entry, use_reentrant=use_reentrant)
    # The first pass of a step is recomputed while the step is not over yet.
    assert criterion.window_step == (0 if entry == "step" and not use_reentrant else 1)
    assert torch.equal(criterion.window, expected.window) or criterion.window_step == 0


@pytest.mark.parametrize("entry", ["forward", "step"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_validation_in_train_mode_is_warned_of_once(mode, entry):
    logits, target, _ = batch()
    criterion = AMPLoss(mode="mixup")
    call = criterion if entry == "forward" else lambda *args: criterion.step(nn.Identity(), *args)
    with mode():
        with pytest.warns(
            UserWarning, match=r"train mode and no gradients are recorded.* call criterion\.eval\(\)"
        ) as seen:
            call(1 * logits, target)
        assert seen[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # whatever Python would show once
            call(1 * logits, target)
            AMPLoss().eval()(1 * logits, target)


@pytest.mark.parametrize("entry", ["forward", "step"])
def test_training_is_not_taken_for_validation(entry):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "AMPLoss")
        through_a_checkpoint(AMPLoss(), entry)
        through_a_checkpoint(AMPLoss(), entry, use_reentrant=True)
        with torch.no_grad():
            torch.compile(AMPLoss(), backend="eager", fullgraph=True)(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("logits", "target", "kwargs"),
    [
        (torch.zeros(3, 5), torch.tensor([0, 5, 1]), {}),
        (torch.zeros(3, 5), torch.tensor([0, 1]), {}),
        (torch.zeros(3, 4), torch.tensor([0, 1, 2]), {}),
        (torch.zeros(3, 5), torch.tensor([0, 1, 2]), {"num_items": -1}),
        (torch.zeros(3, 5), torch.tensor([0, 1, 2]), {"mix": Mix(torch.full((3,), 1.5), torch.arange(3))}),
    ],
    ids=["label", "batch", "weight", "num_items", "lam"],
)
def test_bad_input_leaves_the_state_as_it_was(logits, target, kwargs):
    criterion = AMPLoss(weight=torch.ones(5), reweight="moving", generator=torch.Generator().manual_seed(1))
    criterion(torch.randn(3, 5), torch.tensor([0, 1, 2]))
    before = copy.deepcopy(criterion.state_dict())
    global_state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError)):
        criterion(logits, target, **kwargs)
    after = criterion.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), global_state)
