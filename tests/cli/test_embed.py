"""`dinov2 embed` as a user meets it."""

import json
import signal
import sys

import numpy as np
import pytest
import torch

from dinov2 import cli
from dinov2.apps.embed import target_format
from dinov2.cli import embed as family
from dinov2.errors import MissingDependency
from tests.apps.test_embed import small
from tests.runs import only_sentence, pictures


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(cli, "_FAMILIES", tuple(dict.fromkeys((*cli._FAMILIES, family))))


@pytest.fixture
def given(here):
    small(here / "m.pth", num_register_tokens=2)
    pictures(here / "my photos", n=6)
    (here / "my photos" / "broken.jpg").write_bytes(b"?")
    (here / "empty").mkdir()
    return here


def test_it_says_what_it_did_and_what_comes_next(dinov2, given):
    ended = dinov2("embed", "my photos", "--model", "m.pth", "-o", "out.npz", "--registers", "--json", "j/out.json")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].startswith("7 images in ") and "images/s" in lines[0] and "of memory" in lines[0]
    assert lines[1] == "1 images could not be read: see out.npz.unreadable.json"
    assert lines[2] == "6 rows are in out.npz, out.npz.json, out.npz.unreadable.json"
    assert lines[3] == "next: dinov2 neighbours out.npz"
    written = json.loads((given / "j" / "out.json").read_text())
    assert written["rows"] == 6 and written["images_per_second"] > 0 and "registers" in written["columns"]
    again = dinov2("embed", "my photos", "--model", "m.pth", "-o", "out.npz", "--registers")
    assert again.out.splitlines()[0] == "everything was there already"
    assert again.out.splitlines()[1:] == lines[1:]


def test_a_dry_run_says_what_would_be_written(dinov2, given):
    ended = dinov2("embed", "my photos", "-m", "m.pth", "-o", "o.npz", "--mean", "--layers", "0", "-1", "--dry-run")
    assert ended.out.splitlines() == [
        "7 images, about 10.9 KiB in 1 parts, would go to o.npz",
        "columns: index, path, height, width, cls, mean, layer0_cls, layer0_mean, layer2_cls, layer2_mean",
    ]
    assert not list(given.glob("o*"))


def test_an_interrupt_ends_with_a_word_on_how_to_go_on(dinov2, given, monkeypatch):
    import dinov2.apps.embed as app

    real = app.encode_batch
    monkeypatch.setattr(app, "encode_batch", lambda *a: (signal.raise_signal(signal.SIGINT), real(*a))[1])
    ended = dinov2("embed", "my photos", "-m", "m.pth", "-o", "out.npz", "--part-rows", "4", "--batch-size", "4")
    assert ended.code == 130
    assert ended.out.splitlines() == [
        "stopped by SIGINT; finished parts are kept: give the same command again to go on"
    ]
    assert "finishing the part at hand" in ended.err
    monkeypatch.undo()


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(dinov2, given, monkeypatch):
    monkeypatch.setattr(family, "_LINE_EVERY", 0.0)
    ended = dinov2("embed", "my photos", "-m", "m.pth", "-o", "out.npz", "--batch-size", "2")
    assert any("4 of 7 images, " in line and "images/s, 0:0" in line for line in ended.err.splitlines())


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("nowhere", "-m", "m.pth", "-o", "out.npz"), "'nowhere' is no existing path"),
        (("empty", "-m", "m.pth", "-o", "out.npz"), "no image was found in"),
        (("my photos", "-m", "no.pth", "-o", "out.npz"), "there is no weight file no.pth"),
        (("my photos", "-m", "dinov2_vits15", "-o", "out.npz"), "dinov2_vits14"),
        (("my photos", "-m", "m.pth", "-o", "out.xyz"), "the suffix of out.xyz names no format"),
        (("my photos", "-m", "m.pth", "-o", "m.pth/out.npz"), "m.pth is a file; choose another"),
        (("my photos", "-m", "m.pth", "-o", "out.npz", "--layers", "9"), "there is no block 9"),
        (("my photos", "empty", "-m", "m.pth", "-o", "out.npz"), "is a folder among 2 sources"),
    ],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(dinov2, given, words, sentence):
    before = sorted(given.rglob("*"))
    ended = dinov2("embed", *words)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert sorted(given.rglob("*")) == before


def test_help_has_an_example_and_typos_the_nearest_option(dinov2):
    assert "dinov2 embed photos --model dinov2_vits14_reg -o features.parquet" in dinov2("embed", "--help").out
    ended = dinov2("embed", "x", "-m", "m", "-o", "o.npz", "--pathces")
    assert ended.code == 2 and "--patches?" in ended.err


def test_a_package_that_the_format_needs_is_missed_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match="pyarrow"):
        target_format("out.parquet", None)


def test_features_that_are_not_finite_are_refused_by_every_command_in_one_sentence(dinov2, given):
    state = torch.load(given / "m.pth", weights_only=True)
    state["blocks.1.mlp.fc1.weight"] *= torch.nan
    torch.save(state, given / "nan.pth")
    torch.save({"weight": torch.zeros(2, 128), "bias": torch.zeros(2)}, given / "head.pth")
    sentence = "nan.pth gives NaN or infinite features for {} of {} images; try --precision fp32, or look whether its "
    sentence += "training diverged"
    ended = dinov2("embed", "my photos", "-m", "nan.pth", "-o", "out.npz")
    assert (ended.code, only_sentence(ended)) == (2, sentence.format(6, 6)) and not (given / "out.npz").exists()
    ended = dinov2("viz", "my photos/000.png", "--model", "nan.pth", "--size", "32", "-o", "v")
    assert (ended.code, only_sentence(ended)) == (2, f"my photos/000.png: {sentence.format(1, 1)}")
    ended = dinov2("eval", "knn", "--model", "nan.pth", "--train-dataset", "toy:n=20", "--val-dataset", "toy:n=20")
    assert (ended.code, only_sentence(ended)) == (2, sentence.format(2, 2))  # of its first look at the model
    ended = dinov2("classify", "my photos/000.png", "my photos/001.png", "--model", "nan.pth", "--head", "head.pth")
    assert ended.code == 1 and f"my photos/001.png: {sentence.format(1, 1)}" in ended.err
    assert dinov2("embed", "my photos", "-m", "m.pth", "-o", "out.npz").code == 0
    with np.load(given / "out.npz") as kept:
        np.savez(given / "nan.npz", **{**kept, "cls": kept["cls"] * np.inf})
    ended = dinov2("neighbours", "nan.npz")
    assert (ended.code, only_sentence(ended)) == (2, sentence.format(6, 6).replace("nan.pth", "the model"))


def test_its_features_can_be_evaluated(dinov2, given):
    pictures(given / "classes", n=20, classes=2)
    assert dinov2("embed", "classes", "-m", "m.pth", "-o", "out.npz").code == 0
    ended = dinov2("eval", "knn", "--features", "out.npz", "--nb-knn", "3", "--output-dir", "out")
    assert ended.code == 0, ended.err
    assert "top-1" in ended.out and (given / "out" / "results_eval_knn.json").exists()
