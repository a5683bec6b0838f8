"""Instructions that one warp of a program issues, by pipe: counted in SASS, along the way that programs usually take.

A loop counts as often as it turns, which the kernel's TTGIR says; a line of source that both name joins the two. Of the
ways through a kernel that count which takes every loop and makes every store, and of those the shortest: what a branch
can skip otherwise, as a failed assertion, the labels of a tile or the quotient of subnormal numbers, is left out. So is
code for unusual rows, which is in functions or files that are called careful, unless there is no other way.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .budget import PIPES
from .traffic import Line, Loops

# The unit of MUFU converts as well. Rest: the uniform datapath, control, constants and special registers.
NAMES = {
    "fma": r"[FH](FMA|MUL|ADD)|IMAD|[DHIBQ]MMA",
    "mufu": r"MUFU|[FI]2[FI](\.|$)|FRND|POPC|FLO|BREV",
    "lsu": r"LD[GSL]|ST[GSL]|LDSM|STSM|SHFL|ATOM|RED\b",
    "rest": r"U|R2UR|S2|CS2R|LDC|B|EXIT|NOP|WARPSYNC|CALL|RET|DEPBAR|VOTE|LEPC|P2R|R2P|MEMBAR|ERRBAR|CCTL|ELECT",
    "alu": "",
}
SASS = re.compile(
    r'(?P<label>\.L_x_\d+):|//## File "(?:[^"]*/)?(?P<file>[^"]+)", line (?P<line>\d+)'
    r"|/\*[0-9a-f]{4,}\*/ +\{? *(?P<guard>@!?U?P\w+ +)?(?P<name>[A-Z]\S*) *(?P<rest>[^;]*)"
)
ADDED = re.compile(r"(?:IADD|IADD3|VIADD) (U?R\d+), (?:U?P\w+, )?\1, (0x[0-9a-f]+)\b")
KERNELS = Path(__file__).parents[2] / "kernels" / "amp"


class Block:
    """Instructions of which all are issued if one is, and the blocks that may follow."""

    def __init__(self) -> None:
        self.pipes: Counter[str] = Counter()
        self.stores = 0
        self.lines: list[Line] = []  # of source, the last instruction's last
        self.steps: set[int] = set()  # what is added to a register, in place
        self.targets: list[str] = []
        self.next: set[int] = set()
        self.falls = True  # into the block that stands behind it


def issued(sass: str, kernel: str, loops: Loops) -> dict[str, int]:
    """Instructions that a warp issues, by pipe.

    Args:
        sass: of `nvdisasm -g -c`.
        kernel: its name.
        loops: of `traffic.loop_turns`.

    Raises:
        ValueError: no way through the code has been found.
    """
    blocks = _blocks(sass.partition(f"\n{kernel}:\n")[2])
    every = set(range(len(blocks)))
    careful = {at for at in every if any(line in _careful_lines(name) for name, line in blocks[at].lines)}
    found = _way(blocks, every - careful, loops) or _way(blocks, every, loops)
    if not found:
        raise ValueError(f"{kernel}: no way through the machine code")
    return {pipe: found[pipe] for pipe in PIPES}


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


def _blocks(code: str) -> list[Block]:
    blocks, labels = [Block()], {}
    line: Line = ("", 0)
    for found in SASS.finditer(code):
        if found["label"]:
            if blocks[-1].pipes:
                blocks.append(Block())
            labels[found["label"]] = len(blocks) - 1
        elif found["line"]:
            line = (found["file"], int(found["line"]))
        else:
            block, name, rest = blocks[-1], found["name"], found["rest"].replace(".reuse", "")
            block.pipes[next(pipe for pipe, names in NAMES.items() if re.match(names, name))] += 1
            block.stores += name.startswith("STG")
            block.lines.append(line)
            block.steps |= {int(number, 16) for _, number in ADDED.findall(f"{name} {rest}")}
            # Where the lanes of a warp disagree, BRA.DIV leads to what does the same for them one by one.
            if name == "EXIT" or re.match(r"BRA(?!\.DIV)", name):
                block.targets = re.findall(r"\.L_x_\d+", rest)
                block.falls = bool(found["guard"]) or "P" in rest.partition("`")[0]
                blocks.append(Block())
    for at, block in enumerate(blocks):
        block.next = {labels[target] for target in block.targets} | ({at + 1} if block.falls else set())
    return blocks


def _way(blocks: list[Block], allowed: set[int], loops: Loops) -> Counter[str]:
    """What the way through these blocks issues that has most loops, then most stores, then fewest instructions.

    Nothing, where there is no way.
    """
    order, back = _explored(blocks, allowed)
    after = {at: blocks[at].next & set(order) for at in order}
    ends = {at for at in order if not blocks[at].falls and not blocks[at].targets}
    times = dict.fromkeys(order, 1)
    inner: set[Line] = set()
    bodies = {head: _body(after, head, latches) for head, latches in back.items()}
    for head, body in sorted(bodies.items(), key=lambda loop: len(loop[1])):
        latches = back[head]
        named = [line for at in sorted(body, key=latches.__contains__) for line in blocks[at].lines if line in loops]
        # Of the lines that name loops the last one, which branches back; the loops in this one have theirs already.
        own = ([line for line in named if line not in inner] or named)[-1:]
        inner |= set(own)
        turns, step = loops[own[0]] if own else (1, 1)
        # Machine code may do several turns in one.
        grown = [number // step for at in body for number in blocks[at].steps if number and number % step == 0]
        outside = {to for at in body for to in after[at]} - body
        if not outside:
            ends |= latches
        for at in body:
            times[at] *= -(-turns // min(grown, default=1))
            # A loop is left from its last block.
            after[at] = (after[at] - {head} | outside) if at in latches else after[at] & body
    best: dict[int, tuple[int, int, int, int]] = {}  # loops and stores, negative; instructions; what follows
    for _ in order:
        before = dict(best)
        for at in order:
            ways = [(*best[to][:3], to) for to in after[at] if to in best] + [(0, 0, 0, -1)] * (at in ends)
            if ways:
                taken, stores, count, to = min(ways)
                count += times[at] * blocks[at].pipes.total()
                best[at] = (taken - (at in back), stores - blocks[at].stores, count, to)
        if best == before:
            break
    pipes: Counter[str] = Counter()
    at = 0
    while at in best:
        pipes.update({pipe: times[at] * count for pipe, count in blocks[at].pipes.items()})
        at = best[at][3]
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
