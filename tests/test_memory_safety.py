"""No kernel reads what is not its to read, in a way that matters, or writes what is not its to write.

A guard stands in for the launch: every tensor a kernel is given, with whatever strides, is copied into a larger buffer
of NaN, and what the kernel did to it is copied back. An element read from beyond spoils the result, and a write beyond
shows, also one of NaN: no two NaN of the buffers have the same bits, or hardly any.
"""

import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import sanitize
import torch
from conftest import DTYPES, HAS_GPU, TRITON_DEVICE
from torch import Tensor

import fastamp
from fastamp.conformance import check_case

triton = pytest.importorskip("triton", reason="the package triton is not installed")
import triton.language as tl  # noqa: E402

BENCH = Path(__file__).parents[1] / "bench"
MARGIN = 1 << 14  # elements on either side, more than any tile
INVERSE = {"_inverse_kernel"}
CHUNKS = INVERSE | {"_amp_cross_entropy_kernel", "_amp_rows_kernel", "_amp_rows_grad_kernel"}
LAUNCHED = {
    "amp_cross_entropy": CHUNKS
    | {"_amp_binary_kernel", "_amp_few_classes_kernel", "_amp_total_kernel", "_rescale_kernel"},
    "linear_amp_cross_entropy": CHUNKS | {"_linear_amp_cross_entropy_kernel", "_amp_total_kernel"},
    "mix": INVERSE | {"_mix_kernel", "_mix_grad_kernel"},
    "lambda_grad": {"_inner_product_kernel"},
    "remix": INVERSE | {"_inner_product_kernel", "_remix_kernel", "_mix_grad_kernel"},
    "select_cross_entropy": {"_select_few_classes_kernel", "_select_kernel"},
    "embedding_mix": INVERSE | {"_embedding_mix_kernel", "_run_pieces_kernel", "_long_runs_kernel"},
}
DRAWN = {"_draw_partner_kernel"}
# What goes through tiles of a few elements as well.
SMALL = {
    "amp_cross_entropy": ["probabilities", "pairs", "binary", "several labels, pairs"],
    "linear_amp_cross_entropy": ["head", "relu, dropout", "chunks"],
    "mix": ["words, strided"],
    "lambda_grad": ["words, strided"],
    "remix": ["words, strided"],
    "select_cross_entropy": ["marked rows", "groups of rows"],
    "embedding_mix": ["words, strided", "one word"],
}


CASES = sanitize.small_cases(interpreted=TRITON_DEVICE == "cpu")


class Held:
    """A tensor within a larger buffer."""

    def __init__(self, tensor: Tensor) -> None:
        self.original = one_of_each(tensor)
        sizes_and_strides = list(zip(tensor.shape, tensor.stride(), strict=True))
        span = 1 + sum((size - 1) * stride for size, stride in sizes_and_strides) if tensor.numel() else 0
        # As far from a multiple of 16 bytes as it was: a launch may be compiled for that.
        first = MARGIN + tensor.data_ptr() % 16 // tensor.element_size()
        self.buffer = filled(first + span + MARGIN, tensor)
        self.own = torch.zeros(len(self.buffer), dtype=torch.bool, device=tensor.device)
        self.view = self.buffer.as_strided(tensor.shape, tensor.stride(), first)
        one_of_each(self.own.as_strided(tensor.shape, tensor.stride(), first)).fill_(True)
        one_of_each(self.view).copy_(self.original)
        self.before = self.buffer.clone()

    def give_back(self) -> list[int]:
        """What was written goes to the tensor; positions that were written and are none of its own."""
        changed = (as_bytes(self.buffer) != as_bytes(self.before)).any(1)
        if changed.any():
            self.original.copy_(one_of_each(self.view))
        return (changed & ~self.own).nonzero().flatten().tolist()


def one_of_each(tensor: Tensor) -> Tensor:
    """The tensor without the repetitions that a stride of 0 makes."""
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def filled(length: int, like: Tensor) -> Tensor:
    """NaN with random bits; of int64, what passes for a row, a class or a word and leads to a wrong result."""
    if not like.is_floating_point():
        return torch.randint(2 if like.dtype == torch.int64 else 100, (length,), device=like.device).to(like.dtype)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[like.element_size()]
    random = torch.randint(-(2**15), 2**15, (length,), device=like.device).to(words)
    return (random | torch.full((1,), torch.nan, dtype=like.dtype, device=like.device).view(words)).view(like.dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8).view(len(tensor), tensor.element_size())


class Guard:
    """Stands in for the launch of every kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: set[str] = set()
        self.stray: list[str] = []
        kernels = type(total_kernel)
        run = kernels.run

        def guarded(kernel, *arguments, **options):
            held = [Held(value) if isinstance(value, Tensor) else None for value in arguments]
            given = [value if one is None else one.view for value, one in zip(arguments, held, strict=True)]
            result = run(kernel, *given, **options)
            self.launched.add(kernel.__name__)
            for name, one in zip(kernel.arg_names, held, strict=False):
                places = [] if one is None else one.give_back()
                if places:
                    self.stray.append(f"{kernel.__name__} writes beyond {name}, at {places[:5]} of {len(one.buffer)}")
            return result

        monkeypatch.setattr(kernels, "run", guarded)


@triton.jit
def total_kernel(
    values_ptr,  # (N,)
    totals_ptr,  # (N,)
    N,
    READ_BEFORE: tl.constexpr,
    READ_AFTER: tl.constexpr,
    WRITE_BEFORE: tl.constexpr,
    WRITE_AFTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of all values to every place, and read or write further than that."""
    at = tl.arange(0, BLOCK) - 1
    read = (at >= -READ_BEFORE) & (at < N + READ_AFTER)
    total = tl.sum(tl.load(values_ptr + at, mask=read, other=0.0))
    written = (at >= -WRITE_BEFORE) & (at < N + WRITE_AFTER)
    tl.store(totals_ptr + at, tl.zeros((BLOCK,), tl.float32) + total, mask=written)


def launch_total(totals=None, **further) -> Tensor:
    totals = torch.zeros(13, device=TRITON_DEVICE) if totals is None else totals
    beyond = dict.fromkeys(("READ_BEFORE", "READ_AFTER", "WRITE_BEFORE", "WRITE_AFTER"), 0) | further
    total_kernel[(1,)](torch.ones(13, device=TRITON_DEVICE), totals, 13, **beyond, BLOCK=16)
    return totals


def test_the_guard_lets_pass_what_is_right(monkeypatch):
    guard = Guard(monkeypatch)
    assert launch_total().tolist() == [13.0] * 13
    assert guard.launched == {"total_kernel"}
    assert not guard.stray


@pytest.mark.parametrize("further", ["READ_BEFORE", "READ_AFTER"])
def test_the_guard_shows_one_element_read_too_far(monkeypatch, further):
    Guard(monkeypatch)
    assert launch_total(**{further: 1}).isnan().all()


@pytest.mark.parametrize(("further", "place"), [("WRITE_BEFORE", MARGIN - 1), ("WRITE_AFTER", MARGIN + 13)])
def test_the_guard_shows_one_element_written_too_far(monkeypatch, further, place):
    guard = Guard(monkeypatch)
    assert launch_total(**{further: 1}).tolist() == [13.0] * 13
    assert guard.stray == [f"total_kernel writes beyond totals_ptr, at [{place}] of {2 * MARGIN + 13}"]


def test_the_guard_shows_what_is_written_between_the_elements_of_a_view(monkeypatch):
    guard = Guard(monkeypatch)
    wide = torch.zeros(26, device=TRITON_DEVICE)
    launch_total(wide[::2])
    assert len(guard.stray) == 1
    assert wide[1::2].eq(0).all()


@pytest.mark.parametrize("op", LAUNCHED)
def test_kernels_stay_within_their_tensors(monkeypatch, op):
    """Dtypes take turns: each case runs in one, or on a GPU in all."""
    guard = Guard(monkeypatch)
    for number, case in enumerate(case for case in CASES if case.op == op):
        for dtype in DTYPES if HAS_GPU else DTYPES[number % 4 :][:1]:
            assert_stays_within(guard, case, dtype)
    assert guard.launched == LAUNCHED[op]


@pytest.mark.parametrize("op", LAUNCHED)
def test_kernels_stay_within_their_tensors_where_tiles_are_small(
    monkeypatch, small_tiles, tiny_tiles, many_programs, op
):
    guard = Guard(monkeypatch)
    head = import_module("fastamp.kernels.linear_amp_cross_entropy")
    one_row = head.linear_head_config
    monkeypatch.setattr(head, "linear_head_config", lambda *given, **more: one_row(*given, **more)._replace(rows=2))
    for name in SMALL[op]:
        (case,) = [case for case in CASES if case.op == op and case.name == name]
        assert_stays_within(guard, case, torch.float32)


@pytest.mark.parametrize("batch", [1, 3, 50, 257])
def test_the_draw_of_partners_stays_within_its_tensors(monkeypatch, batch):
    guard = Guard(monkeypatch)
    for alpha, pairing in ((1.0, "permutation"), (0.3, "matching"), (1.0, "matching")):
        with fastamp.set_backend("triton"):
            partner = fastamp.AMPLoss(alpha=alpha, pairing=pairing).sample(batch, device=TRITON_DEVICE).partner
        assert partner.sort().values.tolist() == list(range(batch))
    assert not guard.stray
    assert guard.launched == DRAWN


def assert_stays_within(guard, case, dtype):
    """The case holds the contract, and nothing was written elsewhere."""
    finding = check_case(case, TRITON_DEVICE, "triton", dtype)
    assert not finding.failures, f"{case.op} [{case.name}] in {dtype}: {finding.failures}"
    assert not guard.stray, f"{case.op} [{case.name}] in {dtype}: {guard.stray}"


def test_every_kernel_is_among_those_launched():
    package = import_module("fastamp.kernels")
    modules = [import_module(f"fastamp.kernels.{module.name}") for module in pkgutil.iter_modules(package.__path__)]
    defined = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert defined == DRAWN.union(*LAUNCHED.values())


def test_the_sanitizer_run_is_rehearsed_without_it(tmp_path):
    """As a program: it interprets kernels, which in this process may be compiled."""
    code = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
import sanitize
every = sanitize.small_cases
sanitize.small_cases = lambda *, interpreted: every(interpreted=interpreted)[:1]
sanitize.main()
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, str(tmp_path), "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == ["no GPU: the cases were interpreted", "2 cases ran"]
    text = (tmp_path / "sanitize.json").read_text()
    assert '"cases": 2' in text
    assert "no GPU: the cases were interpreted" in text


def test_no_function_of_the_sanitizer_run_changes_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, "run_cases", lambda device: 0)
    before = dict(os.environ)
    assert sanitize.sanitize(tmp_path, "cpu")
    assert dict(os.environ) == before


def test_what_a_tool_found_is_told_apart():
    clean = sanitize.summarise("memcheck", 0, "========= ERROR SUMMARY: 0 errors\n", 1.0)
    assert (clean["outcome"], clean["errors"], clean["kernels"]) == ("clean", 0, [])
    log = "========= Invalid __global__ read of size 4 bytes\n=========     at _mix_kernel+0x1d0 in mix.py:84\n"
    found = sanitize.summarise("memcheck", sanitize.FOUND_ERRORS, f"{log}========= ERROR SUMMARY: 3 errors\n", 1.0)
    assert (found["outcome"], found["errors"], found["kernels"]) == ("errors", 3, ["_mix_kernel"])
    assert "Invalid __global__ read" in found["log"][0]
    older = sanitize.summarise("memcheck", sanitize.FOUND_ERRORS, "=========     at 0x1d0 in _mix_kernel\n", 1.0)
    assert older["kernels"] == ["_mix_kernel"]
    assert sanitize.summarise("racecheck", None, "", 150.0)["outcome"].startswith("ran out")
    assert sanitize.summarise("initcheck", 0, "Target application returned an error", 1.0)["outcome"] != "clean"


def test_every_tool_runs_the_cases_and_is_summed_up(tmp_path, monkeypatch):
    """With a program in the tool's place: one tool finds an error, one ends badly, one is clean."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"""#!{sys.executable}
import os, sys
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
assert sys.argv[-3:] == ["--cases", "--device", "cuda"]
name = sys.argv[sys.argv.index("--tool") + 1]
print("========= " + dict(memcheck="ERROR", racecheck="RACECHECK", initcheck="No")[name] + " SUMMARY: 0 and more")
sys.exit(dict(memcheck=0, racecheck=int(sys.argv[sys.argv.index("--error-exitcode") + 1]), initcheck=1)[name])
"""
    )
    tool.chmod(0o755)
    outcomes = {found["tool"]: found["outcome"] for found in sanitize.run_tools(str(tool))}
    assert outcomes == {"memcheck": "clean", "racecheck": "errors", "initcheck": "failed, code 1"}
