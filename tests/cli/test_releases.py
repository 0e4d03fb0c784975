"""`dinov2 releases`."""

import json
import urllib.error
import urllib.request
from email.message import Message

import pytest

from dinov2.models.releases import RELEASES
from tests.runs import contents, only_sentence


class Answered:
    """What a server says that has every file."""

    def __init__(self) -> None:
        self.headers = Message()
        self.headers["Content-Length"] = "88283115"
        self.headers["Content-Type"] = "binary/octet-stream"

    def __enter__(self) -> "Answered":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def test_every_file_is_listed_with_its_address(dinov2) -> None:
    ended = dinov2("releases")
    assert ended.code == 0 and ended.err == ""
    lines = ended.out.splitlines()
    assert len(lines) == 1 + 65
    assert [line.split()[-1] for line in lines[1:]] == [row.url for row in RELEASES]
    assert "ImageNet-1k linear top-1 80.9 %" in next(line for line in lines if line.startswith("dinov2_vits14_reg "))


def test_one_kind_is_listed_and_written_as_json(dinov2, here) -> None:
    ended = dinov2("releases", "--kind", "depth", "--json", "out/table.json")
    assert ended.code == 0 and len(ended.out.splitlines()) == 1 + 24
    rows = json.loads((here / "out" / "table.json").read_text(encoding="utf-8"))
    assert {row["kind"] for row in rows} == {"depth"} and len(rows) == 24
    ended = dinov2("releases", "--kind", "depth", "--json", "-")
    assert json.loads(ended.out) == rows


def test_a_check_says_which_files_answer_and_fails_when_one_does_not(dinov2, here, monkeypatch) -> None:
    missing = RELEASES[1].url

    def answer(request: urllib.request.Request, timeout: float) -> Answered:
        if request.full_url == missing:
            raise urllib.error.HTTPError(missing, 404, "Not Found", Message(), None)
        return Answered()

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    ended = dinov2("releases", "--check", "--json", "checked.json")
    assert ended.code == 1
    assert ended.out.splitlines()[-1] == "64 of 65 files answer"
    assert "dinov2_vitb14  " in ended.out and "404 Not Found" in ended.out and "88.3 MB" in ended.out
    faults = {row["name"]: row["fault"] for row in json.loads((here / "checked.json").read_text()) if row["fault"]}
    assert faults == {"dinov2_vitb14": "404 Not Found"}
    assert dinov2("releases", "--check", "--kind", "depth").code == 0


def test_a_check_without_network_is_one_sentence(dinov2, here, monkeypatch) -> None:
    def unreachable(request: object, timeout: float) -> object:
        raise urllib.error.URLError(OSError(101, "Network is unreachable"))

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    ended = dinov2("releases", "--check", "--json", "checked.json")
    assert (ended.code, ended.out) == (1, "")
    assert "none of the 65 addresses can be reached" in only_sentence(ended)
    assert contents(here) == {}


def test_a_place_that_cannot_be_written_is_said_before_the_network_is_asked(dinov2, here, monkeypatch) -> None:
    monkeypatch.delattr(urllib.request, "urlopen")
    (here / "file").write_text("mine")
    for place, sentence in (("file/table.json", "file is a file"), (".", ". is a folder; give the name of a file")):
        ended = dinov2("releases", "--check", "--json", place)
        assert ended.code == 2 and sentence in only_sentence(ended)
    assert contents(here) == {"file": b"mine"}


@pytest.mark.parametrize("words", [("--kind", "head"), ("--chek",), ("extra",)])
def test_a_wrong_word_is_a_usage_error(dinov2, words) -> None:
    assert dinov2("releases", *words).code == 2


def test_the_kinds_of_the_option_are_those_of_the_table() -> None:
    from dinov2.cli.releases import _KINDS
    from dinov2.models.releases import KINDS

    assert _KINDS == KINDS
