"""The file of the paper's cells: what it may hold, and what is refused."""

import re

import pytest

pytest.importorskip("scipy")

from fastamp.paper.plan import Cell
from fastamp.paper.published import COLUMNS, PublishedCell, read_published


def test_published_cells_need_not_be_in_the_plan(tmp_path):
    path = tmp_path / "cells.tsv"
    path.write_text("\t".join(COLUMNS) + "\ntable5\tmr\tcnn-rand\tsent-amp@eps=1\t0.25\t7.25\n")
    cell = Cell("mr", "cnn-rand", "sent-amp@eps=1", 0.25)
    assert read_published(path) == {PublishedCell("table5", cell): 7.25}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("table2\ttrec\tcnn-rand\tnone\t1", "5 tab-separated columns; takes 6"),
        ("table9\ttrec\tcnn-rand\tnone\t1\t9", "unknown experiment 'table9'; takes table2"),
        ("table2\timdb\tcnn-rand\tnone\t1\t9", "unknown dataset 'imdb'; takes questions, trec"),
        ("table5\ttrec\tlstm\tnone\t1\t9", "unknown model 'lstm'; takes cnn-rand"),
        ("table2\ttrec\tcnn-rand\tamp\t1\t9", "unknown method 'amp'; takes none"),
        ("table2\ttrec\tcnn-rand\tnone\t0\t9", "ratio must be in (0, 1], got 0"),
        ("table2\ttrec\tcnn-rand\tnone\t1\t9,5", "error must be a number, got '9,5'"),
        ("table2\ttrec\tcnn-rand\tnone\tnan\t9", "ratio must be a number, got 'nan'"),
        ("table2\ttrec\tcnn-rand\tnone\t1\t101", "error must be in [0, 100], got 101"),
        ("table2\tsst1\tbert\tnone\t1\t8", "the same cell as on a line before"),
    ],
)
def test_malformed_published_cells_are_refused_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "cells.tsv"
    path.write_text("\t".join(COLUMNS) + f"\ntable2\tsst1\tbert\tnone\t1\t9\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {message}")):
        read_published(path)


def test_an_unreadable_published_file_or_one_without_its_header_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*absent\.tsv: No such file"):
        read_published(tmp_path / "absent.tsv")
    for content, message in ((b"\xe9", ":1: not UTF-8"), (b"dataset\terror\n", ":1: the header must be")):
        (tmp_path / "odd.tsv").write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'odd.tsv'}{message}")):
            read_published(tmp_path / "odd.tsv")
