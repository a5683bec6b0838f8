"""What the launch heuristics can choose, kernel by kernel: the cases that codegen.py compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton

from fastamp.kernels import RowPolicy, amp_cross_entropy, config, embedding_mix, linear_head, mix, remix, rows_loop
from fastamp.kernels import select_cross_entropy as select

PLAIN = RowPolicy("amp", False, 1.0, False, -100, 0.0, 0.0, 4.8e-7)
MASKED = PLAIN._replace(tie_rel=0.0, clamp=True, label_smoothing=0.1)
DTYPES = {2: "*bf16", 4: "*fp32", 8: "*fp64"}


class Case(NamedTuple):
    """One specialisation of one kernel."""

    name: str
    kernel: Any
    signature: dict[str, str]  # of the arguments that are not constants
    constants: dict[str, Any]
    aligned: tuple[str, ...]  # arguments divisible by 16
    num_warps: int
    row_bytes: int  # bytes of a row in one tile, to be read in vectors; 0: too short to ask


def variants(itemsize: int) -> Iterator[tuple[str, RowPolicy, bool, bool]]:
    """Name, policy, soft targets, class weights: the lightest and the heaviest of each loss."""
    yield "cross_entropy", PLAIN, False, False
    yield "cross_entropy+all", MASKED, True, True
    if itemsize == 4:
        yield "softmax_bce", PLAIN._replace(bce=True), False, False
    yield "softmax_bce+all", MASKED._replace(bce=True), True, True


def row_signature(itemsize: int, data: str, soft: bool, weighted: bool) -> dict[str, str]:
    wide = DTYPES[itemsize]
    signature = {"logits_ptr": data, "target_ptr": data if soft else "*i64", "lam_ptr": wide, "partner_ptr": "*i64"}
    signature |= {"rows_ptr": wide, "B": "i32", "C": "i32", "stride_zm": "i64"}
    return signature | ({"weight_ptr": wide} if weighted else {})


def row_cases(itemsize: int, sizes: list[tuple[int, int]], bce_sizes: list[tuple[int, int]]) -> Iterator[Case]:
    """The register kernel at (B, C) in `sizes`; softmax_bce at every launch that only it has, and some others."""
    for name, policy, soft, weighted in variants(itemsize):
        for batch, classes in bce_sizes if policy.bce else sizes:
            launch = config.forward_config(batch, classes, itemsize, policy)
            if not launch.in_registers:
                continue
            # bfloat16 where the registers are fewest; float32 where they are most.
            width = 2 if itemsize == 4 and not weighted else itemsize
            data = DTYPES[width]
            wide = DTYPES[itemsize]
            signature = row_signature(itemsize, data, soft, weighted)
            signature |= {"dlogits_ptr": data, "step_size": "fp64", "divisor": "fp64"}
            single = launch.block_b >= batch
            signature |= {"loss_ptr": wide, "divisor_ptr": wide} if single else {"inverse_ptr": "*i64"}
            constants = {"stride_zn": 1, "policy": policy, "BLOCK_B": launch.block_b, "BLOCK_C": launch.block_c}
            long = classes >= 1024
            yield Case(
                f"{name} B={batch} C={classes} {launch}",
                amp_cross_entropy._amp_cross_entropy_kernel,
                signature,
                constants,
                ("logits_ptr", "dlogits_ptr", "stride_zm", "C") if long else ("logits_ptr", "dlogits_ptr"),
                launch.num_warps,
                launch.block_c * width if long else 0,
            )


def loop_cases(itemsize: int) -> Iterator[Case]:
    for name, policy, soft, weighted in variants(itemsize):
        launch = config.forward_config(64, 32000, itemsize, policy)
        width = 2 if itemsize == 4 and not weighted else itemsize
        data = DTYPES[width]
        yield Case(
            f"{name} {launch}",
            rows_loop._amp_rows_kernel,
            row_signature(itemsize, data, soft, weighted) | {"step_size": "fp64"},
            {"stride_zn": 1, "policy": policy, "BLOCK_C": launch.block_c},
            ("logits_ptr", "stride_zm", "C"),
            launch.num_warps,
            launch.block_c * width,
        )


def grad_cases(itemsize: int) -> Iterator[Case]:
    for name, policy, soft, weighted in variants(itemsize):
        for classes in (2, 64, 32000):
            launch = config.backward_config(classes, itemsize, policy)
            width = 2 if itemsize == 4 and not weighted else itemsize
            data = DTYPES[width]
            signature = row_signature(itemsize, data, soft, weighted)
            signature |= {"inverse_ptr": "*i64", "upstream_ptr": DTYPES[itemsize], "stride_u": "i64"}
            signature |= {"dlogits_ptr": data, "divisor_ptr": DTYPES[itemsize]}
            long = classes >= 1024
            yield Case(
                f"{name} C={classes} {launch}",
                rows_loop._amp_rows_grad_kernel,
                signature,
                {"stride_zn": 1, "policy": policy, "BLOCK_B": launch.block_b, "BLOCK_C": launch.block_c},
                ("logits_ptr", "dlogits_ptr", "stride_zm", "C") if long else ("logits_ptr", "dlogits_ptr"),
                launch.num_warps,
                launch.block_c * width if long else 0,
            )


def head_cases(itemsize: int, shapes: list[tuple[int, int, int]]) -> Iterator[Case]:
    """The head kernel at (B, D, C)."""
    for name, policy, soft, weighted in variants(itemsize):
        for batch, depth, classes in shapes:
            launch = config.linear_head_config(batch, classes, depth, itemsize, bce=policy.bce)
            if launch is None:
                continue
            wide = DTYPES[itemsize]
            pointers = ("hidden", "weight", "bias", "lam", "rows", "dhidden", "dweight", "dbias")
            signature = {f"{pointer}_ptr": wide for pointer in pointers}
            signature |= {"target_ptr": wide if soft else "*i64", "partner_ptr": "*i64", "inverse_ptr": "*i64"}
            signature |= {"B": "i32", "C": "i32", "D": "i32", "stride_hm": "i64", "stride_u": "i64"}
            signature |= {"step_size": "fp64", "divisor": "fp64"}
            signature |= {"class_weight_ptr": wide, "keep_ptr": wide, "upstream_ptr": wide} if weighted else {}
            yield Case(
                f"{name} B={batch} D={depth} C={classes} {launch}",
                linear_head._linear_head_kernel,
                signature,
                {
                    "policy": policy,
                    "RELU": weighted,
                    "ROWS": launch.rows,
                    "BLOCK_C": launch.block_c,
                    "BLOCK_D": launch.block_d,
                },
                ("hidden_ptr", "dhidden_ptr", "stride_hm", "D"),
                launch.num_warps,
                0,
            )


def small_cases() -> Iterator[Case]:
    """The sum of the losses and the rescaling of the gradient."""
    for wide in ("*fp32", "*fp64"):
        yield Case(
            f"total {wide}",
            rows_loop._amp_total_kernel,
            {"rows_ptr": wide, "loss_ptr": wide, "divisor_ptr": wide, "B": "i32", "divisor": "fp64"},
            {"BLOCK": config.TOTAL_BLOCK},
            (),
            4,
            0,
        )
    yield Case(
        "rescale",
        rows_loop._rescale_kernel,
        {
            "dlogits_ptr": "*bf16",
            "upstream_ptr": "*fp32",
            "divisor_ptr": "*fp32",
            "numel": "i64",
            "assumed": "fp64",
        },
        {"BLOCK": config.RESCALE_BLOCK},
        ("dlogits_ptr", "numel"),
        8,
        0,
    )


def mix_cases() -> Iterator[Case]:
    """Both directions of mixing, and the inner product, of rows of every dtype: few, several and many tiles wide."""
    for itemsize, widths in ((2, (6, 30720)), (4, (768,)), (8, (30720,))):
        data, wide = DTYPES[itemsize], DTYPES[max(4, itemsize)]
        for width in widths:
            launch = config.mix_config(width, itemsize)
            block = {"BLOCK_B": launch.block_b, "BLOCK_N": launch.block_c}
            rest = {"lam_ptr": wide, "B": "i32", "N": "i32"}
            row_bytes = launch.block_c * itemsize if width >= 768 else 0
            for kernel, read, index, written in (
                (mix._mix_kernel, "hidden", "partner", "mixed"),
                (mix._mix_grad_kernel, "upstream", "inverse", "dhidden"),
            ):
                pointers = {f"{read}_ptr": data, f"{written}_ptr": data, f"{index}_ptr": "*i64"}
                stride = f"stride_{read[0]}"
                aligned = (f"{read}_ptr", f"{written}_ptr", *((f"{stride}m", "N") if width >= 768 else ()))
                yield Case(
                    f"{data} N={width} {launch}",
                    kernel,
                    pointers | rest | {f"{stride}m": "i64"},
                    {f"{stride}n": 1} | block,
                    aligned,
                    launch.num_warps,
                    row_bytes,
                )
            parts = config.inner_product_config(width, itemsize)
            yield Case(
                f"{data} N={width} {parts}",
                remix._inner_product_kernel,
                {"grad_mixed_ptr": data, "hidden_ptr": data, "partner_ptr": "*i64", "parts_ptr": wide}
                | {"B": "i32", "N": "i32", "part": "i32", "parts": "i32", "stride_gm": "i64", "stride_hm": "i64"},
                {"stride_gn": 1, "stride_hn": 1, "BLOCK_B": parts.block_b, "BLOCK_N": parts.block_n},
                ("grad_mixed_ptr", "hidden_ptr", "stride_gm", "stride_hm", "part", "N") if width >= 768 else (),
                parts.num_warps,
                row_bytes,
            )


def remix_cases() -> Iterator[Case]:
    """A remix of rows in registers, and of long ones from parts of their inner products."""
    for itemsize, widths in ((2, (6, 2**24)), (4, (6, 8192)), (8, (4096, 30720))):
        data, compute = DTYPES[itemsize], max(4, itemsize)
        for width in widths:
            launch = config.remix_config(width, compute)
            parts = 0
            if launch is None:
                launch = config.mix_config(width, itemsize)
                parts = triton.cdiv(width, config.inner_product_config(width, itemsize).part)
            wide = DTYPES[compute]
            signature = {name: wide for name in ("lam_ptr", "grad_divisor_ptr", "grad_ptr", "lam_adv_ptr")}
            signature |= {"hidden_ptr": data, "mixed_ptr": data, "partner_ptr": "*i64", "B": "i32", "N": "i32"}
            signature |= {"parts": "i32", "stride_gm": "i64", "stride_hm": "i64", "step_size": "fp64"}
            signature |= {"parts_ptr": wide} if parts else {"grad_mixed_ptr": data}
            yield Case(
                f"{data} N={width} parts={parts} {launch}",
                remix._remix_kernel,
                signature,
                {
                    "stride_gn": 1,
                    "stride_hn": 1,
                    "policy": MASKED if parts else PLAIN,
                    "BLOCK_B": launch.block_b,
                    "BLOCK_N": launch.block_c,
                    "BLOCK_P": triton.next_power_of_2(max(1, parts)),
                },
                ("grad_mixed_ptr", "hidden_ptr", "mixed_ptr", *(("stride_gm", "stride_hm", "N") * (width >= 768))),
                launch.num_warps,
                launch.block_c * itemsize if width >= 768 else 0,
            )


def select_cases(itemsize: int, sizes: list[int], bce_sizes: list[int]) -> Iterator[Case]:
    """Two sets of logits in registers or by loops, by the number of classes."""
    for name, policy, soft, weighted in variants(itemsize):
        for classes in bce_sizes if policy.bce else sizes:
            launch = config.select_config(classes, itemsize, bce=policy.bce)
            width = 2 if itemsize == 4 and not weighted else itemsize
            data, wide = DTYPES[width], DTYPES[itemsize]
            signature = {name: data for name in ("logits_ptr", "logits_adv_ptr")}
            signature |= {"target_ptr": data if soft else "*i64", "lam_ptr": wide, "partner_ptr": "*i64"}
            signature |= {name: wide for name in ("loss_ptr", "delta_ptr", "grad_ptr", "grad_adv_ptr")}
            signature |= {"mask_ptr": "*i8", "C": "i32", "stride_zm": "i64", "stride_am": "i64"}
            signature |= {"weight_ptr": wide} if weighted else {}
            constants = {"stride_zn": 1, "stride_an": 1, "policy": policy, "BLOCK_C": launch.block_c}
            if launch.in_registers:
                signature |= {"B": "i32"}
                constants |= {"BLOCK_B": launch.block_b}
            aligned = ("logits_ptr", "logits_adv_ptr", "grad_ptr", "grad_adv_ptr")
            long = classes >= 1024
            yield Case(
                f"{name} C={classes} {launch}",
                select._select_kernel if launch.in_registers else select._select_rows_kernel,
                signature,
                constants,
                (*aligned, "stride_zm", "stride_am", "C") if long else aligned,
                launch.num_warps,
                launch.block_c * width if long else 0,
            )


def embedding_cases() -> Iterator[Case]:
    """Mixed embeddings, and both stages of the table's gradient, of every dtype."""
    for itemsize, depths in ((2, (10, 768)), (8, (768,))):
        data, wide = DTYPES[itemsize], DTYPES[max(4, itemsize)]
        for depth in depths:
            aligned = ("D", "stride_ev", "stride_ub", "stride_ut") if depth >= 768 else ()
            launch = config.mix_config(depth, itemsize)
            yield Case(
                f"{data} D={depth} {launch}",
                embedding_mix._embedding_mix_kernel,
                {"ids_ptr": "*i64", "table_ptr": data, "lam_ptr": wide, "partner_ptr": "*i64", "mixed_ptr": data}
                | {"tokens": "i32", "T": "i32", "V": "i32", "D": "i32", "stride_ev": "i64"},
                {"stride_ed": 1, "BLOCK_B": launch.block_b, "BLOCK_D": launch.block_c},
                ("table_ptr", "mixed_ptr", *aligned),
                launch.num_warps,
                launch.block_c * itemsize if depth >= 768 else 0,
            )
            launch = config.embedding_grad_config(depth, max(4, itemsize))
            block = {"PIECE": launch.piece, "ROWS": launch.rows, "BLOCK_D": launch.block_d}
            signature = {"sorted_ptr": "*i64", "dtable_ptr": data, "pieces_ptr": wide, "tokens": "i32", "D": "i32"}
            signature |= {"padding_idx": "i32"}
            yield Case(
                f"{data} D={depth} {launch}",
                embedding_mix._run_pieces_kernel,
                signature
                | {"order_ptr": "*i64", "upstream_ptr": data, "lam_ptr": wide, "inverse_ptr": "*i64", "T": "i32"}
                | {"stride_ub": "i64", "stride_ut": "i64"},
                {"stride_ud": 1} | block,
                ("upstream_ptr", "dtable_ptr", "pieces_ptr", *aligned),
                launch.num_warps,
                launch.block_d * itemsize if depth >= 768 else 0,
            )
            yield Case(
                f"{data} D={depth} {launch}",
                embedding_mix._long_runs_kernel,
                signature | {"chunks": "i32"},
                block,
                ("dtable_ptr", "pieces_ptr", *aligned),
                launch.num_warps,
                launch.block_d * max(4, itemsize) if depth >= 768 else 0,
            )


SINGLE = [(50, classes) for classes in (1, 2, 6, 16)]
GROUPS = [(4096, classes) for classes in (2, 6, 16, 32, 100)]
LONG = [(4096, 2**power) for power in range(8, 13)]
BCE = [(50, 2), (50, 6), (4096, 6), (4096, 100), (4096, 256), (4096, 2048)]
HEADS = [(50, 300, 6), (24, 768, 5), (24, 768, 2), (512, 1024, 8), (50, 512, 16)]
ASSERTING_KERNELS = (
    amp_cross_entropy._amp_cross_entropy_kernel,
    rows_loop._amp_rows_kernel,
    linear_head._linear_head_kernel,
    embedding_mix._embedding_mix_kernel,
    select._select_kernel,
    select._select_rows_kernel,
)
GROUPS_OF_CASES = {
    "rows": lambda: row_cases(4, SINGLE + GROUPS + LONG, BCE),
    "rows-fp64": lambda: row_cases(8, [(50, 6), (4096, 6), (4096, 100), (4096, 2048)], [(50, 6), (4096, 1024)]),
    "loop": lambda: loop_cases(4),
    "loop-fp64": lambda: loop_cases(8),
    "grad": lambda: grad_cases(4),
    "grad-fp64": lambda: grad_cases(8),
    "head": lambda: head_cases(4, HEADS),
    "head-fp64": lambda: head_cases(8, HEADS[:2]),
    "small": small_cases,
    "mix": mix_cases,
    "remix": remix_cases,
    "embedding": embedding_cases,
    "select": lambda: select_cases(4, [6, 4096, 128_000], [6, 2048, 128_000]),
    "select-fp64": lambda: select_cases(8, [2048, 128_000], [1024, 128_000]),
}
