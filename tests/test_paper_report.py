"""The report of a results folder: what its tables say, what they leave out, and the paper's cells."""

import random
import re
from dataclasses import replace

import pytest

pytest.importorskip("scipy")

from fastamp.paper import plots, report
from fastamp.paper.plan import EXPERIMENTS, Cell, Run
from fastamp.paper.published import PublishedCell
from fastamp.paper.report import write
from fastamp.paper.results import Results

MACHINE = {"device": "cpu", "torch": "2.13.0", "fastamp": "0.1.0", "threads": 1}
LAM = [i / 20 for i in range(21)]
LEAST = "trec, least (selected on test)"


def result_of(error: float, steps: int = 20, types_covered=None, tokens_covered=None) -> dict:
    covered = {"types_covered": types_covered, "tokens_covered": tokens_covered}
    return {"test_error": error, "least_test_error": error - 1.5, "steps": steps, **covered}


def done(method="none", seed=0, error=10.0, *, dataset="trec", model="cnn-rand", ratio=1.0, **fields) -> dict:
    run = Run(dataset, model, method, ratio, seed)
    policy = {"mix/lam": 0.5, "mix/lam_shift": 0.001, "mix/mask": 0.9, "mix/grad_abs": 0.3}
    return {
        "status": "done",
        "key": run.key,
        **vars(run),
        "config": {"fold": None},
        "result": result_of(error),
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


def ran(name: str, **extent) -> dict:
    """The request of a command without options but those given."""
    fields = {field: getattr(EXPERIMENTS[name], field) for field in ("datasets", "models", "methods", "ratios")}
    return {"experiment": name, "seeds": range(10), **fields, **extent}


def results(records, *requests: dict) -> Results:
    return Results({"eval_every": None, "overrides": {}, "data": {"trec": "a5"}, "requests": requests}, tuple(records))


def render(records, *requests: dict, **more) -> str:
    return report.render(results(records, *requests), **more)


def rows(text: str) -> list[list[str]]:
    """The fields of every line of a table."""
    return [[field.strip() for field in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def row(text: str, *start: str) -> list[str]:
    """The first line of a table that begins so."""
    return next(fields for fields in rows(text) if fields[: len(start)] == list(start))


def test_a_cell_is_mean_deviation_and_number_of_seeds():
    text = render([done(seed=seed, error=error) for seed, error in enumerate((10.0, 11.0, 12.0))], ran("table2"))
    assert row(text, "Model", "Method") == ["Model", "Method", "trec", LEAST, "paper"]
    ours = ["11.00 ± 1.00 (3)", "9.50 ± 1.00 (3)"]
    assert row(text, "CNN-rand", "Baseline") == ["CNN-rand", "Baseline", *ours, "not at hand"]
    assert row(render([done(error=12.4)], ran("table2")), "CNN-rand")[2] == "12.40 (1)"


def test_rows_and_columns_stand_in_the_plan_order_and_missing_cells_are_dashes():
    records = [done(dataset="mr"), done("sent-amp", dataset="mr"), done("sent-mixup"), done(model="bert")]
    table = [fields for fields in rows(render(records, ran("table2"))) if fields[0] in ("Model", "CNN-rand", "BERT")]
    assert table[:5] == [
        ["Model", "Method", "trec", LEAST, "mr", LEAST.replace("trec", "mr"), "paper"],
        ["CNN-rand", "Baseline", "–", "–", "10.00 (1)", "8.50 (1)", "not at hand"],
        ["CNN-rand", "SentMixup", "10.00 (1)", "8.50 (1)", "–", "–", "not at hand"],
        ["CNN-rand", "SentAMP", "–", "–", "10.00 (1)", "8.50 (1)", "not at hand"],
        ["BERT", "Baseline", "10.00 (1)", "8.50 (1)", "–", "–", "not at hand"],
    ]


def test_rows_with_fewer_seeds_are_marked():
    text = render([done(), done(seed=1), done("sent-amp")], ran("table2"))
    assert row(text, "CNN-rand", "SentAMP †")[2] == "10.00 (1)"
    assert row(text, "CNN-rand", "Baseline")[2] == "10.00 ± 0.00 (2)"


def test_ratios_are_columns_where_the_experiment_says_so_and_the_metric_selected_on_test_data_a_table_of_its_own():
    records = [done(model="lstm-glove", ratio=ratio, error=100 * ratio) for ratio in (1.0, 0.03, 0.1)]
    ours, official = render(records, ran("table3")).split("### Test error, least (selected on test)")
    assert "selects the model by the test data" in ours
    assert row(ours, "Data set", "Model") == ["Data set", "Model", "Method", "3%", "10%", "100%", "paper"]
    assert row(ours, "trec")[3:] == ["3.00 (1)", "10.00 (1)", "100.00 (1)", "not at hand"]
    assert row(official, "Data set")[3:] == ["3%", "10%", "100%"]
    assert row(official, "trec")[3:] == ["1.50 (1)", "8.50 (1)", "98.50 (1)"]
    assert "### Test error" not in render([done()], ran("table2"))


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


def test_equal_methods_are_noise():
    records = [done(method, seed, 10.0 + seed) for method in ("sent-amp", "sent-mixup") for seed in range(8)]
    found = row(render(records, ran("table2")), "trec", "CNN-rand", "SentAMP", "SentMixup")
    assert found[4:] == ["within noise", "+0.00 [+0.00, +0.00]", "+0.0%", "1.000 ‡", "1.000", "8, 0 differ"]


def test_claims_of_the_abstract_stand_beside_ours():
    text = render([*pair_of_methods(), *pair_of_methods(gain=-2.0, dataset="sst2")], ran("table2"))
    assert row(text, "sst2", "CNN-rand", "SentAMP", "SentMixup")[4] == "**worse**"
    assert "up to 31.3%" in text
    assert "up to 17.5%" in text
    assert "Mixup of the same level here: 2." in text
    assert "+9.6% (trec, CNN-rand, 100% of the training data, SentAMP, n = 8; **better**)" in text
    assert "Clear readings: 1 better, 1 worse." in text


def test_a_comparison_that_several_tables_have_is_adjusted_once(monkeypatch):
    shared = (("sent-amp", "sent-mixup"),)
    for name, more in (("one", ()), ("two", (("none", "sent-mixup"),))):
        table = replace(EXPERIMENTS["table2"], comparisons=(*shared, *more))
        monkeypatch.setitem(EXPERIMENTS, name, table)
    records = [*pair_of_methods(), *(done("none", seed, 10.0 + 0.4 * seed) for seed in range(8))]
    one, two = render(records, ran("one"), ran("two")).split("## two:")
    found = [row(part, "trec", "CNN-rand", "SentAMP", "SentMixup")[7:9] for part in (one, two)]
    assert found == [["0.008", "0.016"]] * 2  # of two comparisons, though the first table has one
    assert row(two, "trec", "CNN-rand", "Baseline")[7:9] == ["1.000 ‡", "1.000"]
    assert "for the number of different comparisons in this report" in one
    random.Random(0).shuffle(records)
    assert render(records, ran("one"), ran("two")) == f"{one}## two:{two}"  # in whatever order the lines are


def test_failed_runs_are_listed_and_the_header_names_machines_lengths_and_data():
    other = done(seed=1, machine={**MACHINE, "device": "NVIDIA H100"})
    text = render([done(), other, failed("sent-amp", 3)], ran("table2"))
    assert text.count("DivergedError") == 1
    assert "- `trec/cnn-rand/sent-amp/1/3`: DivergedError: the loss is nan" in text
    assert "Runs: 2 done, 1 failed; 2 min of runs" in text
    assert "- Machine: NVIDIA H100, torch 2.13.0, fastamp 0.1.0, threads 1 (1 runs)" in text
    assert "- Length: 20 steps\n" in text
    assert '- data: `{"trec": "a5"}`' in text
    assert render([failed()], ran("table2")).startswith("# Results\n\n- Runs: 0 done, 1 failed")
    assert "Runs: 0 done, 0 failed" in render([])


def test_header_says_what_was_asked_for_and_how_many_runs_of_it_are_missing():
    part = {"datasets": ["trec"], "models": ["cnn-rand"], "methods": ["none", "sent-amp"]}
    records = [done(), done(seed=1), done("sent-amp"), failed("sent-amp", 1)]
    lines = render(records, ran("table2", **part, seeds=[0, 1, 2]), ran("figure2", methods=["none"], seeds=[1]))
    asked = [line for line in lines.splitlines() if line.startswith("- Asked for")]
    assert asked == [
        "- Asked for: table2: trec; cnn-rand; none, sent-amp; 100%; seeds 0, 1, 2. "
        "**Unfinished: 3 of 6 runs are missing.**",
        "- Asked for: figure2: trec; cnn-rand; none; 100%; seeds 1",
    ]


def test_header_says_what_the_vectors_cover():
    covered = [
        done(seed=seed, model="cnn-glove", result=result_of(9.0, types_covered=97.5, tokens_covered=99.5 + seed / 4))
        for seed in (0, 1)
    ]
    text = render([done(), *covered], ran("table2"))
    assert "- Pre-trained vectors cover, of trec: 97.5% of its words and 99.50 to 99.75% of its tokens" in text
    assert "vectors cover" not in render([done()], ran("table2"))


def test_notes_say_what_the_intervals_leave_out_what_a_share_of_the_data_is_of_and_which_seeds_are_folds():
    plain, folds = render([done()], ran("table2")), render([done(dataset="mr"), done(dataset="subj")], ran("table2"))
    named = render([done(dataset="mr", config={"fold": 3})], ran("table2"))
    shares = render([done(model="lstm-glove", ratio=0.1)], ran("table3"))
    assert "do not contain its own sampling error" in plain
    for words, there, absent in (
        ("dev data that select the step are not reduced", shares, plain),
        ("subj and mr: sets for ten-fold cross-validation. A seed is a fold", folds, plain),
        ("Folds share training sentences", folds, named),
        ("Every run tests on the fold that its settings name", named, folds),
    ):
        assert words in there
        assert words not in absent


def test_the_ablation_names_what_each_row_adds():
    methods = ("word-mixup", "sent-mixup", "sent-maxop", "sent-amp")
    text = render([done(method, model="lstm-glove") for method in methods], ran("table2"), ran("table5"))
    table2, table5 = text.split("## table5:")
    assert row(table2, "LSTM-glove", "SentMixup")
    labels = [fields[1] for fields in rows(table5) if fields[0] == "LSTM-glove"]
    assert labels == ["Word +RandOp (WordMixup)", "Sent +RandOp (SentMixup)", "Sent +MaxOp", "SentAMP"]
    assert row(table5, "trec", "LSTM-glove", "Sent +MaxOp")[3] == "Sent +RandOp (SentMixup)"


def test_a_table_holds_its_extent_and_what_was_asked_of_it():
    records = [done(ratio=ratio) for ratio in (0.07, 0.1, 1.0)]  # of which the plan's table3 has no 0.07
    asked = ran("table3", models=["cnn-rand"], ratios=[0.07, 0.1])
    for more in ((), (ran("figure2"),)):
        text = render(records, asked, *more)
        assert re.findall(r"^## (\w+):", text, re.MULTILINE) == ["table3", *("figure2" for _ in more)]
        table = text.split("## table3:")[1]
        assert row(table, "Data set")[3:6] == ["7%", "10%", "100%"]
        assert row(table, "trec")[:3] == ["trec", "CNN-rand", "Baseline"]


def test_a_name_that_the_plan_does_not_have_is_shown_as_it_is():
    record = {**done(), "method": "sent-new", "key": "trec/cnn-rand/sent-new/1/0"}
    assert row(render([record], ran("table2", methods=["sent-new"])), "CNN-rand")[1] == "sent-new"


def test_published_cells_stand_beside_ours_in_their_own_table():
    published = {PublishedCell("table2", Cell("trec", "cnn-rand", "sent-amp")): 7.25}
    text = render([done(), done("sent-amp")], ran("table2"), published=published)
    assert row(text, "Model") == ["Model", "Method", "trec", LEAST, "trec, paper"]
    assert row(text, "CNN-rand", "Baseline")[2:] == ["10.00 (1)", "8.50 (1)", "–"]
    assert row(text, "CNN-rand", "SentAMP")[2:] == ["10.00 (1)", "8.50 (1)", "7.25"]
    assert "not at hand" not in text
    other = {PublishedCell("table5", Cell("trec", "cnn-rand", "none")): 9.0}
    assert row(render([done()], ran("table2"), published=other), "CNN-rand")[-1] == "not at hand"


def with_curves(record: dict) -> dict:
    level = {"mean": LAM, "pairs": [LAM, LAM[::-1]]}
    return {**record, "curves": {"lam": LAM, "word": level, "sentence": level}}


def assert_images(folder, text, expected: set[str]) -> None:
    assert {path.name for path in folder.glob("*.png")} == expected == set(re.findall(r"\]\((.*\.png)\)", text))
    for name in expected:
        content = (folder / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(content) > 1000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where to write a report with small plots."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "DPI", 40)
    return tmp_path


def test_plots_are_written_beside_the_report(folder):
    records = [with_curves(record) for record in pair_of_methods(seeds=2)] + [done()]
    records += [done("sent-amp", model="lstm-rand", config={"preset": "official"})]
    path = write(folder, results(records, ran("figure2", models=["lstm-rand"])))
    expected = {"errors", "differences", "curves-trec-cnn-rand", "policy-trec-cnn-rand", "policy-trec-lstm-rand"}
    assert path == folder / "report.md"
    text = path.read_text(encoding="utf-8")
    assert_images(folder, text, {f"figure2-{name}.png" for name in expected})
    assert "of the model of least dev error: two random pairs of test sentences" in text
    assert "of one batch an evaluation" in text
    assert re.findall(r"policy over training, trec, (.+):.* of another loss", text) == ["LSTM-rand"]


def test_ratios_are_drawn_as_a_curve(folder):
    records = [done(seed=seed, ratio=ratio, error=seed / ratio) for seed in (0, 1) for ratio in (0.1, 1.0)]
    text = render(records, ran("table3", models=["cnn-rand"]), folder=folder)
    assert_images(folder, text, {"table3-ratios.png"})
