"""Draws what README.md and bench/README.md say of results from bench/results/*.json: `python bench/readme.py`.

A page marks what is to be drawn, and everything between the marks is replaced:

    <!-- drawn: SECTION -->
    <!-- /drawn -->

with a SECTION of SECTIONS. With --check nothing is written, and the code is 1 where a page is not in step.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md")
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- drawn: (\S+) -->\n)(.*?)(<!-- /drawn -->)", re.DOTALL)
Results = dict[str, Any]
Rows = list[dict[str, Any]]


def read_results(folder: Path) -> list[tuple[Path, Results]]:
    """Every file of `fastamp bench` in a folder, GPUs first, then the newest first.

    Args:
        folder: with the JSON files; those of other programs have no "copy_gb_s" and are left out.
    """
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    found = [(path, results) for path, results in found if "copy_gb_s" in results]
    found.sort(key=lambda one: one[1]["time"], reverse=True)
    return sorted(found, key=lambda one: one[1]["device"]["type"] == "cpu")


def of_suite(found: list[tuple[Path, Results]], suite: str, *, least_format: int = 2) -> list[tuple[Path, Results]]:
    """Those of one suite; results of format 1, which name none, are of the suite "head"."""
    return [
        (path, results)
        for path, results in found
        if results.get("suite", "head") == suite and results["format"] >= least_format
    ]


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    lines = [list(head)]
    lines += [["---"] * len(lines[0]), *(list(cells) for cells in body)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def origin(path: Path, results: Results, page: Path) -> str:
    """What a table is from, in one paragraph."""
    checkout = results["checkout"]
    commit = "" if checkout is None else f", commit {checkout['commit'][:7]}{' with changes' * checkout['changed']}"
    link = path.relative_to(page.parent).as_posix()
    return (
        f"`{results['command']}` on {results['device']['name']}, {results['time'][:10]}, torch "
        f"{results['versions']['torch']}, threads {results['threads']}{commit}; a copy moves "
        f"{results['copy_gb_s']:.0f} GB/s; [all numbers]({link}):"
    )


def names_of(rows: Rows, field: str) -> list[str]:
    """The different values of a field, in their order."""
    return list(dict.fromkeys(row[field] for row in rows))


def place(row: dict[str, Any]) -> str:
    """Where a row was measured."""
    return f"{row['workload']}, {row['dtype']}, {row['clock']}"


def ratio(row: dict[str, Any], *, spread: bool = False) -> str:
    """To its base: the median, perhaps with the quartiles."""
    if row["ratio"] is None:
        return ""
    both = row["ratio"]["both"]
    if row["contender"] == row["ratio_to"]:
        return "1 *"
    quartiles = f" ({both['q25']:.2f}-{both['q75']:.2f})" if spread else ""
    return f"{both['q50']:.2f}{quartiles}"


def memory(row: dict[str, Any]) -> str:
    """Over its base's; nothing where the base was refused."""
    return f"{row['peak_memory_ratio']:.2f}" if "peak_memory_ratio" in row else ""


def head_table(results: Results) -> str:
    """Ratios: a line for every workload, a column for every contender."""
    rows = results["rows"]
    names = names_of(rows, "contender")
    body = []
    for label, group in groupby(rows, place):
        by_name = {row["contender"]: row for row in group}
        body.append([label, *(ratio(by_name[name]) if name in by_name else "" for name in names)])
    return table(["time over plain Mixup's (*)", *names], body)


def layers_table(results: Results) -> str:
    """Ratios of time and memory: a line for every contender, two columns for every workload."""
    places = list(dict.fromkeys(map(place, results["rows"])))
    found = {(place(row), row["contender"]): row for row in results["rows"]}
    body = []
    for name in names_of(results["rows"], "contender"):
        cells = [name]
        for where in places:
            row = found.get((where, name))
            cells += ["", ""] if row is None else [ratio(row, spread=True), memory(row)]
        body.append(cells)
    return table(["", *(f"{where}: {what}" for where in places for what in ("time", "memory"))], body)


def rows_table(results: Results) -> str:
    """Bandwidth: a line for every operation, shape, dtype, clock and contender."""
    body = (
        [
            place(row),
            row["contender"],
            f"{row['ms']['both']['q50']:.3g}",
            ratio(row),
            f"{row['gb_s']:.3g}",
            f"{row['percent_of_copy']:.0f}",
        ]
        for row in results["rows"]
    )
    return table(["", "", "ms", "over PyTorch's (*)", "GB/s", "% of a copy"], body)


def scaling_table(results: Results) -> str:
    """Exponents: a line for every size that varies and every clock, a column for every contender."""
    fits = results["fits"]
    names = names_of(fits, "contender")
    body = []
    for (size, takes, clock, low, high), group in groupby(
        fits, lambda fit: (fit["varies"], fit["input"], fit["clock"], fit["from"], fit["to"])
    ):
        by_name = {fit["contender"]: fit["exponent"] for fit in group}
        exponents = ("" if by_name.get(name) is None else f"{by_name[name]:.2f}" for name in names)
        body.append([f"{size} of {takes}, {low} to {high}, {clock}", *exponents])
    return table(["exponent of the growth in", *names], body)


def vocabulary_table(results: Results) -> str:
    """Time and peak memory, and what they are to those of a linear layer with cross-entropy."""
    body = (
        [
            place(row),
            row["contender"],
            f"{row['ms']['both']['q50']:.3g}",
            ratio(row, spread=True),
            f"{row['peak_memory_bytes'] / 1e6:.4g}",
            memory(row),
        ]
        for row in results["rows"]
    )
    return table(["", "", "ms", "over *", "peak MB", "over *"], body)


TABLES: dict[str, Callable[[Results], str]] = {
    "head": head_table,
    "layers": layers_table,
    "rows": rows_table,
    "scaling": scaling_table,
    "vocabulary": vocabulary_table,
}


def suite_section(suite: str, found: list[tuple[Path, Results]], page: Path) -> str:
    """A table for every device that has results of a suite."""
    blocks = []
    for path, results in of_suite(found, suite):
        blocks.append(f"{origin(path, results, page)}\n\n{TABLES[suite](results)}")
        blocks += [f"Refused: {entry['contender']} at {entry['workload']}." for entry in results["refused"]]
    return (
        "\n\n".join(blocks)
        or f"No result in the present format yet; `fastamp bench --suite {suite} --out bench/results` gives one."
    )


def figure(found: list[tuple[Path, Results]], page: Path) -> str:
    """The bars of the suite "head", of a GPU if there is one, and where they are from."""
    drawn = [
        (path.with_suffix(".png"), results)
        for path, results in of_suite(found, "head", least_format=1)
        if path.with_suffix(".png").exists()
    ]
    if not drawn:
        return "No result yet; `fastamp bench --out bench/results` gives one."
    path, results = drawn[0]
    device, threads = results["device"], results["threads"]
    where = device["name"] if device["type"] == "cuda" else f"{device['name']}, {threads} thread{'s' * (threads != 1)}"
    return (
        f"![Time of a step relative to plain Mixup]({path.relative_to(page.parent).as_posix()})\n\n"
        f"*{where}, torch {results['versions']['torch']}: from hidden state through `nn.Linear` to the gradients, "
        f"relative to plain eager Mixup in the same interleaved run of `{results['command']}`, {results['time'][:10]}.*"
    )


def layers_claim(found: list[tuple[Path, Results]], page: Path) -> str:
    """What whole steps with words mixed cost, in a sentence for every device and clock."""
    said = []
    for _, results in of_suite(found, "layers"):
        for clock in names_of(results["rows"], "clock"):
            costs = [
                cost
                for workload in names_of(results["rows"], "workload")
                if (cost := _cost([r for r in results["rows"] if (r["workload"], r["clock"]) == (workload, clock)]))
            ]
            if costs:
                where = f"{results['device']['name']}, {clock}, threads {results['threads']}"
                said.append(f"On {where}, relative to the fastest plain Mixup of the same run: {'; '.join(costs)}.")
    return "\n".join(said) or "No result yet; `fastamp bench --suite layers --out bench/results` gives one."


def _cost(rows: Rows) -> str | None:
    by_name = {row["contender"]: row for row in rows if row["ratio"] is not None}
    if "AMPLoss.step" not in by_name:
        return None
    others = {
        "Mixup": "Mixup as one writes it",
        "AMP as published": "AMP as published",
        "AMP autograd": "by careful autograd",
        "AMP autograd, split": "by careful autograd, cut as fastamp cuts",
    }
    beside = [f"{said} {ratio(by_name[name]).rstrip(' *')}" for name, said in others.items() if name in by_name]
    row = by_name["AMPLoss.step"]
    beside += [f"{memory(row)} times its memory"] if memory(row) else []
    return f"{row['workload']}, {row['dtype']}: {ratio(row)} times {row['ratio_to']} ({', '.join(beside)})"


def targets(found: list[tuple[Path, Results]], page: Path) -> str:
    """A line for every claim and every file that can say whether it holds."""
    body = []
    for target in TARGETS:
        said = [(path, target.verdict(results)) for path, results in found if results["format"] >= 2]
        lines = [
            (f"[{path.name}]({path.relative_to(page.parent).as_posix()})", verdict) for path, verdict in said if verdict
        ]
        needs = "a GPU" if target.device == "cuda" else f"the suite {target.suite}"
        for number, (file, verdict) in enumerate(lines or [("", f"not measured: takes {needs}")]):
            body.append([target.claim if number == 0 else "", file, verdict])
    return table(["claim", "file", "verdict, and the row that is nearest to the bound or furthest beyond"], body)


def host(found: list[tuple[Path, Results]], page: Path) -> str:
    """What bench/host_overhead.py counted, from host.json beside the other results."""
    path = (found[0][0].parent if found else RESULTS) / "host.json"
    if not path.exists():
        return f"No result yet; `python bench/host_overhead.py --json {path.name}` gives one."
    results = json.loads(path.read_text(encoding="utf-8"))
    body = []
    for row in results["rows"]:
        launching = [
            name for name in row["operators"] if name.split(".")[0] not in ("empty", "new_empty", "empty_like")
        ]
        batch, width, classes = row["shape"]
        shape = f"({batch}, {width}) -> {classes}" if row["step"].startswith("linear") else f"({batch}, {classes})"
        body.append(
            [
                shape,
                row["step"],
                str(len(row["kernels"])),
                str(len(launching)),
                "" if row["us"] is None else str(row["us"]),
            ]
        )
    head = ["(B, C)", "step, forward and backward", "our kernels", "operators that launch", "µs, launches apart"]
    where = f"{results['device']}, torch {results['versions']['torch']}, triton {results['versions']['triton']}"
    return f"On {where}:\n\n{table(head, body)}"


def files(found: list[tuple[Path, Results]], page: Path) -> str:
    """A list of all results."""
    body = (
        [
            f"[{path.name}]({path.relative_to(page.parent).as_posix()})",
            results.get("suite", "head"),
            results["device"]["name"],
            results["time"][:10],
            f"`{results['command']}`",
        ]
        for path, results in found
    )
    return table(["file", "suite", "device", "date", "command"], body)


SECTIONS: dict[str, Callable[[list[tuple[Path, Results]], Path], str]] = {
    "figure": figure,
    "layers-claim": layers_claim,
    "targets": targets,
    "host": host,
    "files": files,
    **{suite: lambda found, page, suite=suite: suite_section(suite, found, page) for suite in TABLES},
}


def drawn(page: Path, results: Path = RESULTS) -> str:
    """A page's text with its marked sections drawn anew.

    Args:
        page: the Markdown file, above or beside the folder of results.
        results: that folder.

    Raises:
        ValueError: a section that is unknown, or a mark without its other half.
    """
    text = page.read_text(encoding="utf-8")
    found = read_results(results)

    def section(match: re.Match[str]) -> str:
        opened, name, _, closed = match.groups()
        if name not in SECTIONS:
            raise ValueError(f"{page.name}: unknown section {name!r}; takes {', '.join(SECTIONS)}")
        return f"{opened}{SECTIONS[name](found, page)}\n{closed}"

    marks = (text.count("<!-- drawn: "), text.count("<!-- /drawn -->"), len(MARKED.findall(text)))
    if len(set(marks)) > 1:
        raise ValueError(f"{page.name}: {marks[0]} marks open and {marks[1]} close a section; {marks[2]} match")
    return MARKED.sub(section, text)


def main() -> None:
    """Rewrites the pages, or says which are not in step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; code 1 where a page is not in step")
    check = parser.parse_args().check
    stale = [(page, text) for page in PAGES if (text := drawn(page)) != page.read_text(encoding="utf-8")]
    for page, text in stale:
        if not check:
            page.write_text(text, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'not in step; run bench/readme.py' if check else 'drawn anew'}")
    sys.exit(check and bool(stale))


if __name__ == "__main__":
    main()
