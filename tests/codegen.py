"""Compile what the launch heuristics can choose, for GPUs that are not here; print one JSON line a kernel.

Run as a program, in a process where TRITON_INTERPRET is not set: triton.jit decides when a kernel is defined
whether it will be compiled or interpreted.

    python tests/codegen.py cuda:90 rows mix       # any of GROUPS_OF_CASES
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
from codegen_cases import ASSERTING_KERNELS, GROUPS_OF_CASES, Case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastamp.kernels.rows import ASSERTING

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_case(case: Case, target: GPUTarget) -> dict[str, Any]:
    """Compile, and read registers, spills and the narrowest vector access off the machine code."""
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    constants = {name: case.constants.get(name) for name in names if signature[name] == "constexpr"}
    for parameter in case.kernel.params:
        # A launch would compile another kernel than this: with its value left open.
        if parameter.name in constants and not parameter.is_constexpr and parameter.annotation_type:
            raise TypeError(f"{parameter.name} has a type, so a launch does not make a constant of it")
    aligned = [name for name in case.aligned if name in case.signature]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    start = time.perf_counter()
    source = ASTSource(case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps} | (ASSERTING if case.kernel in ASSERTING_KERNELS else {})
    compiled = triton.compile(source, target=target, options=options)
    found: dict[str, Any] = {"case": case.name, "kernel": case.kernel.__name__, "warps": case.num_warps}
    found["seconds"] = round(time.perf_counter() - start, 2)
    if target.backend == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", "-sass", file.name]
            dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found |= {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
        accesses_to_local = len(re.findall(r"\b(?:STL|LDL)\b", dump))
        # Far below the limit ptxas may park one register in a slot to reach the next step of occupancy: its choice,
        # reported as "parked". A spill is what the limit forced, or anything beyond that one slot.
        limit = min(255, 65536 // (32 * case.num_warps))
        parked = found["stack"] <= 8 and found["reg"] < limit
        found["parked" if parked else "spills"] = accesses_to_local
        found.setdefault("spills", 0)
        accesses = re.findall(r"(?:ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
        found["widest"] = max((int(count or 1) * int(bits) // 8 for count, bits in accesses), default=0)
    else:
        assembly = compiled.asm["amdgcn"]
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
            found[key] = max(int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", assembly))
        found["spills"] = found["vgpr_spill_count"] + found["private_segment_fixed_size"]
        widths = [int(width or 1) for width in re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", assembly)]
        found["widest"] = 4 * max(widths, default=0)
    held = case.row_bytes // (case.num_warps * target.warp_size)
    found["narrow"] = found["widest"] < min(16, held)
    return found


def main(target_name: str, *groups: str) -> None:
    """Print one JSON line for every case of the groups."""
    backend, arch = target_name.split(":")
    target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    for group in groups:
        for case in GROUPS_OF_CASES[group]():
            print(json.dumps(compile_case(case, target)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
