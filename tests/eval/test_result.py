import json
import math
import os
import stat
import sys

import pytest

from dinov2.errors import DataError
from dinov2.eval.result import Result, environment, read_results, write_results
from dinov2.whole_files import write_json


def test_rows_survive_the_file(tmp_path):
    row = Result(task="knn", metric="top-1", value=83.5, ci=(83.0, 84.0), k=10, n=100, model={"digest": "ab"})
    path = write_results(tmp_path / "new" / "results.json", [row])
    assert read_results(path) == [row]


def test_extra_keys_stand_beside_the_rows_and_cannot_replace_them(tmp_path):
    path = write_results(tmp_path / "r.json", [], extra={"('full', 10) Top 1": 83.5, "rows": "mine"})
    document = json.loads(path.read_text())
    assert document["('full', 10) Top 1"] == 83.5
    assert document["rows"] == []


def test_the_document_is_valid_json_even_with_values_json_cannot_say(tmp_path):
    path = write_json(tmp_path / "r.json", {"a": math.nan, "b": [math.inf, tmp_path.name], 3: (1, True, None)})
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, tmp_path.name], "3": [1, True, None]}


def test_a_missing_value_is_read_as_nan(tmp_path):
    path = write_results(tmp_path / "r.json", [Result(task="t", metric="m", value=math.nan)])
    assert math.isnan(read_results(path)[0].value)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = write_json(tmp_path / "r.json", {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_results_are_readable_like_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    path = write_json(tmp_path / "r.json", {})
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_fields_of_a_newer_version_are_ignored(tmp_path):
    path = write_json(tmp_path / "r.json", {"rows": [{"task": "t", "metric": "m", "value": 1.0, "mood": "good"}]})
    assert read_results(path)[0].value == 1.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [3]}'])
def test_a_file_that_is_no_results_file_is_named(tmp_path, text):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(DataError, match=r"odd\.json is not a results file"):
        read_results(tmp_path / "odd.json")


def test_the_environment_names_versions_and_no_place_of_this_machine():
    facts = environment()
    assert {"python", "torch", "numpy", "platform", "threads"} <= set(facts)
    assert not any(os.sep in str(value) for value in facts.values())
