"""The results folder of the paper's runs."""

import errno
import json
import os

import pytest

from fastamp.paper.results import LINES, RUNS, claim, read

SETTINGS = {
    "steps": 6,
    "eval_every": None,
    "threads": 1,
    "overrides": {"lr": 0.5},
    "data": {"trec": "a"},
    "vectors": None,
    "pretrained": None,
}


WHAT = ("dataset", "model", "method", "ratio", "seed", "config", "result", "history", "curves", "seconds", "machine")


def line_of(key: str, status: str = "done", **fields) -> dict:
    return {"status": status, "key": key, **dict.fromkeys(WHAT), "error": None, **fields}


def config_of(**fields) -> dict:
    none = {"vectors": None, "pretrained": None}
    return {"dataset": "trec", "model": "textcnn", "method": "none", **none, **fields}


def test_lines_are_read_back_and_the_newest_of_a_key_counts(tmp_path):
    with claim(tmp_path, SETTINGS, "first") as writer:
        writer.append(line_of("a", "failed"))
        writer.append(line_of("b", note="ü"))
        writer.append(line_of("a", note="again"))
    results = read(tmp_path)
    assert results.records == (
        {"format": 1, **line_of("a", note="again")},
        {"format": 1, **line_of("b", note="ü")},
    )
    assert results.notices == ()
    assert results.settings == {"format": 1, **SETTINGS, "commands": ["first"]}


def test_a_run_that_is_done_gets_no_second_line(tmp_path):
    with claim(tmp_path, SETTINGS, "first") as writer:
        writer.append(line_of("a"))
        with pytest.raises(ValueError, match="a is done already"):
            writer.append(line_of("a"))
    line = (tmp_path / LINES).read_text()
    (tmp_path / LINES).write_text(2 * line)
    with pytest.raises(ValueError, match=r"results.jsonl, line 2: a is done in an earlier line already; delete one"):
        read(tmp_path)


@pytest.mark.parametrize("full", ["at once", "within the line"])
def test_a_full_disk_is_told_with_the_file_and_loses_no_line_before(tmp_path, monkeypatch, full):
    write = os.write

    def write_little(descriptor, content):
        if full == "at once":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content[:20])

    with claim(tmp_path, SETTINGS, "first") as writer:
        writer.append(line_of("a"))
        monkeypatch.setattr(os, "write", write_little)
        with pytest.raises(OSError, match=r"results\.jsonl"):
            writer.append(line_of("b"))
    monkeypatch.undo()
    with claim(tmp_path, SETTINGS, "first") as writer:
        assert list(writer.records) == ["a"]
        writer.append(line_of("b"))
    assert [line["key"] for line in read(tmp_path).records] == ["a", "b"]


def test_a_torn_last_line_is_left_out_by_readers_and_cut_off_by_the_next_runner(tmp_path):
    with claim(tmp_path, SETTINGS, "first") as writer:
        writer.append(line_of("a"))
    whole = (tmp_path / LINES).read_bytes()
    (tmp_path / LINES).write_bytes(whole + b'{"format": 1, "key": "b", "st')
    results = read(tmp_path)
    assert [line["key"] for line in results.records] == ["a"]
    assert "the last line is torn, and left out" in results.notices[0]
    assert (tmp_path / LINES).read_bytes() != whole
    with claim(tmp_path, SETTINGS, "first") as writer:
        assert "the last line was torn, and is cut off" in writer.notices[0]
        assert (tmp_path / LINES).read_bytes() == whole
        writer.append(line_of("b"))
    assert [line["key"] for line in read(tmp_path).records] == ["a", "b"]


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "",
        '{"key": "a"}',
        '{"format": 1, "key": "b", "status": "?"}',
        '{"format": 1, "key": ["b"], "status": "done"}',
        '{"format": 1, "key": "b", "status": []}',
        '{"format": 1, "key": "b", "status": "failed"}',
        json.dumps({"format": 1, **{name: None for name in WHAT if name != "curves"}, "key": "b", "status": "done"}),
    ],
)
def test_a_damaged_line_is_refused_by_file_and_number(tmp_path, damage):
    with claim(tmp_path, SETTINGS, "first") as writer:
        writer.append(line_of("a"))
    with open(tmp_path / LINES, "a") as file:
        file.write(damage + "\n")
    told = r"results\.jsonl, line 2 is damaged \(.+\); delete the line: its run is made again, and the others are kept$"
    with pytest.raises(ValueError, match=told):
        read(tmp_path)
    with pytest.raises(ValueError, match=told), claim(tmp_path, SETTINGS, "first"):
        pass
    lines = (tmp_path / LINES).read_text().splitlines(keepends=True)
    (tmp_path / LINES).write_text(lines[0])
    assert [line["key"] for line in read(tmp_path).records] == ["a"]


def test_a_folder_of_another_configuration_is_refused_and_the_differences_named(tmp_path):
    with claim(tmp_path, {**SETTINGS, "vectors": "v"}, "first") as writer:
        writer.append(line_of("a", config=config_of(method="sent-amp", vectors="glove.txt")))
    before = (tmp_path / "settings.json").read_bytes()
    other = {
        **SETTINGS,
        "steps": None,
        "threads": 2,
        "overrides": {"alpha": 0.2},
        "data": {"trec": "b", "mr": "c"},
        "vectors": "w",
    }
    message = (
        r"different: steps the recipe's \(there 6\), threads 2 \(there 1\), alpha 0.2 \(there the recipe's\), "
        r"lr the recipe's \(there 0.5\), data of trec, vectors$"
    )
    with pytest.raises(ValueError, match=message), claim(tmp_path, other, "second"):
        pass
    assert (tmp_path / "settings.json").read_bytes() == before


def test_settings_that_no_finished_run_used_are_replaced_and_runs_under_way_start_over(tmp_path):
    with claim(tmp_path, {**SETTINGS, "data": {"trec": "a", "mr": "b"}, "vectors": "wrong"}, "first") as writer:
        writer.append(line_of("a", config=config_of()))
        writer.append(line_of("b", "failed"))
        writer.run_folder("c").mkdir(parents=True)
    right = {**SETTINGS, "overrides": {"lr": 0.5, "hidden_size": 8}, "data": {"mr": "c"}, "vectors": "right"}
    with claim(tmp_path, right, "second") as writer:
        (notice,) = writer.notices
        assert notice.endswith("used them: hidden_size 8 (there the recipe's), data of mr, vectors")
        assert not (tmp_path / RUNS).exists()
    settings = read(tmp_path).settings
    assert settings == {"format": 1, **right, "data": {"trec": "a", "mr": "c"}, "commands": ["first", "second"]}
    with claim(tmp_path, right, "second") as writer:
        assert writer.notices == ()


def test_without_a_finished_run_another_configuration_takes_the_place_of_the_first(tmp_path):
    with claim(tmp_path, SETTINGS, "wrong") as writer:
        writer.append(line_of("a", "failed"))
    other = {**SETTINGS, "steps": 7, "threads": 2, "overrides": {}}
    with claim(tmp_path, other, "right"):
        pass
    assert read(tmp_path).settings == {"format": 1, **other, "commands": ["right"]}


def test_data_vectors_and_commands_may_be_added(tmp_path):
    for settings, command in (
        (SETTINGS, "first"),
        ({**SETTINGS, "data": {"mr": "c"}, "vectors": "v", "pretrained": "bert"}, "second"),
        (SETTINGS, "first"),
    ):
        with claim(tmp_path, settings, command):
            pass
    settings = read(tmp_path).settings
    assert settings["data"] == {"trec": "a", "mr": "c"}
    assert (settings["vectors"], settings["pretrained"]) == ("v", "bert")
    assert settings["commands"] == ["first", "second"]


def test_a_second_runner_is_refused_while_the_first_works(tmp_path):
    with claim(tmp_path, SETTINGS, "first") as writer:
        with pytest.raises(ValueError, match="another process works in"), claim(tmp_path, SETTINGS, "second"):
            pass
        writer.append(line_of("a"))
        assert len(read(tmp_path).records) == 1
    with claim(tmp_path, SETTINGS, "second"):
        pass


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no results folder: it has no settings\.json"):
        read(tmp_path)
    (tmp_path / LINES).write_text("")
    with pytest.raises(ValueError, match=r"without a settings\.json"), claim(tmp_path, SETTINGS, "first"):
        pass
    with pytest.raises(ValueError, match="is not a folder"), claim(tmp_path / LINES, SETTINGS, "first"):
        pass
    (tmp_path / "settings.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match=r"settings\.json has format 2; takes 1"):
        read(tmp_path)
    (tmp_path / "settings.json").write_text('{"format": 1, "steps": 3}')
    with pytest.raises(ValueError, match=r"settings\.json is damaged \(it has no eval_every, threads.*; put it back"):
        read(tmp_path)
