"""What the launch heuristics can choose for rows of any hidden state, for embeddings and for two sets of logits."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from fastamp.kernels import config, draw, embedding_mix, launch, mix, remix
from fastamp.kernels import select_cross_entropy as select

from .case import DTYPES, MASKED, PLAIN, Case, data_type, tiles, variants

WIDE = 768  # rows of so many elements are read in vectors


def draw_cases() -> Iterator[Case]:
    """Partners from keys of either dtype, and the inverse of a permutation."""
    for itemsize, matching in ((4, False), (4, True), (8, True)):
        keys = DTYPES[itemsize]
        yield Case(
            f"{keys[1:]} {'matching' if matching else 'permutation'}",
            draw._draw_partner_kernel,
            config.DRAW_ROWS,
            {"keys_ptr": keys, "partner_ptr": "*i64", "B": "i32"},
            {"MATCHING": matching, "ROWS": config.DRAW_ROWS, "COLUMNS": config.DRAW_COLUMNS},
            ("partner_ptr",),
            elements=config.DRAW_COLUMNS,
            floor=8,
            sizes={"B": config.DRAW_COLUMNS},
            warps=config.DRAW_WARPS,
        )
    yield Case(
        "int64",
        launch._inverse_kernel,
        config.INVERSE_BLOCK,
        {"partner_ptr": "*i64", "inverse_ptr": "*i64", "B": "i32"},
        {"BLOCK": config.INVERSE_BLOCK},
        ("partner_ptr", "inverse_ptr"),
        elements=config.INVERSE_BLOCK,
        floor=16,
        warps=4,
    )


def mix_cases() -> Iterator[Case]:
    """Both directions of mixing, and the inner product, of rows of every dtype: few, several and many tiles wide."""
    for itemsize, width in ((2, 6), (2, 30720), (4, 768), (8, 30720)):
        data, wide = DTYPES[itemsize], DTYPES[max(4, itemsize)]
        launch, parts = config.mix_config(width, itemsize), config.inner_product_config(width, itemsize)
        row_bytes = launch.block_c * itemsize if width >= WIDE else 0
        for kernel, read, index, written in (
            (mix._mix_kernel, "hidden", "partner", "mixed"),
            (mix._mix_grad_kernel, "upstream", "inverse", "dhidden"),
        ):
            pointers = {f"{read}_ptr": data, f"{written}_ptr": data, f"{index}_ptr": "*i64"}
            stride = f"stride_{read[0]}"
            yield Case(
                f"{data[1:]} N={width}",
                kernel,
                launch,
                pointers | {"lam_ptr": wide, "B": "i32", "N": "i32", f"{stride}m": "i64"},
                {f"{stride}n": 1, "BLOCK_B": launch.block_b, "BLOCK_N": launch.block_c},
                (f"{read}_ptr", f"{written}_ptr", *((f"{stride}m", "N") if width >= WIDE else ())),
                elements=launch.block_b * launch.block_c,
                floor=2 * itemsize,
                row_bytes=row_bytes,
            )
        yield Case(
            f"{data[1:]} N={width}",
            remix._inner_product_kernel,
            parts,
            {"grad_mixed_ptr": data, "hidden_ptr": data, "partner_ptr": "*i64", "parts_ptr": wide}
            | {"B": "i32", "N": "i32", "part": "i32", "parts": "i32", "stride_gm": "i64", "stride_hm": "i64"},
            {"stride_gn": 1, "stride_hn": 1, "BLOCK_B": parts.block_b, "BLOCK_N": parts.block_n},
            ("grad_mixed_ptr", "hidden_ptr", "stride_gm", "stride_hm", "part", "N") if width >= WIDE else (),
            elements=parts.block_b * parts.part,
            floor=2 * itemsize,
            row_bytes=row_bytes,
            sizes={"part": parts.part},
        )


def remix_cases() -> Iterator[Case]:
    """A remix of rows in registers, and of long ones from parts of their inner products."""
    for itemsize, width in ((2, 6), (2, 2**24), (4, 6), (4, 8192), (8, 4096), (8, 30720)):
        data, compute = DTYPES[itemsize], max(4, itemsize)
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
        tile = {"BLOCK_B": launch.block_b, "BLOCK_N": launch.block_c, "BLOCK_P": triton.next_power_of_2(max(1, parts))}
        yield Case(
            f"{data[1:]} N={width}" + f" from {parts} parts" * (parts > 0),
            remix._remix_kernel,
            launch,
            signature,
            {"stride_gn": 1, "stride_hn": 1, "policy": MASKED if parts else PLAIN, **tile},
            ("grad_mixed_ptr", "hidden_ptr", "mixed_ptr", *(("stride_gm", "stride_hm", "N") * (width >= WIDE))),
            elements=launch.block_b * launch.block_c,
            floor=(2 if parts else 3) * itemsize,
            row_bytes=launch.block_c * itemsize if width >= WIDE else 0,
        )


def select_cases(itemsize: int, sizes: list[int], *, binary: bool = False) -> Iterator[Case]:
    """Two sets of logits, by the number of classes."""
    for name, policy, soft, weighted in variants(binary=binary):
        width, data = data_type(itemsize, weighted)
        wide = DTYPES[itemsize]
        for classes in sizes:
            launch = config.select_config(classes, itemsize, policy, dense_target=soft)
            signature = {name: data for name in ("logits_ptr", "logits_adv_ptr")}
            signature |= {"target_ptr": data if soft else "*i64", "lam_ptr": wide, "partner_ptr": "*i64"}
            signature |= {name: wide for name in ("loss_ptr", "delta_ptr", "grad_ptr", "grad_adv_ptr")}
            signature |= {"mask_ptr": "*i8", "B": "i32", "C": "i32", "stride_zm": "i64", "stride_am": "i64"}
            signature |= {"tie_abs": "fp64", "tie_rel": "fp64"}
            signature |= {"weight_ptr": wide} if weighted else {}
            constants = {"stride_zn": 1, "stride_an": 1, "policy": policy, "BLOCK_C": launch.block_c}
            few = launch.block_b > 1
            if few:
                constants["BLOCK_B"] = launch.block_b
            else:
                constants |= {"ALIGN": 8, "BLOCK_CAREFUL": config.careful_block(launch, itemsize, policy)}
            aligned = ("logits_ptr", "logits_adv_ptr", "grad_ptr", "grad_adv_ptr")
            long = classes >= 1024
            yield Case(
                f"{name} {data[1:]} C={classes}",
                select._select_few_classes_kernel if few else select._select_kernel,
                launch,
                signature,
                constants,
                aligned,
                elements=launch.block_b * launch.block_c if few else tiles(classes, launch.block_c),
                floor=(3 if soft else 2) * width + 2 * itemsize,
                row_bytes=launch.block_c * width if long else 0,
                sizes={} if few else {"C": classes},
            )


def embedding_cases() -> Iterator[Case]:
    """Mixed embeddings, and both stages of the table's gradient, of every dtype."""
    for itemsize, depth in ((2, 10), (2, 768), (8, 768)):
        name, data, compute = f"{DTYPES[itemsize][1:]} D={depth}", DTYPES[itemsize], max(4, itemsize)
        wide, vectors = DTYPES[compute], depth >= WIDE
        aligned = ("D", "stride_ev", "stride_ub", "stride_ut") if vectors else ()
        mixing, grad = config.mix_config(depth, itemsize), config.embedding_grad_config(depth, compute)
        yield Case(
            name,
            embedding_mix._embedding_mix_kernel,
            mixing,
            {"ids_ptr": "*i64", "table_ptr": data, "lam_ptr": wide, "partner_ptr": "*i64", "mixed_ptr": data}
            | {"tokens": "i32", "T": "i32", "V": "i32", "D": "i32", "stride_ev": "i64"},
            {"stride_ed": 1, "BLOCK_B": mixing.block_b, "BLOCK_D": mixing.block_c},
            ("table_ptr", "mixed_ptr", *aligned),
            elements=mixing.block_b * mixing.block_c,
            floor=2 * itemsize,
            row_bytes=mixing.block_c * itemsize if vectors else 0,
        )
        block = {"PIECE": grad.piece, "ROWS": grad.rows, "BLOCK_D": grad.block_d}
        shared = {"sorted_ptr": "*i64", "dtable_ptr": data, "pieces_ptr": wide, "tokens": "i32", "D": "i32"}
        shared |= {"padding_idx": "i32"}
        yield Case(
            name,
            embedding_mix._run_pieces_kernel,
            grad,
            shared
            | {"order_ptr": "*i64", "upstream_ptr": data, "lam_ptr": wide, "inverse_ptr": "*i64", "T": "i32"}
            | {"stride_ub": "i64", "stride_ut": "i64"},
            {"stride_ud": 1} | block,
            ("upstream_ptr", "dtable_ptr", "pieces_ptr", *aligned),
            elements=grad.rows * grad.block_d,
            floor=itemsize + compute / grad.rows,
            row_bytes=grad.block_d * itemsize if vectors else 0,
        )
        yield Case(
            name,
            embedding_mix._long_runs_kernel,
            grad,
            shared | {"chunks": "i32"},
            block,
            ("dtable_ptr", "pieces_ptr", *aligned),
            elements=grad.rows * grad.block_d,
            floor=compute + itemsize / grad.rows,
            row_bytes=grad.block_d * compute if vectors else 0,
        )
