"""Tables in the terminal whose names and numbers are whole, however narrow it is."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    names: int = 1,
    title: str = "",
    caption: str = "",
) -> None:
    """Prints a table; where it is wider than the console, what stands first in a row has a line of its own.

    Args:
        console: where to.
        headings: one a column.
        rows: cells, none of more than a line.
        names: so many columns, the first of them, are aligned to the left, the others to the right.
        title: a line above.
        caption: below; broken into lines where it is long.
    """
    lines = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(cell.cell_len for cell in column) for column in zip(*lines, strict=True)]
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= console.width else 1
    whole = sum(widths) + gap * (len(widths) - 1) <= console.width
    for number, cells in enumerate(lines):
        for cell, width, left in zip(cells, widths, [True] * names + [False] * len(cells), strict=False):
            cell.align("left" if left else "right", width)
        parts = [cells] if whole else [cells[:1], [Text(""), *cells[1:]]]
        lines[number] = [Text(" " * gap).join(part) for part in parts]
    wide = max(line.cell_len for parts in lines for line in parts)

    def put(line: Text, style: str = "") -> None:
        line.rstrip()
        console.print(line, style=style, no_wrap=True, overflow="ignore", crop=False, highlight=False)

    console.print()
    if title:
        put(Text(title), "table.title")
    for line in filter(None, lines[0]):
        put(line, "table.header")
    put(Text("─" * min(wide, console.width)))
    for line in (line for parts in lines[1:] for line in parts):
        put(line)
    if caption:
        console.print(Text(caption), style="table.caption", highlight=False)
