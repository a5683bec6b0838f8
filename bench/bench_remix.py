"""∇λ, λ' and the rows at λ' (MaxOp): reads g once and h twice, writes m."""

from support import checked_inputs, operations

from fastamp import functional
from fastamp.benchmarking import plain_remix


@operations
def test_remix(measure, benchmark, device, shape, dtype, whose):
    x = checked_inputs("remix", shape, dtype, device)
    hidden, lam, partner, grad = x["hidden"], x["lam"], x["partner"], x["grad_mixed"]
    benchmark.group = f"remix {shape} {dtype}"
    narrow = lam.to(hidden.dtype)
    moved = 4 * hidden.numel() * hidden.element_size()
    if whose == "fastamp":
        measure(lambda _: functional.remix(hidden, lam, partner, grad), moved=moved)
    else:
        measure(lambda _: plain_remix(hidden, narrow, partner, grad), moved=moved)
