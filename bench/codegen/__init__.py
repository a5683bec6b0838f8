"""What the compiler makes of every kernel for GPUs that need not be here: registers, spills, bytes, instructions.

    python -m bench.codegen --out bench/results

From the root of a checkout; no part of the installed package. Importing this needs no Triton; its modules do, in a
process where TRITON_INTERPRET is not set, since triton.jit decides when a kernel is defined whether it will be compiled
or interpreted.
"""

TARGETS = {"sm_80": "cuda:80", "sm_90": "cuda:90", "sm_100": "cuda:100", "gfx90a": "hip:gfx90a", "gfx942": "hip:gfx942"}
