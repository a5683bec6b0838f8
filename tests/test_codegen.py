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
GROUPS = ("rows", "pairs grad small head draw mix remix embedding select", "binary")
FP64 = "pairs-fp64 rows-fp64 grad-fp64 head-fp64 select-fp64 binary-fp64"

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
    place = ("sm_90", "_mix_kernel", "bf16 N=30720")
    was = next(row for row in record["rows"] if (row["target"], row["kernel"], row["case"]) == place)
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
    more = {pipe: count + count // 10 for pipe, count in was["instructions"].items()}
    (line,) = told(instructions=more)
    assert re.fullmatch(r"issues [\d.]+ instructions an element, [\d.]+ before", line)
    assert told(read=was["read"] // 2, written=was["written"] // 2) == []
    (line,) = problems([{**was, "case": "bf16 N=1"}], record)
    assert line.endswith("is not recorded; run python -m bench.codegen --out bench/results")


def test_another_compiler_may_choose_other_accesses_but_not_other_bytes():
    from codegen.report import problems

    record = copy.deepcopy(recorded())
    was = next(row for row in record["rows"] if row["instructions"])
    record["versions"]["triton"] = "0.0"
    other = {"loads": was["loads"] + 1, "instructions": {pipe: 2 * n for pipe, n in was["instructions"].items()}}
    assert problems([{**was, **other}], record) == []
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


LOCATED = """
#loc = loc("/a/rows_loop.py":9:0)
#loc1 = loc("/a/rows_loop.py":20:4)
#loc2 = loc("sums"(#loc1))
#loc3 = loc(callsite(#loc4 at #loc1))
#loc4 = loc("/a/rows.py":7:8)
"""


def test_a_loops_turns_and_step_stand_under_its_line_of_source():
    from codegen.traffic import loop_turns

    def loop(last, place):
        return f"%r = scf.for %i = %c0_i32 to {last} step %c64_i32  : i32 {{\n{LOAD}\n}} loc({place})"

    body = f"{loop('%N', '#loc2')}\nscf.if %c {{\n{loop('%unknown', '#loc3')}\n}} else {{\n{LOAD}\n}} loc(#loc1)"
    found = loop_turns(COPY.format(body=body) + LOCATED, ["in_ptr", "N"], {"N": 100})
    assert found == {("rows_loop.py", 20): (2, 64), ("rows.py", 7): (1, 64)}


SASS = """
copy:
.text.copy:
	//## File "/a/rows_loop.py", line 9
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/                   CALL.ABS.NOINC R14 ;
.L_x_0:
        /*0040*/               @P1 EXIT ;
        /*0050*/               @P4 BRA P3, `(.L_x_4) ;
.L_x_1:
	//## File "/a/rows_loop.py", line 20
        /*0060*/              @!P2 LDG.E.128 R4, desc[UR28][R34.64] ;
	//## File "/a/rows.py", line 170
        /*0070*/                   FFMA R46, R36, 1.4426950216293334961, R23.reuse ;
        /*0080*/                   MUFU.EX2 R46, R40 ;
        /*0090*/               @P5 BRA `(.L_x_2) ;
        /*00a0*/                   FSEL R49, R2, RZ, !P6 ;
.L_x_2:
	//## File "/a/rows_loop.py", line 20
        /*00b0*/                   VIADD R32, R32.reuse, {grown} ;
        /*00c0*/              {leave}
.L_x_3:
	//## File "/a/rows.py", line 346
        /*00d0*/              @!P2 STG.E desc[UR28][R32.64], R4 ;
        /*00e0*/                   EXIT ;
.L_x_4:
	//## File "/a/{unusual}", line 43
        /*00f0*/                   DADD R2, R2, 1 ;
        /*0100*/                   STG.E desc[UR28][R32.64], R4 ;
        /*0110*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*0120*/                   BRA `(.L_x_5);
"""
BOTTOM, CALL = "@!P0 BRA `(.L_x_1) ;", "@P0 CALL.REL.NOINC `(.L_x_3) ;\n        /*00c8*/       BRA `(.L_x_1) ;"


@pytest.mark.parametrize(("leave", "branches"), [(BOTTOM, 2), (CALL, 3)])
@pytest.mark.parametrize(("grown", "turns"), [("0x40", 6), ("0x80", 3), ("0x100", 2), ("0x7", 6), ("0x4000", 6)])
def test_instructions_are_counted_along_the_usual_way(leave, branches, grown, turns):
    from codegen.instructions import issued

    code = SASS.format(leave=leave, grown=grown, unusual="rows_careful.py")
    found = issued(code, "copy", {("rows_loop.py", 20): (6, 64), ("rows.py", 99): (7, 1)})
    # A constant, two branches and an exit that is not taken before the loop; a store and an exit after it.
    assert found == {"fma": turns, "alu": turns, "mufu": turns, "lsu": turns + 1, "rest": branches * turns + 5}


def test_instructions_of_a_loop_of_unknown_length_count_once_and_those_of_the_only_way_always():
    from codegen.instructions import issued

    code = SASS.format(leave=BOTTOM, grown="0x40", unusual="rows_careful.py")
    assert sum(issued(code, "copy", {}).values()) == 12
    only = code.replace("@P4 BRA P3,", "BRA")
    assert issued(only, "copy", {}) == {"fma": 1, "alu": 0, "mufu": 0, "lsu": 2, "rest": 6}
    with pytest.raises(ValueError, match="copy: no way through the machine code"):
        issued(code.replace("EXIT ;", "BRA `(.L_x_5) ;"), "copy", {})


def test_what_a_kernel_issues_is_what_stands_in_its_machine_code():
    code = """
import json
from bench.codegen.cases import mix_cases
from bench.codegen.compiling import _tool, compile_case, compiled
(case,) = (case for case in mix_cases() if (case.kernel.__name__, case.name) == ("_mix_kernel", "fp32 N=768"))
print(json.dumps([_tool(compiled(case, "sm_90"), "cuobjdump", "-sass"), compile_case(case, "sm_90")]))
"""
    run = python(code)
    assert run.returncode == 0, run.stderr[-3000:]
    dump, row = json.loads(run.stdout)
    straight = re.findall(r"/\*[0-9a-f]{4}\*/ +(?:@\S+ )?([A-Z]\w*)", dump)
    straight = straight[: straight.index("BRA")]  # to itself, behind the end
    assert "EXIT" in straight
    assert sum(row["instructions"].values()) == len(straight)
    assert row["instructions"]["lsu"] == row["loads"] + row["stores"]


def test_the_bound_and_the_predicted_time_follow_from_counts_and_data_sheets():
    from codegen.budget import DEVICES, MAIN, over_predicted, picoseconds

    h200 = DEVICES["sm_90"]
    assert h200.instructions(4, h200.lanes) == pytest.approx(31.1, abs=0.05)
    row = {"target": "sm_90", "floor": 4, "warps": 2, "elements": 640}
    counts = {"fma": 100, "alu": 200, "mufu": 40, "lsu": 60, "rest": 0}  # 40 an element, 4 of them MUFU
    times = picoseconds({**row, "instructions": counts})
    assert times == pytest.approx(
        {"memory": 4 / 4.3, "issue": 4e4 / 128 / 132 / 1.98 / 1, "MUFU": 4e3 / 16 / 132 / 1.98}
    )
    rows = [{**row, "kernel": launch.kernel, "case": launch.case, "instructions": counts} for launch in MAIN]
    policy = "amp_cross_entropy_1d0_row_False_None_m100_0d0_matching_True"
    timed = {
        f"_amp_cross_entropy_kernel torch.bfloat16 torch.int64 False {policy} B<=4096 C=4096": {
            "ms": {"a": 0.04, "b": 1}
        },
        f"_amp_cross_entropy_kernel torch.float32 torch.int64 False {policy} B<=4096 C=4096": {"ms": {"a": 0.04}},
        "_mix_kernel torch.bfloat16 B<=256 N=98304": {"ms": {"a": None, "b": 0.1}},
    }
    (line,) = over_predicted(timed, rows)
    us = 4096**2 * times["issue"] / 1e6
    assert line.endswith(f" at (4096, 4096): 40.0 us measured, {us:.1f} us predicted (issue): {40 / us:.2f}")
