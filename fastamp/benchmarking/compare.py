"""Two results of one suite, row by row: what became slower or faster beyond the spread of either."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from fastamp.tables import print_table

Key = tuple[str, str, str, str, str]  # workload, dtype, clock, contender, and what varies
TAKEN = ("format", "suite", "device", "versions", "threads", "copy_gb_s", "rows")
OF_ROWS = ("workload", "dtype", "clock", "contender", "ms", "ratio")
QUARTILES = ("q25", "q50", "q75")
SAME_COPY = 0.1  # copies that differ by more are of another machine, or of a busy one
VERDICTS = ("slower", "faster", "within the spread", "base")
SHORT = {"within the spread": "in spread"}


@dataclass(frozen=True)
class Change:
    """One row in both results.

    Attributes:
        key: what it is of: workload, dtype, clock, contender, and the size that varies or "".
        before: what it is judged by in the first, as quantiles: the ratio to its base, for the base runs in the same
            rounds on the same machine; milliseconds where there is none.
        after: in the second.
        ms: the median milliseconds in the first, and in the second.
        by_ratio: whether it is judged by ratios.
        is_base: whether ratios are to it in both: then it is not judged.
    """

    key: Key
    before: dict[str, float]
    after: dict[str, float]
    ms: tuple[float, float]
    by_ratio: bool
    is_base: bool = False

    @property
    def ratio(self) -> float:
        """Of the medians that it is judged by, the second's over the first's."""
        return self.after["q50"] / self.before["q50"]

    @property
    def verdict(self) -> str:
        """One of VERDICTS: "slower" and "faster" where the middle halves of the rounds are apart."""
        if self.is_base:
            return "base"
        if self.after["q25"] > self.before["q75"]:
            return "slower"
        return "faster" if self.after["q75"] < self.before["q25"] else "within the spread"


@dataclass(frozen=True)
class Comparison:
    """What two results have to say of each other.

    Attributes:
        changes: rows in both, in the first's order.
        only: rows in the first only, and in the second only.
        caveats: what else is different: devices, versions, threads, how fast a copy is.
    """

    changes: tuple[Change, ...]
    only: tuple[tuple[Key, ...], tuple[Key, ...]]
    caveats: tuple[str, ...]


def read(path: Path) -> dict[str, Any]:
    """Results that `fastamp bench --out` wrote.

    Args:
        path: the JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no results, or such of format 1, which name no suite, or a row that lacks something.
    """
    try:
        results: Any = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    missing = [name for name in TAKEN if not isinstance(results, dict) or name not in results]
    if missing == ["suite"]:
        raise ValueError(f"{path} is of format {results['format']}, without a suite; takes format 2 or later")
    if missing:
        raise ValueError(f"{path} holds no results of fastamp bench: {', '.join(missing)} not there")
    if not isinstance(results["rows"], list):
        raise ValueError(f"{path}: rows must be a list, got {type(results['rows']).__name__}")
    for number, row in enumerate(results["rows"], 1):
        if (lacking := _lacking(row)) is not None:
            raise ValueError(f"{path}: row {number} has no {lacking}")
    return results


def _lacking(row: Any) -> str | None:
    for name in OF_ROWS:
        if not isinstance(row, dict) or name not in row:
            return name
    for name in ("ms", "ratio"):
        if name == "ratio" and row[name] is None:
            continue
        both = row[name].get("both") if isinstance(row[name], dict) else None
        for quartile in QUARTILES:
            if not isinstance(both, dict) or not isinstance(both.get(quartile), int | float):
                return f"{name}.both.{quartile}"
    return None


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Matches the rows of two results by workload, dtype, clock and contender.

    Args:
        before: the first, as `read` gives it.
        after: the second.

    Raises:
        ValueError: they are of different suites or formats, or have no row in common.
    """
    for name in ("suite", "format"):
        if before[name] != after[name]:
            raise ValueError(f"the two are of different {name}s: {before[name]!r} and {after[name]!r}")
    first, second = _by_key(before), _by_key(after)
    if not first.keys() & second.keys():
        raise ValueError("the two have no row in common: no workload, dtype, clock and contender is in both")
    changes = tuple(_change(key, row, second[key]) for key, row in first.items() if key in second)
    only = tuple(tuple(key for key in one if key not in other) for one, other in ((first, second), (second, first)))
    facts = {"device": _device, "threads": lambda results: results["threads"]}
    names = dict.fromkeys((*before["versions"], *after["versions"]))
    facts |= {name: lambda results, name=name: results["versions"].get(name) for name in names}
    caveats = [f"{name}: {of(before)} and {of(after)}" for name, of in facts.items() if of(before) != of(after)]
    slow, fast = sorted((before["copy_gb_s"], after["copy_gb_s"]))
    if fast > (1 + SAME_COPY) * slow:
        caveats.append(f"copy: {before['copy_gb_s']:.3g} and {after['copy_gb_s']:.3g} GB/s")
    return Comparison(changes, (only[0], only[1]), tuple(caveats))


def _device(results: dict[str, Any]) -> str:
    device = results["device"]
    numbers = [f"{name} {device[name]}" for name in ("family", "model", "stepping") if device.get(name) is not None]
    return " ".join([device["name"], *numbers])


def _change(key: Key, before: dict[str, Any], after: dict[str, Any]) -> Change:
    by_ratio = before["ratio"] is not None and after["ratio"] is not None
    measure = "ratio" if by_ratio else "ms"
    return Change(
        key,
        before[measure]["both"],
        after[measure]["both"],
        (before["ms"]["both"]["q50"], after["ms"]["both"]["q50"]),
        by_ratio,
        by_ratio and all(row.get("ratio_to") == row["contender"] for row in (before, after)),
    )


def _by_key(results: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {
        (row["workload"], row["dtype"], row["clock"], row["contender"], row.get("varies", "")): row
        for row in results["rows"]
    }


def print_comparison(found: Comparison, console: Console) -> None:
    """Prints a table for every workload and clock, then what is in one only, and how many changed."""
    for caveat in found.caveats:
        console.print(f"not the same {caveat}", highlight=False, soft_wrap=True)
    for label, group in groupby(found.changes, lambda change: (*change.key[:3], change.key[4])):
        rows = []
        for change in group:
            shown = [_median(quantiles, change.by_ratio) for quantiles in (change.before, change.after)]
            ms = ", ".join(f"{value:.3g}" for value in change.ms)
            verdict = SHORT.get(change.verdict, change.verdict)
            rows.append((change.key[3], ms, *shown, f"{change.ratio:.2f}", verdict))
        print_table(
            console,
            ("", "ms", "first", "second", "2nd/1st", ""),
            rows,
            title=", ".join(filter(None, label)),
            caption="ms of both; ratios to the base, or ms where there is none, with q25-q75; second/first of these",
        )
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
