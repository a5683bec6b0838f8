"""The report of a results folder: what its tables say, what they leave out, and the paper's cells."""

import random
import re
from dataclasses import replace

import pytest

pytest.importorskip("scipy")

from fastamp.paper import plots, report
from fastamp.paper.plan import EXPERIMENTS, Cell, Run
from fastamp.paper.published import PAPER, PublishedCell, read_published
from fastamp.paper.report import write
from fastamp.paper.results import Results
from fastamp.training import RECIPES

MACHINE = {"device": "cpu", "torch": "2.13.0", "fastamp": "0.1.0", "threads": 1}
LAM = [i / 20 for i in range(21)]
HEADER = ["Data set", "Model", "Share", "Method", "Test error", "The paper's"]
HEADER += ["At last step", "dev data", "least (selected on test)", "Trained on + dev"]


def result_of(error: float, steps: int = 8000, types_covered=None, tokens_covered=None) -> dict:
    covered = {"types_covered": types_covered, "tokens_covered": tokens_covered}
    errors = {"test_error": error, "least_test_error": error - 1.5, "final_test_error": error + 1}
    errors |= {"best_dev_error": 2 * error}
    sizes = {"train_size": 4907, "dev_size": 545, "test_size": 500, "embedding_dim": 300}
    return {**errors, "steps": steps, **covered, **sizes}


def done(method="none", seed=0, error=10.0, *, dataset="trec", model="cnn-rand", ratio=1.0, **fields) -> dict:
    run = Run(dataset, model, method, ratio, seed)
    policy = {"mix/lam": 0.5, "mix/lam_shift": 0.001, "mix/mask": 0.9, "mix/grad_abs": 0.3, "mix/delta": 0.002}
    return {
        "status": "done",
        "key": run.key,
        **vars(run),
        "config": {"fold": None, "model": RECIPES[model].fields["model"], "step_size": 0.002},
        "result": result_of(error),
        "history": [{"step": n, "test_error": error, **(policy if "amp" in method else {})} for n in (10, 20)],
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


def test_a_cell_is_mean_deviation_and_number_of_seeds_beside_the_papers_and_at_other_steps():
    text = render([done(seed=seed, error=error) for seed, error in enumerate((10.0, 11.0, 12.0))], ran("table2"))
    assert row(text, "Data set", "Model") == HEADER
    ours = ["11.00 ± 1.00 (3)", "8.8 ± 0.86", "12.00 ± 1.00 (3)", "22.00 ± 2.00 (3)", "9.50 ± 1.00 (3)", "4907 + 545"]
    assert row(text, "trec", "CNN-rand", "100%", "Baseline")[4:] == ours
    assert row(render([done(error=12.4)], ran("table2")), "trec", "CNN-rand")[4] == "12.40 (1)"


def test_not_run_and_not_printed_are_two_things_and_rows_stand_in_the_plans_order():
    records = [done(dataset="mr"), done("sent-amp", dataset="mr"), done("sent-mixup@official"), done(model="bert")]
    text = render(records, ran("table2", methods=["sent-mixup@official"]))
    table = text.split("## table2")[1].split("### Comparisons")[0]
    cells = [(fields[0], fields[1], *fields[3:6]) for fields in rows(table)[2:]]
    assert cells[:4] == [
        ("trec", "CNN-rand", "Baseline", "not run", "8.8 ± 0.86"),
        ("trec", "CNN-rand", "SentMixup", "not run", "8.3 ± 0.63"),
        ("trec", "CNN-rand", "SentAMP", "not run", "8.1 ± 0.71"),
        ("trec", "CNN-rand", "WordMixup", "not run", "8.3 ± 0.71"),
    ]
    assert cells[5] == ("trec", "CNN-rand", "SentMixup, published code", "10.00 (1)", "not printed")
    assert cells[6] == ("trec", "BERT", "Baseline", "10.00 (1)", "2.6 ± 0.18")
    assert {fields[0] for fields in cells[11:]} == {"mr"}
    assert "Not run: dataset sst1, sst2, subj; model lstm-rand, lstm-glove, cnn-glove; " in text


def test_the_papers_cell_stands_beside_ours_whatever_command_ran_it_and_where_its_tables_differ_both_do():
    records = [done(method, model="bert") for method in ("none", "word-amp")] + [
        done("nonlinear-mixup", model="cnn-glove")
    ]
    text = render(
        [*records, done(model="cnn-glove-tuned")],
        ran("controls", models=["bert"]),
        ran("table2", models=["cnn-glove-tuned"]),
    )
    assert row(text, "trec", "BERT", "100%", "WordAMP")[5] == "1.9 ± 0.13, Table 2 and 4; 2.0 ± 0.12, Table 5"
    assert row(text, "trec", "CNN-glove", "100%", "Non-linear Mixup (ours)")[5] == "5.3 ± 0.29, cited from Guo 2020"
    assert row(text, "trec", "CNN-glove, tuned vectors", "100%", "Baseline")[5] == "7.9 ± 0.12"


def test_shares_are_rows_with_the_numbers_of_sentences_that_are_trained_on_and_that_select():
    sizes = {1.0: 4907, 0.03: 160, 0.1: 543}
    records = [
        done("sent-amp", model="bert", ratio=ratio, result={**result_of(100 * ratio), "train_size": size})
        for ratio, size in sizes.items()
    ]
    table = [fields for fields in rows(render(records, ran("table3"))) if fields[3:4] == ["SentAMP"]]
    assert [(fields[2], *fields[4:6], fields[-1]) for fields in table] == [
        ("3%", "3.00 (1)", "42.1 ± 7.34", "160 + 545"),
        ("10%", "10.00 (1)", "4.6 ± 0.37", "543 + 545"),
        ("100%", "100.00 (1)", "2.1 ± 0.20, Table 2 and 3; 2.1 ± 0.15, Table 4", "4907 + 545"),
    ]


def test_a_comparison_gives_difference_interval_improvement_and_p():
    text = render(pair_of_methods(), ran("table2"))
    found = row(text, "trec", "CNN-rand", "100%", "SentAMP", "SentMixup")
    assert found[5] == "**better**"
    assert re.fullmatch(r"-1\.10 \[-1\.\d\d, -1\.0\d\]", found[6])
    assert found[7:9] == ["+9.6%", "-0.2 (+2.4%)"]  # 1.1 of 11.4
    assert found[9:12] == ["0.008", "0.008", "8"]  # 2 / 2^8
    last, dev = found[12:]
    assert (last, dev[:5]) == (found[6], "-2.20")
    assert "Comparisons: 1 better; of all 1, 1 with q < 0.05." in text


def test_below_six_seeds_nothing_is_read_not_even_a_hint():
    text = render(pair_of_methods(seeds=5), ran("table2"))
    found = row(text, "trec", "CNN-rand", "100%", "SentAMP", "SentMixup")
    assert (found[5], found[9]) == ("too few seeds", "0.062 ‡")
    assert "Comparisons: 1 too few seeds; of all 1, 0 with q < 0.05." in text


@pytest.mark.parametrize(
    ("differences", "words"),
    [((0, 0, 0, 0, -1, 1), "within noise"), ((0, 1, 1, 1, 1, 1), "too few seeds"), ((0, -1, 1, 0, 0), "too few seeds")],
)
def test_seeds_that_do_not_differ_are_seeds_but_bear_out_nothing(differences, words):
    records = [done("sent-mixup", seed, 10.0) for seed in range(len(differences))] + [
        done("sent-amp", seed, 10.0 + difference) for seed, difference in enumerate(differences)
    ]
    assert row(render(records, ran("table2")), "trec", "CNN-rand", "100%", "SentAMP", "SentMixup")[5] == words


def test_what_q_does_not_bear_out_is_a_hint():
    records = pair_of_methods(seeds=6)
    found = row(render(records, ran("table2")), "trec", "CNN-rand", "100%", "SentAMP", "SentMixup")
    assert (found[5], *found[9:11]) == ("**better**", "0.031", "0.031")
    records += [done("word-amp", seed, 10.0 + seed % 2) for seed in range(6)] + [
        done("word-mixup", seed, 10.0 + (seed + 1) % 2) for seed in range(6)
    ]
    found = row(render(records, ran("table2")), "trec", "CNN-rand", "100%", "SentAMP", "SentMixup")
    assert (found[5], *found[9:11]) == ("a hint: better", "0.031", "0.062")


def test_equal_methods_are_noise():
    records = [done(method, seed, 10.0 + seed) for method in ("sent-amp", "sent-mixup") for seed in range(8)]
    found = row(render(records, ran("table2")), "trec", "CNN-rand", "100%", "SentAMP", "SentMixup")
    nothing = "+0.00 [+0.00, +0.00]"
    assert found[5:8] == ["within noise", nothing, "+0.0%"]
    assert found[9:] == ["1.000 ‡", "1.000", "8, 0 differ", nothing, nothing]


def test_the_report_opens_with_the_result_and_the_papers_largest_gains():
    records = [*pair_of_methods(model="cnn-glove"), *pair_of_methods(gain=-2.0, dataset="sst2")]
    text = render(records, ran("table2"))
    assert row(text, "sst2", "CNN-rand", "100%", "SentAMP", "SentMixup")[5] == "**worse**"
    opening = text.split("\n## ")[0]
    assert opening.startswith(
        "# Results\n\nAMP against Mixup, test error at the step of least dev error: 1 better, 1 worse."
    )
    assert re.search(
        r"- trec, CNN-glove, 100%: SentAMP against SentMixup -1\.10 \[.+\] points, n = 8, q = 0\.008: \*\*better\*\*\. "
        r"The paper's: -2\.1 \(\+31\.3%\); -1\.9 \(Sent \+MaxOp\)\.",
        opening,
    )
    assert "Table 2, 31.3% of Mixup's error (trec, CNN-glove, 100%, SentAMP), is among these." in opening
    assert "Table 3, 17.5% of Mixup's error (trec, BERT, 3%, SentAMP), was not run here, and nothing here" in opening
    assert "none was run." in render([done()], ran("table2"))


def test_the_distance_of_amp_from_mixup_over_training_stands_beside_the_placebos_and_another_seeds():
    records = [
        done(method, seed, 10.0 + seed + offset)
        for method, offset in (("word-mixup", 0.0), ("word-amp", 0.6), ("word-amp@placebo", -0.2))
        for seed in range(3)
    ]
    for record in records[6:]:
        record["history"][-1]["test_error"] -= 0.4  # 0.2 from Mixup, and 0.6 at the end
    opening = render(records, ran("controls", models=["cnn-rand"])).split("\n## ")[0]
    found = "AMP and Mixup with the same seed 0.60, the placebo (ε = 1e-6) and Mixup 0.40, two seeds of Mixup 1.33. "
    beyond = "AMP's less the placebo's: +0.20 [+0.20, +0.20], n = 3; over the last quarter +0.00 [+0.00, +0.00]."
    assert found + beyond in opening
    assert (
        "two seeds of Mixup 1.33. No placebo was run."
        in render(records[:6], ran("controls", models=["cnn-rand"])).split("\n## ")[0]
    )


def test_a_comparison_that_several_tables_have_is_adjusted_once(monkeypatch):
    shared = (("sent-amp", "sent-mixup"),)
    for name, more in (("one", ()), ("two", (("none", "sent-mixup"),))):
        table = replace(EXPERIMENTS["table2"], comparisons=(*shared, *more))
        monkeypatch.setitem(EXPERIMENTS, name, table)
    records = [*pair_of_methods(), *(done("none", seed, 10.0 + 0.4 * seed) for seed in range(8))]
    records += [done("sent-amp", dataset="questions")]  # which the second table has alone
    two_sets = {"datasets": ["trec", "questions"]}
    monkeypatch.setitem(EXPERIMENTS, "one", replace(EXPERIMENTS["one"], datasets=("trec",)))
    one, two = render(records, ran("one", datasets=["trec"]), ran("two", **two_sets)).split("## two:")
    found = [row(part, "trec", "CNN-rand", "100%", "SentAMP", "SentMixup")[9:11] for part in (one, two)]
    assert found == [["0.008", "0.016"]] * 2  # of two comparisons, though the first table has one
    assert row(two, "trec", "CNN-rand", "100%", "Baseline", "SentMixup")[9:11] == ["1.000 ‡", "1.000"]
    assert "for the number of different comparisons in this report" in two
    random.Random(0).shuffle(records)
    again = render(records, ran("one", datasets=["trec"]), ran("two", **two_sets))
    assert again == f"{one}## two:{two}"  # in whatever order the lines are


def test_failed_runs_are_listed_and_the_header_names_machines_lengths_and_data():
    other = done(seed=1, machine={**MACHINE, "device": "NVIDIA H100"})
    short = done(seed=2, seconds=0, result={**result_of(9.0, steps=20), "embedding_dim": 50})
    text = render([done(), other, short, failed("sent-amp", 3)], ran("table2"))
    assert text.count("DivergedError") == 1
    assert "- `trec/cnn-rand/sent-amp/1/3`: DivergedError: the loss is nan" in text
    assert "Runs: 3 done, 1 failed; 2 min of runs" in text
    assert "- Machine: NVIDIA H100, torch 2.13.0, fastamp 0.1.0, threads 1 (1 runs)" in text
    assert "- Not the paper's: 20 steps, the paper 8000 (1 runs)\n" in text
    assert "- Not the paper's: CNN-rand: word vectors of width 50, the paper 300 (1 runs)\n" in text
    assert '- data: `{"trec": "a5"}`' in text
    assert "## How it was run\n\n- Runs: 0 done, 1 failed" in render([failed()], ran("table2"))
    assert "Runs: 0 done, 0 failed" in render([])


def test_header_says_what_was_asked_for_and_how_many_runs_of_it_are_missing():
    part = {"datasets": ["trec"], "models": ["cnn-rand"], "methods": ["none", "sent-amp"]}
    records = [done(), done(seed=1), done("sent-amp"), failed("sent-amp", 1)]
    figure2 = ran("figure2", models=["cnn-rand"], ratios=[1.0], methods=["none"], seeds=[1])
    lines = render(records, ran("table2", **part, seeds=[0, 1, 2]), figure2)
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
    named = render([done(dataset="mr", config={"fold": 3, "model": "textcnn"})], ran("table2"))
    assert "do not contain its own sampling error" in plain
    assert "A share is of each class of all training sentences, dev included, rounded down, at least one" in plain
    for words, there, absent in (
        ("subj and mr: sets for ten-fold cross-validation. A seed is a fold", folds, plain),
        ("Folds share training sentences", folds, named),
        ("Every run tests on the fold that its settings name", named, folds),
    ):
        assert words in there
        assert words not in absent


def test_the_ablation_names_what_each_row_adds_and_one_run_of_two_rows_stands_there_once():
    methods = ("word-mixup", "word-maxop", "sent-mixup", "sent-amp")
    records = [done(method, model="cnn-glove") for method in methods]
    table2, table4 = render(records, ran("table2"), ran("table4")).split("## table4:")
    assert row(table2, "trec", "CNN-glove", "100%", "SentAMP")
    labels = [
        fields[3] for fields in rows(table4) if fields[:2] == ["trec", "CNN-glove"] and len(fields) == len(HEADER)
    ]
    ours = ["Word +RandOp (WordMixup)", "Word +MaxOp", "WordAMP", "Sent +RandOp (SentMixup)", "Sent +MaxOp = SentAMP"]
    assert labels == ["Baseline", *ours]
    same = row(table4, "trec", "CNN-glove", "100%", "Sent +MaxOp = SentAMP")
    assert same[5] == "4.6 ± 0.33, Table 2 and 4; 4.8 ± 0.22 (Sent +MaxOp), Table 4"
    assert "the loss is convex in λ" in table4
    assert "the loss is convex in λ" not in table2
    against = [fields[3:5] for fields in rows(table4) if len(fields) > len(HEADER)][2:]
    assert ["Sent +MaxOp = SentAMP", "Sent +RandOp (SentMixup)"] in against
    assert all(method != baseline for method, baseline in against)
    # An override may make them two.
    two = render([done(method, model="cnn-glove") for method in ("sent-maxop", "sent-amp")], ran("table4"))
    assert row(two, "trec", "CNN-glove", "100%", "SentAMP", "Sent +MaxOp")
    apart = render([done(method, model="bert") for method in ("sent-maxop", "sent-amp")], ran("table4"))
    assert row(apart, "trec", "BERT", "100%", "SentAMP", "Sent +MaxOp")
    assert "the loss is convex in λ" not in apart


def test_a_table_holds_its_extent_and_what_was_asked_of_it_and_each_table_is_there_once():
    records = [done("sent-amp", ratio=ratio) for ratio in (0.07, 0.1, 1.0)]  # of which the plan's table3 has no 0.07
    asked = ran("table3", models=["cnn-rand"], ratios=[0.07, 0.1])
    for more in ((), (ran("figure2", models=["cnn-rand"], ratios=[0.1]),)):
        text = render(records, asked, *more)
        assert re.findall(r"^## (\w+): ", text, re.MULTILINE) == ["table3", *("figure2" for _ in more)]
        assert [fields[2] for fields in rows(text) if fields[3] == "SentAMP"] == ["7%", "10%", "100%"]
        assert ("Its runs are in the tables of table3." in text) == bool(more)


def test_a_name_that_the_plan_does_not_have_is_shown_as_it_is():
    record = {**done(), "method": "sent-new", "key": "trec/cnn-rand/sent-new/1/0"}
    assert (
        row(render([record], ran("table2", methods=["sent-new"])), "trec", "CNN-rand", "100%", "sent-new")[4]
        == "10.00 (1)"
    )


def test_cells_of_a_file_take_the_place_of_the_papers():
    published = (PublishedCell("table2", Cell("trec", "cnn-rand", "sent-amp"), 7.25, 0.5),)
    text = render([done(), done("sent-amp")], ran("table2"), published=published)
    assert row(text, "trec", "CNN-rand", "100%", "Baseline")[5] == "not printed"
    assert row(text, "trec", "CNN-rand", "100%", "SentAMP")[5] == "7.2 ± 0.50"
    ours = render([done()], ran("table2"))
    assert ours == render([done()], ran("table2"), published=read_published(PAPER))


def with_curves(record: dict) -> dict:
    level = {"mean": LAM, "pairs": [LAM, LAM[::-1]]}
    return {**record, "curves": {"lam": LAM, "word": level, "sentence": level}}


def assert_images(folder, text, expected: set[str]) -> None:
    assert {path.stem for path in folder.glob("*.png")} == expected == set(re.findall(r"\]\((.*)\.png\)", text))
    for name in expected:
        content = (folder / f"{name}.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(content) > 1000
        assert "</svg>" in (folder / f"{name}.svg").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where to write a report with small plots."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "DPI", 40)
    return tmp_path


def test_plots_are_written_beside_the_report_and_name_what_they_are_of(folder):
    records = [with_curves(record) for record in pair_of_methods(seeds=2, ratio=0.03)]
    path = write(folder, results(records, ran("figure2", models=["cnn-rand"])))
    assert path == folder / "report.md"
    expected = {"figure2-errors", "figure2-differences", "figure2-curves-trec-cnn-rand-0.03"}
    assert_images(folder, path.read_text(encoding="utf-8"), expected)
    for name in expected:
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        assert "<!-- trec, CNN-rand, 3%, 8000 steps, n = 2; at the step of least dev error -->" in svg
    assert "<!-- SentAMP - SentMixup -->" in svg or name != "figure2-curves-trec-cnn-rand-0.03"
    before = {name: (folder / f"{name}.svg").read_bytes() for name in expected}
    write(folder, results(records, ran("figure2", models=["cnn-rand"])))
    assert {name: (folder / f"{name}.svg").read_bytes() for name in expected} == before


def test_the_controls_show_distances_over_training_and_what_the_step_does(folder):
    steps = {"placebo": 1e-6, "eps=1": 1.0}
    records = pair_of_methods(seeds=2) + [
        done(f"sent-amp@{name}", seed, config={"fold": None, "model": "textcnn", "step_size": step})
        for name, step in steps.items()
        for seed in (0, 1)
    ]
    text = render(records, ran("controls", models=["cnn-rand"]), folder=folder)
    names = {"errors", "differences", "distances-trec-cnn-rand", "step-trec-cnn-rand"}
    assert_images(folder, text, {f"controls-{name}" for name in names})
    svg = (folder / "controls-distances-trec-cnn-rand.svg").read_text(encoding="utf-8")
    labels = ("AMP - Mixup, same seed", "placebo - Mixup, same seed", "Mixup, two seeds", "sentences mixed")
    assert all(f"<!-- {label} -->" in svg for label in labels)
    svg = (folder / "controls-step-trec-cnn-rand.svg").read_text(encoding="utf-8")
    assert "<!-- mean |λ' - λ| -->" in svg


def test_shares_are_drawn_against_the_number_of_sentences_with_the_papers_cells(folder):
    records = [
        done(method, seed, model="bert", ratio=ratio, result={**result_of(seed / ratio), "train_size": size})
        for seed in (0, 1)
        for ratio, size in ((0.1, 543), (0.2, 1089))
        for method in ("sent-mixup", "sent-amp")
    ]
    text = render(records, ran("table3"), folder=folder)
    assert_images(folder, text, {"table3-shares"})
    svg = (folder / "table3-shares.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {label} -->" in svg for label in ("543", "1089", "SentAMP, the paper", "sentences trained on"))
