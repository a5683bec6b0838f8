"""∇λ from the gradient of the mixed rows: reads g and h."""

from support import checked_inputs, operations

from fastamp import functional
from fastamp.benchmarking import plain_lambda_grad


@operations
def test_lambda_grad(measure, benchmark, device, shape, dtype, whose):
    x = checked_inputs("lambda_grad", shape, dtype, device)
    hidden, grad, partner = x["hidden"], x["grad_mixed"], x["partner"]
    benchmark.group = f"lambda_grad {shape} {dtype}"
    moved = 2 * hidden.numel() * hidden.element_size()
    if whose == "fastamp":
        measure(lambda _: functional.lambda_grad(grad, hidden, partner), moved=moved)
    else:
        measure(lambda _: plain_lambda_grad(grad, hidden, partner), moved=moved)
