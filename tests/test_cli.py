"""`fastamp check`, `fastamp bench`, `fastamp demo`, and bench/gpu.sh."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import HAS_GPU
from rich.console import Console

from fastamp import functional, reference
from fastamp.cli import main
from fastamp.conformance import Report, Row, StepCase, cases, check, check_case, print_report

ROOT = Path(__file__).parents[1]
TINY = (6, 5, 3)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch):
    # The whole check takes minutes in Triton's interpreter; the tests of the kernels run there anyway.
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, list(map(str, arguments)))


def interrupted(*given, **options):
    raise KeyboardInterrupt


def test_quick_check_passes_and_shows_every_operation_and_dtype(tmp_path):
    result = invoke("check", "--quick", "--device", "cpu", "--out", tmp_path / "check.json")
    assert result.exit_code == 0, result.output
    for op in functional.__all__:
        for dtype in ("float64", "float32", "float16", "bfloat16"):
            assert any(op in line and dtype in line and "yes" in line for line in result.output.splitlines())
    assert "TRITON_INTERPRET=1" in result.output or HAS_GPU
    assert "every row keeps the contract" in result.output
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["ok"]
    assert len(report["rows"]) == 4 * len(functional.__all__)
    assert all(0 <= row["worst"] < 1 for row in report["rows"])


def test_a_broken_operation_is_named_and_ends_in_code_1(monkeypatch):
    right = functional.mix
    monkeypatch.setattr(functional, "mix", lambda *given: right(*given) * 1.02)
    result = invoke("check", "--quick", "--device", "cpu", "--op", "mix", "--op", "lambda_grad")
    assert result.exit_code == 1
    assert "failed: mix, torch on cpu, float32: rows of 30: m: " in result.output
    assert "failed: lambda_grad" not in result.output
    assert "4 of 8 rows break the contract" in result.output


def test_an_operation_that_raises_is_a_failure_and_the_others_are_still_checked(monkeypatch):
    def broken(*given, **options):
        raise RuntimeError("ptxas\nfailed")

    monkeypatch.setattr(functional, "mix", broken)
    report = check(["cpu"], quick=True, ops=["mix", "lambda_grad"])
    assert {row.op: row.ok for row in report.rows} == {"mix": False, "lambda_grad": True}
    assert report.rows[0].failures[0] == "rows of 30: RuntimeError: ptxas"


@pytest.mark.parametrize("fault", ["unwritten", "input", "branch", "step"])
def test_a_faulty_step_breaks_the_contract(monkeypatch, fault):
    right = functional.amp_cross_entropy

    def faulty(logits, *given, **options):
        if fault == "step":  # λ' of another step size
            return right(logits, *given, **{**options, "step_size": 3e-3})
        loss, stats = right(logits, *given, **options)
        if fault == "unwritten":
            stats = stats._replace(lam_adv=torch.empty_like(stats.lam_adv))
        if fault == "input":
            with torch.no_grad():
                logits.mul_(2)
        if fault == "branch":
            stats = stats._replace(mask=~stats.mask)
        return loss, stats

    case = StepCase("case", batch=9)
    assert not check_case(case, "cpu", "torch", torch.float32).failures
    monkeypatch.setattr(functional, "amp_cross_entropy", faulty)
    failures = " ".join(check_case(case, "cpu", "torch", torch.float32).failures)
    said = {"unwritten": "λ': 9 of 9", "input": "wrote to its input", "branch": "the other of the two", "step": "λ'"}
    assert said[fault] in failures


def test_quick_cases_are_among_all_cases():
    every = list(cases(quick=False))
    assert all(case in every for case in cases(quick=True))
    assert len({(case.op, case.name) for case in every}) == len(every)
    assert {case.op for case in every} == set(functional.__all__)


@pytest.mark.gpu
def test_quick_check_passes_on_a_gpu():
    report = check(["cuda"], quick=True)
    assert {row.backend for row in report.rows} == {"torch", "triton"}
    assert report.ok, [row.failures for row in report.rows]


def test_the_check_of_a_gpu_is_whole_in_80_columns():
    row = Row("linear_amp_cross_entropy", "cuda:0", "triton", "bfloat16", 34, 1.2e-3, 3.4e-3, ("wrong",))
    console = Console(file=io.StringIO(), width=80)
    print_report(Report((row,), ()), console)
    shown = console.file.getvalue()
    for word in ("linear_amp_cross_entropy", "triton cuda:0", "bfloat16", "34", "1.2e-03", "3.4e-03", "NO"):
        assert f" {word} " in shown.replace("\n", " "), shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.fixture
def demo(monkeypatch):
    """The command's module with a check of one operation, and few pairings."""
    module = importlib.import_module("fastamp.cli.demo")
    monkeypatch.setattr(module, "check", lambda *given, **options: check(["cpu"], quick=True, ops=["lambda_grad"]))
    monkeypatch.setattr(module, "PAIRINGS", 1)
    return module


def test_demo_trains_draws_and_resumes(demo, tmp_path):
    arguments = ("demo", "--steps", 3, "--seeds", 1, "--out", tmp_path)
    first = invoke(*arguments)
    assert first.exit_code == 0, first.output
    for said in ("sent-amp", "test error %", "1 seed, 3 steps each", "One seed decides nothing", "step 3 "):
        assert said in first.output
    assert "loss of mixed test pairs, 1 seed" in first.output
    record = json.loads((tmp_path / "demo.json").read_text())
    assert set(record["loss"]) == {"none", "sent-mixup", "sent-amp"}
    assert len(record["loss"]["none"][0]) == len(record["lam"]) == demo.GRID
    again = invoke(*arguments)
    assert again.exit_code == 0, again.output
    assert "step 3 " not in again.output
    assert json.loads((tmp_path / "demo.json").read_text())["loss"] == record["loss"]


def test_an_interrupted_demo_says_how_to_go_on(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "train", interrupted)
    result = invoke("demo", "--steps", 3, "--out", tmp_path / "my runs")
    assert result.exit_code == 130
    said = f"interrupted; what is trained is kept, and this goes on: fastamp demo --steps 3 --out '{tmp_path}/my runs'"
    assert result.output.splitlines()[-1] == said


def test_demo_stops_where_the_check_fails(demo, monkeypatch, tmp_path):
    report = demo.check()
    failed = replace(report, rows=(replace(report.rows[0], failures=("wrong",)),))
    monkeypatch.setattr(demo, "check", lambda *given, **options: failed)
    result = invoke("demo", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("Error: the operations do not do here what they should")
    assert not (tmp_path / "out").exists()


def test_the_curve_is_the_loss_of_mixed_rows(demo):
    logits, labels = torch.randn(20, 4, dtype=torch.float64), torch.randint(4, (20,))
    lam = torch.tensor([0.0, 0.3, 1.0])
    curve = demo.loss_against_lambda(logits, labels, lam, torch.Generator().manual_seed(1))
    partner = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    for value, one in zip(curve, lam.double(), strict=True):
        expected = reference.amp(lambda m: m, logits, labels, one.expand(20), partner, mode="mixup").loss
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("check", "--device", "gpu"), 1, "device 'gpu' cannot be used"),
        (("check", "--device", "meta"), 1, "device 'meta' cannot be used; takes cpu or cuda"),
        (("check", "--op", "mixup"), 2, "'mixup' is not one of 'amp_cross_entropy'"),
        (("check", "--seed", "-1"), 2, "-1 is not in the range"),
        (("bench", "--shapes", "50x300"), 2, "'50x300' is no shape; write BxDxC, as in 50x300x6"),
        (("bench", "--shapes", "0x3x6"), 2, "'0x3x6' is no shape"),
        (("bench", "--dtype", "fp8"), 2, "'fp8' is not one of fp32, bf16, fp16"),
        (("bench", "--rounds", "0"), 2, "0 is not in the range"),
        (("bench", "--device", "tpu9"), 1, "device 'tpu9' cannot be used"),
        (("demo", "--steps", "0"), 2, "0 is not in the range"),
        (("demo", "--seeds", "many"), 2, "'many' is not a valid integer range"),
    ],
)
def test_bad_commands_end_in_one_line_and_a_failure_code(arguments, code, message):
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    *_, last = result.output.strip().splitlines()
    assert last.startswith("Error: ")
    assert message in last


@pytest.mark.parametrize(("command", "called"), [("check", "check.check"), ("bench", "bench.run")])
def test_an_interrupted_command_ends_in_code_130(monkeypatch, command, called):
    monkeypatch.setattr(f"fastamp.cli.{called}", interrupted)
    result = invoke(command)
    assert (result.exit_code, result.output.splitlines()[-1]) == (130, "interrupted")


def test_a_file_in_the_place_of_the_results_folder_is_an_error_of_one_line(tmp_path):
    (tmp_path / "out").write_text("")
    result = invoke("bench", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "is a file" in result.output.splitlines()[-1]


SCRIPT = ROOT / "bench" / "gpu.sh"


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *arguments], capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_gpu_script_says_that_there_is_no_gpu(tmp_path):
    done = run_script(str(SCRIPT), str(tmp_path / "out"), PYTHON=sys.executable)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["gpu.sh: torch finds no GPU on this machine"]


def test_the_limits_of_the_gpu_script_leave_time_of_its_530_seconds():
    text = SCRIPT.read_text()
    # The largest one counts where steps run side by side; the last three take what is left.
    limits = {name: int(limit) for name, limit in re.findall(r"step (\S+) \S+ (\d+) ", text)}
    beside = (("tests", "warm-large"), ("check", "warm"), ("sanitize",))
    largest = max(sum(limits[name] for name in one_after_another) for one_after_another in beside)
    alone = set(limits) - {"launches", "predicted", "autotune", *sum(beside, ())}
    assert alone == {"nvidia-smi", "machine", "ops", "head", "layers", "scaling", "vocabulary", "training"}
    together = int(re.search(r"^TOGETHER=(\d+)", text, re.MULTILINE)[1])
    assert largest + sum(limits[name] for name in alone) < together <= 530
    assert "in one go of 530 seconds at most" in text


@pytest.mark.parametrize("failing", ["", "check"])
def test_the_gpu_script_runs_every_step_and_checks_before_it_warms_up(tmp_path, failing):
    """With a program in Python's place, which keeps what it is asked for."""
    stand_in, asked, out = tmp_path / "python", tmp_path / "asked", tmp_path / "out"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {asked}\ncase "$*" in *" {failing or "none"} {out}") exit 1;; esac\n')
    stand_in.chmod(0o755)
    done = run_script(str(SCRIPT), str(out), PYTHON=str(stand_in), DEVICE="cpu")
    summary = dict(line.split(": ") for line in (out / "summary.txt").read_text().splitlines())
    summary.pop("all of it")
    summary.pop("nvidia-smi", None)
    rest = {"ops", "head", "layers", "scaling", "vocabulary", "training", "launches", "predicted"}
    assert summary.keys() == {"machine", "tests", "check", "warm", "sanitize", *rest}
    assert {name for name, said in summary.items() if not said.startswith("passed")} == {*failing.split()}
    assert done.returncode == (1 if failing else 0)
    steps = re.findall(rf"--quick (\S+) {out}$", asked.read_text(), re.MULTILINE)
    assert steps.index("check") < steps.index("warm") < steps.index("ops")


@pytest.fixture(scope="module")
def gpu_steps():
    spec = importlib.util.spec_from_file_location("bench_gpu_steps", SCRIPT.with_name("gpu_steps.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_scripts_check_is_in_small_parts_the_largest_first(gpu_steps):
    parts = gpu_steps.check_parts(quick=False)
    assert max(len(part.cases) for part in parts) <= 4
    costs = [part.cost for part in parts]
    assert costs == sorted(costs, reverse=True)
    dtypes = {}
    for part in parts:
        for case in part.cases:
            dtypes.setdefault((case.op, case.name), []).append(part.dtype)
    assert dtypes.keys() == {(case.op, case.name) for case in cases(quick=False)}
    wide, narrow = {torch.float32, torch.float64}, {torch.bfloat16, torch.float16}
    assert all(len(of) == 2 and wide & {*of} and narrow & {*of} for of in dtypes.values())
    by_op = {op: {dtype for (of, _), those in dtypes.items() if of == op for dtype in those} for op, _ in dtypes}
    assert {op for op, of in by_op.items() if of != wide | narrow} == {"select_loss"}  # which has no kernel


def test_the_gpu_scripts_check_is_one_report_of_all_its_parts(gpu_steps, tmp_path, monkeypatch, capsys):
    few = [case for case in cases(quick=True) if case.op in ("mix", "remix")]
    wrong = StepCase("wrong", options={"loss": "none such"})
    monkeypatch.setattr(gpu_steps, "cases", lambda quick: [*few, wrong])
    monkeypatch.setattr(gpu_steps, "CASES_A_PART", 1)
    monkeypatch.setattr(gpu_steps, "_workers", lambda: ThreadPoolExecutor(1))
    assert not gpu_steps.check_all(tmp_path, "cpu", True)
    found = json.loads((tmp_path / "check.json").read_text())
    counts = {(row["op"], row["dtype"]): row["cases"] for row in found["rows"]}
    assert len(counts) == len(found["rows"])
    assert sum(counts.values()) == 2 * (len(few) + 1)
    assert {op for op, _ in counts} == {"mix", "remix", "amp_cross_entropy"}
    failed = [row for row in found["rows"] if not row["ok"]]
    assert [row["op"] for row in failed] == ["amp_cross_entropy"] * 2
    assert all("wrong: ValueError" in line for row in failed for line in row["failures"])
    assert "2 of " in capsys.readouterr().out


def test_the_gpu_script_prints_measured_over_predicted(gpu_steps, tmp_path, capsys):
    name = "_mix_kernel torch.bfloat16 B<=256 N=98304"  # 25 million elements, 4 bytes of each at 4.3 TB/s
    (tmp_path / "launches-a-gpu.json").write_text(json.dumps({name: {"launch": "b", "ms": {"a": 0.05, "b": 0.04}}}))
    assert gpu_steps.predicted(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(" at (256, 128, 768): 50.0 us measured, 23.4 us predicted (memory): 2.14")


def test_gpu_script_says_how_it_is_called():
    done = run_script(str(SCRIPT))
    assert (done.returncode, done.stderr) == (2, "gpu.sh: usage: bench/gpu.sh DIR\n")
