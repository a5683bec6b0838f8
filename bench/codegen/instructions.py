"""Instructions that one warp of a program issues, by pipe: counted in SASS, along the way that programs usually take.

A loop counts as often as it turns, which the kernel's TTGIR says; a line of source that both name joins the two. What a
branch leads around counts if there is a loop or a store in it: a failed assertion, the labels of a tile or the quotient
of subnormal numbers do not. Nor does code for unusual rows, which is in functions or files that are called careful,
unless there is no other way.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from pathlib import Path

from .budget import PIPES
from .traffic import Line, Loops

# The unit of MUFU converts as well. Rest: the uniform datapath, control, constants and special registers.
NAMES = {
    "fma": r"[DFH](FMA|MUL|ADD)|IMAD|[DHIBQ]MMA",
    "mufu": r"MUFU|[FI]2[FI](\.|$)|FRND|POPC|FLO|BREV",
    "lsu": r"LD[GSL]|ST[GSL]|LDSM|STSM|SHFL|ATOM|RED\b",
    "rest": r"U|R2UR|S2|CS2R|LDC|B|EXIT|NOP|WARPSYNC|CALL|RET|DEPBAR|VOTE|LEPC|P2R|R2P|MEMBAR|ERRBAR|CCTL|ELECT",
    "alu": "",
}
SASS = re.compile(
    r'(?P<label>\.L_x_\d+):|//## File "(?:[^"]*/)?(?P<file>[^"]+)", line (?P<line>\d+)'
    r"|/\*[0-9a-f]{4,}\*/ +\{? *(?P<guard>@!?U?P\w+ +)?(?P<name>[A-Z]\S*) *(?P<rest>[^;]*)"
)
ADDED = re.compile(r"(?:IADD|IADD3|VIADD) (U?R\d+), (?:U?P\w+, )*\1, (0x[0-9a-f]+)\b")
KERNELS = Path(__file__).parents[2] / "kernels" / "amp"


class Block:
    """Instructions of which all are issued if one is, and the blocks that may follow."""

    def __init__(self) -> None:
        self.pipes: Counter[str] = Counter()
        self.names: list[str] = []
        self.lines: list[Line] = []
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
    every = {at for at, block in enumerate(blocks) if "CALL.ABS.NOINC" not in block.names}  # a failed assertion's
    careful = {at for at in every if any(line in _careful_lines(name) for name, line in blocks[at].lines)}
    way = _way(blocks, every - careful) or _way(blocks, every)
    if not way:
        raise ValueError(f"{kernel}: no way through the machine code")
    times, inner = dict.fromkeys(way, 1), set[Line]()
    back = {first: last for last, at in enumerate(way) for first in range(last + 1) if way[first] in blocks[at].next}
    for first, last in sorted(back.items(), reverse=True):
        body = way[first : last + 1]
        named = [line for at in body for line in blocks[at].lines if line in loops]
        # Of the lines that name loops the last one, which branches back; the loops in this one have theirs already.
        own = ([line for line in named if line not in inner] or named)[-1:]
        inner |= set(own)
        turns, step = loops[own[0]] if own else (1, 1)
        # Machine code may do several turns in one.
        grown = {number // step for at in body for number in blocks[at].steps if number % step == 0}
        at_once = min(grown & {1, 2, 4, 8}, default=1)
        times |= {at: times[at] * -(-turns // at_once) for at in body}
    return {pipe: sum(times[at] * blocks[at].pipes[pipe] for at in way) for pipe in PIPES}


def _way(blocks: list[Block], allowed: set[int]) -> list[int]:
    """Blocks of the usual way; none, if these lead to no end."""
    way: list[int] = []
    at = 0
    while at in allowed:
        way.append(at)
        ahead = blocks[at].next - set(way)
        if blocks[at].next and not ahead:  # a loop that is left from within
            within = way[min(map(way.index, blocks[at].next)) :]
            if any(blocks[inner].names[-1] == "EXIT" for inner in within):
                return way
            ahead = {to for inner in within for to in blocks[inner].next} - set(way)
        if not ahead:
            return way if blocks[at].names[-1] == "EXIT" else []
        last = max(ahead & allowed, default=-1)
        around = [to for to in allowed if at < to < last]
        counts = any("STG" in " ".join(blocks[to].names) or min(blocks[to].next, default=to + 1) <= to for to in around)
        at = min(ahead & allowed, default=-1) if counts else last
    return []


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
            if blocks[-1].names:
                blocks.append(Block())
            labels[found["label"]] = len(blocks) - 1
        elif found["line"]:
            line = (found["file"], int(found["line"]))
        else:
            block, name, rest = blocks[-1], found["name"], found["rest"].replace(".reuse", "")
            block.pipes[next(pipe for pipe, names in NAMES.items() if re.match(names, name))] += 1
            block.names.append(name)
            block.lines.append(line)
            block.steps |= {int(number, 16) for _, number in ADDED.findall(f"{name} {rest}")}
            # BRA.DIV is for lanes that disagree, and leads to what does the same for them one by one. A call under a
            # condition does not return: for sm_80 loops are left by it.
            guarded = bool(found["guard"]) or "P" in rest.partition("`")[0]
            if name == "EXIT" or re.match(r"BRA(?!\.DIV)", name) or (guarded and name.startswith("CALL.REL")):
                block.targets, block.falls = re.findall(r"\.L_x_\d+", rest), guarded
                blocks.append(Block())
    for at, block in enumerate(blocks):
        block.next = {labels[target] for target in block.targets} | ({at + 1} if block.falls else set())
    return blocks
