"""What the paper reports."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass

from fastamp.data import DATASETS
from fastamp.data.files import read_table
from fastamp.paper.plan import EXPERIMENTS, METHODS, Cell
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


def read_published(path: str | os.PathLike[str]) -> dict[PublishedCell, float]:
    """Reads the paper's cells from a file that you make from its tables, tab-separated as in `data.files.read_table`.

        experiment<TAB>dataset<TAB>model<TAB>method<TAB>ratio<TAB>error
        table2<TAB>trec<TAB>cnn-rand<TAB>sent-amp<TAB>1<TAB>50.0

    (The number is made up.) Names are those of `fastamp.paper.plan`, whether the plan has such a cell or not: what a
    table consists of is partly inferred there. The ratio is a share in (0, 1], the error a percentage of misclassified
    sentences: 100 - accuracy.

    Returns:
        the errors by cell, in the order of the file.

    Raises:
        ValueError: the file is missing, unreadable, empty or malformed, holds a name that is not known or a cell twice;
            names the file and the line.
    """
    cells: dict[PublishedCell, float] = {}

    def add(experiment: str, dataset: str, model: str, method: str, ratio: str, error: str) -> None:
        place = Cell(
            _known("dataset", dataset, DATASETS),
            _known("model", model, RECIPES),
            _known("method", method, METHODS),
            _number("ratio", ratio),
        )
        cell, percent = PublishedCell(_known("experiment", experiment, EXPERIMENTS), place), _number("error", error)
        if not 0 < place.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {place.ratio:g}")
        if not 0 <= percent <= 100:
            raise ValueError(f"error must be in [0, 100], got {percent:g}")
        if cell in cells:
            raise ValueError("the same cell as on a line before")
        cells[cell] = percent

    read_table(path, COLUMNS, add)
    return cells


def _known(column: str, name: str, names: Collection[str]) -> str:
    if name not in names:
        raise ValueError(f"unknown {column} {name!r}; takes {', '.join(names)}")
    return name


def _number(column: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column} must be a number, got {text!r}")
    return number
