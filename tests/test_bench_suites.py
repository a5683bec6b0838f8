"""`fastamp bench`: what is timed agrees with the definition, every suite gives its numbers, and tables are whole."""

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result

from fastamp import benchmarking
from fastamp.benchmarking import (
    NETWORKS,
    OPERATIONS,
    SUITES,
    BenchConfig,
    Contender,
    HiddenWork,
    LayerWorkload,
    Workload,
    contenders,
    heads,
    layer_contenders,
    machine,
    operation_contenders,
    peers,
    suites,
    timing,
    workload,
)
from fastamp.benchmarking.measure import fits
from fastamp.cli import main

CPU = torch.device("cpu")
# More rows than are checked together.
TINY = {
    "textcnn": {"batch": 40, "lengths": (2, 7), "vocabulary": 30, "width": 12},
    "bert": {"batch": 9, "lengths": (3, 6), "vocabulary": 30, "width": 64, "options": {"layers": 2, "heads": 2}},
    "bilstm": {"batch": 9, "lengths": (3, 6), "vocabulary": 30, "width": 6, "options": {"states": 5}},
    "vit-base-64": {
        **{"batch": 9, "lengths": (5, 5), "width": 32, "side": 8, "dtype": "fp32"},
        "options": {"patch": 4, "layers": 2, "heads": 2},
    },
}


@pytest.fixture(scope="module", autouse=True)
def small():
    """Suites and networks in sizes that take no time, and no interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        patch.setitem(machine.COPY_BYTES, "cpu", 1 << 20)
        for name, value in (("WARMUP_STEPS", 2), ("SLOT_MS", 0.5)):
            patch.setattr(timing, name, value)
        for op, operation in OPERATIONS.items():
            shapes = ((6, 7),) if "logits" in operation.takes else ((6, 3, 5),)
            patch.setitem(OPERATIONS, op, operation._replace(shapes=(shapes, operation.shapes[1])))
        for name, sizes in TINY.items():
            patch.setitem(NETWORKS, name, replace(NETWORKS[name], **sizes))
        patch.setitem(suites.VOCABULARY, "cpu", ((256, 16, 4000),))
        growth = (("B", "logits", (0, 0, 7), (4, 8, 16, 32)), ("D", "hidden", (9, 0, 3), (4, 8)))
        patch.setitem(suites.GROWTH, "cpu", growth)
        patch.setitem(SUITES["head"].reduced, "shapes", ((6, 5, 3), (256, 64, 1000)))
        yield


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, ["bench", "--device", "cpu", *map(str, arguments)])


@pytest.fixture(scope="module")
def every(small, tmp_path_factory):
    """What `--suite all` wrote, by suite, and its output."""
    folder = tmp_path_factory.mktemp("all")
    result = invoke("--suite", "all", "--rounds", 2, "--out", folder)
    assert result.exit_code == 0, result.output
    written = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {results["suite"]: results for results in written}, result.output


def test_all_suites_run_in_one_go_and_refuse_nobody(every):
    found, output = every
    assert found.keys() == SUITES.keys()
    for results in found.values():
        assert (results["threads"], results["rounds"], results["device"]["type"]) == (1, 2, "cpu")
        assert results["versions"]["torch"] == torch.__version__
        assert results["copy_gb_s"] > 0
        assert results["refused"] == []
        for row in results["rows"]:
            assert row["peak_memory_bytes"] > 0
            assert row["ratio"]["both"]["q50"] > 0
            assert row["ratio"].keys() == row["ms"].keys()
            for quantiles in map(list, (way.values() for way in row["ms"].values())):
                assert 0 < quantiles[0] <= quantiles[-1]
    for said in ("reduced: nothing compiled, three shapes", "reduced: nothing compiled, the TextCNN alone"):
        assert f"note: {said}" in output


def test_tables_are_whole_in_80_columns(every):
    _, output = every
    assert "…" not in output
    assert "growth in B, logits, fp32, eager: median ms" in output
    assert "bytes: read h, write m of fp32, 720" in " ".join(output.split())


def test_the_suite_of_heads(every):
    results = every[0]["head"]
    assert set(heads.MIXUP) >= {row["ratio_to"] for row in results["rows"]}
    small = {row["contender"] for row in results["rows"] if row["workload"] == "(6, 5) -> 3"}
    assert {"AMP, official code", "torch fused linear, no mixing", "AMPLoss", "linear_amp_cross_entropy"} <= small
    assert all(("gb_s" in row) == (row["input"] == "logits") for row in results["rows"])
    gpu = [f"{name}: not run, it takes a GPU" for name in ("Liger, no mixing", "Liger fused linear, no mixing")]
    few = "AMPLoss, matching: not run, kernels for pairs are for 1000 classes or more"
    assert {*gpu, few} <= {*results["notes"]}


def test_the_suite_of_layers(every):
    rows = {row["contender"]: row for row in every[0]["layers"]["rows"]}
    assert {"cross-entropy", "Mixup", "Mixup, split", "AMP as published", "AMPLoss.step, merged"} <= rows.keys()
    for row in rows.values():
        assert row["workload"] == "TextCNN, (40, 7)"
        assert row["shape"] == {"B": 40, "T": 7, "D": 12, "C": 6}
        assert row["ratio_to"] in ("Mixup", "Mixup, split", "Mixup, AMPLoss.step")
        assert row["ms"].keys() == {"forward", "backward", "both", "step"}
    assert rows["AMPLoss.step"]["peak_memory_ratio"] < rows["AMP autograd, split"]["peak_memory_ratio"]


def test_the_suite_of_rows_counts_bytes(every):
    results = every[0]["rows"]
    assert len(results["rows"]) == 2 * len(OPERATIONS)
    moved = {"mix": 2, "mix with backward": 4, "lambda_grad": 2, "remix": 4}
    for row in results["rows"]:
        if row["mode"] in moved:
            assert row["shape"] == {"B": 6, "T": 3, "D": 5, "C": None}
            assert row["bytes"] == 6 * 3 * 5 * 4 * moved[row["mode"]]
        assert row["ratio_to"] == "PyTorch"
        assert row["ms"].keys() == {"both"}
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["ms"]["both"]["q50"] / 1e6)
        assert row["percent_of_copy"] == pytest.approx(100 * row["gb_s"] / results["copy_gb_s"])


def test_the_suite_of_a_vocabulary_shows_that_chunks_take_less_memory_than_all_logits(every):
    results = every[0]["vocabulary"]
    rows = {row["contender"]: row for row in results["rows"]}
    assert {"cross-entropy", "AMP autograd", "linear_amp_cross_entropy"} < rows.keys()
    assert {row["ratio_to"] for row in rows.values()} == {"cross-entropy"}
    chunks = rows["linear_amp_cross_entropy, chunks of 62"]["peak_memory_bytes"]
    assert chunks < 0.6 * rows["AMPLoss"]["peak_memory_bytes"]


def test_the_suite_of_scaling_fits_every_contender(every):
    results = every[0]["scaling"]
    assert results["notes"] == ["scaling: up to 2^24 elements a batch, for a CPU; on a GPU up to 2^27"]
    found = {(fit["varies"], fit["contender"]): fit for fit in results["fits"]}
    assert found.keys() == {(size, name) for size in "BD" for name in heads.GROWING}
    assert found["B", "AMPLoss"]["ms"].keys() == {"4", "8", "16", "32"}
    assert isinstance(found["B", "AMPLoss"]["exponent"], float)


def growing(exponent: float, sizes: tuple[int, ...]) -> list[dict]:
    common = {"varies": "B", "input": "logits", "dtype": "fp32", "contender": "AMPLoss", "clock": "eager"}
    # Below 64 the time is that of a call.
    ms = [max(0.01 * size**exponent, 0.01 * 64**exponent) for size in sizes]
    return [{**common, "shape": {"B": size}, "ms": {"both": {"q50": q50}}} for size, q50 in zip(sizes, ms, strict=True)]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_exponent_is_that_of_the_upper_half(exponent):
    (fit,) = fits(growing(exponent, tuple(2**i for i in range(1, 12))))
    assert fit["exponent"] == pytest.approx(exponent)
    assert (fit["from"], fit["to"], len(fit["ms"])) == (64, 2048, 11)
    (fit,) = fits(growing(exponent, (4, 8)))
    assert fit["exponent"] is None


def test_five_powers_of_two_are_fitted_one_size_at_a_time():
    for size, _, shape, values in suites.GROWTH["cuda"]:
        assert shape["BDC".index(size)] == 0
        assert all(after == 2 * before for before, after in pairwise(values))
        (fit,) = fits(growing(1.0, values))
        assert fit["to"] / fit["from"] >= 2**5


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("all", "--shapes", "5x5x5"), 1, "shapes is no option of the suite all, which takes none"),
        (("scaling", "--no-compiled"), 1, "compiled is no option of the suite scaling, which takes none"),
        (("vocabulary", "--networks", "bert"), 1, "networks is no option of the suite vocabulary, which takes shapes"),
        (("layers", "--dtype", "bf16"), 1, "dtypes is no option of the suite layers, which takes networks, compiled"),
        (("layers", "--networks", "gpt"), 2, "'gpt' is not one of textcnn, bert"),
    ],
)
def test_options_of_other_suites_are_refused(arguments, code, said):
    result = invoke("--suite", *arguments)
    assert result.exit_code == code
    assert said in " ".join(result.output.split())


# Who may be timed


def named(name: str) -> Contender:
    (one,) = (one for one in contenders() if one.name == name)
    return one


def missing(name: str, shape: tuple, dtype: str = "fp32", takes: str = "hidden") -> str | None:
    return heads.missing(Workload(shape, dtype, takes, CPU))[name]


@pytest.mark.parametrize("takes", ["hidden", "logits"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contender_agrees_with_the_definition(takes, dtype):
    work = Workload((50, 30, 6), dtype, takes, CPU)
    for one in contenders():
        if one.takes in (takes, "both") and not one.compiled and heads.missing(work).get(one.name) is None:
            assert work.bind(one).disagreement() is None, one.name


@pytest.mark.parametrize("name", TINY)
def test_every_contender_at_a_network_agrees_with_the_definition(name):
    if NETWORKS[name].missing():
        pytest.skip("transformers is not installed")
    work = LayerWorkload(NETWORKS[name], CPU)
    before = {name: value.clone() for name, value in work.network.model.state_dict().items()}
    given = layer_contenders(work, compiled=False)
    later = ["Mixup, split", "AMP autograd, split"] if name in ("textcnn", "vit-base-64") else []
    assert [one.name for one in given if "split" in one.name] == later
    for contender in given:
        assert work.bind(contender).disagreement() is None, contender.name
    for name, value in work.network.model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype


@pytest.mark.parametrize(
    ("mode", "other"),
    [("official", peers.amp_autograd), ("official", peers.mixup_two_terms), ("amp", peers.mixup_two_terms)],
)
def test_another_loss_cannot_pass_for_amp_or_the_official_code(mode, other):
    for work in (Workload((50, 30, 6), "fp32", "hidden", CPU), LayerWorkload(NETWORKS["textcnn"], CPU)):
        assert "its loss is off by" in work.bind(Contender("other", mode, other)).disagreement()


def test_a_wrong_gradient_is_seen_where_the_loss_is_right():
    def detached(network, x, y, mix):
        loss = peers.cross_entropy(network, x, y, mix)
        return loss.detach() + 0.5 * (loss - loss.detach())

    runner = Workload((6, 5, 3), "fp32", "hidden", CPU).bind(Contender("half", "none", detached))
    assert "its gradient to its input is off by 5.0e-01" in runner.disagreement()
    runner = LayerWorkload(NETWORKS["textcnn"], CPU).bind(Contender("half", "none", detached))
    assert runner.disagreement() == "its gradient to embedding.weight is off by 5.0e-01 (allowed 3e-03)"


def test_the_official_code_pays_for_a_whole_backward_pass(monkeypatch):
    asked = []
    right = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda of, by, **given: asked.append(len(by)) or right(of, by, **given))
    work = Workload((8, 5, 3), "fp32", "hidden", CPU)
    peers.amp_official(work.network, *work.inputs[0], work.mix)
    assert asked == [4]  # λ, the rows, weight and bias


def test_who_is_not_run_and_why(monkeypatch):
    assert missing("AMP, official code", (50, 30, 6), "bf16") == "its binary cross-entropy of a softmax takes fp32"
    assert missing("AMP, official code", (256, 4, 1000)) == "its definition would hold (256, 1000, 1000)"
    assert missing("AMPLoss, matching", (20, 1, 999), takes="logits").startswith("kernels for pairs are for 1000")
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert missing("torch fused linear, no mixing", (64, 16, 400)) == "this torch lacks it"


def test_liger_is_timed_where_it_is_installed_and_there_is_a_gpu(monkeypatch):
    work = Workload((6, 5, 3), "fp32", "hidden", CPU)
    given = [one for one in contenders() if "Liger" in one.name]
    assert len(given) == 2
    assert not any(one.capturable for one in given)
    assert not any("Liger" in base for one in contenders() for base in one.base)

    def said():
        return {heads.missing(work)[one.name] for one in given}

    assert said() == {"it takes a GPU"}
    # On a GPU, as far as that can be told without one.
    monkeypatch.setattr(work, "device", torch.device("cuda"))
    for found, reason in ((None, "liger_kernel is not installed"), (object(), None)):
        monkeypatch.setattr(heads, "find_spec", lambda name, found=found: found)
        assert said() == {reason}


def test_liger_is_called_by_the_names_of_its_arguments(monkeypatch):
    module = ModuleType(peers.LIGER)
    module.liger_cross_entropy = F.cross_entropy
    module.liger_fused_linear_cross_entropy = lambda input, weight, target, bias=None: F.cross_entropy(
        F.linear(input, weight, bias), target
    )
    for name in ("liger_kernel", "liger_kernel.transformers", peers.LIGER):
        monkeypatch.setitem(sys.modules, name, module)
    work = Workload((6, 5, 3), "fp32", "hidden", CPU)
    for one in contenders():
        if "Liger" in one.name:
            assert work.bind(one).disagreement() is None
            assert one.mode == "none"


@pytest.mark.parametrize("takes", ["hidden", "logits"])
@pytest.mark.parametrize("mode", ["amp", "none", "official"])
def test_the_truth_does_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch, takes, mode):
    whole = Workload((20, 5, 4), "fp32", takes, CPU)
    monkeypatch.setattr(heads, "TRUTH_ELEMENTS", 5 * 7)
    parts = Workload((20, 5, 4), "fp32", takes, CPU)
    assert [len(part) for part in parts.parts] == [7, 7, 6]
    assert not torch.equal(whole.mix.partner, parts.mix.partner)
    assert torch.equal(parts.matched.partner[parts.matched.partner], torch.arange(20))
    whole.mix, whole.matched = parts.mix, parts.matched
    for matched in (False, True):
        for value, right in zip(parts.truth(mode, matched=matched), whole.truth(mode, matched=matched), strict=True):
            torch.testing.assert_close(value, right)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_matched_partners_are_checked_with_a_matching(dtype):
    work, matching = Workload((20, 1, 1000), dtype, "logits", CPU), named("AMPLoss, matching")
    assert heads.missing(work)[matching.name] is None
    assert work.bind(matching).disagreement() is None
    with pytest.raises(ValueError, match="partner must be its own inverse"):
        work.bind(replace(matching, matched=False)).disagreement()


def operation(op: str, dtype: str = "fp32") -> HiddenWork:
    return HiddenWork(op, (64, 7) if op.startswith("select") else (8, 4, 6), dtype, CPU)


@pytest.mark.parametrize("op", OPERATIONS)
def test_operations_agree_with_the_definition(op):
    """In float64 PyTorch's is what fastamp's, which `fastamp check` holds to the definition, is compared with."""
    for dtype in ("fp32", "bf16"):
        for contender in operation_contenders(op, compiled=False):
            assert operation(op, dtype).bind(contender).disagreement() is None, contender.name
    given = OPERATIONS[op]
    wide = {name: x.detach().double() if x.is_floating_point() else x for name, x in operation(op).inputs[0].items()}
    wide = {name: x.requires_grad_(name in given.leaves) for name, x in wide.items()}
    plain, ours = (given.run(f, wide, given.takes) for f in (given.plain, given.ours))
    for name, value in ours.items():
        torch.testing.assert_close(plain[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_wrong_operation_is_seen(op):
    def wrong(*given):
        made = OPERATIONS[op].ours(*given)
        return (given[1], made[1]) if op == "remix" else made * 1.02  # the step of λ left out

    said = "λ' is off by 2.0e-03" if op == "remix" else "is off by 2.0e-02"
    assert said in operation(op).bind(Contender("fastamp", op, wrong)).disagreement()


def timed_are(monkeypatch, work: Workload, *given: Contender) -> None:
    """The suite "head" is this workload and these contenders."""
    monkeypatch.setitem(SUITES, "head", SUITES["head"]._replace(works=lambda *_: [(work, list(given))]))


def test_bench_refuses_whoever_computes_something_else_or_raises(monkeypatch, tmp_path):
    def broken(network, x, y, mix):
        raise RuntimeError("no compiler\nhere")

    wrong = Contender("Mixup as AMP", "amp", peers.mixup_soft_targets)
    right = Contender("AMP autograd", "amp", peers.amp_autograd)
    work = Workload((50, 5, 3), "fp32", "hidden", CPU)
    timed_are(monkeypatch, work, wrong, Contender("broken", "amp", broken), right)
    result = invoke("--rounds", 1, "--out", tmp_path)
    assert result.exit_code == 1
    assert "refused, not timed: Mixup as AMP at (50, 5) -> 3, fp32: its loss is off by" in result.output
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [(row["contender"], row["ratio"]) for row in results["rows"]] == [("AMP autograd", None)]
    assert [entry["contender"] for entry in results["refused"]] == ["Mixup as AMP", "broken"]
    assert results["refused"][1]["reason"] == "RuntimeError: no compiler"


def test_a_definition_that_fails_leaves_the_network_as_it_was(monkeypatch):
    work = LayerWorkload(NETWORKS["textcnn"], CPU)
    monkeypatch.setattr(workload, "_share", lambda *given: given[0](given[1]).sum() / None)
    with pytest.raises(TypeError, match="unsupported operand"):
        work.truth("amp")
    assert {p.dtype for p in work.network.model.parameters()} == {torch.float32}


def test_a_compiled_contender_is_compared_with_compiled_mixup(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    results = benchmarking.run(BenchConfig(suite="layers", networks=("textcnn",), rounds=1), command="")
    assert results["refused"] == []
    compiled = {row["contender"]: row["ratio_to"] for row in results["rows"] if "compiled" in row["contender"]}
    assert compiled.keys() == {"Mixup, compiled", "Mixup, split, compiled", "AMPLoss.step, compiled"}
    assert all("compiled" in base for base in compiled.values())


def test_what_cannot_run_here_is_said(monkeypatch):
    monkeypatch.setitem(NETWORKS, "bert", replace(NETWORKS["bert"], package="transformers_of_tomorrow"))
    large = ("bilstm", "bert-base-24x64", "bert-base-256x128", "vit-base-64")
    for name in large:
        monkeypatch.setitem(NETWORKS, name, replace(NETWORKS[name], package=None))
    notes = []
    given = suites.networks(BenchConfig(suite="layers", compiled=False), CPU, notes.append)
    assert [work.name for work, _ in given] == ["TextCNN, (40, 7)"]
    gpu = [f"{name}: not run, it takes a GPU" for name in large]
    assert notes == ["bert: not run, transformers_of_tomorrow is not installed", *gpu]
    config = BenchConfig(shapes=((4096, 8, 32000),))
    assert list(suites.heads(config, CPU, notes.append)) == []
    assert notes[5:] == [f"(4096, 8, 32000) fp32 {takes}: not run, it takes a GPU" for takes in config.inputs]


def test_what_is_wanted_most_comes_first(monkeypatch):
    monkeypatch.setattr(suites, "Workload", lambda *given: given)
    monkeypatch.setattr(suites, "present", lambda *given: [])
    given = [work[:3] for work, _ in suites.heads(BenchConfig(), torch.device("cuda"), print)]
    first = [(shape, dtype, "hidden") for dtype in ("fp32", "bf16") for shape in suites.PAPER]
    first += [(suites.SHAPES[-1], "bf16", "logits"), (suites.WIDE, "bf16", "logits")]
    assert given[: len(first)] == first
    assert len(given) == len(set(given)) == 4 * len(suites.SHAPES) + 1


def test_a_rehearsal_checks_everybody_and_times_nobody(monkeypatch):
    bound = []
    right = Workload.bind
    monkeypatch.setattr(Workload, "bind", lambda work, one: bound.append(one.name) or right(work, one))
    monkeypatch.setattr(timing, "eager_slot", None)
    benchmarking.rehearse(BenchConfig(shapes=((6, 5, 3),), inputs=("hidden",), compiled=False))
    assert {"Mixup, two terms", "AMPLoss", "AMP autograd"} < set(bound)


def test_bad_benchmarks_are_refused():
    with pytest.raises(ValueError, match=r"a shape is \(B, D, C\), each at least 1, got \(1, 2\)"):
        BenchConfig(shapes=((1, 2),))
    for name, value in (("rounds", 0), ("dtypes", ("fp8",)), ("inputs", ("words",))):
        with pytest.raises(ValueError, match=f"{name.removesuffix('s')}s? .*(must be|takes)"):
            BenchConfig(**{name: value})


# The engine


def test_contenders_take_turns():
    order = []
    series = [timing.Series(None, lambda n=n: order.append(n) or {"both": 3.0}) for n in "abc"]
    timing.round_robin(series, 20)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert series[0].values("both").tolist() == [3.0] * 20


def test_a_training_step_takes_the_optimizers_step_and_leaves_the_weights(monkeypatch):
    work = LayerWorkload(NETWORKS["textcnn"], CPU)
    (contender,) = (one for one in layer_contenders(work, compiled=False) if one.name == "AMPLoss.step")
    seen = []
    right = torch.optim.Adam.step
    weight = work.network.model.embedding.weight
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: seen.append(float(weight.grad.norm())) or right(adam))
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


def test_nothing_is_captured_after_a_capture_that_failed(monkeypatch):
    work = Workload((6, 5, 3), "fp32", "hidden", CPU)
    runners = [work.bind(Contender(name, "none", peers.cross_entropy)) for name in "abcd"]
    asked, notes = [], []

    def slot(runner, pool):
        asked.append((runner.contender.name, pool))
        if runner.contender.name == "b":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return lambda: None

    monkeypatch.setattr(timing, "graph_slot", slot)
    monkeypatch.setattr(timing, "_failed", [])
    assert list(timing.captured([work.bind(named("Liger, no mixing"))], "pool", notes.append)) == []
    assert [one.runner for one in timing.captured(runners, "pool", notes.append)] == runners[:1]
    assert list(timing.captured(runners, "pool", notes.append)) == []
    assert asked == [("a", "pool"), ("b", "pool")]
    where = "b at (6, 5) -> 3, fp32"
    after = f"no more CUDA graphs in this process after {where}"
    reads = "Liger, no mixing: not in a CUDA graph, its step reads from the device"
    assert notes == [reads, f"{where} cannot be captured in a CUDA graph: operation not permitted", after, after]


def test_a_graph_has_no_time_of_backward():
    work = Workload((6, 5, 3), "fp32", "hidden", CPU)
    runner = work.bind(Contender("a", "none", peers.cross_entropy, base=("a",)))
    series = [timing.Series(runner, lambda: None, [{"forward": 1.0, "both": 3.0}])]
    (row,) = benchmarking.measure._rows(work, "graph", series, {"a": {"peak_memory_bytes": 1}}, 1.0)
    assert row["ms"].keys() == row["ratio"].keys() == {"forward", "both"}


def test_marked_regions_and_copies_are_no_launches():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(device_type=device, name=name, is_user_annotation=marked)
        for device, name, marked in (
            (cuda, "triton_per_fused", False),
            (cuda, "Torch-Compiled Region: 0/0", True),
            (cuda, "Memcpy DtoH", False),
            (cuda, "Memset (Device)", False),
            (cpu, "aten::add", False),
        )
    ]
    assert timing.kernel_launches(events) == 1


def test_copies_count_what_a_step_makes_of_an_input(monkeypatch):
    asked = []
    monkeypatch.setattr(heads, "copies_to_exceed_cache", lambda one, device: asked.append(one) or 2)
    for takes in ("hidden", "logits"):
        for dtype in ("fp32", "bf16"):
            assert len(Workload((6, 5, 3), dtype, takes, CPU).inputs) == 2
    assert asked == [4 * (30 + 18), 2 * (30 + 18), 4 * 36, 2 * 36]
    assert len(Workload((6, 5, 3), "fp32", "hidden", CPU, captured=False).inputs) == 1  # of the suite vocabulary


@pytest.mark.gpu
@pytest.mark.parametrize("suite", SUITES)
def test_suites_run_on_a_gpu(monkeypatch, suite):
    for op, operation in OPERATIONS.items():
        monkeypatch.setitem(OPERATIONS, op, operation._replace(shapes=(operation.shapes[1][:1],) * 2))
    monkeypatch.setitem(suites.VOCABULARY, "cuda", ((600, 64, 128000),))
    monkeypatch.setitem(suites.GROWTH, "cuda", (("C", "logits", (64, 0, 0), (256, 1024, 4096)),))
    given = {"head": {"shapes": ((50, 300, 6),)}, "rows": {"compiled": False}}
    given["layers"] = {"networks": ("textcnn", "bilstm"), "compiled": False}
    config = BenchConfig(suite=suite, rounds=2, device="cuda", **given.get(suite, {}))
    results = benchmarking.run(config, command="")
    assert results["refused"] == []
    assert not any("cannot be captured" in note for note in results["notes"])
    assert all(row["kernel_launches"] > 0 and row["peak_memory_bytes"] > 0 for row in results["rows"])
    clocks = {"eager"} if suite == "vocabulary" else {"eager", "graph"}
    assert {row["clock"] for row in results["rows"]} == clocks
    if suite == "layers":
        assert all(row["peak_memory_ratio"] <= 1.15 for row in results["rows"] if row["contender"] == "AMPLoss.step")
