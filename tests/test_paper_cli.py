"""`fastamp paper`: every table and figure by its command, on small settings."""

import gzip
import io
import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from paper_runs import InThisProcess
from rich.console import Console

from fastamp.cli import main
from fastamp.paper import runner
from fastamp.paper.display import RunsDisplay, duration
from fastamp.paper.plan import EXPERIMENTS, METHODS, Run
from fastamp.paper.results import LINES, read
from fastamp.paper.runner import Active, Progress

SMALL = "--steps 4 --eval-every 2 --seeds 1 --threads 1 --set embedding_dim=8 --set hidden_size=8"
SMALL += " --models cnn-rand --ratios 1"
FIGURE2 = "--models lstm-glove"
ASKED = {
    "table2": "--datasets trec,sst2",
    "table3": f"{FIGURE2} --ratios 0.1,1",
    "table4": "--models cnn-glove --methods none,word-maxop,sent-maxop,sent-amp",
    "table5": "--models lstm-glove --datasets trec --methods word-mixup,word-amp@alpha=0.2",
    "figure2": FIGURE2,
    "controls": "--methods none,double-softmax,sent-amp@eps=0+redrawn,sent-amp@official",
}
# Figure 2's are Table 3's, made again for their loss against λ.
NEW_RUNS = {"table2": 10, "table3": 4, "table4": 3, "table5": 2, "figure2": 2, "controls": 3}

together = pytest.mark.xdist_group("paper cli")


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["paper", *map(str, arguments)])


def write_corpora(folder: Path) -> None:
    """Small corpora in place of TREC and SST-2, and 8-dimensional vectors of most of their words."""
    words = [f"w{i}" for i in range(40)]
    generator = torch.Generator().manual_seed(0)
    for name, classes, parts in (("trec", 6, ("train", "test")), ("sst2", 2, ("train", "dev", "test"))):
        (folder / name).mkdir()
        for part in parts:
            drawn = torch.randint(40, (72, 7), generator=generator).tolist()
            lines = [f"{i % classes}\t{' '.join(words[j] for j in row)}\n" for i, row in enumerate(drawn)]
            (folder / name / f"{part}.tsv").write_text("label\ttext\n" + "".join(lines))
    values = torch.randn(30, 8, generator=generator).tolist()
    lines = [f"{word} {' '.join(map(str, row))}\n" for word, row in zip(words, values, strict=False)]
    (folder / "vectors.txt").write_text("".join(lines))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, Result], list[object]]:
    """A folder with the small runs of every table and figure, what each command said, and the options of all."""
    folder = tmp_path_factory.mktemp("paper")
    write_corpora(folder)
    options = [*SMALL.split(), "--data-dir", folder, "--vectors", folder / "vectors.txt", "--out", folder / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
        said = {name: invoke(name, *options, *asked.split()) for name, asked in ASKED.items()}
    return folder / "out", said, options


@pytest.fixture(scope="module")
def report(made) -> str:
    folder, _, _ = made
    with pytest.MonkeyPatch.context() as patch:
        # test_paper_report draws; here are six tables of them, of seconds each.
        patch.setattr("fastamp.paper.plots.draw", lambda view, *rest, **how: [(f"{view.name}.png", "A caption.")])
        result = invoke("report", folder)
    assert result.exit_code == 0, result.output
    assert f"written to {folder / 'report.md'}" in result.output
    return (folder / "report.md").read_text()


@together
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_table_and_figure_has_a_command_shares_runs_with_the_others_and_is_in_the_report(made, report, name):
    output = made[1][name].output
    assert made[1][name].exit_code == 0, output
    assert len(re.findall(r"test error \d+\.\d\d% \(dev", output)) == NEW_RUNS[name], output
    assert re.search(r"^(\d+) of \1 runs, in ", output, re.MULTILINE)
    section = report.split(f"## {name}: ")[1].split("\n## ")[0]
    assert section.startswith(f"{EXPERIMENTS[name].title}\n")
    shown = {"controls": METHODS["double-softmax"].label, "figure2": "Its runs are in the tables of table2."}
    assert shown.get(name, "AMP") in section
    assert f"![{name}.png]({name}.png)\n\nA caption." in section


@together
def test_lines_stand_for_the_runs_that_were_asked_for(made):
    folder, _, _ = made
    configs = {line["key"]: line["config"] for line in read(folder).records}
    assert len(configs) == sum(NEW_RUNS.values()) - NEW_RUNS["figure2"]
    curves = {line["key"] for line in read(folder).records if line["curves"] is not None}
    assert curves == {"trec/lstm-glove/sent-mixup/1/0", "trec/lstm-glove/sent-amp/1/0"}
    assert {"sst2/cnn-rand/word-amp/1/0", "trec/cnn-rand/sent-amp@eps=0+redrawn/1/0"} <= configs.keys()
    assert configs["trec/lstm-glove/sent-mixup/0.1/0"]["fraction"] == 0.1
    assert configs["trec/lstm-glove/word-amp@alpha=0.2/1/0"]["alpha"] == 0.2
    specification = read(folder).specification
    assert [specification[name] for name in ("steps", "eval_every", "device", "threads")] == [4, 2, "cpu", 1]
    assert specification["overrides"] == {"embedding_dim": 8, "hidden_size": 8}
    assert specification["data"].keys() == {"trec", "sst2", "vectors"}
    assert [request["experiment"] for request in specification["requests"]] == list(EXPERIMENTS)
    assert specification["requests"][1]["ratios"] == [0.1, 1.0]


@together
def test_the_same_command_again_runs_nothing_and_needs_no_threads(made):
    folder, _, options = made
    before = (folder / LINES).read_bytes()
    place = options.index("--threads")
    for name, runs, model in (("figure2", 2, "lstm-glove"), ("table2", 5, "cnn-rand")):
        result = invoke(
            name, *options[:place], *options[place + 2 :], "--models", model, "--datasets", "trec", "--jobs", 2
        )
        assert result.exit_code == 0, result.output
        assert f"\n{runs} of {runs} runs, in " in f"\n{result.output}"
    assert "no run here uses hidden_size, which is for model 'bilstm', not for 'textcnn'" in result.output
    assert (folder / LINES).read_bytes() == before


@together
def test_a_dry_run_lists_what_is_done_and_to_do_and_writes_nothing(made, tmp_path):
    folder, _, options = made
    before = (folder / "settings.json").read_bytes()
    asked = ("--datasets", "trec", "--seeds", "0-1", "--methods", "none,sent-amp", "--dry-run")
    result = invoke("table2", *options, *asked)
    assert result.output.splitlines() == [
        "trec/cnn-rand/none/1/0: done",
        "trec/cnn-rand/sent-amp/1/0: done",
        "trec/cnn-rand/none/1/1: to do",
        "trec/cnn-rand/sent-amp/1/1: to do",
        "2 to do",
    ]
    # Their loss against λ is not there.
    assert invoke("figure2", *options, *asked).output.splitlines()[-1] == "4 to do"
    assert (folder / "settings.json").read_bytes() == before
    result = invoke("figure2", "--dry-run", "--out", tmp_path / "new")
    assert result.output.splitlines()[-1] == "20 to do"
    assert not (tmp_path / "new").exists()


@together
def test_another_specification_is_refused_with_what_to_do(made):
    folder, _, options = made
    before = (folder / "settings.json").read_bytes()
    result = invoke("figure2", *options, "--set", "lr=0.5", "--steps", 7)
    assert result.exit_code == 1
    assert "different: steps 7 (there 4), lr 0.5 (there the recipe's). Give another folder, or" in result.output
    assert (folder / "settings.json").read_bytes() == before


def test_a_share_that_leaves_a_class_empty_is_told_before_anything_runs(tmp_path, monkeypatch, recwarn):
    write_corpora(tmp_path)
    monkeypatch.setattr("fastamp.cli.paper.execute_all", lambda *given, **more: progress(total=1))
    options = (*SMALL.split(), "--datasets", "trec", "--methods", "none", "--data-dir", tmp_path, "--ratios", "0.05,1")
    assert invoke("table3", *options, "--out", tmp_path / "out").exit_code == 0
    told = [str(warning.message) for warning in recwarn]
    assert "dataset 'trec': a share of 0.05 leaves no example of class 0 (DESC); one is kept" in told


def test_a_failed_run_is_told_ends_in_code_1_and_is_not_repeated(tmp_path, monkeypatch):
    arguments = [*SMALL.split(), "--datasets", "questions", "--seeds", "3-3", "--methods", "none", "--set", "lr=1e30"]
    monkeypatch.setattr(runner, "ProcessPoolExecutor", InThisProcess)
    for _ in range(2):
        result = invoke("figure2", *arguments, "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert "1 of 1 runs, 1 failed, in " in result.output
        assert "tried again only with --retry-failed" in result.output
    (line,) = (json.loads(line) for line in (tmp_path / "out" / LINES).read_text().splitlines())
    assert (line["seed"], line["status"]) == (3, "failed")
    assert line["error"].startswith("DivergedError")


@pytest.mark.parametrize("when", ["execute_all", "claim"])
def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch, when):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fastamp.cli.paper.{when}", interrupted)
    arguments = [*SMALL.split(), "--datasets", "questions", "--out", str(tmp_path / "out")]
    result = invoke("figure2", *arguments)
    assert result.exit_code == 130
    told = result.output.splitlines()[-1]
    assert told.endswith(f"this goes on: fastamp paper figure2 {' '.join(arguments)}")
    assert (f"what is finished is in {tmp_path / 'out'}, and runs under way" in told) == (when == "execute_all")


def test_without_a_subcommand_it_lists_the_titles():
    output = "".join(invoke().output.split())
    assert all("".join(f"{name}{experiment.title}".split()) in output for name, experiment in EXPERIMENTS.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--models lstm", "'lstm' is not one of cnn-rand, cnn-glove"),
        ("--methods sent-amp,amp", "'amp' is not one of none, word-mixup"),
        ("--datasets imdb", "'imdb' is not one of questions, trec"),
        ("--seeds 7-3", "'7-3' are no seeds; write 5 for 0 to 4, 0-9, or 3,7"),
        ("--seeds a", "'a' are no seeds"),
        ("--seeds 3,-1", "'3,-1' are no seeds"),
        ("--ratios 0,1", "'0,1': a share of the data is above 0 and at most 1"),
        ("--ratios all", "'all' is no list of numbers"),
        ("--set lr", "'lr' is no FIELD=VALUE"),
        ("--set alpa=3", "'alpa' is no field of TrainConfig; takes fold, "),
        ("--set seed=3", "seed is set by --seeds"),
        ("--set lr=fast", "lr takes float, not 'fast'"),
        ("--set lower=yes", "lower takes bool, not 'yes'"),
        ("--set dropout=2", "dropout must be below 1, got 2.0"),
        ("--models cnn-glove", "cnn-glove needs vectors, a GloVe text file: give --vectors"),
        ("--models cnn-glove --vectors v.txt --set embedding_dim=8 --datasets questions", "but v.txt has width 2"),
        ("--models lstm-glove --vectors torn.gz --datasets questions", "the compressed file is damaged"),
        ("--models bert --pretrained ./gone --datasets questions", "there is no folder ./gone"),
        ("--models lstm-rand --set hidden_size=7 --datasets questions", "must be even, got 7"),
        ("--set fold=3 --datasets questions", "has test examples of its own, and no folds"),
        ("--set capture=true", "capture needs a cuda device, got device 'cpu'"),
        ("--datasets questions,trec --data-dir gone", "gone/trec/train.tsv: No such file"),
        ("--datasets questions --device cuda:99", "device 'cuda:99' cannot be used"),
        ("--jobs 0", "0 is not in the range x>=1"),
        ("--methods nonlinear-mixup", "the paper has nonlinear-mixup with cnn-glove only"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name_before_anything_is_written(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("v.txt").write_text("what 1 2\n")
    Path("torn.gz").write_bytes(gzip.compress(b"what 1 2\n")[:-4])
    result = invoke("figure2", "--models", "cnn-rand", *arguments.split(), "--out", "out")
    assert result.exit_code != 0
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_seeds_are_a_number_a_range_or_a_list(tmp_path):
    texts = {"3": [0, 1, 2], "0-2": [0, 1, 2], "3,7": [3, 7], "0-1,5,1": [0, 1, 5], "4-4": [4]}
    for text, seeds in texts.items():
        arguments = ("--seeds", text, "--methods", "none", "--dry-run", "--out", tmp_path / "out")
        lines = invoke("figure2", *arguments).output.splitlines()
        assert lines[:-1] == [f"trec/bert/none/0.03/{seed}: to do" for seed in seeds]


def test_options_reach_the_runner_and_fields_are_read_as_they_are_annotated(tmp_path, monkeypatch):
    taken = {}

    def keep(runs, options, *rest, **more):
        taken.update(options.overrides)
        assert more["retry_failed"]
        assert more["jobs"] == 3
        raise ValueError("kept")

    monkeypatch.setattr("fastamp.cli.paper.execute_all", keep)
    settings = {"lower": "False", "clip_norm": "3", "embedding_dim": "8", "reweight": "none"}
    sets = [argument for pair in settings.items() for argument in ("--set", "=".join(pair))]
    where = ("--datasets", "questions", "--models", "cnn-rand", "--ratios", 1)
    arguments = (*where, "--methods", "sent-amp", "--jobs", 3, "--retry-failed", *sets)
    result = invoke("figure2", *arguments, "--out", tmp_path / "out")
    assert "kept" in result.output
    assert taken == {"lower": False, "clip_norm": 3.0, "embedding_dim": 8, "reweight": "none"}
    assert [type(value) for value in taken.values()] == [bool, float, int, str]


# Display


def progress(**fields) -> Progress:
    return Progress(**{"total": 4, "done": 1, "failed": 0, **fields})


def test_a_terminal_shows_runs_under_way_and_what_has_ended():
    out = io.StringIO()
    with RunsDisplay(Console(file=out, force_terminal=True, width=150)) as display:
        runs = Run("trec", "cnn-rand", "none"), Run("trec", "cnn-rand", "none", seed=1)
        active = (Active(runs[0], 50, 100, 12.5, 3.0), Active(runs[1], 0, 100, None, None))
        display.on_poll(progress(active=active))
        display._live.refresh()
        later = progress(done=2, failed=1, seconds_left=500)
        display.on_end({"key": "c", "status": "failed", "error": "[odd] text"}, later)
        display.on_poll(later)
        display._live.refresh()
    shown = out.getvalue()
    assert re.search(r"trec/cnn-rand/none/1/0 .*step .*50.*dev error .*12\.5", shown)
    assert "c: failed: [odd] text" in shown
    assert re.search(r"2 of .*4 runs.*1.* failed, about .*8.* min left", shown)


def test_keys_are_whole_in_80_columns():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    run = Run("trec", "lstm-glove", "sent-amp@eps=0.002+redrawn", 0.03, 9)
    with RunsDisplay(console) as display:
        display.on_poll(progress(active=(Active(run, 7900, 8000, 12.5, 3.0),)))
        display._live.refresh()
    assert f"  {run.key}" in console.file.getvalue()


def test_elsewhere_every_run_that_has_ended_is_a_line(capsys):
    line = {"key": "c", "status": "done", "result": {"test_error": 10.4, "best_dev_error": 9.123}}
    with RunsDisplay(Console(force_terminal=False)) as display:
        display.on_poll(progress())
        display.on_end(line, progress(unknown=3))
        display.on_end(line, progress(unknown=2, seconds_left=500))
        display.on_end(line, progress(seconds_left=500))
        display.on_end(line, progress(done=4))
    assert capsys.readouterr().out.splitlines() == [
        "c: test error 10.40% (dev 9.12%); 1 of 4 runs, time left not known yet",
        "c: test error 10.40% (dev 9.12%); 1 of 4 runs, about 8 min and 2 runs of unknown length left",
        "c: test error 10.40% (dev 9.12%); 1 of 4 runs, about 8 min left",
        "c: test error 10.40% (dev 9.12%); 4 of 4 runs",
    ]


def test_durations_are_said_as_one_says_them():
    said = {3.4: "3 s", 99.4: "99 s", 99.6: "2 min", 5940: "99 min", 7500: "2 h 05 min"}
    assert {seconds: duration(seconds) for seconds in said} == said
