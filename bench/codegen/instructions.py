"""Instructions that one warp of a program issues, by pipe: in machine code, along the way that programs usually take.

A loop counts as often as it turns, which the kernel's TTGIR says; the line of source that both name joins the two. Of
the ways through a kernel the shortest counts that takes every loop and meets no code for unusual rows, which is in
functions or files that are called careful. So what a branch can skip does not count: a failed assertion, a tile's
labels, the quotient of subnormal numbers. Where a kernel has no other way than the careful one, that counts.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PIPES = ("fma", "alu", "mufu", "lsu", "rest")
# The unit of MUFU converts as well. Rest: the uniform datapath, control, and moves of constants and special registers.
SASS = (
    ("fma", r"[FH](FMA|MUL|ADD)|IMAD|[DHIBQ]MMA"),
    ("mufu", r"MUFU|[FI]2[FI]P?\b|FRND|POPC|FLO|BREV"),
    ("lsu", r"LD[GSL]|ST[GSL]|LDSM|STSM|SHFL|ATOM|RED\b"),
    ("rest", r"U|R2UR|S2|CS2R|LDC|B|EXIT|NOP|WARPSYNC|CALL|RET|DEPBAR|VOTE|LEPC|P2R|R2P|MEMBAR|ERRBAR|CCTL|ELECT"),
    ("alu", ""),
)
AMDGCN = (
    ("mufu", "v_(exp|log|rcp|rsq|sqrt|sin|cos)"),
    ("fma", "v_(pk_)?(fma|fmac|mul|mad|mac|add|sub)"),
    ("alu", "v_"),
    ("lsu", "global|buffer|flat|scratch|ds_"),
    ("rest", ""),
)
SASS_LINE = re.compile(
    r'(?P<label>\.L_x_\d+):|//## File "(?P<file>.*?)", line (?P<line>\d+)'
    r"|/\*[0-9a-f]{4,}\*/ +\{? *(?P<guard>@!?U?P\w+ +)?(?P<name>[A-Z]\S*) *(?P<rest>[^;]*)"
)
AMD_LINE = re.compile(
    r"(?P<label>\.LBB\w+):|\t\.loc\t(?P<file>\d+) (?P<line>\d+)"
    r"|\t(?P<guard>)(?P<name>[a-z]\w+)\t?(?P<rest>[^;\n]*)"
)
AMD_FILE = re.compile(r'^\t\.file\t(\d+) ".*" "(.*)"$', re.MULTILINE)
SUM = re.compile(r"(?:U?IADD|VIADD|[sv]_addk?_(?:nc_)?[iu]32)")
NUMBER = re.compile(r"-?(?:0x[0-9a-f]+|\d+)")
KERNELS = Path(__file__).parents[2] / "kernels" / "amp"
Line = tuple[str, int]  # a file's name, which tells it from others here: what a cache holds was compiled anywhere
Pipes = tuple[tuple[str, str], ...]


class Block:
    """Instructions of which all are issued if one is, and the blocks that may follow."""

    def __init__(self) -> None:
        self.pipes: Counter[str] = Counter()
        self.lines: set[Line] = set()  # of source
        self.last: Line = ("", 0)
        self.steps: set[int] = set()  # numbers that are added to a register, in place
        self.targets: list[str] = []
        self.next: set[int] = set()
        self.falls = True  # into the block that stands behind it
        self.ends = False


def issued(assembly: str, kernel: str, loops: Mapping[Line, tuple[int, int]]) -> dict[str, int]:
    """Instructions that a warp issues, by pipe.

    Args:
        assembly: with lines of source: of `nvdisasm -g -c`, or Triton's amdgcn.
        kernel: its name.
        loops: turns and step of each, as `traffic.loop_turns` gives them.

    Raises:
        ValueError: no way through the code has been found.
    """
    blocks = _blocks(assembly, kernel)
    usual = {at for at, block in enumerate(blocks) if not any(line in _careful_lines(name) for name, line in block.lines)}
    for allowed in (usual, set(range(len(blocks)))):
        found = _way(blocks, allowed, loops)
        if found is not None:
            return {pipe: found[pipe] for pipe in PIPES}
    raise ValueError(f"{kernel}: no way through the machine code")


@functools.cache
def _careful_lines(name: str) -> frozenset[int]:
    path = KERNELS / name
    if not path.exists():
        return frozenset()
    text = path.read_text()
    spans = [(1, len(text.splitlines()))] if "careful" in name else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and "careful" in node.name:
            spans.append((node.lineno, node.end_lineno or node.lineno))
    return frozenset(line for first, last in spans for line in range(first, last + 1))


def _blocks(assembly: str, kernel: str) -> list[Block]:
    files = dict(AMD_FILE.findall(assembly))
    pattern, pipes = (AMD_LINE, AMDGCN) if files else (SASS_LINE, SASS)
    code = assembly.partition(f"\n{kernel}:\n")[2].partition("\n.Lfunc_end")[0]
    blocks, labels, line = [Block()], {}, ("", 0)
    for found in pattern.finditer(code):
        if found["label"]:
            if blocks[-1].pipes:
                blocks.append(Block())
            labels[found["label"]] = len(blocks) - 1
        elif found["line"]:
            line = (files.get(found["file"], found["file"]).rpartition("/")[2], int(found["line"]))
        elif _add(blocks[-1], pipes, line, found["guard"], found["name"], found["rest"]):
            blocks.append(Block())
    for at, block in enumerate(blocks):
        block.next = {labels[target] for target in block.targets}
        if block.falls and at + 1 < len(blocks):
            block.next.add(at + 1)
    return blocks


def _add(block: Block, pipes: Pipes, line: Line, guard: str | None, name: str, rest: str) -> bool:
    """Adds an instruction to a block; whether the block ends with it."""
    block.pipes[next(pipe for pipe, names in pipes if re.match(names, name))] += 1
    if line[1]:
        block.lines.add(line)
        block.last = line
    first, *others = rest.replace(".reuse", "").split(", ")
    numbers = [int(other, 0) for other in others if NUMBER.fullmatch(other.strip())]
    if SUM.match(name) and (first in others or len(others) == 1):
        block.steps |= set(numbers)
    # Where the lanes of a warp disagree, BRA.DIV leads to what does the same for them one by one.
    if re.match(r"BRA(?!\.DIV)|s_c?branch", name):
        block.targets += re.findall(r"\.L\w+", rest)
        block.falls = bool(guard) or name.startswith("s_cbranch") or "P" in rest.partition("`")[0]
        return True
    if name in ("EXIT", "s_endpgm"):
        block.ends, block.falls = True, bool(guard)
        return True
    return False


def _way(blocks: list[Block], allowed: set[int], loops: Mapping[Line, tuple[int, int]]) -> Counter[str] | None:
    """What the way through the allowed blocks issues that takes most loops, and of such ways is the shortest."""
    order, back = _explored(blocks, allowed)
    after = {at: blocks[at].next & set(order) for at in order}
    ends = {at for at in order if blocks[at].ends and not blocks[at].falls}
    times = dict.fromkeys(order, 1)
    for head, latches in back.items():
        body = _body(after, head, latches)
        turns = _turns(blocks, body, latches, loops)
        outside = {to for at in body for to in after[at]} - body
        if not outside:
            ends |= latches
        for at in body:
            times[at] *= turns
            # A loop is left from its last block.
            after[at] = (after[at] - {head} | outside) if at in latches else after[at] & body
    best: dict[int, tuple[int, int, int | None]] = {}  # loops that are left out, instructions, the block that follows
    for _ in order:
        before = dict(best)
        for at in order:
            ways = [(*best[to][:2], to) for to in after[at] if to in best] + [(0, 0, None)] * (at in ends)
            if ways:
                taken, count, to = min(ways, key=lambda way: way[:2])
                best[at] = (taken - (at in back), count + times[at] * blocks[at].pipes.total(), to)
        if best == before:
            break
    if 0 not in best:
        return None
    pipes: Counter[str] = Counter()
    step: int | None = 0
    while step is not None:
        pipes.update({pipe: times[step] * count for pipe, count in blocks[step].pipes.items()})
        step = best[step][2]
    return pipes


def _explored(blocks: list[Block], allowed: set[int]) -> tuple[list[int], dict[int, set[int]]]:
    """Blocks that can be reached, each after what follows it; and of every loop's first block the last ones."""
    order: list[int] = []
    back: dict[int, set[int]] = {}
    seen, path = set(), [(0, iter(blocks[0].next))] if 0 in allowed else []
    while path:
        at, following = path[-1]
        seen.add(at)
        to = next(following, None)
        if to is None:
            order.append(at)
            path.pop()
        elif to in {step for step, _ in path}:
            back.setdefault(to, set()).add(at)
        elif to in allowed and to not in seen:
            path.append((to, iter(blocks[to].next)))
    return order, back


def _body(after: Mapping[int, set[int]], head: int, latches: set[int]) -> set[int]:
    """Blocks of a loop: those from which its last ones are reached without its first."""
    body = {head, *latches}
    while more := {at for at, to in after.items() if at not in body and to & (body - {head})}:
        body |= more
    return body


def _turns(
    blocks: list[Block], body: set[int], latches: set[int], loops: Mapping[Line, tuple[int, int]]
) -> int:
    """Turns in machine code, which may do several of the source's in one; 1 where only the device knows."""
    turns, step = next((loops[blocks[at].last] for at in latches if blocks[at].last in loops), (1, 1))
    unrolled = [number // step for at in body for number in blocks[at].steps if number > 0 and number % step == 0]
    return -(-turns // min(unrolled, default=1))
