"""The paper's cells, which ship with the package, and files of others: what they may hold, and what is refused."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastamp.cli import main
from fastamp.paper.plan import Cell, Run, same_method
from fastamp.paper.published import COLUMNS, PublishedCell, printed, read_published

PAPER = read_published()
EXTRACTED = Path(__file__).parents[2] / "shared" / "paper" / "cells.tsv"
MODELS = {"RNN_rand": "lstm-rand", "RNN_glove": "lstm-glove", "CNN_rand": "cnn-rand", "CNN_glove": "cnn-glove"}
MODELS |= {"BERT_base": "bert"}
ROWS = {"w/o": "none", "Sent": "sent-mixup", "Sent(our)": "sent-amp", "Word": "word-mixup", "Word(our)": "word-amp"}
ROWS |= {"Non-linear": "nonlinear-mixup"}
OPERATIONS = {"+RandOp": "mixup", "+MaxOp": "maxop", "AMP": "amp"}


def test_there_are_188_printed_errors_and_71_improvements():
    assert Counter(c.experiment for c in PAPER) == {"table2": 130, "table3": 18, "table4": 16, "table5": 24}
    assert sum(c.improvement is not None for c in PAPER) == 71
    best = {
        name: max((c for c in PAPER if c.experiment == name), key=lambda c: c.improvement or 0)
        for name in ("table2", "table3")
    }
    assert best["table2"] == PublishedCell("table2", Cell("trec", "cnn-glove", "sent-amp"), 4.6, 0.33, 31.3)
    assert best["table3"] == PublishedCell("table3", Cell("trec", "bert", "sent-amp", 0.03), 42.1, 7.34, 17.5)
    assert best["table3"].text == "42.1 ± 7.34"


@pytest.mark.parametrize("name", ["table2", "table3", "table4", "table5"])
def test_each_printed_error_is_what_its_tables_command_runs_by_default(tmp_path, name):
    arguments = ["paper", name, "--seeds", "1", "--vectors", "glove.txt", "--dry-run", "--out", str(tmp_path / "out")]
    listed = CliRunner().invoke(main, arguments).output.splitlines()
    runs = {line.removesuffix(": to do") for line in listed}
    cells = [c.cell for c in PAPER if c.experiment == name]
    keys = {Run(c.dataset, c.model, same_method(c.model, c.method), c.ratio, 0).key for c in cells}
    assert keys == runs - {f"{len(keys)} to do"}  # nothing else


def test_the_shipped_cells_are_those_that_were_extracted_from_the_papers_text():
    if not EXTRACTED.exists():
        pytest.skip("the extraction of the paper's text is not beside this checkout")
    errors, improvements = Counter(), Counter()
    for line in EXTRACTED.read_text(encoding="utf-8").splitlines()[1:]:
        table, model, dataset, row, setting, mean, std, *_ = line.split("\t")
        if table == "1" or row == "labels":
            continue
        share = float(setting[6:-1]) / 100 if setting.startswith("ratio=") else 1.0
        place = f"table{table}", dataset.lower().replace("-", ""), MODELS[model], share
        if row.startswith("RP "):
            improvements[(*place, row[3:].lower(), setting.partition("alpha=")[2], float(mean))] += 1
            continue
        method = ROWS[row]
        if table == "4":
            method = f"{row.lower()}-{OPERATIONS[setting]}" if setting in OPERATIONS else "none"
        elif setting.startswith("alpha=") and float(setting[6:]) != 1:
            method += f"@{setting}"
        errors[(*place, method, mean, std)] += 1
    ours = [((c.experiment, c.cell.dataset, c.cell.model, c.cell.ratio), c) for c in PAPER]
    assert errors == Counter((*place, c.cell.method, f"{c.error:.1f}", f"{c.std:.2f}") for place, c in ours)
    assert improvements == Counter(
        (
            *place,
            c.cell.method[:4],
            "" if c.experiment != "table5" else c.cell.method.partition("alpha=")[2] or "1.0",
            c.improvement,
        )
        for place, c in ours
        if c.improvement is not None
    )


def test_what_is_printed_of_a_cell_comes_from_every_table_and_for_both_readings_of_the_vectors():
    amp = Cell("trec", "bert", "word-amp")
    assert [(c.experiment, c.text) for c in printed(amp, PAPER)] == [
        ("table2", "1.9 ± 0.13"),
        ("table4", "1.9 ± 0.13"),
        ("table5", "2.0 ± 0.12"),
    ]
    amp = Cell("trec", "cnn-glove", "sent-amp")
    assert [c.text for c in printed(amp, PAPER)] == ["4.6 ± 0.33", "4.8 ± 0.22", "4.6 ± 0.33"]  # +MaxOp is AMP there
    assert printed(replace(amp, model="cnn-glove-tuned"), PAPER) == printed(amp, PAPER)
    assert printed(replace(amp, ratio=0.1), PAPER) == printed(replace(amp, method="sent-amp@placebo"), PAPER) == []


def test_cells_of_a_file_need_not_be_in_the_plan(tmp_path):
    path = tmp_path / "cells.tsv"
    path.write_text("\t".join(COLUMNS) + "\ntable5\tmr\tcnn-rand\tsent-amp@eps=1\t0.25\t7.25\t0.5\t\n")
    cell = Cell("mr", "cnn-rand", "sent-amp@eps=1", 0.25)
    assert read_published(path) == (PublishedCell("table5", cell, 7.25, 0.5),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("table2\ttrec\tcnn-rand\tnone\t1", "5 tab-separated columns; takes 8"),
        ("table9\ttrec\tcnn-rand\tnone\t1\t9\t1\t", "unknown experiment 'table9'; takes table2"),
        ("table2\timdb\tcnn-rand\tnone\t1\t9\t1\t", "unknown dataset 'imdb'; takes questions, trec"),
        ("table5\ttrec\tlstm\tnone\t1\t9\t1\t", "unknown model 'lstm'; takes cnn-rand"),
        ("table2\ttrec\tcnn-rand\tamp\t1\t9\t1\t", "unknown method 'amp'; takes none"),
        ("table2\ttrec\tcnn-rand\tnone\t0\t9\t1\t", "ratio must be above 0, got 0"),
        ("table2\ttrec\tcnn-rand\tnone\t2\t9\t1\t", "ratio must be from 0 to 1, got 2"),
        ("table2\ttrec\tcnn-rand\tnone\t1\t9,5\t1\t", "error must be a number, got '9,5'"),
        ("table2\ttrec\tcnn-rand\tnone\tnan\t9\t1\t", "ratio must be a number, got 'nan'"),
        ("table2\ttrec\tcnn-rand\tnone\t1\t101\t1\t", "error must be from 0 to 100, got 101"),
        ("table2\ttrec\tcnn-rand\tnone\t1\t9\t-1\t", "std must be from 0 to 100, got -1"),
        ("table2\ttrec\tcnn-rand\tnone\t1\t9\t1\tup", "improvement must be a number, got 'up'"),
        ("table2\tsst1\tbert\tnone\t1\t8\t1\t", "the same cell as on a line before, with other numbers"),
    ],
)
def test_malformed_published_cells_are_refused_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "cells.tsv"
    path.write_text("\t".join(COLUMNS) + f"\ntable2\tsst1\tbert\tnone\t1\t9\t1\t\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: {message}")):
        read_published(path)


def test_a_published_file_that_is_unreadable_or_of_another_format_is_refused_and_the_columns_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*absent\.tsv: No such file"):
        read_published(tmp_path / "absent.tsv")
    old = "\t".join(COLUMNS[:-2])
    for content, message in (
        (b"\xe9", ":1: not UTF-8"),
        (
            f"{old}\n".encode(),
            f":1: the header must be {chr(9).join(COLUMNS)!r}, got {old!r}; there is no column std, ",
        ),
    ):
        (tmp_path / "odd.tsv").write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'odd.tsv'}{message}")):
            read_published(tmp_path / "odd.tsv")
