"""The results folder of the paper's runs."""

import errno
import json
import os

import pytest

from fastamp.paper.results import LINES, claim, read

TABLE2 = {"experiment": "table2", "datasets": ["trec"], "models": ["cnn-rand"], "methods": ["none"]}
TABLE2 |= {"ratios": [1.0], "seeds": [0]}
SPECIFICATION = {"steps": 6, "eval_every": None, "device": "cpu", "threads": 1, "overrides": {"lr": 0.5}}
SPECIFICATION |= {"data": {"trec": "a"}, "requests": [TABLE2]}
WHAT = ("dataset", "model", "method", "ratio", "seed", "config", "result", "history", "curves", "seconds", "machine")


def line_of(key: str, status: str = "done", **fields) -> dict:
    return {"status": status, "key": key, **dict.fromkeys(WHAT), "error": None, **fields}


def test_lines_are_read_back_and_the_newest_of_a_key_counts(tmp_path):
    with claim(tmp_path, SPECIFICATION) as writer:
        writer.append(line_of("a", "failed"))
        writer.append(line_of("b", note="ü"))
        writer.append(line_of("a", note="again"))
    results = read(tmp_path)
    assert results.records == (line_of("a", note="again"), line_of("b", note="ü"))
    assert results.notices == ()
    assert results.specification == {**SPECIFICATION, "format": 3}


def test_a_run_that_is_done_gets_no_second_line(tmp_path):
    with claim(tmp_path, SPECIFICATION) as writer:
        writer.append(line_of("a"))
        with pytest.raises(ValueError, match="a is done already"):
            writer.append(line_of("a"))
    line = (tmp_path / LINES).read_text()
    (tmp_path / LINES).write_text(2 * line)
    with pytest.raises(ValueError, match=r"results.jsonl, line 2: a is done in an earlier line already; delete one"):
        read(tmp_path)


def test_a_run_that_is_done_gets_a_second_line_for_its_loss_against_lambda(tmp_path):
    with claim(tmp_path, SPECIFICATION) as writer:
        writer.append(line_of("a"))
        writer.append(line_of("a", curves={"lam": []}))
        with pytest.raises(ValueError, match="a is done already"):
            writer.append(line_of("a", curves={"lam": []}))
    assert read(tmp_path).records == (line_of("a", curves={"lam": []}),)


@pytest.mark.parametrize("full", ["at once", "within the line"])
def test_a_full_disk_is_told_with_the_file_and_loses_no_line_before(tmp_path, monkeypatch, full):
    write = os.write

    def write_little(descriptor, content):
        if full == "at once":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content[:20])

    with claim(tmp_path, SPECIFICATION) as writer:
        writer.append(line_of("a"))
        monkeypatch.setattr(os, "write", write_little)
        with pytest.raises(OSError, match=r"results\.jsonl"):
            writer.append(line_of("b"))
    monkeypatch.undo()
    with claim(tmp_path, SPECIFICATION) as writer:
        assert list(writer.records) == ["a"]
        writer.append(line_of("b"))
    assert [line["key"] for line in read(tmp_path).records] == ["a", "b"]


def test_a_torn_last_line_is_left_out_by_readers_and_cut_off_by_the_next_runner(tmp_path):
    with claim(tmp_path, SPECIFICATION) as writer:
        writer.append(line_of("a"))
    whole = (tmp_path / LINES).read_bytes()
    (tmp_path / LINES).write_bytes(whole + b'{"key": "b", "st')
    results = read(tmp_path)
    assert [line["key"] for line in results.records] == ["a"]
    assert "the last line is torn, and left out" in results.notices[0]
    assert (tmp_path / LINES).read_bytes() != whole
    with claim(tmp_path, SPECIFICATION) as writer:
        assert "the last line was torn, and is cut off" in writer.notices[0]
        assert (tmp_path / LINES).read_bytes() == whole
        writer.append(line_of("b"))
    assert [line["key"] for line in read(tmp_path).records] == ["a", "b"]


def test_a_damaged_line_is_refused_by_file_and_number(tmp_path):
    with claim(tmp_path, SPECIFICATION) as writer:
        writer.append(line_of("a"))
    whole = (tmp_path / LINES).read_text()
    told = r"results\.jsonl, line 2 is damaged \(.+\); delete the line: its run is made again, and the others are kept$"
    without_curves = {name: None for name in WHAT if name != "curves"} | {"key": "b", "status": "done"}
    damages = ["{", "[]", "", '{"key": "a"}', '{"key": "b", "status": "?"}', '{"key": ["b"], "status": "done"}']
    damages += ['{"key": "b", "status": []}', '{"key": "b", "status": "failed"}', json.dumps(without_curves)]
    for damage in damages:
        (tmp_path / LINES).write_text(f"{whole}{damage}\n")
        with pytest.raises(ValueError, match=told):
            read(tmp_path)
        with pytest.raises(ValueError, match=told), claim(tmp_path, SPECIFICATION):
            pass
    (tmp_path / LINES).write_text(whole)
    assert [line["key"] for line in read(tmp_path).records] == ["a"]


def test_another_specification_is_refused_with_the_differences_and_what_to_do(tmp_path):
    with claim(tmp_path, {**SPECIFICATION, "data": {"trec": "a", "vectors": "v"}}):
        pass
    before = (tmp_path / "settings.json").read_bytes()
    other = {
        **SPECIFICATION,
        "steps": None,
        "device": "cuda",
        "overrides": {"alpha": 0.2},
        "data": {"trec": "b", "mr": "c", "vectors": "w"},
    }
    message = (
        r"different: steps the recipe's \(there 6\), device 'cuda' \(there 'cpu'\), alpha 0.2 \(there the recipe's\), "
        r"lr the recipe's \(there 0.5\), data of trec, data of vectors. Give another folder, or the options and data"
    )
    with pytest.raises(ValueError, match=message), claim(tmp_path, other):
        pass
    assert (tmp_path / "settings.json").read_bytes() == before


def test_requests_and_data_of_other_sets_are_added_once(tmp_path):
    more = {**TABLE2, "experiment": "table5", "seeds": [0, 1]}
    for requests, data in (([TABLE2], {"trec": "a"}), ([more], {"mr": "c", "vectors": "v"}), ([TABLE2], {"trec": "a"})):
        with claim(tmp_path, {**SPECIFICATION, "requests": requests, "data": data}):
            pass
    specification = read(tmp_path).specification
    assert specification["requests"] == [TABLE2, more]
    assert specification["data"] == {"trec": "a", "mr": "c", "vectors": "v"}


def test_a_second_runner_is_refused_while_the_first_works(tmp_path):
    with claim(tmp_path, SPECIFICATION) as writer:
        with pytest.raises(ValueError, match="another process works in"), claim(tmp_path, SPECIFICATION):
            pass
        writer.append(line_of("a"))
        assert len(read(tmp_path).records) == 1
    with claim(tmp_path, SPECIFICATION):
        pass


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no results folder: it has no settings\.json"):
        read(tmp_path)
    (tmp_path / LINES).write_text("")
    with pytest.raises(ValueError, match=r"without a settings\.json"), claim(tmp_path, SPECIFICATION):
        pass
    with pytest.raises(ValueError, match="is not a folder"), claim(tmp_path / LINES, SPECIFICATION):
        pass
    damaged = r"settings\.json is damaged \(.*{}.*\); put it back from a copy, or give another folder$"
    for content, message in (
        (
            {"format": 2},
            r"format 2, in which tables 4 and 5, .* meant others; this version takes 3: run the commands again into "
            "another folder",
        ),
        ({"format": 3, "steps": 3}, damaged.format("it has no eval_every, device")),
        ({**SPECIFICATION, "format": 3, "requests": [{"experiment": "table2"}]}, damaged.format("datasets")),
        ({**SPECIFICATION, "format": 3, "requests": 3}, damaged.format("not iterable")),
        (
            {**SPECIFICATION, "format": 3, "requests": [{**TABLE2, "experiment": "table9"}]},
            r"unknown experiment 'table9'; takes table2",
        ),
    ):
        (tmp_path / "settings.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read(tmp_path)
