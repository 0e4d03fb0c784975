"""`dinov2 convert` as a person types it."""

import json

import pytest
import torch

from dinov2 import cli
from dinov2.cli import convert
from tests.models.tiny_backbones import tiny
from tests.runs import only_sentence


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    if convert not in cli._FAMILIES:
        monkeypatch.setattr(cli, "_FAMILIES", (*cli._FAMILIES, convert))


def test_a_conversion_says_what_it_compared_and_wrote(dinov2, here):
    torch.save(tiny().state_dict(), "w.pth")
    ended = dinov2("convert", "w.pth", "out/timm", "--to", "timm", "--json", "result.json")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0] == "note: mask_token: left out, timm has none"
    assert "largest difference, read back: 0" in lines
    assert lines[-1] == "written: out/timm (35 tensors, all accounted for; README.md, config.json, model.safetensors)"
    result = json.loads((here / "result.json").read_text())
    assert result["output"] == "out/timm" and result["to"] == "timm" and result["differences"]["read back"] == 0
    assert sorted(path.name for path in here.iterdir()) == ["out", "result.json", "w.pth"]


def test_json_can_be_the_output(dinov2, here):
    torch.save(tiny().state_dict(), "w.pth")
    ended = dinov2("convert", "w.pth", "x.safetensors", "--to", "original", "--img-size", 42, 70, "--json", "-")
    assert ended.code == 0
    assert json.loads(ended.out)["notes"] == ["position grid 7x7 -> 3x5 (resampled by the model's rule)"]


@pytest.mark.parametrize(
    "words, reason",
    [
        (["nowhere.pth", "m", "--to", "hf"], "there is no weight file nowhere.pth; check the path"),
        (["dinov2_vits41", "m", "--to", "hf"], "dinov2_vits14"),
        (["empty", "m", "--to", "hf"], "empty holds no"),
        (["page.pth", "m", "--to", "hf"], "page.pth is no weight file but a web page"),
        (["half.pth", "m", "--to", "hf"], "half.pth is no weight file (or only a part of one)"),
        (["w.pth", "half.pth", "--to", "original"], "half.pth exists and is another one"),
        (["w.pth", "m", "--to", "hf", "--head", "w.pth"], "it looks like a backbone"),
        (["w.pth", "m", "--to", "hf", "--img-size", "99"], "images of 99x99 pixels are no whole number of patches"),
        (["w.pth", "half.pth/m", "--to", "hf"], "half.pth is a file"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(dinov2, here, words, reason):
    torch.save(tiny().state_dict(), "w.pth")
    (here / "empty").mkdir()
    (here / "page.pth").write_text("<!DOCTYPE html><title>404</title>")
    (here / "half.pth").write_bytes((here / "w.pth").read_bytes()[:3000])
    before = sorted(path.name for path in here.iterdir())
    ended = dinov2("convert", *words)
    assert ended.code == 2 and reason in only_sentence(ended)
    assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.parametrize(
    "words, reason",
    [
        (["w.pth", "m"], "the following arguments are required: --to"),
        (["w.pth", "m", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["w.pth", "m", "--to", "hf", "--img-size", "1", "2", "3"], "--img-size takes one side, or height and width"),
        (["w.pth", "m", "--to", "hf", "--patch-size", "0"], "'0' is no whole number from 1"),
        (["w.pth", "m", "--to", "hf", "--forse"], "is it --force?"),
    ],
)
def test_words_that_mean_nothing_are_refused(dinov2, here, words, reason):
    ended = dinov2("convert", *words)
    assert ended.code == 2 and reason in ended.err
    assert list(here.iterdir()) == []


def test_the_help_has_an_example(dinov2):
    ended = dinov2("convert", "--help")
    assert ended.code == 0 and "dinov2 convert dinov2_vits14_reg exported/vits14-reg --to hf" in ended.out
