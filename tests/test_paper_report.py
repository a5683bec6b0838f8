"""The report of a results folder: what its tables say, what they leave out, and the paper's cells."""

import random
import re
import sys
from dataclasses import replace

import pytest

pytest.importorskip("scipy")

from fastamp.paper.plan import EXPERIMENTS, Run
from fastamp.paper.published import COLUMNS, PublishedCell, read_published
from fastamp.paper.report import render, write
from fastamp.paper.statistics import Cell

MACHINE = {"device": "cpu", "torch": "2.13.0", "fastamp": "0.1.0", "threads": 1}
SETTINGS = {"format": 1, "steps": 20, "threads": 1, "commands": []}
LAM = [i / 20 for i in range(21)]


def done(method="none", seed=0, error=10.0, *, dataset="trec", model="cnn-rand", ratio=1.0, **fields) -> dict:
    run = Run(dataset, model, method, ratio, seed)
    policy = {"mix/lam": 0.5, "mix/lam_shift": 0.001, "mix/mask": 0.9, "mix/grad_abs": 0.3}
    return {
        "format": 1,
        "status": "done",
        "key": run.key,
        **vars(run),
        "config": {"fold": None},
        "result": {"test_error": error, "least_test_error": error - 1.5, "steps": 20},
        "history": [{"step": step, **(policy if "amp" in method else {})} for step in (10, 20)],
        "curves": None,
        "seconds": 60.0,
        "machine": MACHINE,
        **fields,
    }


def failed(method="none", seed=0, error="DivergedError: the loss is nan") -> dict:
    record = done(method, seed, status="failed", traceback="...")
    return {k: v for k, v in record.items() if k not in ("result", "history", "curves")} | {"error": error}


def pair_of_methods(method="sent-amp", baseline="sent-mixup", gain=1.0, seeds=8, **place) -> list[dict]:
    """Runs in which the method is better by about `gain` at every seed."""
    errors = [10.0 + 0.4 * seed for seed in range(seeds)]
    return [
        *(done(baseline, seed, error, **place) for seed, error in enumerate(errors)),
        *(done(method, seed, error - gain - 0.2 * (seed % 2), **place) for seed, error in enumerate(errors)),
    ]


def ran(*names: str) -> dict:
    return {**SETTINGS, "commands": [f"fastamp paper {name} --out results" for name in names]}


def rows(text: str) -> list[list[str]]:
    """The fields of every line of a table."""
    return [[field.strip() for field in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def row(text: str, *start: str) -> list[str]:
    """The first line of a table that begins so."""
    return next(fields for fields in rows(text) if fields[: len(start)] == list(start))


def test_a_cell_is_mean_deviation_and_number_of_seeds():
    text = render([done(seed=seed, error=error) for seed, error in enumerate((10.0, 11.0, 12.0))], ran("table2"))
    assert row(text, "Model", "Method") == ["Model", "Method", "trec", "paper"]
    assert row(text, "CNN-rand", "Baseline") == ["CNN-rand", "Baseline", "11.00 ± 1.00 (3)", "not at hand"]


def test_one_seed_has_no_deviation():
    assert row(render([done(error=12.4)], ran("table2")), "CNN-rand")[2] == "12.40 (1)"


def test_rows_and_columns_stand_in_the_plan_order_and_missing_cells_are_dashes():
    records = [done(dataset="mr"), done("sent-amp", dataset="mr"), done("sent-mixup"), done(model="bert")]
    table = [fields for fields in rows(render(records, ran("table2"))) if fields[0] in ("Model", "CNN-rand", "BERT")][
        :5
    ]
    assert table == [
        ["Model", "Method", "trec", "mr", "paper"],
        ["CNN-rand", "Baseline", "–", "10.00 (1)", "not at hand"],
        ["CNN-rand", "SentMixup", "10.00 (1)", "–", "not at hand"],
        ["CNN-rand", "SentAMP", "–", "10.00 (1)", "not at hand"],
        ["BERT", "Baseline", "10.00 (1)", "–", "not at hand"],
    ]


def test_ratios_are_columns_where_the_experiment_says_so():
    records = [done(model="lstm-glove", ratio=ratio, error=100 * ratio) for ratio in (1.0, 0.03, 0.1)]
    text = render(records, ran("table3"))
    assert row(text, "Data set", "Model") == ["Data set", "Model", "Method", "3%", "10%", "100%", "paper"]
    assert row(text, "trec")[3:6] == ["3.00 (1)", "10.00 (1)", "100.00 (1)"]


def test_rows_with_fewer_seeds_are_marked():
    text = render([done(), done(seed=1), done("sent-amp")], ran("table2"))
    assert row(text, "CNN-rand", "SentAMP †")[2] == "10.00 (1)"
    assert row(text, "CNN-rand", "Baseline")[2] == "10.00 ± 0.00 (2)"


def test_the_metric_selected_on_test_data_has_a_table_of_its_own():
    text = render([done(error=12.0)], ran("table2"))
    ours, official = text.split("### Least test error, selected on test data")
    assert "12.00 (1)" in ours
    assert "10.50" not in ours
    assert row(official, "CNN-rand")[2] == "10.50 (1)"


def test_a_comparison_gives_difference_interval_improvement_and_p():
    text = render(pair_of_methods(), ran("table2"))
    found = row(text, "trec", "CNN-rand", "SentAMP", "SentMixup")
    assert found[4] == "**better**"
    assert re.fullmatch(r"-1\.10 \[-1\.\d\d, -1\.0\d\]", found[5])
    assert found[6] == "+9.6%"  # 1.1 of 11.4
    assert found[7:] == ["0.008", "0.008", "8"]  # 2 / 2^8
    assert "Comparisons: 1 better; of all 1, 1 with q < 0.05." in text


def test_few_seeds_are_a_hint_only():
    text = render(pair_of_methods(seeds=5), ran("table2"))
    found = row(text, "trec", "CNN-rand", "SentAMP", "SentMixup")
    assert found[4] == "a hint: better"
    assert found[7] == "0.062 ‡"
    assert "Comparisons: 1 a hint: better; of all 1, 0 with q < 0.05." in text
    assert "Clear readings: 0 better, 0 worse." in text


def test_worse_is_said_as_plainly():
    text = render(pair_of_methods(gain=-1.0), ran("table2"))
    assert row(text, "trec", "CNN-rand", "SentAMP", "SentMixup")[4] == "**worse**"


def test_equal_methods_are_noise():
    records = [done(method, seed, 10.0 + seed) for method in ("sent-amp", "sent-mixup") for seed in range(8)]
    found = row(render(records, ran("table2")), "trec", "CNN-rand", "SentAMP", "SentMixup")
    assert found[4:] == ["within noise", "+0.00 [+0.00, +0.00]", "+0.0%", "1.000 ‡", "1.000", "8, 0 differ"]


def test_only_seeds_of_both_sides_are_compared():
    records = [*pair_of_methods(), done("sent-mixup", 8, 90.0), done("sent-amp", 9, 1.0)]
    found = row(render(records, ran("table2")), "trec", "CNN-rand", "SentAMP", "SentMixup")
    assert found[5].startswith("-1.10")
    assert found[-1] == "8"


def test_claims_of_the_abstract_stand_beside_ours():
    text = render([*pair_of_methods(), *pair_of_methods(gain=-2.0, dataset="sst2")], ran("table2"))
    assert "up to 31.3%" in text
    assert "up to 17.5%" in text
    assert "Mixup of the same level here: 2." in text
    assert "+9.6% (trec, CNN-rand, 100% of the training data, SentAMP, n = 8; **better**)" in text
    assert "Clear readings: 1 better, 1 worse." in text


def test_failed_runs_are_listed_unless_done_later():
    text = render([done(), failed("sent-amp", 3), failed("none", 0)], ran("table2"))
    assert text.count("DivergedError") == 1
    assert "- `trec/cnn-rand/sent-amp/1/3`: DivergedError: the loss is nan" in text
    assert "Runs: 1 done, 1 failed; 60 s of runs" in text


def test_nothing_done_is_said():
    assert render([failed()], SETTINGS).startswith("# Results\n\nRuns: 0 done, 1 failed")
    assert "Runs: 0 done, 0 failed" in render([], SETTINGS)


def test_header_names_machines_lengths_and_commands():
    other = done(seed=1, machine={**MACHINE, "device": "NVIDIA H100"})
    longer = done(seed=2, result={"test_error": 1.0, "least_test_error": 1.0, "steps": 30})
    text = render([done(), other, longer], ran("table2"))
    assert "- Machine: NVIDIA H100, torch 2.13.0, fastamp 0.1.0, threads 1 (1 runs)" in text
    assert "- Length: 20 steps (2 runs), 30 steps (1 runs). **Not the same for all runs.**" in text
    assert "    fastamp paper table2 --out results" in text


def test_seeds_that_are_folds_are_said_to_be():
    assert "subj and mr: sets for ten-fold" in render([done(dataset="mr"), done(dataset="subj")], SETTINGS)
    assert "ten-fold" not in render([done()], SETTINGS)
    assert "A seed is a fold too" not in render([done(dataset="mr", config={"fold": 3})], SETTINGS)


def test_the_order_of_the_lines_does_not_matter():
    records = [
        *pair_of_methods(),
        *pair_of_methods("word-amp", "word-mixup", dataset="sst1"),
        failed(),
        failed("none", 4),
    ]
    text = render(records, ran("table2"))
    random.Random(0).shuffle(records)
    assert render(records, ran("table2")) == text


def test_a_table_that_was_asked_for_takes_what_is_outside_its_extent():
    records = [done(ratio=ratio) for ratio in (0.1, 1.0)]  # the plan's table3 has no cnn-rand
    text = render(records, ran("table3"))
    assert re.findall(r"^## (\w+):", text, re.MULTILINE) == ["table3"]
    assert row(text, "trec")[:2] == ["trec", "CNN-rand"]


def test_of_several_tables_each_has_its_runs_and_the_rest_stands_last():
    records = [done(model="lstm-glove"), done(model="lstm-glove", ratio=0.1), done(model="lstm-glove-fixed")]
    text = render(records, ran("table2", "table3"))
    assert re.findall(r"^## (\w+):", text, re.MULTILINE) == ["table2", "table3", "other"]
    assert row(text, "LSTM-glove, fixed vectors")[1:] == ["Baseline", "10.00 (1)", "not at hand"]


def test_without_commands_no_table_repeats_another():
    text = render([done(), done("sent-amp"), done("sent-amp@eps=1")], SETTINGS)
    assert re.findall(r"^## (\w+):", text, re.MULTILINE) == ["controls"]


def test_a_name_that_the_plan_does_not_have_is_shown_as_it_is():
    text = render([{**done(), "method": "sent-new", "key": "trec/cnn-rand/sent-new/1/0"}], SETTINGS)
    assert row(text, "CNN-rand")[1] == "sent-new"


def test_published_cells_stand_beside_ours(tmp_path):
    path = tmp_path / "cells.tsv"
    path.write_text("\t".join(COLUMNS) + "\ntable2\ttrec\tcnn-rand\tsent-amp\t1\t7.25\n")
    published = read_published(path)
    assert published == {PublishedCell("table2", Cell("trec", "cnn-rand", "sent-amp")): 7.25}
    text = render([done(), done("sent-amp")], ran("table2"), published=published)
    assert row(text, "Model") == ["Model", "Method", "trec", "trec, paper"]
    assert row(text, "CNN-rand", "Baseline")[2:] == ["10.00 (1)", "–"]
    assert row(text, "CNN-rand", "SentAMP")[2:] == ["10.00 (1)", "7.25"]
    assert "not at hand" not in text


def test_published_cells_of_another_table_are_not_at_hand_here():
    published = {PublishedCell("table5", Cell("trec", "lstm-glove", "none")): 9.0}
    text = render([done(model="lstm-glove")], ran("table2"), published=published)
    assert row(text, "LSTM-glove")[-1] == "not at hand"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("table2\ttrec\tcnn-rand\tnone\t1", "5 tab-separated columns; takes 6"),
        ("table9\ttrec\tcnn-rand\tnone\t1\t9", "unknown experiment 'table9'; takes table2"),
        ("table2\timdb\tcnn-rand\tnone\t1\t9", "table2 has no dataset 'imdb'; takes trec"),
        ("table5\ttrec\tcnn-rand\tnone\t1\t9", "table5 has no model 'cnn-rand'; takes lstm-glove"),
        ("table2\ttrec\tcnn-rand\tword-maxop\t1\t9", "table2 has no method 'word-maxop'; takes none"),
        ("table2\ttrec\tcnn-rand\tnone\t0.5\t9", "table2 has no ratio 0.5; takes 1"),
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


@pytest.mark.parametrize("content", ["", "dataset\terror\n", ",".join(COLUMNS)])
def test_published_file_without_its_header_is_refused(tmp_path, content):
    path = tmp_path / "cells.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:1: the header must be"):
        read_published(path)


def test_unreadable_published_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*absent\.tsv: No such file"):
        read_published(tmp_path / "absent.tsv")
    (tmp_path / "latin.tsv").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_published(tmp_path / "latin.tsv")


def with_curves(record: dict) -> dict:
    level = {"mean": LAM, "pairs": [LAM, LAM[::-1]]}
    return {**record, "curves": {"lam": LAM, "word": level, "sentence": level}}


def assert_images(folder, text, expected: set[str]) -> None:
    assert {path.name for path in folder.glob("*.png")} == expected == set(re.findall(r"\]\((.*\.png)\)", text))
    for name in expected:
        content = (folder / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(content) > 5000


def test_plots_are_written_beside_the_report(tmp_path):
    pytest.importorskip("matplotlib")
    records = [with_curves(record) for record in pair_of_methods(seeds=2)] + [done()]
    path = write(tmp_path / "out", records, ran("figure2"))
    expected = {"errors", "differences", "curves-trec-cnn-rand", "policy-trec-cnn-rand"}
    assert path == tmp_path / "out" / "report.md"
    assert_images(path.parent, path.read_text(encoding="utf-8"), {f"figure2-{name}.png" for name in expected})


def test_captions_say_what_the_points_are_and_which_gradients_do_not_compare(tmp_path):
    pytest.importorskip("matplotlib")
    text = write(tmp_path / "ours", [with_curves(done("sent-amp"))], ran("controls")).read_text(encoding="utf-8")
    assert "of the model of least dev error: two random pairs of test sentences" in text
    assert "of one batch an evaluation" in text
    assert "of another loss" not in text
    official = done("sent-amp@official", config={"preset": "official"})
    text = write(tmp_path / "official", [done("sent-amp"), official], ran("controls")).read_text(encoding="utf-8")
    assert "of another loss" in text


def test_ratios_are_drawn_as_a_curve(tmp_path):
    pytest.importorskip("matplotlib")
    records = [done(seed=seed, ratio=ratio, error=seed / ratio) for seed in (0, 1) for ratio in (0.1, 1.0)]
    path = write(tmp_path, records, ran("table3"))
    assert_images(tmp_path, path.read_text(encoding="utf-8"), {"table3-ratios.png"})


def test_report_without_plots_needs_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = write(tmp_path, [done()], ran("table2"), plots=False)
    assert "![" not in path.read_text(encoding="utf-8")
    with pytest.raises(ImportError, match="plots need matplotlib"):
        write(tmp_path, [done()], ran("table2"))


def test_an_experiment_of_ones_own_is_shown():
    mine = replace(EXPERIMENTS["table2"], title="Mine", comparisons=(("sent-amp", "none"),))
    text = render(pair_of_methods(baseline="none"), ran("mine"), experiments={"mine": mine})
    assert "## mine: Mine" in text
    assert row(text, "trec", "CNN-rand", "SentAMP")[3:5] == ["Baseline", "**better**"]
