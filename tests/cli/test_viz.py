"""`dinov2 viz`."""

import json

import pytest
import torch

from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.golden.recipe import fill
from tests.runs import contents, only_sentence, pictures


@pytest.fixture
def model(here):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "block_chunks": 0}
    torch.save(fill(DinoVisionTransformer(**options)).state_dict(), here / "tiny.pth")
    return "tiny.pth"


def test_pictures_and_a_page_are_written_and_the_user_is_told_where(dinov2, here, model):
    pictures(here / "photos", n=2)
    ended = dinov2("viz", "photos", "--model", model, "-o", "maps", "--size", 24)
    assert ended.code == 0 and ended.err == ""
    assert "tiny.pth: " in ended.out and "have a norm above" in ended.out
    assert "PCA basis written to maps" in ended.out and "(0." in ended.out and "opens offline" in ended.out
    assert (here / "maps" / "index.html").is_file() and (here / "maps" / "000_pca.png").is_file()
    assert json.loads((here / "maps" / "viz.json").read_text())["page"]["file"] == "index.html"


def test_every_option_reaches_its_place(dinov2, here, model):
    pictures(here / "photos", n=3)
    words = "--size 24 --what pca norm --block 0 --point 3 4 --foreground --gif --no-page --norm-threshold 1e9".split()
    ended = dinov2("viz", "photos", "-m", model, "-o", "maps", *words, "--compare", model, "--basis", "b.safetensors")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in (here / "maps").iterdir()) == ["norm.gif", "pca.gif", "viz.json"]
    assert ended.out.count("0.00 % of the patches have a norm above 1e+09") == 2
    assert (here / "b.safetensors").is_file()
    again = dinov2("viz", "photos", "-m", model, "-o", "maps", *words, "--basis", "b.safetensors")
    assert "PCA basis reused from b.safetensors" in again.out


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("nowhere.jpg", "--model", "tiny.pth"), "there is no image or folder nowhere.jpg; check the path"),
        (("empty", "--model", "tiny.pth"), "no image was found in"),
        (("text.png", "--model", "tiny.pth"), "text.png cannot be read as an image"),
        (("photos", "--model", "nowhere.pth"), "there is no weight file nowhere.pth; check the path"),
        (("photos", "--model", "tiny.pth", "--block", "7"), "there is no block 7 in a model of 2 blocks"),
        (("photos", "--model", "tiny.pth", "--point", "99", "0"), "the point (99, 0) lies outside of the image"),
        (("photos", "--model", "tiny.pth", "-o", "text.png"), "text.png is a file; choose another path"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_everything_as_it_was(dinov2, here, model, words, sentence):
    pictures(here / "photos", n=1)
    (here / "empty").mkdir()
    (here / "text.png").write_text("mine")
    before = contents(here)
    out = () if "-o" in words else ("-o", "maps")
    ended = dinov2("viz", *words, *out, "--size", 24)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert contents(here) == before


@pytest.mark.parametrize("words", [("--what", "pcs"), ("--size", "0"), ("--sise", "24")])
def test_misspelt_options_are_usage_errors(dinov2, here, model, words):
    pictures(here / "photos", n=1)
    assert dinov2("viz", "photos", "--model", model, *words).code == 2
