"""`dinov2 neighbours` as a user meets it."""

import json
import shutil

import pytest

from dinov2 import cli
from dinov2.apps.embed import embed
from dinov2.cli import neighbours as family
from tests.apps.test_embed import small
from tests.runs import only_sentence, pictures


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(cli, "_FAMILIES", tuple(dict.fromkeys((*cli._FAMILIES, family))))


@pytest.fixture
def given(here):
    pictures(here / "photos", n=6, classes=2)
    shutil.copy(here / "photos/class0/004.png", here / "photos/class1/twin.png")
    embed("photos", model=small(here / "m.pth"), output="out.npz")
    return here


def test_neighbours_of_an_image_are_printed_drawn_and_written(dinov2, given):
    ended = dinov2("neighbours", "out.npz", "--query", "photos/class0/004.png", "-k", "2", "--json", "n.json")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == "photos/class0/004.png"
    assert lines[1] == "   1.000  class1/twin.png  (class1)"
    assert len(lines) == 4 and lines[3] == "pictures are in out.npz.neighbours.html"
    written = json.loads((given / "n.json").read_text())
    assert written["neighbours"]["photos/class0/004.png"][0]["path"] == "class1/twin.png"
    assert (given / "out.npz.neighbours.html").is_file()


def test_duplicates_are_printed_and_written(dinov2, given):
    ended = dinov2("neighbours", "out.npz", "--duplicates", "0.999", "-o", "d.html", "--json", "d.json")
    assert ended.out.splitlines() == [
        "1 pairs are at least 0.999 similar, in 1 groups",
        "  1.0000  class0/004.png  class1/twin.png",
        "pictures are in d.html",
    ]
    assert json.loads((given / "d.json").read_text())["groups"] == [["class0/004.png", "class1/twin.png"]]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("no.parquet",), "there are no features no.parquet"),
        (("m.pth",), "m.pth holds no features; expected a .parquet"),
        (("photos",), "has no _manifest.json"),
        (("out.npz", "--query", "no.jpg"), "there is no image file no.jpg"),
        (("out.npz", "--column", "mean"), "has no column 'mean'"),
        (("out.npz", "--duplicates", "2"), "a cosine similarity of 2.0 does not exist"),
    ],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(dinov2, given, words, sentence):
    before = sorted(given.rglob("*"))
    ended = dinov2("neighbours", *words)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert sorted(given.rglob("*")) == before


def test_help_has_an_example(dinov2):
    assert "dinov2 neighbours features.parquet --query cat.jpg" in dinov2("neighbours", "--help").out
