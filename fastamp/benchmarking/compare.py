"""Two results of one suite, row by row: what became slower or faster beyond the spread of either."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fastamp.benchmarking.report import Results, Row
from fastamp.tables import print_table

Key = tuple[str, str, str, str, str]  # workload, dtype, clock, contender, and what varies
NAMES = ("workload", "dtype", "clock", "contender")
TAKEN = ("format", "suite", "device", "versions", "threads", "copy_gb_s", "rows")
QUARTILES = ("q25", "q50", "q75")
SAME_COPY = 0.1  # copies that differ by more are of another machine, or of a busy one
VERDICTS = ("slower", "faster", "within the spread", "base")


@dataclass(frozen=True)
class Change:
    """One row in both results."""

    key: Key
    # What it is judged by, as quantiles: the ratio to its base, which ran in the same rounds on the same machine;
    # milliseconds where there is none.
    before: dict[str, float]
    after: dict[str, float]
    ms: tuple[float, float]  # the medians in the first, and in the second
    by_ratio: bool
    is_base: bool  # whether ratios are to it in both: then it is not judged

    @property
    def ratio(self) -> float:
        """The second's median of what it is judged by over the first's."""
        return self.after["q50"] / self.before["q50"]

    @property
    def verdict(self) -> str:
        """One of VERDICTS: "slower" and "faster" where the middle halves of the rounds are apart."""
        if self.is_base:
            return "base"
        if self.after["q25"] > self.before["q75"]:
            return "slower"
        return "faster" if self.after["q75"] < self.before["q25"] else "within the spread"


class Comparison(NamedTuple):
    """What two results have to say of each other."""

    changes: tuple[Change, ...]  # rows in both, in the first's order
    only: tuple[tuple[Key, ...], tuple[Key, ...]]  # rows in the first only, and in the second only
    caveats: tuple[str, ...]  # what else is different: devices, versions, threads, how fast a copy is


def read(path: Path) -> Results:
    """Results that `fastamp bench --out` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no results, or such of format 1, which name no suite, or a row that lacks something.
    """
    try:
        results: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text's encoding, or of JSON
        raise ValueError(f"{path} is no JSON: {error}") from None
    missing = [name for name in TAKEN if not isinstance(results, dict) or name not in results]
    if missing or not isinstance(results["rows"], list):
        raise ValueError(f"{path} holds no results of fastamp bench: no {', '.join(missing) or 'list of rows'}")
    for number, row in enumerate(results["rows"], 1):
        try:
            measured = [row["ms"]["both"], *([row["ratio"]["both"]] if row["ratio"] is not None else [])]
            whole = all(isinstance(one[q], int | float) for one in measured for q in QUARTILES)
            whole = whole and all(row[name] for name in NAMES)
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{path}: row {number} lacks a name, or quartiles of both directions")
    return results


def compare(before: Results, after: Results) -> Comparison:
    """Matches the rows of two results, as `read` gives them, by workload, dtype, clock and contender.

    Raises:
        ValueError: they are of different suites or formats, or have no row in common.
    """
    for name in ("suite", "format"):
        if before[name] != after[name]:
            raise ValueError(f"the two are of different {name}s: {before[name]!r} and {after[name]!r}")
    first, second = (
        {(*(row[n] for n in NAMES), row.get("varies", "")): row for row in r["rows"]} for r in (before, after)
    )
    changes = tuple(_change(key, row, second[key]) for key, row in first.items() if key in second)
    if not changes:
        raise ValueError("the two have no row in common: no workload, dtype, clock and contender is in both")
    only = (tuple(key for key in first if key not in second), tuple(key for key in second if key not in first))
    facts = [{"device": _device(one), "threads": one["threads"], **one["versions"]} for one in (before, after)]
    names = dict.fromkeys((*facts[0], *facts[1]))
    caveats = [f"{n}: {facts[0].get(n)} and {facts[1].get(n)}" for n in names if facts[0].get(n) != facts[1].get(n)]
    slow, fast = sorted((before["copy_gb_s"], after["copy_gb_s"]))
    if fast > (1 + SAME_COPY) * slow:
        caveats.append(f"copy: {before['copy_gb_s']:.3g} and {after['copy_gb_s']:.3g} GB/s")
    return Comparison(changes, only, tuple(caveats))


def _device(results: Results) -> str:
    device = results["device"]
    numbers = [f"{name} {device[name]}" for name in ("family", "model", "stepping") if device.get(name) is not None]
    return " ".join([device["name"], *numbers])


def _change(key: Key, *rows: Row) -> Change:
    by_ratio = all(row["ratio"] is not None for row in rows)
    before, after = (row["ratio" if by_ratio else "ms"]["both"] for row in rows)
    first, second = (row["ms"]["both"]["q50"] for row in rows)
    is_base = by_ratio and all(row.get("ratio_to") == row["contender"] for row in rows)
    return Change(key, before, after, (first, second), by_ratio, is_base)


def print_comparison(found: Comparison, console: Console) -> None:
    """Prints a table for every workload and clock, then what is in one only, and how many changed."""
    for caveat in found.caveats:
        console.print(f"not the same {caveat}", highlight=False, soft_wrap=True)
    caption = "ms of both; ratios to the base, or ms where there is none, with q25-q75; second/first of these"
    for label, group in groupby(found.changes, lambda change: (*change.key[:3], change.key[4])):
        body = [
            [
                change.key[3],
                ", ".join(f"{value:.3g}" for value in change.ms),
                *(_median(quantiles, change.by_ratio) for quantiles in (change.before, change.after)),
                f"{change.ratio:.2f}",
                "in spread" if change.verdict == "within the spread" else change.verdict,
            ]
            for change in group
        ]
        headings = ["", "ms", "first", "second", "2nd/1st", ""]
        print_table(console, headings, body, title=", ".join(filter(None, label)), caption=caption)
    for which, keys in zip(("first", "second"), found.only, strict=True):
        for key in keys:
            console.print(f"in the {which} only: {', '.join(filter(None, key))}", highlight=False, soft_wrap=True)
    verdicts = [change.verdict for change in found.changes]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in VERDICTS)
    console.print(f"{len(verdicts)} rows: {counts}", highlight=False)


def _median(quantiles: dict[str, float], by_ratio: bool) -> str:
    form = ".2f" if by_ratio else ".3g"
    q25, q50, q75 = (format(quantiles[name], form) for name in QUARTILES)
    return f"{q50} {q25}-{q75}"
