"""What the paper reports."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastamp.data import DATASETS
from fastamp.paper.plan import EXPERIMENTS, METHODS, Experiment
from fastamp.paper.statistics import Cell
from fastamp.training.recipes import RECIPES

CITATION = "Liu et al., EMNLP 2021, https://aclanthology.org/2021.emnlp-main.238/"
# The two claims of the abstract, relative reductions of the error rate over Mixup variants, in percent.
REDUCTION_UP_TO = 31.3
LOW_RESOURCE_REDUCTION_UP_TO = 17.5

COLUMNS = ("experiment", "dataset", "model", "method", "ratio", "error")


@dataclass(frozen=True)
class PublishedCell:
    """A printed cell: of which table or figure, and which runs it averages."""

    experiment: str
    cell: Cell


def read_published(
    path: str | os.PathLike[str], experiments: Mapping[str, Experiment] = EXPERIMENTS
) -> dict[PublishedCell, float]:
    r"""Reads the paper's cells from a file that you make from its tables.

    UTF-8, tab-separated, no quoting; the first line is the header, every other line a cell:

        experiment<TAB>dataset<TAB>model<TAB>method<TAB>ratio<TAB>error
        table2<TAB>trec<TAB>cnn-rand<TAB>sent-amp<TAB>1<TAB>50.0

    (The number is made up.) Names are those of `fastamp.paper.plan`, whether the plan has such a cell or not: what a
    table consists of is partly inferred there. The ratio is a share in (0, 1], the error a percentage of misclassified
    sentences: 100 - accuracy.

    Args:
        path: the file.
        experiments: whose names are known.

    Returns:
        the errors by cell, in the order of the file.

    Raises:
        ValueError: the file is missing, unreadable, empty or malformed, holds a name that is not known or a cell twice;
            names the file and the line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason})") from None
    if lines[-1] == "":
        lines.pop()
    header = "\t".join(COLUMNS)
    if not lines or lines[0] != header:
        raise ValueError(f"{path}:1: the header must be {header!r}, got {(lines or [''])[0][:80]!r}")
    cells: dict[PublishedCell, float] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            cell, error_rate = _parse(line, experiments)
            if cell in cells:
                raise ValueError("the same cell as on a line before")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        cells[cell] = error_rate
    return cells


def _parse(line: str, experiments: Mapping[str, Experiment]) -> tuple[PublishedCell, float]:
    fields = line.split("\t")
    if len(fields) != len(COLUMNS):
        raise ValueError(f"{len(fields)} tab-separated columns; takes {len(COLUMNS)} ({', '.join(COLUMNS)})")
    name, dataset, model, method, *numbers = fields
    if name not in experiments:
        raise ValueError(f"unknown experiment {name!r}; takes {', '.join(experiments)}")
    names = {"dataset": (dataset, DATASETS), "model": (model, RECIPES), "method": (method, METHODS)}
    for column, (value, known) in names.items():
        if value not in known:
            raise ValueError(f"unknown {column} {value!r}; takes {', '.join(known)}")
    ratio, error_rate = (_number(column, text) for column, text in zip(COLUMNS[-2:], numbers, strict=True))
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio:g}")
    if not 0 <= error_rate <= 100:
        raise ValueError(f"error must be in [0, 100], got {error_rate:g}")
    return PublishedCell(name, Cell(dataset, model, method, ratio)), error_rate


def _number(column: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column} must be a number, got {text!r}")
    return number
