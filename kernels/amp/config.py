"""Launches, from shape and compute width alone: a frozen table. FASTAMP_AUTOTUNE=1 searches about it: see tuning.py.

Sizes are in 4-byte words of the compute dtype: float64 has half as many columns. tests/test_codegen.py compiles what
these can choose for five architectures, and fails on a spill. Beside an entry stands what chose it: registers on sm_90
from bench/results/codegen.md, or instructions. A lane has many columns, so that sums, scalars and addresses are shared
by many, and as few warps as that leaves are enough to keep memory busy. Which of the neighbours of a launch is the
fastest only a GPU can say, and none has been asked yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# amp_cross_entropy, rows of few classes, one to a lane
FEW_CLASSES = 16  # words: 156 registers, 255 where every class has target mass
FEW_ROWS = 64  # of a program; a batch of no more is one program, which sums it
FEW_WARPS = 2
# amp_cross_entropy, a row to a program that holds it whole
REGISTER_WORDS = 4096
WORDS_PER_WARP = 1024  # 32 a lane: 194-209 registers, 254 of a pair
WORDS_PER_WARP_HEAVY = 512  # where MinOp may reject, or every class has target mass: 209-235; with 1024 they spill
BINARY_WORDS = 1024  # of binary cross-entropy by one warp: 167-189 registers; a pair of 4096 by four spills
LEAST_WORDS = 64  # two a lane: a sum then is one of numbers that all lanes have rounded alike
CAREFUL_COLUMNS = 64  # least tile of careful loops
SEARCH_ROWS = 1024  # of so many a program looks for the row whose partner its own is; of more it is told
# amp_cross_entropy, longer rows by loops, and their gradient
LOOP_WORDS = 2048
LOOP_WARPS = 4  # 122 registers, 230 where every class has target mass
PAIR_WARPS = 8  # 113 and 192
GRAD_WORDS = 2048
GRAD_WORDS_PER_WARP = 1024  # 182-255
TOTAL_BLOCK = 1024
TOTAL_TURNS = 4  # of one program; more losses are summed by several, and their sums by one
RESCALE_BLOCK = 4096
# select_cross_entropy, by loops beyond few classes
SELECT_WORDS = 1024  # by one warp 254 registers; where every class has target mass, by two 206
SELECT_WORDS_PER_WARP_BINARY = 256  # 128 registers; with twice as many they spill
# linear_head
HEAD_CLASSES = 16
HEAD_DEPTH = 1024
HEAD_WORDS = 8192  # largest W in registers: 105-255; half of that in float64
HEAD_WORDS_PER_WARP = 1024
# draw, inverse
DRAW_ROWS = 16  # of a program, which looks at all keys, so many at a time
DRAW_COLUMNS = 32
DRAW_WARPS = 4
INVERSE_BLOCK = 256  # rows of a program that inverts a permutation
# mix, remix, embedding_mix
MIX_BYTES = 4096  # a tile of an elementwise kernel in memory: 32 bytes a thread of 4 warps, 62-100%
MIX_ROWS = 64  # most rows of such a tile
REMIX_WORDS = 8192  # longest row of which ∇λ is taken in registers
REMIX_WORDS_PER_WARP = 512
PART_TILES = 2  # tiles of a long row whose products one program sums, at least
MAX_PARTS = 256  # parts of a row; each program of the second stage reads all of them
EMBEDDING_PIECE = 32  # tokens that one program sums, at most
EMBEDDING_ROWS = 4  # tokens whose gradients are in registers at a time
EMBEDDING_WORDS = 512  # columns of them


def cdiv(size: int, tile: int) -> int:
    """Tiles that cover a size. Triton's own function is one for kernels as well, and takes the host microseconds."""
    return -(-size // tile)


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below size >= 1; see `cdiv`."""
    return 1 << (size - 1).bit_length()


class Config(NamedTuple):
    """A launch: how many rows and columns a program holds, and by how many warps."""

    block_b: int
    block_c: int
    num_warps: int
    in_registers: bool  # whole rows in registers, or a loop over tiles


def forward_config(batch: int, classes: int, itemsize: int, policy: Any, *, dense_target: bool) -> Config:
    """The launch of the forward.

    Args:
        batch: B.
        classes: C.
        itemsize: bytes of the compute dtype, 4 or 8.
        policy: what the kernel is compiled for.
        dense_target: probabilities, or labels that are smoothed.
    """
    block_c = next_power_of_2(classes)
    words = block_c * itemsize // 4
    if _is_few(words, itemsize, policy):
        return Config(FEW_ROWS, block_c, FEW_WARPS, True)
    if words > REGISTER_WORDS:
        warps = PAIR_WARPS if policy.pairing == "matching" and policy.loss == "cross_entropy" else LOOP_WARPS
        return Config(1, LOOP_WORDS * 4 // itemsize, warps, False)
    light = (policy.keeps_all or policy.mode == "mixup") and not dense_target
    if policy.loss == "binary_cross_entropy":
        light = itemsize == 8 or (light and words <= BINARY_WORDS)  # doubles take careful loops
    per_warp = WORDS_PER_WARP if light else WORDS_PER_WARP_HEAVY
    return Config(1, max(block_c, LEAST_WORDS * 4 // itemsize), max(1, words // per_warp), True)


def careful_block(config: Config, itemsize: int, policy: Any) -> int:
    """The tile of a program's careful loops: small beside what else it holds, larger where it has no other way."""
    decided = policy.keeps_all or policy.mode == "mixup"
    alone = policy.loss == "binary_cross_entropy" and not decided and itemsize == 4
    if not config.in_registers:
        return (256 if alone else 128) * config.num_warps
    return max(CAREFUL_COLUMNS, config.block_c // (2 if alone else 4))


def _is_few(words: int, itemsize: int, policy: Any) -> bool:
    """Whether rows go one to a lane; doubles with a logarithm for every class would spill."""
    return words <= FEW_CLASSES and (policy.loss == "cross_entropy" or itemsize == 4)


def backward_config(classes: int, itemsize: int, policy: Any) -> Config:
    """The launch of the gradient from stored scalars."""
    block_c = next_power_of_2(classes)
    if _is_few(block_c * itemsize // 4, itemsize, policy):
        return Config(FEW_ROWS, block_c, FEW_WARPS, False)
    words = max(LEAST_WORDS, min(block_c * itemsize // 4, GRAD_WORDS))
    per_warp = GRAD_WORDS_PER_WARP if policy.loss == "cross_entropy" else GRAD_WORDS_PER_WARP // 2
    return Config(1, words * 4 // itemsize, max(1, words // per_warp), False)


def select_config(classes: int, itemsize: int, policy: Any, *, dense_target: bool) -> Config:
    """The launch that compares the losses of two sets of logits.

    Args:
        classes: C.
        itemsize: bytes of the compute dtype, 4 or 8.
        policy: what the kernel is compiled for.
        dense_target: probabilities, or labels that are smoothed.
    """
    block_c = next_power_of_2(classes)
    if _is_few(block_c * itemsize // 4, itemsize, policy):
        return Config(FEW_ROWS, block_c, FEW_WARPS, True)
    words = max(min(block_c * itemsize // 4, SELECT_WORDS), LEAST_WORDS)
    per_warp = WORDS_PER_WARP_HEAVY if dense_target else WORDS_PER_WARP
    if policy.loss == "binary_cross_entropy":
        per_warp = SELECT_WORDS_PER_WARP_BINARY
    return Config(1, words * 4 // itemsize, max(1, words // per_warp), False)


class HeadConfig(NamedTuple):
    """A launch of `_linear_amp_cross_entropy_kernel`."""

    rows: int
    block_c: int
    block_d: int
    num_warps: int


def linear_head_config(batch: int, classes: int, depth: int, itemsize: int) -> HeadConfig | None:
    """The launch for a head of this size, or None where W does not fit in registers.

    Args:
        batch: B.
        classes: C.
        depth: D.
        itemsize: bytes of the compute dtype, 4 or 8.
    """
    block_c = max(2, next_power_of_2(classes))
    block_d = next_power_of_2(depth)
    words = block_c * block_d * itemsize // 4
    if classes > HEAD_CLASSES or depth > HEAD_DEPTH or words > HEAD_WORDS * 4 // itemsize:
        return None
    # About as many programs as a large GPU has multiprocessors: more would only add shares of dW to sum.
    rows = max(1, min(8, cdiv(batch, 128)))
    # Eight columns a lane, and all classes of each: sums over classes need no other lane.
    warps = max(1, block_d * itemsize // 1024, words // HEAD_WORDS_PER_WARP)
    return HeadConfig(rows, block_c, block_d, warps)


def mix_config(width: int, itemsize: int) -> Config:
    """The launch of an elementwise kernel over rows.

    Args:
        width: N, elements of a row.
        itemsize: bytes of an element in memory.
    """
    tile = MIX_BYTES // itemsize
    block_n = min(next_power_of_2(width), tile)
    block_b = min(tile // block_n, MIX_ROWS)
    return Config(block_b, block_n, max(1, 4 * block_b * block_n // tile), False)


def remix_config(width: int, itemsize: int) -> Config | None:
    """The launch that takes ∇λ and mixes again at once, or None where a row does not fit in registers.

    Args:
        width: N, elements of a row.
        itemsize: bytes of the compute dtype, 4 or 8.
    """
    block_n = next_power_of_2(width)
    words = block_n * itemsize // 4
    if words > REMIX_WORDS:
        return None
    return Config(max(1, REMIX_WORDS_PER_WARP // words), block_n, max(1, words // REMIX_WORDS_PER_WARP), True)


class PartsConfig(NamedTuple):
    """A launch of `_inner_product_kernel`."""

    block_b: int
    block_n: int
    part: int  # columns of one part, a multiple of block_n
    num_warps: int


def inner_product_config(width: int, itemsize: int) -> PartsConfig:
    """The launch of the first stage of an inner product.

    Args:
        width: N, elements of a row.
        itemsize: bytes of an element in memory.
    """
    tile = mix_config(width, itemsize)
    part = tile.block_c
    if width > part:
        part *= max(PART_TILES, cdiv(cdiv(width, MAX_PARTS), part))
    return PartsConfig(tile.block_b, tile.block_c, part, tile.num_warps)


class EmbeddingConfig(NamedTuple):
    """A launch of either stage of the table's gradient."""

    piece: int  # tokens of a chunk
    rows: int  # tokens, or pieces, that are summed at a time
    block_d: int
    num_warps: int


def embedding_grad_config(depth: int, itemsize: int) -> EmbeddingConfig:
    """The launches of the table's gradient.

    Args:
        depth: D.
        itemsize: bytes of the compute dtype, 4 or 8.
    """
    block_d = min(next_power_of_2(depth), EMBEDDING_WORDS * 4 // itemsize)
    num_warps = max(1, EMBEDDING_ROWS * block_d * itemsize // 4 // 512)
    return EmbeddingConfig(EMBEDDING_PIECE, EMBEDDING_ROWS, block_d, num_warps)
