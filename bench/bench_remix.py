"""∇λ, λ' and the rows at λ' (MaxOp): reads g once and h twice, writes m."""

from support import checked_inputs, operations, plain_mix

from fastamp import functional


@operations
def test_remix(measure, benchmark, device, shape, dtype, whose):
    x = checked_inputs("remix", shape, dtype, device)
    hidden, lam, partner, grad = x["hidden"], x["lam"], x["partner"], x["grad_mixed"]
    benchmark.group = f"remix {shape} {dtype}"
    narrow = lam.to(hidden.dtype)

    def composed(_):
        slope = (grad * (hidden - hidden[partner])).flatten(1).sum(1)
        lam_adv = narrow + 2e-3 * slope.clamp(-1, 1)
        return lam_adv, plain_mix(hidden, lam_adv, partner)

    moved = 4 * hidden.numel() * hidden.element_size()
    run = composed if whose == "PyTorch" else lambda _: functional.remix(hidden, lam, partner, grad)
    measure(run, moved=moved)
