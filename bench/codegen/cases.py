"""What the launch heuristics can choose, kernel by kernel, and the least that each has to move.

The floor is counted per element of the largest matrix: for AMP on logits, z is read once and its gradient written once.
Probabilities as targets are read as well. What a row holds once (λ, its loss) and what all rows share (class weights)
is counted but is not in the floor; it weighs where rows are short.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fastamp.kernels import (
    config,
    embedding_mix,
    launch,
    linear_amp_cross_entropy,
    rows_binary,
    rows_few,
    rows_grad,
    rows_loop,
    rows_registers,
)
from fastamp.kernels import select_cross_entropy as select

from .case import DTYPES, Case, data_type, tiles, variants
from .layer_cases import draw_cases, embedding_cases, mix_cases, remix_cases, select_cases

TOTAL_ROWS = 4096  # rows that _amp_total_kernel sums


def row_signature(itemsize: int, data: str, soft: bool, weighted: bool) -> dict[str, str]:
    """Types of what all kernels over rows of logits take."""
    wide = DTYPES[itemsize]
    signature = {"logits_ptr": data, "target_ptr": data if soft else "*i64", "lam_ptr": wide, "partner_ptr": "*i64"}
    signature |= {"rows_ptr": wide, "B": "i32", "C": "i32", "stride_zm": "i64"}
    return signature | ({"weight_ptr": wide} if weighted else {})


def row_cases(
    itemsize: int, sizes: list[tuple[int, int]], *, matched: bool = False, binary: bool = False
) -> Iterator[Case]:
    """The forward at (B, C) in `sizes`: rows of few classes, rows in registers, and longer ones by loops."""
    for name, policy, soft, weighted in variants(matched=matched, binary=binary):
        width, data = data_type(itemsize, weighted)
        for batch, classes in sizes:
            launch = config.forward_config(batch, classes, itemsize, policy, dense_target=soft)
            few, by_loops = launch.block_b > 1, not launch.in_registers
            signature = row_signature(itemsize, data, soft, weighted) | {"step_size": "fp64", "divisor": "fp64"}
            signature |= {"dlogits_ptr": data} if (matched and not binary) or not by_loops else {}
            constants = {"stride_zn": 1, "policy": policy, "BLOCK_C": launch.block_c}
            if few:
                kernel = rows_few._amp_few_classes_kernel
                constants["BLOCK_B"] = launch.block_b
                if launch.block_b >= batch:
                    signature |= {"loss_ptr": DTYPES[itemsize], "divisor_ptr": DTYPES[itemsize]}
            else:
                kernel = rows_loop._amp_rows_kernel if by_loops else rows_registers._amp_cross_entropy_kernel
                constants |= {"ALIGN": 8, "BLOCK_CAREFUL": config.careful_block(launch, itemsize, policy)}
                if binary:
                    kernel = rows_binary._amp_binary_kernel
                    constants["WHOLE"] = launch.in_registers
            if not matched and not by_loops and batch > config.SEARCH_ROWS:
                signature |= {"inverse_ptr": "*i64"}
            tile = tiles(classes, launch.block_c) if by_loops else launch.block_c
            yield Case(
                f"{name} {data[1:]} B={batch} C={classes}",
                kernel,
                launch,
                signature,
                constants,
                ("logits_ptr", "dlogits_ptr"),
                elements=(2 if matched and not few else launch.block_b) * tile,
                floor=(1 + soft + ("dlogits_ptr" in signature)) * width,
                row_bytes=launch.block_c * width if classes >= 1000 else 0,
                sizes={"C": classes} if by_loops else {"B": batch},
            )


def grad_cases(itemsize: int, *, matched: bool = False, binary: bool = False) -> Iterator[Case]:
    """The gradient from those scalars: few classes, several, and rows of many tiles."""
    for name, policy, soft, weighted in variants(matched=matched, binary=binary):
        width, data = data_type(itemsize, weighted)
        for classes in (32000,) if matched else (2, 64, 32000):
            launch = config.backward_config(classes, itemsize, policy)
            signature = row_signature(itemsize, data, soft, weighted)
            signature |= {"upstream_ptr": DTYPES[itemsize], "stride_u": "i64", "inverse_ptr": "*i64"}
            signature |= {"dlogits_ptr": data, "divisor_ptr": DTYPES[itemsize]}
            constants = {"stride_zn": 1, "policy": policy, "ALIGN": 8 if classes % 8 == 0 else 1}
            yield Case(
                f"{name} {data[1:]} C={classes}",
                rows_grad._amp_rows_grad_kernel,
                launch,
                signature,
                constants | {"BLOCK_B": launch.block_b, "BLOCK_C": launch.block_c},
                ("logits_ptr", "dlogits_ptr"),
                elements=(2 if matched else launch.block_b) * launch.block_c,
                floor=(3 if soft else 2) * width,
                row_bytes=launch.block_c * width if classes >= 1000 else 0,
            )


def head_cases(itemsize: int, shapes: list[tuple[int, int, int]], *, binary: bool = False) -> Iterator[Case]:
    """The head kernel at (B, D, C)."""
    for name, policy, soft, weighted in variants(binary=binary):
        for batch, depth, classes in shapes:
            launch = config.linear_head_config(batch, classes, depth, itemsize)
            if launch is None:
                continue
            # With a comparison, binary cross-entropy takes the closed form.
            policy = policy._replace(keeps_all=policy.keeps_all or binary)
            wide = DTYPES[itemsize]
            pointers = ("hidden", "weight", "bias", "lam", "rows", "dhidden", "dweight", "dbias")
            signature = {f"{pointer}_ptr": wide for pointer in pointers}
            signature |= {"target_ptr": wide if soft else "*i64", "partner_ptr": "*i64"}
            signature |= {"inverse_ptr": "*i64"} if batch > config.SEARCH_ROWS else {}
            signature |= {"B": "i32", "C": "i32", "D": "i32", "stride_hm": "i64", "stride_u": "i64"}
            signature |= {"step_size": "fp64", "divisor": "fp64"}
            signature |= {"class_weight_ptr": wide, "keep_ptr": wide, "upstream_ptr": wide} if weighted else {}
            tile = {"ROWS": launch.rows, "BLOCK_C": launch.block_c, "BLOCK_D": launch.block_d}
            yield Case(
                f"{name} {wide[1:]} B={batch} D={depth} C={classes}",
                linear_amp_cross_entropy._linear_amp_cross_entropy_kernel,
                launch,
                signature,
                {"policy": policy, "RELU": weighted and not binary, **tile},
                ("hidden_ptr", "dhidden_ptr", "stride_hm", "D"),
                elements=launch.rows * launch.block_d,
                floor=(3 if weighted else 2) * itemsize,  # and a dropout mask
            )


def small_cases() -> Iterator[Case]:
    """The sum of the losses and the rescaling of the gradient."""
    for itemsize in (4, 8):
        wide = DTYPES[itemsize]
        yield Case(
            f"{wide[1:]} B={TOTAL_ROWS}",
            rows_grad._amp_total_kernel,
            config.TOTAL_BLOCK,
            {"rows_ptr": wide, "loss_ptr": wide, "divisor_ptr": wide, "B": "i32", "divisor": "fp64", "assumed": "fp64"},
            {"BLOCK": config.TOTAL_BLOCK, "TURNS": config.TOTAL_TURNS},
            (),
            elements=tiles(TOTAL_ROWS, config.TOTAL_BLOCK),
            floor=2 * itemsize,
            sizes={"B": TOTAL_ROWS},
            warps=4,
        )
    pointers = {"dlogits_ptr": "*bf16", "upstream_ptr": "*fp32", "divisor_ptr": "*fp32"}
    yield Case(
        "bf16",
        rows_grad._rescale_kernel,
        config.RESCALE_BLOCK,
        {**pointers, "numel": "i64", "assumed": "fp64"},
        {"BLOCK": config.RESCALE_BLOCK},
        ("dlogits_ptr", "numel"),
        elements=config.RESCALE_BLOCK,
        floor=4,
        warps=8,
    )


FEW = [(64, 6), (64, 16), (4096, 2), (4096, 16)]
REGISTERS = [(1024, 100), (4096, 1000), (4096, 2048), (4096, 4096)]
LOOP = [(64, 32000)]
BINARY = [(64, 6), (1024, 100), (4096, 1000), (4096, 4096), *LOOP]
HEADS = [(50, 300, 6), (24, 768, 5), (24, 768, 2), (512, 1024, 8), (50, 512, 16)]
ASSERTING_KERNELS = (
    rows_binary._amp_binary_kernel,
    rows_few._amp_few_classes_kernel,
    rows_registers._amp_cross_entropy_kernel,
    rows_loop._amp_rows_kernel,
    linear_amp_cross_entropy._linear_amp_cross_entropy_kernel,
    embedding_mix._embedding_mix_kernel,
    select._select_few_classes_kernel,
    select._select_kernel,
    launch._inverse_kernel,
)
GROUPS_OF_CASES = {
    "rows": lambda: row_cases(4, FEW + REGISTERS + LOOP),
    "rows-fp64": lambda: row_cases(8, [(50, 6), (4096, 100), (4096, 2048), *LOOP]),
    "pairs": lambda: itertools.chain(row_cases(4, REGISTERS + LOOP, matched=True), grad_cases(4, matched=True)),
    "pairs-fp64": lambda: row_cases(8, [(4096, 2048), *LOOP], matched=True),
    "grad": lambda: grad_cases(4),
    "grad-fp64": lambda: grad_cases(8),
    "head": lambda: head_cases(4, HEADS),
    "head-fp64": lambda: head_cases(8, [(50, 300, 3), (24, 768, 2)]),
    "binary": lambda: itertools.chain(
        row_cases(4, BINARY, binary=True),
        row_cases(4, BINARY[1:], matched=True, binary=True),
        grad_cases(4, binary=True),
        grad_cases(4, matched=True, binary=True),
        head_cases(4, HEADS[:3], binary=True),
        select_cases(4, [6, 4096], binary=True),
    ),
    "binary-fp64": lambda: row_cases(8, [(50, 6), (4096, 1000)], binary=True),
    "small": small_cases,
    "draw": draw_cases,
    "mix": mix_cases,
    "remix": remix_cases,
    "embedding": embedding_cases,
    "select": lambda: select_cases(4, [6, 4096, 128_000]),
    "select-fp64": lambda: select_cases(8, [2048, 128_000]),
}
