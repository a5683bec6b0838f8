"""README.md and bench/README.md say of results what bench/results/*.json hold."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest

from fastamp import benchmarking
from fastamp.benchmarking import OF_SUITES, BenchConfig, suites, write

ROOT = Path(__file__).parents[1]


sys.path.append(str(ROOT / "bench"))  # where scripts find each other
import readme  # noqa: E402
from targets import TARGETS  # noqa: E402


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of every suite but the layers, in sizes that take no time."""
    results = tmp_path_factory.mktemp("measured")
    given = {"head": {"shapes": ((6, 5, 3),)}, "vocabulary": {"shapes": ((12, 5, 40),)}, "rows": {}, "scaling": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        patch.setattr(suites, "HIDDEN_SHAPES", ((6, 3, 5),))
        patch.setitem(suites.GROWTH, "cpu", (("B", "logits", (0, 0, 7), (4, 8, 16)),))
        for suite, only in given.items():
            compiled = {"compiled": False} if suite in OF_SUITES["compiled"] else {}
            config = BenchConfig(suite=suite, rounds=1, **compiled, **only)
            write(benchmarking.run(config, command=f"fastamp bench --suite {suite}"), results)
    return results


@pytest.fixture
def folder(tmp_path, measured):
    """A folder for a page, with those results beside it."""
    shutil.copytree(measured, tmp_path / "results")
    return tmp_path


def page(folder: Path, *sections: str) -> Path:
    path = folder / "PAGE.md"
    marked = "\n".join(f"<!-- drawn: {section} -->\nby hand\n<!-- /drawn -->" for section in sections)
    path.write_text(f"before\n\n{marked}\n\nafter\n")
    return path


@pytest.mark.parametrize("path", readme.PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_are_in_step_with_the_results(path):
    assert readme.drawn(path) == path.read_text(encoding="utf-8"), "run python bench/readme.py"


def test_the_page_of_benchmarks_draws_every_suite():
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    for section in (*benchmarking.SUITES, "targets", "files"):
        assert f"<!-- drawn: {section} -->" in text


@pytest.mark.parametrize("suite", ["head", "vocabulary", "rows", "scaling"])
def test_numbers_are_those_of_the_results(folder, suite):
    text = readme.drawn(page(folder, suite), folder / "results")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "by hand" not in text
    (path,) = (path for path in (folder / "results").iterdir() if json.loads(path.read_text())["suite"] == suite)
    results = json.loads(path.read_text())
    assert f"`fastamp bench --suite {suite}` on {results['device']['name']}" in text
    assert f"(results/{path.name})" in text
    if suite == "scaling":
        shown = [f"{fit['exponent']:.2f}" for fit in results["fits"]]
    elif suite == "rows":
        shown = [f"{row['gb_s']:.3g}" for row in results["rows"]]
    else:
        shown = [f"{row['ratio']['both']['q50']:.2f}" for row in results["rows"] if row["contender"] != row["ratio_to"]]
    for number in shown:
        assert f" {number} " in text
    results["device"]["name"] = "another processor"
    path.write_text(json.dumps(results))
    assert "another processor" in readme.drawn(page(folder, suite), folder / "results")


def test_a_gpu_comes_before_a_cpu_and_a_newer_result_before_an_older_one(folder):
    source = next((folder / "results").glob("*-rows.json"))
    results = json.loads(source.read_text())
    results["device"] = {"type": "cuda", "name": "a GPU", "tag": "a-gpu"}
    results["time"] = "2001-01-01T00:00:00+00:00"
    (folder / "results" / "a-gpu-rows.json").write_text(json.dumps(results))
    results["device"] = {"type": "cpu", "name": "an old CPU", "tag": "an-old-cpu"}
    (folder / "results" / "an-old-cpu-rows.json").write_text(json.dumps(results))
    text = readme.drawn(page(folder, "rows"), folder / "results")
    places = [text.index(name) for name in ("a-gpu-rows.json", source.name, "an-old-cpu-rows.json")]
    assert places == sorted(places)


def test_the_figure_is_one_that_is_there(folder):
    assert "No result yet" in readme.drawn(page(folder, "figure"), folder / "results")
    (path,) = (p for p in (folder / "results").iterdir() if json.loads(p.read_text())["suite"] == "head")
    path.with_suffix(".png").write_bytes(b"")
    assert f"](results/{path.stem}.png)" in readme.drawn(page(folder, "figure"), folder / "results")


def test_what_layers_cost_is_said_in_words():
    said = readme.layers_claim(readme.read_results(ROOT / "bench" / "results"), ROOT / "README.md")
    results = [one for _, one in readme.of_suite(readme.read_results(ROOT / "bench" / "results"), "layers")]
    for row in results[0]["rows"]:
        if row["contender"] == "AMPLoss.step":
            cost = f"{row['ratio']['both']['q50']:.2f} times {row['ratio_to']} (Mixup as one writes it "
            assert f"{row['workload']}, {row['dtype']}: {cost}" in said
        if row["contender"] == "AMP autograd, split":
            assert f"cut as fastamp cuts {row['ratio']['both']['q50']:.2f}" in said


def head_of(ratio: float) -> dict:
    """The results of the paper's first shape in which AMPLoss takes so many times plain Mixup."""
    (_, results), *_ = readme.of_suite(readme.read_results(ROOT / "bench" / "results"), "head")
    results = copy.deepcopy(results)
    for row in results["rows"]:
        if row["contender"] == "AMPLoss" and row["ratio"] is not None:
            row["ratio"]["both"]["q50"] = ratio
    return results


def test_a_target_that_is_missed_is_said_to_be_missed_and_by_how_much():
    target = TARGETS[0]
    assert target.verdict(head_of(1.2)).startswith("holds: 1.2 against 1.2 at ")
    assert target.verdict(head_of(1.5)).startswith("**misses by 25%**, 4 of 4: 1.5 against 1.2 at ")
    assert target.verdict({**head_of(1.5), "suite": "rows"}) is None
    gpu = {**head_of(1.5), "device": {"type": "cuda"}}
    assert target.verdict(gpu) is None
    (faster,) = (one for one in TARGETS if one.at_least and one.suite == "head" and "20 times" in one.claim)
    assert faster.verdict(head_of(1.0)) is None
    assert "against 20 at" in faster.verdict(gpu)
    assert faster.verdict(gpu).startswith("**misses by ")


def test_every_claim_has_a_line_and_one_that_nobody_measured_says_so(tmp_path):
    lines = readme.targets([], tmp_path / "PAGE.md").splitlines()[2:]
    assert len(lines) == len(TARGETS)
    assert all("not measured: takes " in line for line in lines)


def test_a_base_that_was_refused_leaves_its_cells_empty(tmp_path):
    (_, results), *_ = readme.of_suite(readme.read_results(ROOT / "bench" / "results"), "layers")
    results = copy.deepcopy(results)
    for row in results["rows"]:
        row["ratio"] = row["ratio_to"] = None
        del row["peak_memory_ratio"]
    assert "| AMPLoss.step |  |  |  |  |" in readme.layers_table(results)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- drawn: nothing -->\n<!-- /drawn -->\n", "unknown section 'nothing'; takes figure"),
        ("<!-- drawn: files -->\n", "1 marks open and 0 close"),
        ("<!-- /drawn -->\n<!-- drawn: files -->\n", "1 marks open and 1 close a section; 0 match"),
    ],
)
def test_marks_that_mean_nothing_are_an_error(tmp_path, text, message):
    path = tmp_path / "PAGE.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        readme.drawn(path, tmp_path)


def test_check_writes_nothing_and_fails_where_a_page_is_not_in_step(tmp_path, monkeypatch, capsys):
    path = page(tmp_path, "files")
    monkeypatch.setattr(readme, "PAGES", (path,))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "drawn", lambda page: "new")
    before = path.read_text()
    for arguments, code, after in ((["--check"], True, before), ([], False, "new"), (["--check"], False, "new")):
        monkeypatch.setattr("sys.argv", ["readme.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            readme.main()
        assert (bool(ended.value.code), path.read_text()) == (code, after)
    assert capsys.readouterr().out.splitlines() == ["PAGE.md: not in step; run bench/readme.py", "PAGE.md: drawn anew"]
