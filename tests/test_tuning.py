"""FASTAMP_AUTOTUNE=1: every launch may be searched for; what it is never changes what is computed."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections import namedtuple
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import TRITON_DEVICE
from hypothesis import given
from hypothesis import strategies as st

from fastamp.conformance import EmbeddingCase, OperationCase, SelectionCase, StepCase, check_case

pytest.importorskip("triton", reason="the package triton is not installed")
from triton.runtime.errors import OutOfResources

from fastamp.policy import Policy

tuning = import_module("fastamp.kernels.tuning")

CASES = [
    StepCase("one program", batch=5, classes=3),
    StepCase("groups of rows", batch=37, classes=5),
    StepCase("pairs", batch=5, classes=141, options={"pairing": "matching"}),
    StepCase("long rows", batch=2, classes=4099),
    StepCase("long pairs", batch=3, classes=4099, options={"pairing": "matching"}),
    StepCase("head", batch=5, classes=5, width=37),
    StepCase("relu, dropout", batch=5, classes=3, width=19, activation="relu", dropout=0.5),
    OperationCase("mix", "words", shape=(7, 5, 13)),
    OperationCase("lambda_grad", "long rows", shape=(3, 9001)),
    OperationCase("remix", "words", shape=(7, 5, 13)),
    OperationCase("remix", "long rows", shape=(3, 9001)),
    SelectionCase("rows", shape=(7, 77)),
    SelectionCase("long rows", shape=(2, 4099)),
    EmbeddingCase("words", shape=(7, 5, 13)),
]


class Tile(NamedTuple):
    """A launch."""

    size: int
    num_warps: int


@pytest.fixture
def tunes(monkeypatch, tmp_path):
    """Tuning is on, and knows nothing yet; the folder of what it finds."""
    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "INTERPRETED", 1)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_unwritable", set())
    monkeypatch.setenv("FASTAMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def held(folder):
    (file,) = folder.iterdir()
    return json.loads(file.read_text())


def search(times, kernel="_some_kernel"):
    """The launches that a kernel was run with in one call on the CPU, and what the call gave; a run takes `times`."""
    ran = []

    def run(given):
        ran.append(given)
        if times.get(given) is None:
            raise OutOfResources(1, 0, "registers")
        return given

    clock = iter(range(10**6))
    now = [0.0]

    def perf_counter():
        if next(clock) % 2:  # the end of a measurement
            now[0] += times[ran[-1]]
        return now[0]

    patch = pytest.MonkeyPatch()
    patch.setattr(tuning.time, "perf_counter", perf_counter)
    try:
        about = ("fp32", "B<=8", torch.device("cpu"))
        made = tuning.tuned(kernel, lambda: about, Tile(4, 8), ("size", "num_warps"), run)
    finally:
        patch.undo()
    return ran, made


EVERY = {Tile(size, warps): size + warps for size in (2, 4, 8) for warps in (4, 8, 16)}


@pytest.fixture
def launched(monkeypatch):
    """Options of the launches. As in the newest Triton, a kernel is handed the fields of its policy and no more."""

    fields_alone = namedtuple("fields_alone", Policy._fields)
    options, kernels = [], type(import_module("fastamp.kernels.mix")._mix_kernel)
    run = kernels.run

    def noted(*given, **said):
        options.append(said)
        if "policy" in said:
            said = {**said, "policy": fields_alone(*said["policy"])}
        return run(*given, **said)

    monkeypatch.setattr(kernels, "run", noted)
    return options


@pytest.fixture
def candidates(monkeypatch):
    """What every launch is chosen from, and what has to be called with the number of the choice that is no search."""
    found = {}

    def chosen(given, run, device, file, key):
        apart = {re.sub(r"num_warps=\d+", "", text): text for text in given}  # the interpreter has no warps
        found[key] = [*given] if device.type == "cuda" else [*apart.values()]
        return found[key][number[0] % len(found[key])]

    number = [0]
    monkeypatch.setattr(tuning, "_fastest", chosen)

    def choose(this):
        number[0] = this
        tuning._chosen.clear()

    return found, choose


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_every_candidate_of_every_kernel_computes_the_same(tunes, launched, candidates, case):
    found, choose = candidates
    number, most = 0, 1
    while number < most:
        choose(number)
        finding = check_case(case, TRITON_DEVICE, "triton", torch.float32)
        assert not finding.failures, (number, finding.failures)
        number, most = number + 1, max(map(len, found.values()))
    assert launched
    assert all(options["enable_fp_fusion"] is True for options in launched), "Triton's default changes"


def test_a_kernel_is_searched_for_once_and_its_launches_are_kept(tunes):
    case = OperationCase("lambda_grad", "words", shape=(3, 2, 5))
    assert not check_case(case, TRITON_DEVICE, "triton", torch.float32).failures
    (entry,) = held(tunes).values()
    assert entry["launch"] in entry["ms"]
    (file,) = tunes.iterdir()
    kept = file.stat().st_mtime_ns
    tuning._chosen.clear()
    assert not check_case(case, TRITON_DEVICE, "triton", torch.float32).failures
    assert file.stat().st_mtime_ns == kept


def test_the_fastest_launch_is_taken_and_remembered(tunes):
    ran, made = search(EVERY | {Tile(8, 16): 0.001})
    assert made == Tile(8, 16)
    assert set(ran) == set(EVERY)
    again, made = search(EVERY)
    assert again == [Tile(8, 16)] == [made]
    tuning._chosen.clear()  # another process
    again, made = search(EVERY)
    assert again == [Tile(8, 16)] == [made]
    entry = held(tunes)["_some_kernel fp32 B<=8"]
    assert entry["launch"] == "size=8 num_warps=16"
    assert entry["ms"]["size=2 num_warps=4"] == 6000


def test_a_launch_that_the_device_has_no_room_for_is_passed_over(tunes):
    _, made = search({**EVERY, Tile(2, 4): None, Tile(2, 8): 0.5})
    assert made == Tile(2, 8)
    assert held(tunes)["_some_kernel fp32 B<=8"]["ms"]["size=2 num_warps=4"] is None


def test_other_errors_of_a_launch_are_not_swallowed(tunes):
    def run(_):
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuning.tuned("_some_kernel", lambda: (torch.device("cpu"),), Tile(4, 8), ("size",), run)
    assert not tunes.exists()


def test_what_was_found_for_other_kernels_or_another_compiler_is_not_taken(tunes, monkeypatch):
    search(EVERY)
    for module, name, value in ((tuning, "_kernels", lambda: "other"), (tuning.triton, "__version__", "other")):
        monkeypatch.setattr(module, name, value)
        ran, _ = search(EVERY)
        assert set(ran) == set(EVERY), name


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {}}'])
def test_a_spoiled_file_is_told_and_replaced(tunes, text):
    search(EVERY)
    (file,) = tunes.iterdir()
    file.write_text(text)
    tuning._chosen.clear()
    with pytest.warns(UserWarning, match="is not a file of launches; they are searched for again"):
        ran, _ = search(EVERY)
    assert set(ran) == set(EVERY)
    assert held(tunes)


def test_a_folder_that_cannot_be_written_is_told_once_and_ends_no_step(tunes, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTAMP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot be written.*lost with this process"):
        _, made = search(EVERY | {Tile(8, 16): 0.001})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(EVERY, kernel="_another_kernel")
        again, made_again = search(EVERY)
    assert again == [Tile(8, 16)] == [made] == [made_again]


def test_two_processes_keep_what_both_found(tunes, monkeypatch):
    search(EVERY, kernel="_first_kernel")
    mine = tuning._chosen
    monkeypatch.setattr(tuning, "_chosen", {})
    search(EVERY, kernel="_second_kernel")
    monkeypatch.setattr(tuning, "_chosen", mine)
    search(EVERY, kernel="_third_kernel")
    assert {key.split()[0] for key in held(tunes)} == {"_first_kernel", "_second_kernel", "_third_kernel"}


def test_without_the_switch_nothing_is_searched_for(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTAMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "ENABLED", False)
    ran, made = search(EVERY)
    assert ran == [Tile(4, 8)] == [made]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("tiles", ["frozen", "small_tiles", "tiny_tiles"])
@given(data=st.data())
def test_every_launch_is_one_that_a_program_can_have(request, triton_backend, tiles, data):
    """For any size and dtype warps and tiles are powers of two, and there are some."""
    if tiles != "frozen":
        request.getfixturevalue(tiles)
    config = import_module("fastamp.kernels.config")
    size, batch = (data.draw(st.integers(0, 20).flatmap(lambda power: st.integers(1, 2**power))) for _ in range(2))
    stored, itemsize = data.draw(st.sampled_from([(2, 4), (4, 4), (8, 8)]))
    keeps_all, flag = (data.draw(st.booleans()) for _ in range(2))
    policy = Policy(keeps_all=keeps_all, loss=data.draw(st.sampled_from(["cross_entropy", "binary_cross_entropy"])))
    head = config.linear_head_config(batch, min(size, 16), batch % 2048 + 1, itemsize)
    launches = [
        config.forward_config(batch, size, itemsize, policy, dense_target=flag),
        config.backward_config(size, itemsize, policy),
        config.select_config(size, itemsize, policy, dense_target=flag),
        config.mix_config(size, stored),
        config.remix_config(size, itemsize),
        config.inner_product_config(size, stored),
        config.embedding_grad_config(size, itemsize),
        head and head._replace(rows=1),  # of which a program takes one after the other
    ]
    for launch in filter(None, launches):
        numbers = {name: value for name, value in launch._asdict().items() if name not in ("in_registers", "part")}
        assert all(value >= 1 and value & (value - 1) == 0 for value in numbers.values()), launch
        assert launch.num_warps <= tuning.MAX_WARPS, launch
    wide, narrow = (config.select_config(*of, policy, dense_target=flag) for of in ((size, 8), (2 * size, 4)))
    if policy.loss == "cross_entropy":
        assert wide.num_warps == narrow.num_warps, "as many words want as many warps"


def test_every_kernel_has_a_case_that_is_compiled():
    record = json.loads((Path(__file__).parents[1] / "bench" / "results" / "codegen.json").read_text())
    modules = [module for name, module in sys.modules.items() if name.startswith("fastamp.kernels.")]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels == {row["kernel"] for row in record["rows"]}


def test_the_switch_is_0_or_1(monkeypatch):
    for value, enabled in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("FASTAMP_AUTOTUNE", value)
        assert tuning._is_on() is enabled
    monkeypatch.setenv("FASTAMP_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="FASTAMP_AUTOTUNE must be 0 or 1, got 'yes'"):
        tuning._is_on()


def test_the_folder_follows_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTAMP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / "fastamp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning.folder() == tmp_path / "home" / ".cache" / "fastamp"


@pytest.mark.parametrize(
    "more",
    [{"options": {"label_smoothing": 0.1}}, {"options": {"tie_tol": 0.0}}, {"weighted": True}],
    ids=["smoothed", "to the letter", "weighted"],
)
def test_what_a_kernel_is_compiled_for_is_searched_for_by_itself(tunes, candidates, more):
    """A launch that suits one specialisation may have no room for another's registers."""
    found, _ = candidates
    seen = []
    for marks in ({}, more):
        options = {"pairing": "matching", **marks.get("options", {})}
        case = StepCase("case", batch=3, classes=141, **{**marks, "options": options})
        assert not check_case(case, TRITON_DEVICE, "triton", torch.float32).failures
        seen.append({key for key in found if key.startswith("_amp_cross_entropy_kernel")})
    assert seen[0] < seen[1]
