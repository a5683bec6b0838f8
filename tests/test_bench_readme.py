"""bench/README.md says of results what bench/results/*.json hold."""

import json
import shutil
from pathlib import Path

import pytest
import tables

BENCH = Path(__file__).parents[1] / "bench"


def test_the_page_is_in_step_with_the_results():
    assert tables.page() == tables.PAGE.read_text(encoding="utf-8"), "run python bench/tables.py"


def test_every_suite_has_a_table_whose_numbers_are_those_of_its_results(tmp_path):
    shutil.copytree(BENCH / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "codegen*"))
    page = tmp_path / "README.md"
    page.write_text("before\n" + "".join(tables.MARKS) + "after\n")
    for path in (tmp_path / "results").glob("cpu-amd-epyc-26-2*.json"):
        results = json.loads(path.read_text())
        for i, fit in enumerate(results.get("fits", ())):
            fit["exponent"] = 7 + i / 100
        for i, row in enumerate(results["rows"]):
            if row["contender"] != row["ratio_to"]:
                row["ratio"]["both"]["q50"] = 8 + i / 100
        path.write_text(json.dumps(results))
    text = tables.page(page)
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    for title in tables.SUITES.values():
        assert f"### {title}" in text
    assert "7.00" in text
    assert text.count("| 8.0") > 4


@pytest.mark.parametrize("text", ["", tables.MARKS[0], "".join(tables.MARKS) * 2])
def test_a_page_without_its_marks_is_an_error(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match="must each stand there once"):
        tables.page(tmp_path / "README.md")


def test_who_was_refused_is_said_below_the_table():
    said = tables.refused({"refused": [{"contender": "AMPLoss", "workload": "w", "reason": "its loss is off"}]})
    assert said == "\nRefused: AMPLoss at w.\n"
