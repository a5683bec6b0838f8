"""Bytes of global memory that one program asks for, counted in what Triton made of the kernel (its TTGIR).

Every load and store of that text becomes the same accesses in machine code: none is dropped or merged behind it. It
counts with all elements of its tile, whether or not a mask leaves some out, as the elements that bytes are divided by
do; what a tile smaller than the program's threads makes some of them do twice is not counted, since it comes from the
cache in the same instruction. A loop counts as often as it turns where it runs to a constant or to an argument of known
size, otherwise once. In a branch either the one that moves more counts, or the first: kernels put the usual one
first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

ACCESS = re.compile(r"(?:^|= |\s)\"?((?:tt|ttg|ttng|amdg|amdgpu|nvgpu|nvws)\.\w*(?:load|store|copy|atomic)\w*)")
LOADS = ("tt.load", "amdg.buffer_load", "amdgpu.buffer_load")
STORES = ("tt.store", "amdg.buffer_store", "amdgpu.buffer_store")
IN_SHARED_MEMORY = ("ttg.local_load", "ttg.local_store")
ACCESSED = re.compile(r": (?:tensor<((?:\d+x)*))?(?:!tt\.ptr<)?[a-z]+(\d+)\b[^:]*$")
LOOP = re.compile(r"scf\.for \S+ = (%\S+) to (%\S+) step (%\S+)")
CONSTANT = re.compile(r"^(%\S+) = arith\.constant (-?\d+) : i\d+$")
SCALED = re.compile(r"^(%\S+) = arith\.(divsi|muli) (%\S+), (%\S+) : i\d+$")
ARGUMENT = re.compile(r"(%\w+): ")
PLACE = re.compile(r"^(#loc\w*) = (loc\(.*\))$", re.MULTILINE)
Line = tuple[str, int]  # a file's name alone, for what a cache holds was compiled anywhere; and a line of it
Loops = dict[Line, tuple[int, int]]
FILE = re.compile(r'^loc\("(?:[^"]*/)?([^"/]+)":(\d+):\d+')


class Traffic(NamedTuple):
    """Bytes that a program reads and writes."""

    read: int
    written: int

    def plus(self, other: Traffic, times: int = 1) -> Traffic:
        """The sum with so many times the other."""
        return Traffic(self.read + times * other.read, self.written + times * other.written)


class _Region:
    """What is between two braces, or, of a branch, between the last two; and the branches before it."""

    def __init__(self, turns: int) -> None:
        self.turns = turns
        self.here = Traffic(0, 0)
        self.before: list[Traffic] = []


def program_traffic(
    ttgir: str, arguments: Sequence[str], sizes: Mapping[str, int], *, first_branch: bool = False
) -> Traffic:
    """Bytes that one program asks for.

    Args:
        ttgir: the text of one kernel.
        arguments: names of those that are not constants, in order.
        sizes: values of integer arguments that loops run to.
        first_branch: of two branches count the first, not the dearer.

    Raises:
        ValueError: the text has an access that is not understood.
    """
    stack = [_Region(1)]
    for text, values, _ in _statements(ttgir, arguments, sizes):
        if text.startswith("}"):
            _close(stack, other_branch=text.startswith("} else {"), first_branch=first_branch)
        found = ACCESS.search(text)
        if found and found[1] not in IN_SHARED_MEMORY:
            stack[-1].here = stack[-1].here.plus(_access(found[1], text))
        if text.endswith("{") and not text.startswith("} else {"):
            loop = LOOP.search(text)
            stack.append(_Region(_turns(loop, values) if loop else 1))
    return stack[0].here


def loop_turns(ttgir: str, arguments: Sequence[str], sizes: Mapping[str, int]) -> Loops:
    """How often a program turns in each loop, and what its index grows by, under the names of file and line.

    Arguments are those of `program_traffic`.
    """
    places = dict(PLACE.findall(ttgir))
    found: Loops = {}
    opened: list[tuple[int, int] | None] = []
    for text, values, place in _statements(ttgir, arguments, sizes):
        other = text.startswith(("} else {", "} do {"))
        if text.startswith("}") and not other:
            loop = opened.pop()
            while place in places:
                place = places[place]
                named = FILE.search(place)
                if loop and named:
                    found[named[1], int(named[2])] = loop
                place = "".join(re.findall(r"#loc\w*", place)[:1])
        if text.endswith("{") and not other:
            begun = LOOP.search(text)
            opened.append((_turns(begun, values), values.get(begun[3], 1)) if begun else None)
    return found


def _statements(
    ttgir: str, arguments: Sequence[str], sizes: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, int], str]]:
    """Every line without its place, the integers known by then, and the place's name."""
    values: dict[str, int] = {}
    for line in ttgir.splitlines():
        text = re.sub(r"\s*loc\([^()]*(?:\([^()]*\))*[^()]*\)$", "", line.strip()).strip()
        if text.startswith("tt.func"):
            named = ARGUMENT.findall(line)
            if len(named) != len(arguments):
                raise ValueError(f"{len(named)} arguments in the compiled code, {len(arguments)} expected")
            given = dict(zip(arguments, named, strict=True))
            values |= {given[name]: size for name, size in sizes.items()}
        constant = CONSTANT.match(text)
        if constant:
            values[constant[1]] = int(constant[2])
        scaled = SCALED.match(text)
        if scaled and scaled[3] in values and scaled[4] in values:
            one, other = values[scaled[3]], values[scaled[4]]
            values[scaled[1]] = one // other if scaled[2] == "divsi" else one * other
        yield text, values, "".join(re.findall(r"loc\((#loc\w*)\)$", line))


def _close(stack: list[_Region], *, other_branch: bool, first_branch: bool) -> None:
    region = stack[-1]
    branches = [*region.before, region.here]
    if other_branch:
        region.before, region.here = branches, Traffic(0, 0)
    else:
        stack.pop()
        taken = branches[0] if first_branch else max(branches, key=sum)
        stack[-1].here = stack[-1].here.plus(taken, region.turns)


def _turns(loop: re.Match[str], values: Mapping[str, int]) -> int:
    bounds = [values.get(name) for name in loop.groups()]
    if None in bounds:
        return 1
    first, last, step = (bound or 0 for bound in bounds)
    return max(0, -(-(last - first) // step))


def _access(name: str, text: str) -> Traffic:
    accessed = ACCESSED.search(text)
    if accessed is None or name not in LOADS + STORES:
        raise ValueError(f"cannot count the bytes of: {text}")
    size = max(1, int(accessed[2]) // 8)
    for length in (accessed[1] or "").split("x")[:-1]:
        size *= int(length)
    return Traffic(size, 0) if name in LOADS else Traffic(0, size)
