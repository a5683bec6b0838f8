"""The tables of bench/README.md, made from bench/results: `python bench/tables.py` writes them into the page.

They stand between the two marks below; with --check nothing is written, and the code is 1 where they are not those of
the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("README.md")
MARKS = ("<!-- tables: python bench/tables.py -->\n", "<!-- /tables -->\n")
SUITES = {
    "head": "Last layer: time over plain Mixup's (*)",
    "layers": "Whole steps: time and peak memory over plain Mixup's (*)",
    "rows": "Operations: time over PyTorch's (*), and percent of a copy's bandwidth",
    "vocabulary": "A vocabulary: time and peak memory over cross-entropy's (*)",
    "scaling": "Exponents of growth",
}
Results = dict[str, Any]


def page(path: Path = PAGE) -> str:
    """The page's text with the tables of all results in the folder beside it.

    Raises:
        ValueError: the marks do not stand there once each.
    """
    text = path.read_text(encoding="utf-8")
    if [text.count(mark) for mark in MARKS] != [1, 1]:
        raise ValueError(f"{path.name}: {MARKS[0].strip()} and {MARKS[1].strip()} must each stand there once")
    before, rest = text.split(MARKS[0])
    files = {file: json.loads(file.read_text(encoding="utf-8")) for file in sorted(path.parent.glob("results/*.json"))}
    parts = [
        f"### {title}\n\n{origin(file, results)}\n\n{table(results)}\n{refused(results)}"
        for suite, title in SUITES.items()
        for file, results in files.items()
        if results.get("suite") == suite
    ]
    parts += [host(results) for file, results in files.items() if file.name == "host.json"]
    return before + MARKS[0] + "\n" + "\n".join(parts) + "\n" + MARKS[1] + rest.split(MARKS[1])[1]


def origin(file: Path, results: Results) -> str:
    """Where a table is from."""
    commit = "" if results["checkout"] is None else f", commit {results['checkout']['commit'][:7]}"
    return (
        f"{results['device']['name']}, threads {results['threads']}, torch {results['versions']['torch']}, "
        f"{results['time'][:10]}{commit}: `{results['command']}`, [all numbers](results/{file.name})"
    )


def refused(results: Results) -> str:
    """Who did not agree with the definition, and was not timed."""
    return "".join(f"\nRefused: {one['contender']} at {one['workload']}.\n" for one in results["refused"])


def table(results: Results) -> str:
    """A line for every contender, a column for every workload and clock, or for every size that grows."""
    columns: dict[str, dict[str, str]] = {}
    for fit in results.get("fits", ()):
        label = f"{fit['varies']} of {fit['input']}, {fit['from']} to {fit['to']}, {fit['clock']}"
        columns.setdefault(label, {})[fit["contender"]] = f"{fit['exponent']:.2f}"
    for row in [] if columns else results["rows"]:
        label = f"{row['workload']}, {row['dtype']}, {row['clock']}"
        columns.setdefault(label, {})[row["contender"]] = cell(results["suite"], row)
    return matrix(columns)


def cell(suite: str, row: Results) -> str:
    """The ratio of a row to its base, and what else its suite is about."""
    if row["ratio"] is None:
        return ""
    ratio = "1 *" if row["contender"] == row["ratio_to"] else f"{row['ratio']['both']['q50']:.2f}"
    if suite in ("layers", "vocabulary"):
        return f"{ratio}, {row['peak_memory_ratio']:.2f}"
    return f"{ratio}, {row['percent_of_copy']:.0f}%" if suite == "rows" else ratio


def host(results: Results) -> str:
    """What bench/host_overhead.py counted: a line for every step, a column for every shape."""
    memory = ("empty", "new_empty", "empty_like")  # no launch
    columns: dict[str, dict[str, str]] = {}
    for row in results["rows"]:
        batch, _, classes = row["shape"]
        launching = sum(name.split(".")[0] not in memory for name in row["operators"])
        columns.setdefault(f"({batch}, {classes})", {})[row["step"]] = f"{len(row['kernels'])} + {launching}"
    return (
        "### The host's part of an eager step: our kernels + other operators that launch\n\n"
        f"{results['device']}, torch {results['versions']['torch']}: `python bench/host_overhead.py --json "
        f"bench/results/host.json`\n\n{matrix(columns)}\n"
    )


def matrix(columns: dict[str, dict[str, str]]) -> str:
    """Cells by column and line, as Markdown."""
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        lines.append([name, *(column.get(name, "") for column in columns.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Rewrite the page, or say that it is not in step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    text = page()
    if parser.parse_args().check:
        sys.exit(text != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
