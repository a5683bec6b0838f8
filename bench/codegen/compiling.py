"""Compile one case for one target, and read off the machine code what it takes and moves."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastamp.kernels.rows import ASSERTING, OPTIONS

from . import TARGETS
from .case import Case
from .cases import ASSERTING_KERNELS, GROUPS_OF_CASES
from .instructions import issued
from .occupancy import ARCHITECTURES, occupancy
from .traffic import loop_turns, program_traffic

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# A PTX access: its direction, how many elements, bits of each.
PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(\w+)")
AMD_WIDTHS = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}


def compile_group(target: str, group: str) -> list[dict[str, Any]]:
    """A row of the report for every case of a group in GROUPS_OF_CASES, compiled for a target in TARGETS."""
    return [compile_case(case, target) for case in GROUPS_OF_CASES[group]()]


def compiled(case: Case, target: str) -> Any:
    """What Triton makes of a case.

    Args:
        case: what to compile.
        target: a name in TARGETS.

    Raises:
        TypeError: the case takes for a constant what a launch would leave open.
    """
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    constants = {name: case.constants.get(name) for name in names if signature[name] == "constexpr"}
    for parameter in case.kernel.params:
        # A launch would compile another kernel than this: with its value left open.
        if parameter.name in constants and not parameter.is_constexpr and parameter.annotation_type:
            raise TypeError(f"{parameter.name} has a type, so a launch does not make a constant of it")
    aligned = [name for name in case.aligned if name in case.signature]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, **(ASSERTING if case.kernel in ASSERTING_KERNELS else OPTIONS)}
    backend, arch = TARGETS[target].split(":")
    gpu = GPUTarget(backend, int(arch) if backend == "cuda" else arch, ARCHITECTURES[target].warp_size)
    return triton.compile(source, target=gpu, options=options)


def compile_case(case: Case, target: str) -> dict[str, Any]:
    """One row of the report; arguments as `compiled` takes them."""
    made, kernel = compiled(case, target), case.kernel.__name__
    nvidia, shared = TARGETS[target].startswith("cuda"), made.metadata.shared
    sass = _tool(made, "nvdisasm", "-g", "-c") if nvidia else ""
    taken = _nvidia(made, sass, case.num_warps) if nvidia else _amd(made, kernel)
    text, arguments = made.asm["ttgir"], [name for name in case.kernel.arg_names if name in case.signature]
    moved = program_traffic(text, arguments, case.sizes)
    mostly = program_traffic(text, arguments, case.sizes, first_branch=True)
    row = {
        "target": target,
        "kernel": kernel,
        "case": case.name,
        "launch": str(case.launch),
        "warps": case.num_warps,
        "shared": shared,
        "occupancy": round(occupancy(target, taken["registers"], case.num_warps, shared), 4),
        **taken,
        "elements": case.elements,
        "read": moved.read,
        "written": moved.written,
        "mostly_read": mostly.read,
        "mostly_written": mostly.written,
        "floor": case.floor,
        "instructions": issued(sass, kernel, loop_turns(text, arguments, case.sizes)) if nvidia else None,
    }
    held = case.row_bytes // (case.num_warps * ARCHITECTURES[target].warp_size)
    return row | {"narrow": row["load_width"] < min(16, held)}


def _tool(compiled: Any, name: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def _nvidia(compiled: Any, sass: str, num_warps: int) -> dict[str, int]:
    resources = _tool(compiled, "cuobjdump", "--dump-resource-usage")
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", resources)}
    # Far below the limit ptxas may park one register in a slot to reach the next step of occupancy: its choice. A spill
    # is what the limit forced, or anything beyond that one slot.
    parked = used["STACK"] <= 8 and used["REG"] < min(255, 65536 // (32 * num_warps))
    accesses_to_local = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    widths: dict[str, list[int]] = {"ld": [], "st": []}
    for way, count, bits in PTX_ACCESS.findall(compiled.asm["ptx"]):
        widths[way].append(int(count or 1) * int(bits) // 8)
    return _found(used["REG"], 0 if parked else accesses_to_local, widths["ld"], widths["st"])


def _amd(compiled: Any, kernel: str) -> dict[str, int]:
    assembly = compiled.asm["amdgcn"]
    # Before it stand the functions that an assertion prints with, and what they load and store.
    body = assembly.partition(f"\n{kernel}:")[2]

    def largest(key: str) -> int:
        return max(int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", assembly))

    widths: dict[str, list[int]] = {"load": [], "store": []}
    for way, what in AMD_ACCESS.findall(body):
        unit, _, count = what.replace("_d16", "").replace("_hi", "").partition("x")
        if unit not in AMD_WIDTHS:
            raise ValueError(f"cannot tell the width of {way}_{what}")
        widths[way].append(AMD_WIDTHS[unit] * int(count or 1))
    spilled = largest("vgpr_spill_count") + largest("private_segment_fixed_size")
    return _found(largest("vgpr_count"), spilled, widths["load"], widths["store"])


def _found(registers: int, spills: int, loads: list[int], stores: list[int]) -> dict[str, int]:
    return {
        "registers": registers,
        "spills": spills,
        "load_width": max(loads, default=0),
        "store_width": max(stores, default=0),
        "loads": len(loads),
        "stores": len(stores),
    }
