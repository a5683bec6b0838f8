"""`fastamp bench`: the peers, the suites "rows", "scaling" and "vocabulary", all of them in one go, and the plots."""

import json
import sys
from dataclasses import replace
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
    BenchConfig,
    Contender,
    HiddenWork,
    Workload,
    contenders,
    heads,
    operation_contenders,
    peers,
    suites,
    timing,
)
from fastamp.benchmarking.measure import fits
from fastamp.cli import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def small_suites(monkeypatch):
    """The suites in sizes that take no time."""
    for op, operation in OPERATIONS.items():
        shapes = ((6, 7),) if "logits" in operation.takes else ((6, 3, 5),)
        monkeypatch.setitem(OPERATIONS, op, operation._replace(shapes=(shapes, shapes)))
    monkeypatch.setitem(suites.VOCABULARY, "cpu", ((12, 5, 40),))
    growth = (("B", "logits", (0, 0, 7), (4, 8, 16, 32)), ("D", "hidden", (9, 0, 3), (4, 8)))
    monkeypatch.setitem(suites.GROWTH, "cpu", growth)
    monkeypatch.setitem(suites.SUITES["head"].reduced, "shapes", ((6, 5, 3),))
    tiny = {"batch": 9, "lengths": (2, 7), "vocabulary": 30, "width": 12}
    monkeypatch.setitem(NETWORKS, "textcnn", replace(NETWORKS["textcnn"], **tiny))


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["bench", "--device", "cpu", *map(str, arguments)])


def results_in(folder, suite: str) -> dict:
    (path,) = folder.glob(f"*-{suite}.json")
    return json.loads(path.read_text())


# peers


def named(name: str) -> Contender:
    (one,) = (one for one in contenders() if one.name == name)
    return one


def missing(name: str, shape: tuple, dtype: str = "fp32", takes: str = "hidden") -> str | None:
    return heads.missing(Workload(shape, dtype, takes, CPU))[name]


def test_the_official_code_agrees_with_the_official_options_of_the_definition():
    assert missing("AMP, official code", (50, 30, 6)) is None
    assert Workload((50, 30, 6), "fp32", "hidden", CPU).bind(named("AMP, official code")).disagreement() is None


@pytest.mark.parametrize("other", [peers.amp_autograd, peers.mixup_two_terms])
def test_another_loss_cannot_pass_for_the_official_code(other):
    runner = Workload((50, 30, 6), "fp32", "hidden", CPU).bind(Contender("other", "official", other))
    assert "its loss is off by" in runner.disagreement()


def test_the_official_code_pays_for_a_whole_backward_pass(monkeypatch):
    asked = []
    right = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda of, by, **given: asked.append(len(by)) or right(of, by, **given))
    work = Workload((8, 5, 3), "fp32", "hidden", CPU)
    peers.amp_published(work.head, *work.inputs[0], work.mix)
    assert asked == [4]  # λ, the rows, weight and bias


def test_where_the_official_code_is_not_run_is_said():
    assert missing("AMP, official code", (50, 30, 6), "bf16") == "its binary cross-entropy of a softmax takes fp32"
    assert missing("AMP, official code", (256, 4, 1000)) == "its definition would hold (256, 1000, 1000)"


def test_liger_is_timed_where_it_is_installed_and_there_is_a_gpu(monkeypatch):
    work = Workload((6, 5, 3), "fp32", "hidden", CPU)
    given = [one for one in contenders() if "Liger" in one.name]
    assert len(given) == 2
    assert not any(one.capturable for one in given)

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


def test_liger_is_no_base_of_ratios():
    assert not any("Liger" in base for one in contenders() for base in one.base)


@pytest.mark.parametrize("takes", ["hidden", "logits"])
@pytest.mark.parametrize("mode", ["amp", "mixup", "none", "official"])
def test_the_truth_does_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch, takes, mode):
    whole = Workload((20, 5, 4), "fp32", takes, CPU)
    monkeypatch.setattr(heads, "TRUTH_ELEMENTS", 5 * 7)
    parts = Workload((20, 5, 4), "fp32", takes, CPU)
    assert [len(part) for part in parts._parts()] == [7, 7, 6] if takes == "hidden" else True
    assert not torch.equal(whole.mix.partner, parts.mix.partner)
    whole.mix = parts.mix
    taken = parts.truth(mode)
    whole.matched = parts.matched
    assert torch.equal(parts.matched.partner[parts.matched.partner], torch.arange(20))
    matched = parts.truth(mode, matched=True)
    monkeypatch.undo()
    for found, other in ((taken, whole.truth(mode)), (matched, whole.truth(mode, matched=True))):
        for value, right in zip(found, other, strict=True):
            torch.testing.assert_close(value, right)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_matched_partners_are_checked_with_a_matching(dtype):
    work, matching = Workload((20, 1, 1000), dtype, "logits", CPU), named("AMPLoss, matching")
    assert heads.missing(work)[matching.name] is None
    assert work.bind(matching).disagreement() is None
    with pytest.raises(ValueError, match="partner must be its own inverse"):
        work.bind(replace(matching, matched=False)).disagreement()
    assert missing(matching.name, (20, 1, 999), dtype, "logits").startswith("kernels for pairs are for 1000")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_fused_linear_of_torch_is_timed_where_torch_has_it(monkeypatch, dtype):
    one = named("torch fused linear, no mixing")
    if missing(one.name, (64, 16, 400), dtype) is None:
        assert Workload((64, 16, 400), dtype, "hidden", CPU).bind(one).disagreement() is None
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert missing(one.name, (64, 16, 400), dtype) == "this torch lacks it"


# rows


def operation(op: str, dtype: str = "fp32") -> HiddenWork:
    return HiddenWork(op, (64, 7) if op.startswith("select") else (8, 4, 6), dtype, CPU)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_operations_agree_with_the_definition(op, dtype):
    work = operation(op, dtype)
    for contender in operation_contenders(op, compiled=False):
        assert work.bind(contender).disagreement() is None, contender.name


@pytest.mark.parametrize("op", OPERATIONS)
def test_what_is_timed_in_plain_pytorch_is_the_definition(op):
    """In float64 it is what fastamp's operations, which `fastamp check` holds to the definition, are compared with."""
    work, operation_ = operation(op), OPERATIONS[op]
    wide = {name: x.detach().double() if x.is_floating_point() else x for name, x in work.inputs[0].items()}
    wide = {name: x.requires_grad_(name in operation_.leaves) for name, x in wide.items()}
    plain, ours = (operation_.run(f, wide, operation_.takes) for f in (operation_.plain, operation_.ours))
    for name, value in ours.items():
        torch.testing.assert_close(plain[name], value, rtol=1e-10, atol=1e-12)


def test_a_step_of_lambda_left_out_is_seen():
    def no_step(*given):
        return OPERATIONS["remix"].ours.func(*given, step_size=0.0)

    runner = operation("remix").bind(Contender("fastamp", "remix", no_step))
    assert runner.disagreement().startswith("λ' is off by 2.0e-03")


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op != "remix"])
def test_a_wrong_operation_is_seen(op):
    wrong = Contender("fastamp", op, lambda *given: OPERATIONS[op].ours(*given) * 1.02)
    assert "is off by 2.0e-02" in operation(op).bind(wrong).disagreement()


def test_the_suite_of_rows_counts_bytes(small_suites, tmp_path):
    result = invoke("--suite", "rows", "--rounds", 2, "--no-compiled", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    results = results_in(tmp_path, "rows")
    assert results["refused"] == results["notes"] == []
    assert len(results["rows"]) == 2 * len(OPERATIONS)
    moved = {"mix": 2, "mix with backward": 4, "lambda_grad": 2, "remix": 4}
    for row in results["rows"]:
        if row["mode"] in moved:
            assert row["shape"] == {"B": 6, "T": 3, "D": 5, "C": None}
            assert row["bytes"] == 6 * 3 * 5 * 4 * moved[row["mode"]]
        assert row["ratio_to"] == "PyTorch"
        assert row["ms"].keys() == row["ratio"].keys() == {"both"}
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["ms"]["both"]["q50"] / 1e6)
        assert row["percent_of_copy"] == pytest.approx(100 * row["gb_s"] / results["copy_gb_s"])
    assert "bytes: read h, write m of fp32, 720" in result.output
    (drawn,) = tmp_path.glob("*-rows.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")


# scaling


def growing(exponent: float, sizes: tuple[int, ...]) -> list[dict]:
    common = {"varies": "B", "input": "logits", "dtype": "fp32", "contender": "AMPLoss", "clock": "eager"}
    # Below 64 the time is that of a call.
    return [
        {**common, "shape": {"B": size}, "ms": {"both": {"q50": max(0.01 * size**exponent, 0.01 * 64**exponent)}}}
        for size in sizes
    ]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_exponent_is_that_of_the_upper_half(exponent):
    (fit,) = fits(growing(exponent, tuple(2**i for i in range(1, 12))))
    assert fit["exponent"] == pytest.approx(exponent)
    assert (fit["from"], fit["to"]) == (64, 2048)
    assert len(fit["ms"]) == 11


def test_two_sizes_make_no_exponent():
    (fit,) = fits(growing(1.0, (4, 8)))
    assert fit["exponent"] is None


def test_the_suite_of_scaling_fits_every_contender(small_suites, tmp_path):
    result = invoke("--suite", "scaling", "--rounds", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    results = results_in(tmp_path, "scaling")
    assert results["notes"] == ["scaling: up to 2^24 elements a batch, for a CPU; on a GPU up to 2^27"]
    found = {(fit["varies"], fit["contender"]): fit for fit in results["fits"]}
    assert found.keys() == {(size, name) for size in "BD" for name in heads.GROWING}
    assert found["B", "AMPLoss"]["ms"].keys() == {"4", "8", "16", "32"}
    assert isinstance(found["B", "AMPLoss"]["exponent"], float)
    assert {row["varies"] for row in results["rows"]} == {"B", "D"}
    assert "growth in B, logits, fp32, eager: median ms" in result.output


@pytest.mark.parametrize("device", suites.GROWTH)
def test_five_powers_of_two_are_fitted_one_size_at_a_time(device):
    for size, _, shape, values in suites.GROWTH[device]:
        assert shape["BDC".index(size)] == 0
        assert all(after == 2 * before for before, after in pairwise(values))
        (fit,) = fits(growing(1.0, values))
        assert fit["to"] / fit["from"] >= 2**5


# vocabulary


def test_the_suite_of_a_vocabulary_measures_chunks_beside_whole_logits(small_suites, tmp_path):
    result = invoke("--suite", "vocabulary", "--rounds", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    results = results_in(tmp_path, "vocabulary")
    rows = {row["contender"]: row for row in results["rows"]}
    assert {"cross-entropy", "AMP autograd", "linear_amp_cross_entropy"} < rows.keys()
    assert "linear_amp_cross_entropy, chunks of 1" in rows
    assert {row["ratio_to"] for row in rows.values()} == {"cross-entropy"}
    assert all(row["peak_memory_ratio"] > 0 for row in rows.values())
    assert results["notes"] == [
        "vocabulary: (12, 5, 40), for a CPU; on a GPU (4096, 4096, 32000), (8192, 2048, 128256)",
        "Liger fused linear, no mixing: not run, it takes a GPU",
    ]


def test_a_vocabulary_in_chunks_takes_less_memory_than_its_logits():
    config = BenchConfig(suite="vocabulary", shapes=((256, 16, 4000),), rounds=1)
    results = benchmarking.run(config, command="")
    assert results["refused"] == []
    peak = {row["contender"]: row["peak_memory_bytes"] for row in results["rows"]}
    assert peak["linear_amp_cross_entropy, chunks of 62"] < 0.6 * peak["AMPLoss"]


# all


def test_all_suites_run_in_one_go(small_suites, tmp_path):
    result = invoke("--suite", "all", "--rounds", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    written = {json.loads(path.read_text())["suite"] for path in tmp_path.glob("*.json")}
    assert written == set(benchmarking.SUITES)
    assert "reduced: nothing compiled" in results_in(tmp_path, "rows")["notes"]
    for said in ("reduced: nothing compiled, three shapes", "reduced: nothing compiled, the TextCNN alone"):
        assert f"note: {said}" in result.output


@pytest.mark.parametrize(
    ("suite", "option", "said"),
    [
        ("all", ("--shapes", "5x5x5"), "shapes is no option of the suite all, which takes none"),
        ("all", ("--compiled",), "compiled is no option of the suite all, which takes none"),
        ("scaling", ("--no-compiled",), "compiled is no option of the suite scaling, which takes none"),
        (
            "vocabulary",
            ("--networks", "bert"),
            "networks is no option of the suite vocabulary, which takes shapes, dtypes",
        ),
    ],
)
def test_options_of_other_suites_are_refused(suite, option, said):
    result = invoke("--suite", suite, *option)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith(f"Error: {said}")


# graphs, as far as they can be told without a GPU


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
    assert [one.runner for one in timing.captured(runners, "pool", notes.append)] == runners[:1]
    assert list(timing.captured(runners, "pool", notes.append)) == []
    assert asked == [("a", "pool"), ("b", "pool")]
    where = "b at (6, 5) -> 3, fp32"
    after = f"no more CUDA graphs in this process after {where}"
    assert notes == [f"{where} cannot be captured in a CUDA graph: operation not permitted", after, after]


def test_a_step_that_reads_from_the_device_is_not_captured(monkeypatch):
    work = Workload((6, 5, 3), "fp32", "hidden", CPU)
    monkeypatch.setattr(timing, "graph_slot", None)
    notes = []
    assert list(timing.captured([work.bind(named("Liger, no mixing"))], "pool", notes.append)) == []
    assert notes == ["Liger, no mixing: not in a CUDA graph, its step reads from the device"]


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


def test_what_is_wanted_most_comes_first(monkeypatch):
    monkeypatch.setattr(suites, "Workload", lambda *given: given)
    monkeypatch.setattr(suites, "of_head", lambda work, **options: [])
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


def test_tables_are_whole_in_80_columns(small_suites):
    for arguments in (
        ("--suite", "vocabulary"),
        ("--suite", "rows", "--no-compiled"),
        ("--suite", "scaling"),
        ("--suite", "layers", "--networks", "textcnn", "--no-compiled"),
        ("--shapes", "256x64x1000", "--no-compiled"),
    ):
        result = CliRunner(env={"COLUMNS": "80"}).invoke(
            main, ["bench", "--device", "cpu", "--rounds", "2", *arguments]
        )
        assert result.exit_code == 0, result.output
        assert "…" not in result.output, result.output


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["rows", "scaling", "vocabulary"])
def test_suites_run_on_a_gpu(monkeypatch, suite):
    for op, operation in OPERATIONS.items():
        shapes = operation.shapes[1][:1]
        monkeypatch.setitem(OPERATIONS, op, operation._replace(shapes=(shapes, shapes)))
    monkeypatch.setitem(suites.VOCABULARY, "cuda", ((600, 64, 128000),))
    monkeypatch.setitem(suites.GROWTH, "cuda", (("C", "logits", (64, 0, 0), (256, 1024, 4096)),))
    compiled = False if suite == "rows" else None
    results = benchmarking.run(BenchConfig(suite=suite, rounds=2, device="cuda", compiled=compiled), command="")
    assert results["refused"] == []
    assert not any("cannot be captured" in note for note in results["notes"])
    assert all(row["kernel_launches"] > 0 for row in results["rows"])
    clocks = {"eager"} if suite == "vocabulary" else {"eager", "graph"}
    assert {row["clock"] for row in results["rows"]} == clocks
