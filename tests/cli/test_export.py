"""`dinov2 export`."""

import json
import sys

import pytest
import torch

from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.golden.recipe import fill
from tests.runs import contents, only_sentence


@pytest.fixture
def weights(here):
    """A small weight file in the current folder."""
    options = {"img_size": 56, "patch_size": 14, "embed_dim": 64, "depth": 1, "num_heads": 1, "block_chunks": 0}
    torch.save(fill(DinoVisionTransformer(**options)).state_dict(), here / "klein ü.pth")
    return "klein ü.pth"


@pytest.mark.slow
def test_an_onnx_file_with_int8_beside_it_and_the_errors_of_both(dinov2, here, weights):
    ended = dinov2(
        "export", weights, "-o", "out/m.onnx", "--int8", "--check-sizes", "28x42", "2x56x28", "--json", "s.json"
    )
    assert (ended.code, ended.err) == (0, "")
    assert sorted(path.name for path in (here / "out").iterdir()) == ["m.int8.onnx", "m.onnx"]
    for part in (
        "1 x 28 x 42 ",
        "2 x 56 x 28 ",
        "cls ",
        "tokens ",
        "int8: patches cosine >=",
        "sides are multiples of 14",
    ):
        assert part in ended.out
    summary = json.loads((here / "s.json").read_text(encoding="utf-8"))
    assert [found["size"] for found in summary["comparisons"]] == [[1, 28, 42], [2, 56, 28]]
    assert summary["int8"]["milliseconds"]["float32"] > 0 and summary["metadata"]["patch_size"] == 14


@pytest.mark.slow
def test_a_program_of_the_class_token(dinov2, here, weights):
    ended = dinov2("export", weights, "-o", here, "--format", "torch", "--outputs", "cls")
    assert ended.code == 0 and "written: " in ended.out and "tokens" not in ended.out
    assert (here / "klein ü.pt2").is_file()


def test_the_help_shows_an_example(dinov2):
    ended = dinov2("export", "--help")
    assert ended.code == 0 and "example:\n  dinov2 export dinov2_vits14_reg -o " in ended.out


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("nowhere.pth", "-o", "m.onnx"), "nowhere.pth"),
        (("WEIGHTS", "-o", "m.pth"), "m.pth does not say what to write; end it in .onnx or .pt2 (torch.export)"),
        (("WEIGHTS", "-o", "m.onnx", "--format", "torch"), "wrong ending for the format torch; end it in .pt2"),
        (("WEIGHTS", "-o", "file/m.onnx"), "file is a file; choose another"),
        (
            ("WEIGHTS", "-o", "m.onnx", "--outputs", "logits"),
            "no classifier and so no logits; choose cls, tokens or both",
        ),
        (("WEIGHTS", "-o", "m.onnx", "--check-sizes", "30x28"), "multiples of the patch size 14"),
        (("WEIGHTS", "-o", "m.pt2", "--int8"), "int8 is made by onnxruntime; export to a file that ends in .onnx"),
        (("WEIGHTS", "-o", "m.onnx", "--head", "nowhere.pth"), "there is no weight file nowhere.pth"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_everything_as_it_was(dinov2, here, weights, words, sentence):
    if any(word.endswith(".onnx") for word in words):
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    (here / "file").write_text("mine")
    before = contents(here)
    ended = dinov2("export", *(weights if word == "WEIGHTS" else word for word in words))
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert contents(here) == before


@pytest.mark.parametrize("size", ["224", "axb", "1x2x3x4", "-28x28"])
def test_a_size_that_is_none_is_refused(dinov2, weights, size):
    ended = dinov2("export", weights, "-o", "m.onnx", f"--check-sizes={size}")
    assert ended.code == 2 and f"{size!r} is no size; write HEIGHTxWIDTH" in ended.err


def test_without_the_packages_it_says_what_to_install(dinov2, here, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    ended = dinov2("export", weights, "-o", "m.onnx")
    assert ended.code == 2 and "run: pip install 'onnx>=1.18'" in only_sentence(ended)
