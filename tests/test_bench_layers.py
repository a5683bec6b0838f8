"""`fastamp bench --suite layers`: whole steps of networks that are mixed at their words."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner, Result

from fastamp import benchmarking
from fastamp.benchmarking import NETWORKS, BenchConfig, Contender, LayerWorkload, layer_contenders, timing
from fastamp.benchmarking.layers import mixup
from fastamp.cli import main

CPU = torch.device("cpu")
# More rows than are checked together.
TINY = {
    "textcnn": {"batch": 40, "lengths": (2, 7), "vocabulary": 30, "width": 12},
    "bert": {
        "batch": 9,
        "lengths": (3, 6),
        "vocabulary": 30,
        "width": 64,
        "options": {"layers": 2, "heads": 2},
    },
    "bilstm": {"batch": 9, "lengths": (3, 6), "vocabulary": 30, "width": 6, "options": {"states": 5}},
    "vit-base-64": {
        "batch": 9,
        "lengths": (5, 5),
        "width": 32,
        "side": 8,
        "dtype": "fp32",
        "options": {"patch": 4, "layers": 2, "heads": 2},
    },
}
CUT_LATER = ("textcnn", "vit-base-64")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name, sizes in TINY.items():
        monkeypatch.setitem(NETWORKS, name, replace(NETWORKS[name], **sizes))


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["bench", "--suite", "layers", *map(str, arguments)])


@pytest.mark.parametrize("name", TINY)
def test_every_contender_agrees_with_the_definition(name):
    if NETWORKS[name].missing():
        pytest.skip("transformers is not installed")
    work = LayerWorkload(NETWORKS[name], CPU)
    given = layer_contenders(work, compiled=False)
    assert [one.name for one in given if "split" in one.name] == (
        ["Mixup, split", "AMP autograd, split"] if name in CUT_LATER else []
    )
    for contender in given:
        assert work.bind(contender).disagreement() is None, contender.name


@pytest.mark.parametrize("name", TINY)
def test_mixup_cannot_pass_for_amp(name):
    if NETWORKS[name].missing():
        pytest.skip("transformers is not installed")
    work = LayerWorkload(NETWORKS[name], CPU)
    assert "its loss is off by" in work.bind(Contender("Mixup", "amp", mixup)).disagreement()


def test_a_forgotten_gradient_is_seen():
    def words_left_out(network, x, y, mix):
        cut = network.plain
        halved = cut._replace(g=lambda ids: 0.5 * cut.g(ids) + cut.g(ids).detach() / 2)
        return mixup(network._replace(plain=halved), x, y, mix)

    work = LayerWorkload(NETWORKS["textcnn"], CPU)
    said = work.bind(Contender("half", "mixup", words_left_out)).disagreement()
    assert said == "its gradient to embedding.weight is off by 5.0e-01 (allowed 3e-03)"


def test_the_suite_writes_its_results(tmp_path):
    arguments = ("--networks", "textcnn", "--rounds", 2, "--device", "cpu", "--no-compiled", "--out", tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*-layers.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    results = json.loads(path.read_text())
    assert results["suite"] == "layers"
    assert results["refused"] == results["notes"] == []
    rows = {row["contender"]: row for row in results["rows"]}
    assert {"cross-entropy", "Mixup", "Mixup, split", "AMP as published", "AMPLoss.step, merged"} <= rows.keys()
    for row in rows.values():
        assert row["workload"] == "TextCNN, (40, 7)"
        assert row["shape"] == {"B": 40, "T": 7, "D": 12, "C": 6}
        assert row["ratio_to"] in ("Mixup", "Mixup, split", "Mixup, AMPLoss.step")
        assert row["ratio"]["both"]["q50"] > 0
        assert row["ms"]["step"]["q50"] > 0
        assert row["ratio"].keys() == {"forward", "backward", "both", "step"}
    assert rows["AMPLoss.step"]["peak_memory_ratio"] < rows["AMP autograd, split"]["peak_memory_ratio"]
    assert "TextCNN, (40, 7), fp32, eager" in result.output


def test_a_compiled_contender_is_compared_with_compiled_mixup():
    results = benchmarking.run(BenchConfig(suite="layers", networks=("textcnn",), rounds=1), command="")
    assert results["refused"] == []
    compiled = {row["contender"]: row["ratio_to"] for row in results["rows"] if "compiled" in row["contender"]}
    assert compiled.keys() == {"Mixup, compiled", "Mixup, split, compiled", "AMPLoss.step, compiled"}
    assert all("compiled" in base for base in compiled.values())


def test_what_cannot_run_here_is_said(monkeypatch):
    monkeypatch.setitem(NETWORKS, "bert", replace(NETWORKS["bert"], package="transformers_of_tomorrow"))
    monkeypatch.setitem(NETWORKS, "bert-base-24x64", replace(NETWORKS["bert-base-24x64"], package=None))
    monkeypatch.setitem(NETWORKS, "bert-base-256x128", replace(NETWORKS["bert-base-256x128"], package=None))
    monkeypatch.setitem(NETWORKS, "vit-base-64", replace(NETWORKS["vit-base-64"], package=None))
    results = benchmarking.run(BenchConfig(suite="layers", rounds=1, compiled=False), command="")
    assert {row["workload"] for row in results["rows"]} == {"TextCNN, (40, 7)"}
    large = ("bilstm", "bert-base-24x64", "bert-base-256x128", "vit-base-64")
    gpu = [f"{name}: not run, it takes a GPU" for name in large]
    assert results["notes"] == ["bert: not run, transformers_of_tomorrow is not installed", *gpu]


def test_a_training_step_takes_the_optimizers_step_and_leaves_the_weights(monkeypatch):
    work = LayerWorkload(NETWORKS["textcnn"], CPU)
    (contender,) = (one for one in layer_contenders(work, compiled=False) if one.name == "AMPLoss.step")
    seen = []
    right = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda adam: seen.append(float(work.network.model.embedding.weight.grad.norm())) or right(adam),
    )
    (leaves,) = work.leaves
    before = {name: value.detach().clone() for name, value in leaves.items()}
    sample = timing.eager_slot(work.bind(contender))()
    assert sample["step"] > 0
    assert min(seen) > 0
    assert all(torch.equal(value, before[name]) for name, value in leaves.items())
    assert all(value.grad is None for value in leaves.values())


def test_peak_memory_of_a_cpu_is_what_the_allocator_held_at_once():
    work = LayerWorkload(NETWORKS["textcnn"], CPU)

    def loss(network, x, y, mix):
        kept = torch.zeros(1 << 20)  # 4 MiB, let go before the rest
        del kept
        again = torch.zeros(3 << 20)
        return sum(p.sum() for p in network.model.parameters()) + again.sum()

    peak = timing.facts(work.bind(Contender("zeros", "none", loss)))["peak_memory_bytes"]
    assert 12 << 20 <= peak < 13 << 20


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--networks", "gpt"), 2, "'gpt' is not one of textcnn, bert"),
        (("--shapes", "5x5x5"), 1, "shapes is no option of the suite layers, which takes networks, compiled"),
        (("--dtype", "bf16"), 1, "dtypes is no option of the suite layers, which takes networks, compiled"),
    ],
)
def test_options_of_the_other_suite_are_refused(arguments, code, message):
    result = invoke(*arguments)
    assert (result.exit_code, message in result.output) == (code, True), result.output


@pytest.mark.gpu
def test_on_a_gpu_steps_are_captured_and_hold_no_more_memory_than_mixup():
    config = BenchConfig(suite="layers", networks=("textcnn", "bilstm"), rounds=2, device="cuda", compiled=False)
    results = benchmarking.run(config, command="")
    assert results["refused"] == []
    assert not any("cannot be captured" in note for note in results["notes"])
    assert {row["contender"] for row in results["rows"] if row["clock"] == "graph"} >= {"Mixup", "AMPLoss.step"}
    assert all(row["peak_memory_ratio"] <= 1.15 for row in results["rows"] if row["contender"] == "AMPLoss.step")
