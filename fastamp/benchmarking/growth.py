"""How the time of a step grows with one of its sizes: the exponent of a power law through the larger half."""

from __future__ import annotations

import math
from itertools import groupby
from statistics import linear_regression
from typing import Any

FEWEST = 3  # points that say something of a power law


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The growth in every size that varies, of every contender and clock.

    A least-squares line through log median time against log size, over the upper half of the sizes, at least three:
    below, the time is that of the calls themselves.

    Args:
        rows: of results; those whose "varies" names a size.

    Returns:
        Of each: "clock", what "varies", "input", "dtype", "contender", the sizes fitted "from" and "to", "exponent"
        (None for fewer than three sizes), and "ms", the median by size.
    """
    kinds = ("clock", "varies", "input", "dtype", "contender")

    def kind(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(row[name] for name in kinds)

    found = []
    for key, group in groupby(sorted((row for row in rows if "varies" in row), key=kind), kind):
        medians = sorted((row["shape"][key[1]], row["ms"]["both"]["q50"]) for row in group)
        fitted = medians[-max(FEWEST, math.ceil(len(medians) / 2)) :]
        exponent = None
        if len(fitted) >= FEWEST:
            x, y = ([math.log(value) for value in values] for values in zip(*fitted, strict=True))
            exponent = linear_regression(x, y).slope
        found.append(
            {
                **dict(zip(kinds, key, strict=True)),
                "from": fitted[0][0],
                "to": fitted[-1][0],
                "exponent": exponent,
                "ms": {str(size): ms for size, ms in medians},
            }
        )
    return found
