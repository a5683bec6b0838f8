"""`fastamp bench compare`: two results, row by row."""

import json

import pytest
from click.testing import CliRunner, Result

from fastamp.benchmarking import compare
from fastamp.cli import main


def row(
    contender: str = "AMPLoss", q50: float = 1.0, workload: str = "(50, 300) -> 6", ms: float | None = None, **others
) -> dict:
    """A row whose ratio, or whose milliseconds if these are not given, has a median of q50."""
    both = {"q10": 0.8 * q50, "q25": 0.9 * q50, "q50": q50, "q75": 1.1 * q50, "q90": 1.2 * q50}
    return {
        "workload": workload,
        "dtype": "fp32",
        "clock": "eager",
        "contender": contender,
        "ms": {"both": both if ms is None else {name: ms for name in both}},
        "ratio": None if ms is None else {"both": both},
        "ratio_to": None if ms is None else "Mixup",
        **others,
    }


def results(*rows: dict, **others) -> dict:
    return {
        "format": 2,
        "suite": "head",
        "device": {"type": "cpu", "name": "a processor", "tag": "cpu-a-processor"},
        "versions": {"python": "3.11", "torch": "2.13"},
        "threads": 1,
        "copy_gb_s": 20.0,
        "rows": list(rows),
        **others,
    }


def invoke(folder, first: object, second: object, columns: int = 200) -> Result:
    paths = []
    for name, content in (("first.json", first), ("second.json", second)):
        path = folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        paths.append(str(path))
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["bench", "compare", *paths])


def test_a_change_is_one_where_the_quartiles_are_apart():
    for after, verdict in ((1.0, "within the spread"), (1.2, "within the spread"), (1.3, "slower"), (0.7, "faster")):
        (change,) = compare(results(row()), results(row(q50=after))).changes
        assert change.verdict == verdict
        assert change.ratio == pytest.approx(after)


def test_a_slower_machine_is_no_slower_contender():
    """Both of them take twice as long, and the one that is judged as long beside the other as before."""
    before = results(row("AMPLoss", 1.2, ms=1.2), row("Mixup", ms=1.0, ratio_to="Mixup"))
    after = results(row("AMPLoss", 1.2, ms=2.4), row("Mixup", ms=2.0, ratio_to="Mixup"), copy_gb_s=10.0)
    found = compare(before, after)
    assert [change.verdict for change in found.changes] == ["within the spread", "base"]
    assert [change.ms for change in found.changes] == [(1.2, 2.4), (1.0, 2.0)]
    assert found.caveats == ("copy: 20 and 10 GB/s",)


def test_a_slower_contender_is_seen_on_a_faster_machine():
    (change,) = compare(results(row(ms=3.0)), results(row(q50=1.5, ms=2.0))).changes
    assert change.verdict == "slower"


@pytest.mark.parametrize("field", ["family", "model", "stepping"])
def test_processors_of_one_name_are_a_caveat(field):
    one = {"type": "cpu", "name": "a processor", "tag": "t", "family": 25, "model": 1, "stepping": 1}
    found = compare(results(row(), device=one), results(row(), device={**one, field: 2}))
    (caveat,) = found.caveats
    assert caveat.startswith("device: a processor family 25 model 1 stepping 1 and ")
    assert compare(results(row(), device=one), results(row(), device=one)).caveats == ()


def test_names_numbers_and_verdicts_are_whole_in_80_columns(tmp_path):
    name = "linear_amp_cross_entropy, chunks of 126"
    second = results(row(name, 2.345, ms=1234.5), row("AMPLoss", 123.4))
    result = invoke(tmp_path, results(row(name, 1.234, ms=0.012345), row("AMPLoss", 567.8)), second, columns=80)
    assert result.exit_code == 0, result.output
    assert "…" not in result.output
    assert {name, "AMPLoss"} <= set(result.output.splitlines())
    for shown in ("0.0123, 1.23e+03", "1.23 1.11-1.36", "2.35 2.11-2.58", "1.90", "slower", "568 511-625", "faster"):
        assert shown in result.output, shown
    assert max(map(len, result.output.splitlines())) <= 80


def test_rows_are_matched_by_workload_dtype_clock_and_contender():
    others = ({"contender": "Mixup"}, {"clock": "graph"}, {"dtype": "bf16"}, {"workload": "another"}, {"varies": "B"})
    before = [row(q50=q50, **other) for q50, other in enumerate(({}, *others), 1)]
    found = compare(results(*before), results(*before[::-1]))
    assert [change.before["q50"] for change in found.changes] == [1, 2, 3, 4, 5, 6]
    assert {change.ratio for change in found.changes} == {1.0}
    assert found.only == ((), ())


def test_the_command_shows_changes_and_what_is_in_one_only(tmp_path):
    first = results(row("AMPLoss"), row("Mixup"), row("gone"))
    second = results(row("AMPLoss", 2.0), row("Mixup", 1.01), row("new"), versions={"python": "3.11", "torch": "2.14"})
    result = invoke(tmp_path, first, second)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "not the same torch: 2.13 and 2.14" in lines
    (amp,) = (line for line in lines if "AMPLoss" in line)
    assert "1 0.9-1.1" in amp
    assert "2.00" in amp
    assert amp.rstrip().endswith("slower")
    assert "in the first only: (50, 300) -> 6, fp32, eager, gone" in lines
    assert "in the second only: (50, 300) -> 6, fp32, eager, new" in lines
    assert lines[-1] == "2 rows: 1 slower, 0 faster, 1 within the spread, 0 base"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (results(row()), results(row(), suite="layers"), "the two are of different suites: 'head' and 'layers'"),
        (results(row()), results(row("another")), "the two have no row in common"),
        ("{", results(row()), "first.json is no JSON"),
        (results(row()), "[]", "second.json holds no results of fastamp bench: no format, suite"),
        (results(row(), rows={}), results(row()), "first.json holds no results of fastamp bench: no list of rows"),
        (results(row(), "nothing"), results(row()), "first.json: row 2 lacks a name"),
        (results(row()), results(row(ms=1.0) | {"ratio": {}}), "second.json: row 1 lacks a name, or quartiles"),
        (results(row() | {"ms": {"both": {"q25": 1}}}), results(row()), "first.json: row 1 lacks a name, or quartiles"),
    ],
)
def test_what_cannot_be_compared_is_an_error_of_one_line(tmp_path, first, second, message):
    result = invoke(tmp_path, first, second)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("Error: ")
    assert message in result.output.splitlines()[-1]


def test_a_file_that_is_not_there_is_an_error_of_one_line(tmp_path):
    result = CliRunner().invoke(main, ["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert result.exit_code == 2
    assert "does not exist" in result.output.splitlines()[-1]


def test_compare_measures_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("fastamp.cli.bench.run", None)
    assert invoke(tmp_path, results(row()), results(row())).exit_code == 0
