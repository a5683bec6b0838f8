"""AMP inside transformers' Trainer: counts, precision, modes, logs, checkpoints, refusals."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastamp

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import accelerate
import hf_models
from torch._dynamo.utils import counters
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from fastamp.hf import AMPTrainer, AMPTrainerMixin, SentLoss, sent_loss
from fastamp.hf.trainer import MixedPass
from fastamp.mixing import MixStats

KEYS = {"mix/lam_shift", "mix/mask_rate", "mix/grad_abs", "mix/delta"}


def trainer_for(mix_at: str | int, criterion: Any, folder: Path, model: Any = None, **options: Any) -> Any:
    """A Trainer that mixes at a place, or one with `sent_loss`."""
    model = hf_models.build("bert") if model is None else model
    common = {
        "model": model,
        "args": hf_models.arguments(folder, **options),
        "train_dataset": hf_models.Questions(64),
        "eval_dataset": hf_models.Questions(20),
    }
    if mix_at == "sent_loss":
        loss = sent_loss(criterion)
        return Trainer(**common, compute_loss_func=loss, callbacks=[loss])
    return AMPTrainer(**common, criterion=criterion, mix_at=mix_at)


def trained(mix_at: str | int, criterion: Any, folder: Path, model: Any = None, **options: Any) -> Any:
    """The same after its training."""
    trainer = trainer_for(mix_at, criterion, folder, model, **options)
    trainer.train()
    return trainer


def fixed(**options: Any) -> Any:
    """A criterion of fixed mixes."""
    return hf_models.fixed_mixes(fastamp.AMPLoss(**options))


def stats_of(criterion: fastamp.AMPLoss) -> list[MixStats]:
    """A list to which every step of the criterion, at any layer, will append its statistics."""
    kept: list[MixStats] = []

    def keeping(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if criterion.training:
                kept.append(result[1])
            return result

        return call

    criterion.step, criterion.forward = keeping(criterion.step), keeping(criterion.forward)  # type: ignore[method-assign]
    return kept


@pytest.mark.parametrize("mix_at", [1, "sent_loss"])
def test_four_accumulated_batches_are_one_batch(mix_at: str | int, tmp_path: Path) -> None:
    weights = []
    for size, accumulated in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        weights.append(hf_models.weights(trained(mix_at, fixed(step_size=0.05), tmp_path, **options).model))
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mix_at", [1, "sent_loss"])
def test_several_labels_a_row(mix_at: str | int, tmp_path: Path) -> None:
    """Accumulated as one batch, though the Trainer counts every class; evaluation is the model's own loss."""
    weights = []
    for size, accumulated in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        model = hf_models.build("bert", problem_type="multi_label_classification")
        criterion = fixed(loss="binary_cross_entropy", step_size=0.05)
        trainer = trainer_for(mix_at, criterion, tmp_path, model, **options)
        data = hf_models.Questions(64)
        data.labels = F.one_hot(data.labels, 3).double().index_fill_(1, torch.tensor([1]), 1.0)
        trainer.train_dataset = trainer.eval_dataset = data
        trainer.train()
        weights.append(hf_models.weights(trainer.model))
        plain = Trainer(trainer.model, hf_models.arguments(tmp_path), eval_dataset=data)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-12)
    assert not torch.equal(weights[0], hf_models.weights(hf_models.build("bert")))


def test_a_step_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    trainer = trained(1, fixed(step_size=0.05), tmp_path, max_steps=1)
    model, criterion = hf_models.build("bert"), fixed(step_size=0.05)
    batch = torch.utils.data.default_collate([hf_models.Questions(64)[row] for row in range(8)])
    g, f = fastamp.hf.split(model, 1)
    mix = criterion.sample(8, device="cpu")
    loss = criterion.step(f, g(**batch), batch["labels"], mix=mix, context=f.context(batch, mix))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    torch.testing.assert_close(hf_models.weights(trainer.model), hf_models.weights(model), rtol=1e-10, atol=1e-12)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize(("mix_at", "training"), [("embeddings", False), ("sent_loss", False), ("sent_loss", True)])
def test_evaluation_is_plain_cross_entropy_and_leaves_the_mode(mix_at: str, training: bool, tmp_path: Path) -> None:
    criterion = fastamp.AMPLoss().train(training)
    trainer = trainer_for(mix_at, criterion, tmp_path)
    plain = Trainer(hf_models.build("bert"), hf_models.arguments(tmp_path), eval_dataset=hf_models.Questions(20))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    ours, theirs = trainer.predict(hf_models.Questions(20)), plain.predict(hf_models.Questions(20))
    assert (ours.predictions == theirs.predictions).all()
    assert (ours.label_ids == theirs.label_ids).all()
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=1e-6)
    trainer.train()  # mixes, whatever mode the criterion was left in
    assert trainer.state.log_history[0]["mix/lam_shift"] > 0
    assert criterion.training == training


def test_sent_loss_is_the_criterion_by_the_count_of_rows() -> None:
    criterion = fixed()
    loss = sent_loss(criterion)
    loss._is_callback = True
    logits, labels = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = criterion(logits, labels, mix=criterion.sample(6, device="cpu"), num_items=24)
    for count in (24, torch.tensor(24), torch.tensor(24.0)):
        assert torch.equal(loss({"logits": logits}, labels, num_items_in_batch=count), expected)
    assert torch.equal(loss((logits,), labels[:, None].int(), 24), expected)
    with torch.no_grad():
        torch.testing.assert_close(loss({"logits": logits}, labels, 24), F.cross_entropy(logits, labels) / 4)


@pytest.mark.parametrize("mix_at", ["embeddings", "sent_loss"])
def test_bfloat16_autocast(mix_at: str, tmp_path: Path) -> None:
    logs = []
    for bf16 in (False, True):
        model = hf_models.build("bert").float()
        inside: list[bool] = []
        model.classifier.register_forward_hook(lambda *_, into=inside: into.append(torch.is_autocast_enabled("cpu")))
        logs.append(trained(mix_at, fixed(), tmp_path, model, bf16=bf16).state.log_history[0])
        assert set(inside) == {bf16}
    assert logs[0]["loss"] != logs[1]["loss"]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=0.02)
    assert logs[0]["mix/grad_abs"] == pytest.approx(logs[1]["mix/grad_abs"], rel=0.1)


@pytest.mark.parametrize("mix_at", [0, "sent_loss"])
def test_torch_compile_gives_the_same_steps_without_a_graph_break(mix_at: str | int, tmp_path: Path) -> None:
    torch._dynamo.reset()
    weights = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = hf_models.build("bert", num_hidden_layers=1)
        criterion = fastamp.AMPLoss(step_size=0.05, generator=torch.Generator().manual_seed(2))
        counters.clear()
        trainer = trained(mix_at, criterion, tmp_path, model, **options)
        # With the default attention, which is sdpa, one graph is a whole step, or what comes before the criterion.
        assert not options or (not counters["graph_break"], counters["stats"]["unique_graphs"]) == (True, 1)
        weights.append(hf_models.weights(trainer.model))
    assert "OptimizedModule" in type(trainer.model_wrapped).__name__
    trainer.evaluate()
    torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-10)


def test_dropout_compiles_to_one_graph_whose_passes_share_it(tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "attn_implementation": "eager"}
    model = hf_models.build("bert", num_hidden_layers=1, **dropout)
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = trained("embeddings", fastamp.AMPLoss(), tmp_path, model, max_steps=3, learning_rate=0.05, **compiled)
    assert (not counters["graph_break"], counters["stats"]["unique_graphs"]) == (True, 1)
    for entry in trainer.state.log_history[:3]:
        # A step of 2e-3 does that much; masks that differ between the passes do a hundred times more.
        assert 0 < entry["mix/delta"] < 1e-3


def test_gradient_checkpointing_gives_the_same_steps(tmp_path: Path) -> None:
    trainers = [trained(1, fixed(), tmp_path, gradient_checkpointing=given) for given in (False, True)]
    torch.testing.assert_close(*(hf_models.weights(trainer.model) for trainer in trainers), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mix_at", ["embeddings", "sent_loss"])
def test_logs_are_means_over_the_rows_since_the_last_log(mix_at: str | int, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    # Large enough steps for some rows to reject theirs, and batches of 8, 8, 8 and 4 rows.
    criterion = fixed(step_size=0.5, grad_clip=None)
    model = hf_models.build("bert")
    with torch.no_grad():
        model.classifier.weight.mul_(4)
    trainer = trainer_for(mix_at, criterion, tmp_path, model, max_steps=4, logging_steps=2, learning_rate=0.05)
    trainer.train_dataset = hf_models.Questions(28)
    kept = stats_of(criterion)
    trainer.add_callback(Reporter())
    trainer.train()
    trainer.evaluate()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    assert [len(stats.lam) for stats in kept] == [8, 8, 8, 4]
    for entry, window in zip(steps, (kept[:2], kept[2:]), strict=True):
        rows = [torch.cat([getattr(stats, name).double() for stats in window]) for name in MixStats._fields[:5]]
        lam, lam_adv, grad, delta, mask = rows
        expected = {"lam_shift": (lam_adv - lam).abs(), "mask_rate": mask, "grad_abs": grad.abs(), "delta": delta}
        for name, values in expected.items():
            assert entry[f"mix/{name}"] == pytest.approx(values.mean().item(), rel=1e-5), name
    assert mix_at != "embeddings" or {entry["mix/mask_rate"] for entry in steps} != {1.0}
    assert not any(KEYS & set(entry) for entry in trainer.state.log_history if "loss" not in entry)
    assert [set(entry) >= KEYS for entry in seen if "loss" in entry] == [True, True]


def test_plain_mixup_logs_no_gradient_that_it_does_not_compute(tmp_path: Path) -> None:
    trainer = trained("last", fastamp.AMPLoss(mode="mixup"), tmp_path)
    entry = trainer.state.log_history[0]
    assert {key for key in entry if key.startswith("mix/")} == KEYS - {"mix/grad_abs"}
    assert entry["mix/lam_shift"] == 0
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    assert "NaN" not in (tmp_path / "state.json").read_text()


@pytest.mark.parametrize("mix_at", ["embeddings", "sent_loss"])
def test_nothing_is_read_back_between_logs(mix_at: str | int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = fastamp.AMPLoss()
    trainer = trainer_for(mix_at, criterion, tmp_path, max_steps=4, logging_steps=2)
    reads: list[str] = []
    where: list[str] = []

    def within(place: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            where.append(place)
            try:
                return function(*args, **kwargs)
            finally:
                where.pop()

        return call

    def counted(name: str) -> Any:
        read = getattr(torch.Tensor, name)

        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if where and where[-1] != "elsewhere":
                reads.append(f"{where[-1]}: {name}")
            return read(self, *args, **kwargs)

        return call

    for name in ("tolist", "item", "__float__", "__int__", "__bool__", "__index__", "__array__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    loss = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, SentLoss))
    # What the criterion and the model look at is theirs; on the CPU that is more than elsewhere.
    criterion.step = within("elsewhere", criterion.step)  # type: ignore[method-assign]
    criterion.forward = within("elsewhere", criterion.forward)  # type: ignore[method-assign]
    monkeypatch.setattr(fastamp.Mix, "union", within("elsewhere", fastamp.Mix.union))
    trainer.model.bert.forward = within("elsewhere", trainer.model.bert.forward)
    trainer.compute_loss = within("step", trainer.compute_loss)
    loss.pop_logs = within("log", loss.pop_logs)  # type: ignore[method-assign]
    trainer.train()
    assert reads == ["log: tolist"] * 2


@pytest.mark.parametrize(("mix_at", "options"), [("embeddings", {"reweight": "moving"}), ("sent_loss", {})])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(mix_at: str, options: dict, tmp_path: Path) -> None:
    def run(**training: Any) -> Any:
        model = hf_models.build("bert", hidden_dropout_prob=0.2)
        criterion = fastamp.AMPLoss(**options, generator=torch.Generator().manual_seed(7))
        return trainer_for(mix_at, criterion, tmp_path / "run", model, max_steps=4, **training)

    whole = run(save_strategy="steps", save_steps=2)
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(hf_models.weights(resumed.model), hf_models.weights(whole.model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a criterion with a generator."""
    folder = tmp_path_factory.mktemp("saved")
    criterion = fastamp.AMPLoss(generator=torch.Generator().manual_seed(7))
    trained("logits", criterion, folder, save_strategy="steps", save_steps=1)
    return folder / "checkpoint-1"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ("lost", UserWarning, "no state of the criterion in .*mixing_state.pt: its generator starts over"),
        ("damaged", ValueError, r"mixing_state.pt is damaged \(.+\); delete it to start the criterion over$"),
        ("other", ValueError, r"(?s)mixing_state.pt holds the state of another criterion than AMPLoss\("),
        ("none", UserWarning, "mixing_state.pt holds the state of a generator or of a window, which this"),
    ],
)
def test_resuming_without_the_state_of_the_criterion_says_why(
    change: str, kind: Any, message: str, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / saved.name)
    state = folder / "mixing_state.pt"
    if change == "lost":
        state.unlink()
    elif change == "damaged":
        state.write_bytes(state.read_bytes()[:-200])
    options: dict[str, Any] = {"reweight": "moving"} if change == "other" else {}
    if change in ("lost", "damaged"):
        options["generator"] = torch.Generator()
    trainer = trainer_for("logits", fastamp.AMPLoss(**options), tmp_path)
    with pytest.warns(kind, match=message) if kind is UserWarning else pytest.raises(kind, match=message):
        trainer.train(resume_from_checkpoint=str(folder))


def test_a_head_replaced_between_two_trainings_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.nn.Module] = []
    init = MixedPass.__init__
    monkeypatch.setattr(MixedPass, "__init__", lambda self, *args: made.append(args[1]) or init(self, *args))
    trainer = trained("embeddings", fastamp.AMPLoss(), tmp_path)
    assert len(made) == 1  # for both steps: another would be compiled again
    trainer.model.classifier = torch.nn.Linear(16, 3).double()
    before = trainer.model.classifier.weight.detach().clone()
    trainer.optimizer = None
    trainer.train()
    assert len(made) == 2
    assert not torch.equal(trainer.model.classifier.weight, before)


def test_save_pretrained_is_that_of_the_plain_trainer(tmp_path: Path) -> None:
    trainer = trained("embeddings", fastamp.AMPLoss(), tmp_path)
    trainer.save_model(str(tmp_path / "ours"))
    assert "forward" not in trainer.model.__dict__
    plain = Trainer(hf_models.build("bert"), hf_models.arguments(tmp_path))
    plain.model.load_state_dict(trainer.model.state_dict())
    plain.save_model(str(tmp_path / "theirs"))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("mix_at", ["embeddings", "sent_loss"])
def test_float_labels_are_refused_with_the_reason(mix_at: str | int, tmp_path: Path) -> None:
    trainer = trainer_for(mix_at, fastamp.AMPLoss(), tmp_path)
    trainer.train_dataset.labels = F.one_hot(trainer.train_dataset.labels, 3).float()
    with pytest.raises(TypeError, match=r"would count 24 items for 8 rows, .* sigmoid loss"):
        trainer.train()


@pytest.mark.parametrize("mix_at", ["embeddings", "sent_loss"])
def test_other_heads_are_refused(mix_at: str | int, tmp_path: Path) -> None:
    for overrides, message in (
        ({"num_labels": 1}, "num_labels=1 is a regression"),
        ({"problem_type": "multi_label_classification"}, "give AMPLoss.loss='binary_cross_entropy'"),
        ({"problem_type": "regression"}, "configured for 'regression'$"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_for(mix_at, fastamp.AMPLoss(), tmp_path, hf_models.build("bert", **overrides)).train()


@pytest.mark.parametrize("mix_at", ["embeddings", "sent_loss"])
def test_label_smoothing_is_the_criterions_and_applied_once(mix_at: str | int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 would not be applied, .*\(by 0.0\)"):
        trained(mix_at, fastamp.AMPLoss(), tmp_path, label_smoothing_factor=0.1)
    given = ({}, {"label_smoothing_factor": 0.1})
    trainers = [trained(mix_at, fixed(label_smoothing=0.1), tmp_path, max_steps=1, **options) for options in given]
    assert torch.equal(*(hf_models.weights(trainer.model) for trainer in trainers))


def test_class_weights_are_divided_by_rows_in_evaluation(tmp_path: Path) -> None:
    weight = torch.tensor([1.0, 5.0, 0.5])
    trainer = trainer_for("embeddings", fastamp.AMPLoss(weight=weight), tmp_path, per_device_eval_batch_size=20)
    predictions = trainer.predict(hf_models.Questions(20))
    logits, labels = torch.from_numpy(predictions.predictions), torch.from_numpy(predictions.label_ids)
    expected = F.cross_entropy(logits, labels, weight=weight.double(), reduction="sum") / 20
    assert predictions.metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_half_of_sent_loss_is_noticed(tmp_path: Path) -> None:
    common = {"args": hf_models.arguments(tmp_path), "train_dataset": hf_models.Questions(32)}
    loss = sent_loss(fastamp.AMPLoss())
    with pytest.raises(RuntimeError, match=r"give the Trainer compute_loss_func=loss beside callbacks=\[loss\]"):
        Trainer(hf_models.build("bert"), **common, callbacks=[loss]).train()
    loss = sent_loss(fastamp.AMPLoss())
    with pytest.warns(UserWarning, match=r"nothing is logged .* pass callbacks=\[loss\]") as seen:
        Trainer(hf_models.build("bert"), **common, compute_loss_func=loss).train()
    assert len([warning for warning in seen if "callbacks" in str(warning.message)]) == 1  # in two steps


def test_the_mixin_goes_before_a_trainer_of_ones_own_whose_loss_must_not_pass_the_criterion_by(tmp_path: Path) -> None:
    class Own(AMPTrainerMixin, Trainer):
        pass

    class Theirs(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(**inputs)["loss"]

    class Mine(AMPTrainerMixin, Theirs):
        pass

    common = {"args": hf_models.arguments(tmp_path, max_steps=1), "train_dataset": hf_models.Questions(32)}
    with pytest.raises(RuntimeError, match="whose own compute_loss does not call that function"):
        Mine(hf_models.build("bert"), **common, criterion=fastamp.AMPLoss(), mix_at="logits").train()
    # Its outputs hold the mixed loss, which is all that is needed.
    Mine(hf_models.build("bert"), **common, criterion=fastamp.AMPLoss(), mix_at=1).train()
    at_a_layer = {"criterion": fastamp.AMPLoss(), "mix_at": "distilbert.transformer.layer.0"}
    trainer = Own(hf_models.build("distilbert"), **common, **at_a_layer)
    trainer.train()
    assert set(trainer.state.log_history[0]) >= KEYS


def test_a_moving_window_warns_of_accumulated_batches(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"reweight='moving' moves its window at each of the 2 batches"):
        trained(1, fastamp.AMPLoss(reweight="moving"), tmp_path, max_steps=1, gradient_accumulation_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained(1, fastamp.AMPLoss(reweight="moving"), tmp_path, max_steps=1)


def test_reentrant_checkpoints_and_unknown_layers_are_refused_where_a_layer_is_mixed(
    tmp_path: Path,
) -> None:
    for kwargs in ({"use_reentrant": True}, {"preserve_rng_state": True}):
        options: Any = {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs}
        with pytest.raises(ValueError, match=r"set activation_checkpointing_kwargs=\{.*'use_reentrant': False\}"):
            trainer_for(1, fastamp.AMPLoss(), tmp_path, **options)
        trainer_for("logits", fastamp.AMPLoss(), tmp_path, **options)
    with pytest.raises(ValueError, match="0 to 2 for a model of 2 layers, got 7"):
        trainer_for(7, fastamp.AMPLoss(), tmp_path)
    options["activation_checkpointing_kwargs"] = {"every_n_layers": 2}
    trainer_for(1, fastamp.AMPLoss(), tmp_path, **options).train()


def test_criteria_that_the_trainer_does_not_count_by_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ignore_index=0"):
        sent_loss(fastamp.AMPLoss(ignore_index=0))
    with pytest.raises(TypeError, match=r"fastamp\.AMPLoss, got CrossEntropyLoss"):
        sent_loss(torch.nn.CrossEntropyLoss())  # type: ignore[arg-type]
    for mix_at in ("embeddings", "sent_loss"):
        criterion = fastamp.AMPLoss()
        trainer = trainer_for(mix_at, criterion, tmp_path)
        criterion.reduction = "sum"  # which is set later, and so refused when training begins
        with pytest.raises(ValueError, match=r"reduction='mean'.*got reduction='sum'"):
            trainer.train()


def test_the_criterion_itself_as_the_trainers_loss_names_sent_loss(tmp_path: Path) -> None:
    data = {"train_dataset": hf_models.Questions(16), "eval_dataset": hf_models.Questions(8)}
    arguments = hf_models.build("bert"), hf_models.arguments(tmp_path)
    trainer = Trainer(*arguments, compute_loss_func=fastamp.AMPLoss(), **data)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(TypeError, match=r"'num_items_in_batch'; .* compute_loss_func=fastamp\.hf\.sent_loss"):
            run()


def test_a_pretrained_model_that_holds_a_criterion_is_saved_and_loaded(tmp_path: Path) -> None:
    class Holding(BertForSequenceClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.criterion = fastamp.AMPLoss(
                torch.rand(3), reweight="moving", generator=torch.Generator().manual_seed(config.seed)
            )

    config = hf_models.build("bert").config
    config.seed = 3
    model = Holding(config)
    model.criterion.sample(5)
    model.save_pretrained(tmp_path)
    loaded, info = Holding.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(map(torch.equal, model.state_dict().values(), loaded.state_dict().values()))
    assert torch.equal(loaded.criterion.sample(5).lam, model.criterion.sample(5).lam)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "accelerate")
    accelerate.load_checkpoint_in_model(loaded, str(tmp_path / "accelerate"), strict=True)
    assert torch.equal(loaded.criterion.sample(5).lam, model.criterion.sample(5).lam)


def test_calls_that_are_no_classification_are_refused() -> None:
    loss = sent_loss(fastamp.AMPLoss())
    logits = torch.randn(4, 3)
    for outputs, labels, count, message in (
        (logits, None, 4, "labels in every training batch"),
        (logits, torch.zeros(4, 3, dtype=torch.long), 4, r"class indices, got shape \(4, 3\)"),
        (logits[:, :1], torch.zeros(4, dtype=torch.long), 4, "num_labels=1 is a regression head"),
        (logits[None], torch.zeros(1, dtype=torch.long), 4, r"logits \(B, C\)"),
        (logits, torch.zeros(4), 4, "torch.float32: transformers' models take float labels"),  # and nothing of counts
        (logits, torch.zeros(4, dtype=torch.long), torch.ones(2, 1), "nn.DataParallel, which is not supported"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss({"logits": outputs}, labels, count)


def test_two_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="compute_loss_func and criterion"):
        AMPTrainer(hf_models.build("bert"), criterion=fastamp.AMPLoss(), compute_loss_func=F.cross_entropy)


def test_a_missing_accelerate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(ImportError, match=r"fastamp\.hf\.AMPTrainer needs accelerate: pip install 'fastamp\[hf\]'"):
        _ = fastamp.hf.AMPTrainer
