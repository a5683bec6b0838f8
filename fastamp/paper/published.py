"""What the paper reports: all errors of its Tables 2 to 5, which are shipped beside this file."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fastamp.data import DATASETS
from fastamp.data.files import read_table
from fastamp.paper.plan import EXPERIMENTS, METHODS, Cell, same_method
from fastamp.training.recipes import RECIPES

CITATION = "Liu et al., EMNLP 2021, https://aclanthology.org/2021.emnlp-main.238/"
PAPER = Path(__file__).with_name("published.tsv")
COLUMNS = ("experiment", "dataset", "model", "method", "ratio", "error", "std", "improvement")
# How its runs were made, where ours may differ: 768 is BERT's width.
STEPS = 8000
WIDTHS = {"textcnn": 300, "bilstm": 300, "bert": 768}


@dataclass(frozen=True)
class PublishedCell:
    """A printed cell: of which table, which runs it averages, and its numbers."""

    experiment: str
    cell: Cell
    error: float  # percent
    std: float
    improvement: float | None = None  # over Mixup, in percent of its error, where it is printed

    @property
    def text(self) -> str:
        """Mean and deviation as the paper prints them."""
        return f"{self.error:.1f} ± {self.std:.2f}"


def read_published(path: str | os.PathLike[str] = PAPER) -> tuple[PublishedCell, ...]:
    """Reads printed cells, the paper's or those of a file, tab-separated as in `data.files.read_table`.

        experiment<TAB>dataset<TAB>model<TAB>method<TAB>ratio<TAB>error<TAB>std<TAB>improvement
        table2<TAB>trec<TAB>cnn-rand<TAB>sent-amp<TAB>1<TAB>50.0<TAB>1.25<TAB>

    (The numbers are made up.) Names are those of `fastamp.paper.plan`. The ratio is a share in (0, 1], the error a
    percentage of misclassified sentences: 100 - accuracy. The improvement may be empty.

    Returns:
        the cells, in the order of the file; one that several tables print is there several times.

    Raises:
        ValueError: the file is missing, unreadable, empty or malformed, or holds a name that is not known or other
            numbers for a cell of a table; names the file and the line.
    """
    cells: dict[tuple[str, Cell], PublishedCell] = {}

    def read(
        experiment: str, dataset: str, model: str, method: str, ratio: str, error: str, std: str, improvement: str
    ) -> PublishedCell:
        place = Cell(
            _known("dataset", dataset, DATASETS),
            _known("model", model, RECIPES),
            _known("method", method, METHODS),
            _number("ratio", ratio, 1),
        )
        if place.ratio == 0:
            raise ValueError("ratio must be above 0, got 0")
        cell = PublishedCell(
            _known("experiment", experiment, EXPERIMENTS),
            place,
            _number("error", error, 100),
            _number("std", std, 100),
            _number("improvement", improvement, 100, -math.inf) if improvement else None,
        )
        if cells.setdefault((experiment, place), cell) != cell:
            raise ValueError("the same cell as on a line before, with other numbers")
        return cell

    return tuple(read_table(path, COLUMNS, read))


def printed(cell: Cell, published: Iterable[PublishedCell]) -> list[PublishedCell]:
    """What is printed of the experiment that a cell is, in any table.

    The paper's text leaves open whether its GloVe vectors are tuned: its cells are those of both.
    """
    place = replace(cell, model=cell.model.removesuffix("-tuned"))
    return [c for c in published if replace(c.cell, method=same_method(c.cell.model, c.cell.method)) == place]


def _known(column: str, name: str, names: Collection[str]) -> str:
    if name not in names:
        raise ValueError(f"unknown {column} {name!r}; takes {', '.join(names)}")
    return name


def _number(column: str, text: str, most: float, least: float = 0) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column} must be a number, got {text!r}")
    if not least <= number <= most:
        raise ValueError(f"{column} must be from {least:g} to {most:g}, got {number:g}")
    return number
