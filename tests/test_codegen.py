"""Ahead-of-time compilation of what the launch heuristics can choose, for GPUs that need not be here."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from codegen import TARGETS

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench" / "results" / "codegen.json"
GROUPS = ("rows", "pairs grad small head draw mix remix embedding select")
FP64 = "pairs-fp64 rows-fp64 grad-fp64 head-fp64 select-fp64"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def recorded():
    return json.loads(RECORD.read_text())


def python(code: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)


# What the gate asks for: pytest -m "all_targets or not all_targets" tests/test_codegen.py
MORE = [(target, groups) for target in TARGETS for groups in (*GROUPS, FP64) if target != "sm_90" or groups == FP64]
PARTS = [("sm_90", groups) for groups in GROUPS]
PARTS += [pytest.param(*part, marks=pytest.mark.all_targets) for part in MORE]


@pytest.mark.parametrize(("target", "groups"), PARTS)
def test_no_kernel_spills_or_loses_its_vectors_or_moves_more_than_recorded(tmp_path, target, groups):
    from codegen.report import problems

    # A process of its own: in this one kernels may have been defined for the interpreter.
    command = [sys.executable, "-m", "bench.codegen", "--out", str(tmp_path), "--jobs", "1", "--target", target]
    command += [word for group in groups.split() for word in ("--group", group)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads((tmp_path / "codegen.json").read_text())["rows"]
    assert rows
    assert {row["target"] for row in rows} == {target}
    found = problems(rows, recorded())
    assert not found, "\n".join(found)


def test_the_record_has_every_case_once_and_nothing_else():
    code = """
import json
from bench.codegen.cases import GROUPS_OF_CASES
cases = [(case.kernel.__name__, case.name) for make in GROUPS_OF_CASES.values() for case in make()]
print(json.dumps([list(GROUPS_OF_CASES), cases]))
"""
    run = python(code)
    assert run.returncode == 0, run.stderr[-3000:]
    groups, pairs = json.loads(run.stdout)
    assert sorted(groups) == sorted(" ".join((*GROUPS, FP64)).split()), "compiled in no part, or in two"
    cases = [tuple(pair) for pair in pairs]
    assert len(set(cases)) == len(cases)
    rows = [(row["kernel"], row["case"], row["target"]) for row in recorded()["rows"]]
    assert sorted(rows) == sorted((*case, target) for case in cases for target in TARGETS)


def test_a_kernel_that_a_triton_does_not_compile_is_named():
    code = """
from bench.codegen import check
(good,) = [case for case in check.one_of_each() if case.kernel.__name__ == "_mix_kernel"]
bad = good._replace(name="of three columns", constants={**good.constants, "BLOCK_N": 3})
check.one_of_each = lambda: iter([good, bad])
check.main([])
"""
    run = python(code)
    assert run.returncode == 1, run.stderr[-3000:]
    assert run.stdout.count("_mix_kernel [of three columns] for ") == 2
    assert run.stdout.splitlines()[-1].endswith("2 of 4 compiled")


def test_the_oldest_triton_that_is_checked_is_the_oldest_that_can_be_installed():
    (oldest,) = re.findall(r"\"triton>=([\d.]+);", (ROOT / "pyproject.toml").read_text())
    checked = re.findall(r"\{triton: ([\d.]+),", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (tested,) = re.findall(r"^triton==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    versions = [tuple(map(int, version.split("."))) for version in (oldest, tested, checked[-1])]
    assert checked[0] == oldest
    assert versions == sorted(versions)


def test_what_has_become_worse_is_told_by_name():
    from codegen.report import problems

    from fastamp.benchmarking import machine

    record = recorded()
    record["versions"]["triton"] = machine.versions()["triton"]
    was = next(row for row in record["rows"] if row["kernel"] == "_mix_kernel" and row["case"] == "bf16 N=30720")
    assert problems([was], record) == []

    def told(**changes):
        lines = problems([{**was, **changes}], record)
        where = f"{was['target']} _mix_kernel [bf16 N=30720] "
        assert all(line.startswith(where) for line in lines)
        return [line.removeprefix(where) for line in lines]

    assert told(spills=3) == ["spills: 3 accesses to local memory"]
    assert told(narrow=True, load_width=4, loads=24) == [
        "has lost its vectors: its widest load is of 4 bytes",
        "loads 4 bytes at most at a time, 16 before",
        f"takes 24 loads, {was['loads']} before",
    ]
    assert told(read=was["read"] + 2 * was["elements"]) == ["reads 6.006 bytes an element, 4.006 before"]
    assert told(mostly_read=2 * was["mostly_read"]) == ["mostly reads 8.012 bytes an element, 4.006 before"]
    assert told(written=2 * was["written"]) == ["writes 4 bytes an element, 2 before"]
    assert told(read=was["read"] // 2, written=was["written"] // 2) == []
    (line,) = problems([{**was, "case": "bf16 N=1"}], record)
    assert line.endswith("is not recorded; run python -m bench.codegen --out bench/results")


def test_another_compiler_may_choose_other_accesses_but_not_other_bytes():
    from codegen.report import problems

    record = copy.deepcopy(recorded())
    was = dict(record["rows"][0])
    record["versions"]["triton"] = "0.0"
    assert problems([{**was, "loads": was["loads"] + 1}], record) == []
    assert problems([{**was, "read": was["read"] + 1}], record)


COPY = """
module {{
  tt.func public @copy(%in: !tt.ptr<bf16> {{tt.divisibility = 16 : i32}} loc("in"), %N: i32 loc("N")) {{
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c64_i32 = arith.constant 64 : i32 loc(#loc1)
    {body}
    tt.return loc(#loc1)
  }} loc(#loc)
}} loc(#loc)
"""
LOAD = "%x = tt.load %p, %mask, %other : tensor<2x64x!tt.ptr<bf16>, #blocked> loc(#loc4)"
STORE = "tt.store %p, %x, %mask : tensor<64x!tt.ptr<f32>, #blocked> loc(#loc5)"
SUM = """%s = "tt.reduce"(%x) <{axis = 0 : i32}> ({
    ^bb0(%a: f32 loc(callsite(#loc1 at #loc6)), %b: f32 loc(callsite(#loc1 at #loc6))):
      tt.reduce.return %a : f32 loc(#loc1)
    }) : (tensor<64xf32, #blocked>) -> f32 loc(callsite(#loc2 at #loc3))"""


@pytest.mark.parametrize(
    ("body", "read", "written"),
    [
        (LOAD, 256, 0),
        (f"{LOAD}\n{SUM}\n{STORE}", 256, 256),
        ("%y = tt.load %lam : !tt.ptr<f64> loc(#loc7)", 8, 0),
        ("%y = amdg.buffer_load %lam[%at], %mask stride = %s : tensor<16x1xi64, #blocked> loc(#loc7)", 128, 0),
        ("amdg.buffer_store %x, %p[%at], %mask : tensor<32xi8, #blocked> loc(#loc7)", 0, 32),
        (f"%l = ttg.local_load %m : !ttg.memdesc<64xf32, #shared> -> tensor<64xf32, #blocked>\n{LOAD}", 256, 0),
        (f"%r = scf.for %i = %c0_i32 to %N step %c64_i32 iter_args(%a = %x) -> (f32)  : i32 {{\n{LOAD}\n}}", 512, 0),
        (f"scf.for %i = %c0_i32 to %c64_i32 step %c64_i32  : i32 {{\n{LOAD}\n{STORE}\n}} loc(#loc3)", 256, 256),
        (f"scf.for %i = %start to %N step %c64_i32  : i32 {{\n{LOAD}\n}} loc(#loc3)", 256, 0),
        (f"scf.if %c {{\n{LOAD}\n}} else {{\n{LOAD}\n{STORE}\n}} loc(#loc3)\n{LOAD}", 512, 256),
        (f"%r = scf.while (%g = %x) : (f32) -> f32 {{\n{LOAD}\n}} do {{\n^bb0(%g: f32):\n{STORE}\n}}", 256, 256),
    ],
    ids=["tile", "sum", "scalar", "AMD load", "AMD store", "shared", "loop", "one turn", "unknown", "branch", "while"],
)
def test_bytes_are_counted_in_loops_and_branches(body, read, written):
    from codegen.traffic import program_traffic

    assert program_traffic(COPY.format(body=body), ["in_ptr", "N"], {"N": 100}) == (read, written)


def test_of_two_branches_the_first_counts_where_that_is_asked_for():
    from codegen.traffic import program_traffic

    branch = f"scf.if %c {{\n{STORE}\n}} else {{\n{LOAD}\n{LOAD}\n}} loc(#loc3)"
    body = f"{branch}\nscf.for %i = %c0_i32 to %N step %c64_i32  : i32 {{\n{branch}\n}}"
    assert program_traffic(COPY.format(body=body), ["in_ptr", "N"], {"N": 100}, first_branch=True) == (0, 768)
    assert program_traffic(COPY.format(body=body), ["in_ptr", "N"], {"N": 100}) == (1536, 0)
    early = f"scf.if %c {{\n{LOAD}\n}} loc(#loc3)"
    assert program_traffic(COPY.format(body=early), ["in_ptr", "N"], {}, first_branch=True) == (256, 0)


def test_an_access_that_cannot_be_counted_is_an_error():
    from codegen.traffic import program_traffic

    body = "%x = tt.atomic_rmw fadd, acq_rel, gpu, %p, %v, %mask : (tensor<64x!tt.ptr<f32>>) -> tensor<64xf32>"
    with pytest.raises(ValueError, match=r"cannot count the bytes of: %x = tt\.atomic_rmw"):
        program_traffic(COPY.format(body=body), ["in_ptr", "N"], {})
    with pytest.raises(ValueError, match="2 arguments in the compiled code, 1 expected"):
        program_traffic(COPY.format(body=LOAD), ["in_ptr"], {})


@pytest.mark.parametrize(
    ("target", "registers", "num_warps", "shared", "expected"),
    [
        ("sm_90", 32, 4, 0, 1.0),
        ("sm_90", 33, 4, 0, 0.75),  # 40 registers, of 512 a lane: 12 of 16 warps
        ("sm_90", 255, 8, 0, 0.125),
        ("sm_90", 255, 16, 0, 0.0),
        ("sm_90", 16, 1, 0, 0.5),  # 32 blocks of one warp
        ("sm_80", 32, 4, 100 * 1024, 4 / 64),
        ("gfx942", 64, 4, 0, 1.0),
        ("gfx942", 65, 4, 0, 0.875),
        ("gfx942", 32, 1, 0, 1.0),
        ("gfx90a", 32, 2, 8 * 1024, 0.5),  # eight of 8 KB share 64 KB
    ],
)
def test_occupancy_follows_from_the_scarcest_resource(target, registers, num_warps, shared, expected):
    from codegen.occupancy import occupancy

    assert occupancy(target, registers, num_warps, shared) == expected
