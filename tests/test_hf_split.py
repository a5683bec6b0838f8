"""fastamp.hf.split: g and f are the model cut in two, at every place, for every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastamp
from fastamp import reference

pytest.importorskip("transformers")

import hf_models

from fastamp.hf import split
from fastamp.hf.architectures import architecture_of, cuts_of, layers_of

NAMES = list(hf_models.CONFIGS)
TEXTS = [name for name in NAMES if name != "vit"]
PARTNER = torch.tensor([3, 0, 1, 4, 5, 2])


def a_mix() -> fastamp.Mix:
    return fastamp.Mix(torch.rand(6, generator=torch.Generator().manual_seed(1)), PARTNER)


def places(model: nn.Module) -> list[str | int]:
    entry = architecture_of(model)
    count = len(layers_of(model.get_submodule(entry.base), entry))
    return ["embeddings", "last", *range(count + 1), *cuts_of(model, entry)]


def without_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "labels"}


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_f_of_g_is_the_model_at_every_cut(name: str, padding_side: str) -> None:
    model = hf_models.build(name)
    inputs = hf_models.batch(model, padding_side=padding_side)
    output: Any = model(**without_labels(inputs), output_hidden_states=True)
    assert output.logits.std() > 0.05
    for at in places(model):
        g, f = split(model, at)
        hidden = g(**inputs)
        assert hidden.shape[0] == len(inputs["labels"])
        assert torch.equal(f(hidden, **f.context(inputs)), output.logits), at
        if isinstance(at, int):
            assert torch.equal(hidden, output.hidden_states[at]), at
        if at == "last":
            assert (hidden.shape, f.context(inputs)) == ((6, 1, 16), {})


@pytest.mark.parametrize("at", ["embeddings", 1, "last"])
@pytest.mark.parametrize("name", NAMES)
def test_step_is_the_reference_and_every_parameter_gets_its_gradient_once(name: str, at: str | int) -> None:
    model = hf_models.build(name)
    inputs = hf_models.batch(model)
    criterion = fastamp.AMPLoss(step_size=0.05)
    mix = a_mix()
    g, f = split(model, at)
    context = f.context(inputs, mix)
    hidden, labels = g(**inputs), inputs["labels"]
    truth = reference.amp(lambda h: f(h, **context), hidden, labels, mix.lam.double(), mix.partner, step_size=0.05)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(truth.loss, list(parameters.values()), allow_unused=True)

    fired: dict[str, int] = {}
    for key, parameter in parameters.items():
        parameter.register_post_accumulate_grad_hook(lambda _, key=key: fired.update({key: fired.get(key, 0) + 1}))
    loss, stats = criterion.step(f, g(**inputs), inputs["labels"], mix=mix, context=context, return_stats=True)
    loss.backward()

    torch.testing.assert_close(loss, truth.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats.grad, truth.grad, rtol=1e-8, atol=1e-10)
    assert stats.grad.abs().max() > 1e-3
    for (key, parameter), wanted in zip(parameters.items(), expected, strict=True):
        assert (parameter.grad is None) == (wanted is None), key
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-7, atol=1e-9, msg=key)
            assert fired[key] == 1, key


def test_mixing_word_embeddings_is_the_model_on_inputs_embeds_under_the_union_of_both_masks() -> None:
    model: Any = hf_models.build("bert")
    inputs = hf_models.batch(model)
    mix = a_mix()
    g, f = split(model)
    mixed = reference.mix(g(**inputs), mix.lam.double(), mix.partner)
    mask = inputs["attention_mask"] | inputs["attention_mask"][mix.partner]
    truth = model(inputs_embeds=mixed, attention_mask=mask, token_type_ids=inputs["token_type_ids"]).logits
    assert torch.equal(f(mixed, **f.context(inputs, mix)), truth)


@pytest.mark.parametrize("name", TEXTS)
def test_union_keeps_the_dtype_of_the_mask_which_must_not_be_floats(name: str) -> None:
    model = hf_models.build(name)
    inputs = hf_models.batch(model)
    long = inputs["attention_mask"]
    for at in ("embeddings", 1):
        _, f = split(model, at)
        for dtype in (torch.bool, torch.int32, torch.int64):
            mask = f.context({**inputs, "attention_mask": long.to(dtype)}, a_mix())["attention_mask"]
            assert mask.dtype == dtype
            assert mask.sum(1).tolist() == [9, 9, 7, 9, 9, 7]
        with pytest.raises(TypeError, match=r"boolean or integer .* torch.float64"):
            f.context({**inputs, "attention_mask": long.double()})


def test_roberta_counts_the_positions_of_the_union() -> None:
    model = hf_models.build("roberta")
    inputs = hf_models.batch(model, padding_side="left")
    mix = a_mix()
    context = split(model).f.context(inputs, mix)
    assert context["position_ids"][2].tolist() == [1, 1, 2, 3, 4, 5, 6, 7, 8]  # lengths 7 and 4


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("at", ["embeddings", 1])
def test_given_positions_are_passed_on_for_every_row_and_may_come_first(name: str, at: str | int) -> None:
    model = hf_models.build(name)
    inputs = {"position_ids": torch.arange(9).flip(0)[None], **hf_models.batch(model)}
    g, f = split(model, at)
    mix = a_mix()
    context = f.context(inputs, mix)
    assert all(len(value) == 6 for value in context.values())
    fastamp.AMPLoss().step(f, g(**inputs), inputs["labels"], mix=mix, context=context)
    truth = model(**without_labels(inputs)).logits
    torch.testing.assert_close(f(g(**inputs), **f.context(inputs)), truth, rtol=0, atol=1e-12)
    embedded = {"position_ids": inputs["position_ids"], "inputs_embeds": torch.randn(6, 9, 16)}
    assert all(len(value) == 6 for value in f.context(embedded).values())


@pytest.mark.parametrize("at", ["embeddings", 0, 1])
def test_images_are_cast_as_the_model_casts_them(at: str | int) -> None:
    model = hf_models.build("vit")
    inputs = hf_models.batch(model)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    for dtype in (torch.float64, torch.bfloat16):
        model.to(dtype)
        g, f = split(model, at)
        assert g(**inputs).dtype == dtype
        assert torch.equal(f(g(**inputs), **f.context(inputs)), model(**without_labels(inputs)).logits)


def test_images_of_another_size_are_refused_in_pixels() -> None:
    model = hf_models.build("vit")
    g, _ = split(model)
    for shape in ((6, 3, 12, 12), (6, 3, 9, 12)):
        with pytest.raises(ValueError, match=r"8 x 12 pixels, got pixel_values of shape \(6, 3, "):
            g(pixel_values=torch.randn(*shape))


def test_interpolated_positions_are_passed_on_or_refused_by_name() -> None:
    model: Any = hf_models.build("vit", image_size=8)
    model.train(False)
    inputs = {"pixel_values": torch.randn(6, 3, 12, 16).double(), "interpolate_pos_encoding": True}
    truth = model(**inputs).logits
    for at in (0, 1, "last"):
        g, f = split(model, at)
        assert torch.equal(f(g(**inputs), **f.context(inputs)), truth)
    with pytest.raises(ValueError, match=r"interpolate_pos_encoding=True cannot be passed on .* at=0"):
        split(model).g(**inputs)


def test_parts_follow_the_mode_of_the_model_and_set_it() -> None:
    model = hf_models.build("bert", hidden_dropout_prob=0.5)
    inputs = hf_models.batch(model)
    g, f = split(model, 1)
    model.eval()
    context = f.context(inputs)
    assert torch.equal(f(g(**inputs), **context), f(g(**inputs), **context))
    assert not f.training
    f.train()
    assert model.training
    assert all(module.training for module in model.modules())
    assert not torch.equal(f(g(**inputs), **context), f(g(**inputs), **context))


def test_parts_follow_the_model_to_another_dtype_and_own_what_they_use() -> None:
    model = hf_models.build("bert")
    inputs = hf_models.batch(model)
    g, f = split(model, 1)
    model.float()
    assert g(**inputs).dtype == f(g(**inputs), **f.context(inputs)).dtype == torch.float32
    ours, theirs, all_of_them = ({id(parameter) for parameter in part.parameters()} for part in (g, f, model))
    assert ours | theirs == all_of_them
    assert not ours & theirs
    assert split(torch.compile(model, backend="eager"), 1).f.origin is model


def test_the_model_is_left_as_it_was(tmp_path: Any) -> None:
    model: Any = hf_models.build("deberta")
    inputs = hf_models.batch(model)
    modules = {name: (id(module), set(module.__dict__)) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    for at in places(model):
        g, f = split(model, at)
        f(g(**inputs), **f.context(inputs))
    assert modules == {name: (id(module), set(module.__dict__)) for name, module in model.named_modules()}
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()


def test_hidden_states_of_the_model_are_captured_once_after_its_parts_ran() -> None:
    model: Any = hf_models.build("bert")
    model.config.output_hidden_states = True
    inputs = hf_models.batch(model)
    g, f = split(model, 1)
    f(g(**inputs), **f.context(inputs))
    assert len(model(**without_labels(inputs)).hidden_states) == 3


@pytest.mark.parametrize("at", ["embeddings", 1, "last"])
def test_step_runs_under_autocast_and_with_gradient_checkpointing(at: str | int) -> None:
    model: Any = hf_models.build("bert").float()
    inputs = hf_models.batch(model)
    mix = a_mix()
    g, f = split(model, at)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss = fastamp.AMPLoss().step(f, g(**inputs), inputs["labels"], mix=mix, context=f.context(inputs, mix))
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = gradients()
    for ours, theirs in zip(autocast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1 * plain[0].abs().max().item() + 0.02)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_unknown_model_is_refused_with_the_modules_that_would_do() -> None:
    import transformers

    gpt = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=10, bos_token_id=0, eos_token_id=0)
    )
    message = r"GPT2ForSequenceClassification; it knows BertFor.* transformer.h.0 ... .*h.2"
    with pytest.raises(ValueError, match=message):
        split(gpt)
    with pytest.raises(ValueError, match="does not know BertModel"):
        split(hf_models.build("bert").bert)
    with pytest.raises(ValueError, match="none found"):
        split(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        (3, ValueError, r"0 to 2 for a model of 2 layers, got 3"),
        (-1, ValueError, r"0 to 2 for a model of 2 layers, got -1"),
        ("bert.encoder", ValueError, r"cut at 'bert.encoder'.*bert.encoder.layer.0, bert.encoder.layer.1, bert.pooler"),
        (True, TypeError, r'"embeddings", "last", 0 to 2.*got True'),
        (1.0, TypeError, r"got 1.0"),
    ],
)
def test_an_unknown_place_is_refused_with_those_that_would_do(at: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split(hf_models.build("bert"), at)


def test_no_cut_is_offered_between_the_layer_and_the_convolution_that_need_the_same_input() -> None:
    with pytest.raises(ValueError, match=r"deberta\.encoder\.conv, deberta\.encoder\.layer\.1"):
        split(hf_models.build("deberta"), "deberta.encoder.layer.0")


@pytest.mark.parametrize("at", ["embeddings", 1])
def test_inputs_without_their_names_missing_ones_and_ids_in_place_of_states_are_refused(at: str | int) -> None:
    model = hf_models.build("bert")
    inputs = hf_models.batch(model)
    g, f = split(model, at)
    with pytest.raises(TypeError, match=r"g takes the model's inputs by name: g\(\*\*inputs\)"):
        g(inputs["input_ids"])
    with pytest.raises(TypeError, match="embed integer ids first"):
        fastamp.AMPLoss().step(f, inputs["input_ids"], inputs["labels"])
    with pytest.raises(TypeError, match="input_ids among it; got attention_mask"):
        split(model).g(attention_mask=torch.ones(2, 3))
