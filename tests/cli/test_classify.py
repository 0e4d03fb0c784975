"""`dinov2 classify`."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from dinov2.models.heads import LinearHead
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.golden.recipe import fill
from tests.runs import contents, only_sentence, pictures


@pytest.fixture
def words(here):
    """A tiny model with its head, and three photographs of which one is broken."""
    model = DinoVisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, block_chunks=0)
    torch.save(fill(model).state_dict(), here / "b.pth")
    torch.save(fill(LinearHead(64, num_classes=3)).state_dict(), here / "h.pth")
    (here / "names.txt").write_text("Hund\nKatze\nKäfer\n", encoding="utf-8")
    pictures(here / "fotos ü", n=3, size=32)
    (here / "fotos ü" / "001.png").write_bytes(b"broken")
    return ("classify", "fotos ü", "--model", "b.pth", "--head", "h.pth", "--classes", "names.txt")


def test_names_and_probabilities_are_printed_and_broken_images_are_said_apart(dinov2, words):
    ended = dinov2(*words, "--top", 2)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["fotos ü/000.png", "fotos ü/002.png"]
    assert len(lines) == 6
    assert all(line.split(" %  ")[1] in {"Hund", "Katze", "Käfer"} for line in lines if line.startswith(" "))
    broken, summary = ended.err.splitlines()
    assert "001.png cannot be read as an image" in broken
    assert summary == "dinov2: 1 of 3 images could not be classified"


def test_json_on_standard_output_is_nothing_but_json(dinov2, words):
    content = json.loads(dinov2(*words, "--json", "-").out)
    assert [bool(image.get("top")) for image in content["images"]] == [True, False, True]
    assert content["head"]["classes"] == 3


def test_csv_on_standard_output_is_nothing_but_csv(dinov2, words):
    rows = list(csv.DictReader(io.StringIO(dinov2(*words, "--csv", "-", "--top", "1").out)))
    assert [row["rank"] for row in rows] == ["1", "", "1"]
    assert "cannot be read" in rows[1]["error"]
    assert float(rows[0]["probability"]) > 1 / 3


def test_both_files_are_written_beside_the_text_into_folders_that_are_made(dinov2, here, words):
    ended = dinov2(*words, "--json", "out/a.json", "--csv", "out/a.csv")
    assert ended.code == 0 and "Katze" in ended.out
    assert sorted(path.name for path in (here / "out").iterdir()) == ["a.csv", "a.json"]
    assert len(json.loads((here / "out" / "a.json").read_text())["images"]) == 3
    assert len((here / "out" / "a.csv").read_text(encoding="utf-8").splitlines()) == 1 + 3 + 1 + 3


def test_it_fails_only_when_all_images_do(dinov2, here, words):
    for name in ("000.png", "002.png"):
        (here / "fotos ü" / name).write_bytes(b"")
    ended = dinov2(*words, "--json", "out.json")
    assert ended.code == 1
    assert ended.err.splitlines()[-1] == "dinov2: 3 of 3 images could not be classified"
    assert [set(image) for image in json.loads((here / "out.json").read_text())["images"]] == [{"path", "error"}] * 3


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({1: "nowhere.jpg"}, "there is no image or folder nowhere.jpg"),
        ({1: "*.webp"}, "no image matches *.webp"),
        ({5: "b.pth"}, "b.pth has no weight and bias of a linear classifier: it looks like a backbone"),
        ({7: "h.pth"}, "the class names h.pth cannot be read (it is no text in UTF-8)"),
        ({8: "--json", 9: "fotos ü"}, "fotos ü is a folder; give the name of a file in it"),
        ({8: "--csv", 9: "b.pth/x.csv"}, "b.pth is a file"),
        ({8: "--layers", 9: "4"}, "gives 320 for a 4-layer head; it is a 1-layer head"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_everything_as_it_was(dinov2, here, words, changed, sentence):
    (here / "out.csv").write_text("older")
    before = contents(here)
    line = [*words, "--csv", "out.csv"]
    for position, word in changed.items():
        line[position] = word
    ended = dinov2(*line)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert contents(here) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_sentence_with_the_name_of_the_file(dinov2, words):
    ended = dinov2(*words, "--csv", "/dev/full")
    assert ended.code == 1
    assert ended.err.splitlines()[-1].startswith("dinov2: /dev/full could not be written (No space left on device)")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("options", [(), ("--csv", "-"), ("--json", "-"), ("--csv", "o.csv", "--json", "o.json")])
def test_file_names_that_are_no_unicode_are_taken(dinov2, here, words, options):
    (here / "fotos ü" / "000.png").rename(here / "fotos ü" / os.fsdecode(b"\xff.png"))
    ended = dinov2(*words, *options)
    assert ended.code == 0 and ("png" in ended.out)
    if "o.csv" in options:
        assert b"\xff.png" in (here / "o.csv").read_bytes()


def test_both_outputs_cannot_share_standard_output(dinov2, words):
    ended = dinov2(*words, "--csv", "-", "--json", "-")
    assert ended.code == 2 and "only one of --json and --csv" in ended.err
