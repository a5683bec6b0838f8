"""Two results of one suite, row by row: what became slower or faster beyond the spread of either."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Key = tuple[str, str, str, str, str]  # workload, dtype, clock, contender, and what varies
TAKEN = ("format", "suite", "device", "versions", "threads", "rows")


@dataclass(frozen=True)
class Change:
    """One row in both results.

    Attributes:
        key: what it is of: workload, dtype, clock, contender, and the size that varies or "".
        before: quantiles of the milliseconds of a step in the first.
        after: in the second.
    """

    key: Key
    before: dict[str, float]
    after: dict[str, float]

    @property
    def ratio(self) -> float:
        """Of the medians, the second's over the first's."""
        return self.after["q50"] / self.before["q50"]

    @property
    def verdict(self) -> str:
        """Whether it is "slower" or "faster", the middle halves of the rounds apart, or "within the spread"."""
        if self.after["q25"] > self.before["q75"]:
            return "slower"
        return "faster" if self.after["q75"] < self.before["q25"] else "within the spread"


@dataclass(frozen=True)
class Comparison:
    """What two results have to say of each other.

    Attributes:
        changes: rows in both, in the first's order.
        only: rows in the first only, and in the second only.
        caveats: what else is different: devices, versions, threads.
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
        ValueError: it holds no results, or such of format 1, which name no suite.
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
    return results


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
    changes = tuple(
        Change(key, row["ms"]["both"], second[key]["ms"]["both"]) for key, row in first.items() if key in second
    )
    only = tuple(tuple(key for key in one if key not in other) for one, other in ((first, second), (second, first)))
    facts = {"device": lambda results: results["device"]["name"], "threads": lambda results: results["threads"]}
    facts |= {name: lambda results, name=name: results["versions"].get(name) for name in before["versions"]}
    caveats = tuple(f"{name}: {of(before)} and {of(after)}" for name, of in facts.items() if of(before) != of(after))
    return Comparison(changes, (only[0], only[1]), caveats)


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
        table = Table(title=", ".join(filter(None, label)), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("median ms", no_wrap=True)
        for heading in ("first", "q25-q75", "second", "q25-q75", "second/first"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("")
        for change in group:
            cells = []
            for ms in (change.before, change.after):
                cells += [f"{ms['q50']:.4g}", f"{ms['q25']:.4g}-{ms['q75']:.4g}"]
            table.add_row(change.key[3], *cells, f"{change.ratio:.2f}", change.verdict)
        console.print(table)
    for which, keys in zip(("first", "second"), found.only, strict=True):
        for key in keys:
            console.print(f"in the {which} only: {', '.join(filter(None, key))}", highlight=False, soft_wrap=True)
    verdicts = [change.verdict for change in found.changes]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("slower", "faster", "within the spread"))
    console.print(f"{len(verdicts)} rows: {counts}", highlight=False)
