"""Models in the layouts of other libraries: they open there, compute the same, and nothing is written unchecked."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dinov2.apps import conversion
from dinov2.apps.convert import convert
from dinov2.checkpoints import files
from dinov2.checkpoints.files import read_file, write_tensors
from dinov2.checkpoints.heads import head_from_state
from dinov2.checkpoints.load import load_into
from dinov2.checkpoints.open import open_checkpoint
from dinov2.errors import ConfigError, DinoError, WeightsError
from dinov2.models.config import BackboneConfig
from dinov2.models.heads import linear_logits
from tests.golden.recipe import images, pictures
from tests.models.tiny_backbones import all_tokens, tiny
from tests.runs import contents

KINDS = {
    "plain": {},
    "registers": {"num_register_tokens": 4},
    "swiglu": {"ffn_layer": "swiglufused"},
    "bare": {"init_values": None, "qkv_bias": False, "proj_bias": False, "ffn_bias": False},
    "two heads": {"num_heads": 2, "num_register_tokens": 1, "interpolate_antialias": False},
}
OUTPUTS = {"original": "out/w.pth", "hf": "out/m", "timm": "out/t"}


def saved(path: str, **options) -> Path:
    """A tiny model in a file with its table."""
    model = tiny(**options)
    write_tensors(Path(path), model.state_dict(), BackboneConfig.from_model(model).table())
    return Path(path)


def head_of(layers: int = 1, classes: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (classes, (1 + layers) * 64)
    return {"weight": torch.randn(shape, generator=generator), "bias": torch.randn(classes, generator=generator)}


def loaded(path: str | Path):
    opened = open_checkpoint(path)
    model = opened.architecture().build().eval()
    load_into(model, opened.state)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", OUTPUTS)
def test_every_kind_of_model_goes_there_and_comes_back(kind, to):
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    model = tiny(**KINDS[kind])
    result = convert(saved("w.safetensors", **KINDS[kind]), OUTPUTS[to], to=to)
    assert max(result.differences.values()) < 1e-5 and result.n_tensors == len(model.state_dict())
    assert len(result.differences) == (1 if to == "original" else 2)  # the library itself was asked as well
    there = loaded(result.output)
    assert (there.interpolate_offset, there.num_heads) == (model.interpolate_offset, model.num_heads)
    for size in ((98, 98), (70, 126)):
        torch.testing.assert_close(all_tokens(there, images(1, *size)), all_tokens(model, images(1, *size)))
    convert(result.output, "back.safetensors", to="original")
    back, x = loaded("back.safetensors"), images(1, 98, 98)
    torch.testing.assert_close(all_tokens(back, x), all_tokens(model, x))


def test_the_original_layout_is_what_the_release_publishes():
    result = convert(saved("w.safetensors"), "w.pth", to="original")
    content = torch.load("w.pth", weights_only=True)
    assert list(content) == list(tiny().state_dict())
    assert all(torch.equal(content[key], value) for key, value in tiny().state_dict().items())
    assert result.files == ("w.md", "w.pth") and result.differences == {"read back": 0.0}


@pytest.mark.parametrize("layers", [1, 4])
def test_a_classifier_goes_beside_the_backbone_as_released(layers):
    torch.save(head_of(layers), "head.pth")
    convert(saved("w.safetensors", depth=4), "out/w.pth", to="original", head="head.pth")
    name = f"out/w_linear{'' if layers == 1 else '4'}_head.pth"
    assert {key: value.shape for key, value in torch.load(name).items()} == {
        key: value.shape for key, value in head_of(layers).items()
    }
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(["w.pth", "w.md", Path(name).name])


@pytest.mark.parametrize("registers", [0, 2])
def test_a_folder_for_hugging_face_opens_in_the_stock_classes(registers):
    transformers = pytest.importorskip("transformers")
    torch.save(head_of(classes=1000), "head.pth")
    result = convert(saved("w.safetensors", num_register_tokens=registers), "m", to="hf", head="head.pth")
    assert result.files == ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    with conversion._quiet_transformers():
        classifier = transformers.AutoModelForImageClassification.from_pretrained("m").eval()
        backbone = transformers.AutoModel.from_pretrained("m").eval()
        processor = transformers.AutoImageProcessor.from_pretrained("m")
    model, x = tiny(num_register_tokens=registers), images(1, 98, 98)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x).last_hidden_state, all_tokens(model, x), rtol=0, atol=1e-5)
        expected = linear_logits(model, head_from_state(head_of(classes=1000), embed_dim=64), x)
        torch.testing.assert_close(classifier(x).logits, expected, rtol=0, atol=1e-4)
    assert (classifier.config.id2label[0], classifier.config.label2id["tench"]) == ("tench", 0)
    assert len(classifier.config.label2id) == 1000
    assert processor(pictures(1, 120, 140)[0], return_tensors="pt").pixel_values.shape == (1, 3, 98, 98)
    with safe_open("m/model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.slow
def test_a_folder_for_hugging_face_works_in_its_pipelines():
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    torch.save(head_of(classes=5), "head.pth")
    Path("names.txt").write_text("eins\nzwei\ndrei\nvier\nfünf\n", encoding="utf-8")
    convert(saved("w.safetensors"), "m", to="hf", head="head.pth", labels="names.txt")
    with conversion._quiet_transformers():
        classify = transformers.pipeline("image-classification", model="m")
        guesses = classify(Image.fromarray(pictures(1, 120, 140)[0]))
    assert {guess["label"] for guess in guesses} == {"eins", "zwei", "drei", "vier", "fünf"}


def test_a_folder_for_timm_opens_there_by_name():
    timm = pytest.importorskip("timm")
    convert(saved("w.safetensors", num_register_tokens=4, num_heads=2), "t", to="timm")
    model = timm.create_model(f"local-dir:{Path('t').absolute()}", pretrained=True).eval()
    with torch.no_grad():
        tokens = model.forward_features(images(1, 98, 98))
    ours = all_tokens(tiny(num_register_tokens=4, num_heads=2), images(1, 98, 98))
    torch.testing.assert_close(tokens, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["t.pth", "t.safetensors"])
def test_a_single_file_for_timm_is_checked_as_well(name):
    pytest.importorskip("timm")
    result = convert(saved("w.safetensors", num_register_tokens=4, ffn_layer="swiglufused"), name, to="timm")
    assert len(result.differences) == 2 and result.files == ("t.md", name)
    assert open_checkpoint(name).config.num_register_tokens == 4


def test_a_run_keeps_its_normalisation(run):
    result = convert(run, "m", to="hf")
    table = open_checkpoint("m").config.table()
    preprocessor = json.loads(Path("m/preprocessor_config.json").read_text())
    assert table["mean"] == preprocessor["image_mean"] and table["img_size"][0] == preprocessor["crop_size"]["height"]
    assert any("of projection heads: left out" in note for note in result.notes)
    assert "eval" not in result.source or result.source == str(run)


def test_another_size_is_reported_and_written():
    result = convert(saved("w.safetensors"), "w.pth", to="original", img_size=(42, 70), patch_size=7, in_chans=1)
    assert [note.split(" ")[0] for note in result.notes] == ["channels", "patch", "position"]
    assert loaded("w.pth").patch_embed.patches_resolution == (6, 10)


def test_positions_that_are_no_square_are_written_with_the_size_that_is_given(here):
    wide = tiny(img_size=(56, 84))
    torch.save(wide.state_dict(), "w.pth")
    with pytest.raises(WeightsError, match="dinov2 convert FILE NEW.pth --to original --img-size HEIGHT WIDTH"):
        convert("w.pth", "new.pth", to="original")
    assert convert("w.pth", "new.pth", to="original", img_size=[56, 84]).notes == ()
    assert loaded("new.pth").patch_embed.patches_resolution == (4, 6)
    assert torch.equal(all_tokens(loaded("new.pth"), images(1, 56, 84)), all_tokens(wide, images(1, 56, 84)))
    with pytest.raises(WeightsError, match="a grid of 24 positions, which is not square"):
        convert("w.pth", "other.pth", to="original", img_size=[84, 98])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_as_the_cause(here, value):
    state = tiny().state_dict()
    state["blocks.1.norm2.bias"][3] = value
    torch.save(state, "w.pth")
    for to, out in OUTPUTS.items():
        with pytest.raises(WeightsError, match=r"1 of 35 tensors of w.pth hold values that are not finite \(first bl"):
            convert("w.pth", out, to=to)
    assert [path.name for path in here.iterdir() if path.is_file()] == ["w.pth"]


def test_half_precision_stays_half_precision():
    state = {key: value.bfloat16() for key, value in tiny().state_dict().items()}
    write_tensors(Path("w.safetensors"), state, BackboneConfig.from_model(tiny()).table())
    result = convert("w.safetensors", "m", to="hf")
    assert open_checkpoint("m").state["norm.weight"].dtype == torch.bfloat16
    assert json.loads(Path("m/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert max(result.differences.values()) < 1e-5


def test_the_page_beside_a_model_tells_where_it_comes_from():
    source = saved("w.safetensors", num_register_tokens=4)
    result = convert(source, "m", to="hf", img_size=70)
    page = Path("m/README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert result.sha256 == digest and f"SHA-256 of the source's files: `{digest}`" in page
    assert "command: `dinov2 convert w.safetensors m --to hf --img-size 70`" in page
    for part in ("library_name: transformers", "position grid 7x7 -> 5x5", "| num_register_tokens | 4 |", "back: 0"):
        assert part in page


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"to": "hf", "out": "m", "head": "four.pth"}, "this classifier reads 4 blocks, and Hugging Face's"),
        ({"to": "timm", "out": "t", "head": "one.pth"}, "timm's classifier reads the class token only"),
        ({"to": "hf", "out": "m", "head": "one.pth", "labels": "names"}, "has 2 class names and the head 5 classes"),
        ({"to": "hf", "out": "m", "head": "one.pth", "labels": "nowhere"}, "the class names in nowhere cannot be read"),
        ({"to": "hf", "out": "m.safetensors"}, "Hugging Face's layout is a folder and m.safetensors names a file"),
        ({"to": "original", "out": "m.xyz"}, "the release's layout is one file, and"),
        ({"to": "hf", "out": "m", "labels": "names"}, "names names classes, but w.safetensors has no classifier"),
        ({"to": "hf", "out": "m", "img_size": (42, 70)}, "square position grids only"),
        ({"to": "hf", "out": "m", "img_size": 100}, "no whole number of patches"),
        ({"to": "hf", "out": "m", "head": "w.safetensors"}, "it looks like a backbone"),
        ({"to": "hf", "out": "names"}, "names is a file, where a folder is to be written"),
        ({"to": "original", "out": "w.safetensors"}, "is the source itself"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(here, options, reason):
    saved("w.safetensors", depth=4)
    torch.save(head_of(1), "one.pth")
    torch.save(head_of(4), "four.pth")
    Path("names").write_text("a\nb\n")
    before = contents(here)
    with pytest.raises((WeightsError, ConfigError)) as refusal:
        convert("w.safetensors", **options)
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)
    assert contents(here) == before


def test_a_classifier_can_be_left_behind():
    torch.save(head_of(4), "four.pth")
    result = convert(saved("w.safetensors", depth=4), "m", to="hf", head="four.pth", without_head=True)
    assert "classifier: left out, as asked" in result.notes and open_checkpoint("m").head is None


def test_a_different_result_is_only_overwritten_when_told_to(here):
    first = convert(saved("w.safetensors"), "m", to="hf")
    before = contents(here)
    assert convert("w.safetensors", "m", to="hf") == first and contents(here) == before
    saved("other.safetensors", depth=3)
    with pytest.raises(ConfigError, match=r"m/config.json exists and is another one; choose another path, or give"):
        convert("other.safetensors", "m", to="hf")
    assert contents(here / "m") == {key[2:]: value for key, value in before.items() if key.startswith("m/")}
    convert("other.safetensors", "m", to="hf", force=True)
    assert loaded("m").n_blocks == 3


def test_a_folder_with_other_files_is_left_alone_even_when_forced(here):
    Path("m").mkdir()
    Path("m/pytorch_model.bin").write_text("mine")
    with pytest.raises(ConfigError, match=r"m holds other files \(pytorch_model.bin\); choose an empty or new folder"):
        convert(saved("w.safetensors"), "m", to="hf", force=True)
    assert [path.name for path in Path("m").iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize("to", OUTPUTS)
def test_a_tensor_that_gets_lost_on_the_way_is_noticed(here, monkeypatch, to):
    honest = conversion.from_original

    def lossy(state, layout):
        converted = honest(state, layout)
        key = next(key for key in converted.state if key.endswith("norm1.bias"))
        return converted._replace(state={**converted.state, key: converted.state[key] + 1e-6})

    monkeypatch.setattr(conversion, "from_original", lossy)
    saved("w.safetensors")
    with pytest.raises(WeightsError, match=r"could be carried over: blocks.0.norm1.bias would be lost or changed"):
        convert("w.safetensors", OUTPUTS[to], to=to)
    assert [path for path in here.rglob("*") if path.is_file()] == [here / "w.safetensors"]


def test_a_library_that_disagrees_is_believed(here, monkeypatch):
    def wrong(path, x, table, has_head):
        return "peer 1.0", [all_tokens(tiny(), x) + 0.01]

    monkeypatch.setitem(conversion._STOCK, "hf", wrong)
    with pytest.raises(DinoError, match=r"peer 1.0 differs from the source by 0.01; nothing was written"):
        convert(saved("w.safetensors"), "m", to="hf")
    assert sorted(contents(here)) == ["w.safetensors"]
    assert list(convert("w.safetensors", "m", to="hf", ask_library=False).differences) == ["read back"]


@pytest.mark.parametrize(
    "failure, reason", [(ValueError("no such\nthing"), "ValueError: no such"), (KeyError("x"), "KeyError")]
)
def test_a_library_that_cannot_open_the_result_is_quoted(monkeypatch, failure, reason):
    def broken(*arguments):
        raise failure

    monkeypatch.setitem(conversion._STOCK, "timm", broken)
    with pytest.raises(DinoError, match=rf"the library cannot open the result \({reason}.*--skip-library"):
        convert(saved("w.safetensors"), "t", to="timm")


def test_without_the_library_the_result_is_still_read_back(monkeypatch):
    def absent(*arguments):
        raise ImportError("no module named transformers")

    monkeypatch.setitem(conversion._STOCK, "hf", absent)
    result = convert(saved("w.safetensors"), "m", to="hf")
    assert result.differences == {"read back": 0.0}
    assert "not compared with transformers itself, which is not installed" in result.notes


@pytest.mark.parametrize("name", ["w.pth", "model.safetensors", "config.json", "README.md"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(here, monkeypatch, name):
    replace = files.os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    saved("w.safetensors")
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(DinoError, match=rf"{name} could not be written \(No space left on device\); free some space"):
        convert("w.safetensors", "w.pth" if name == "w.pth" else "m", to="original" if name == "w.pth" else "hf")
    assert sorted(contents(here)) == ["w.safetensors"]


def test_a_result_can_go_to_the_current_folder(here, monkeypatch):
    source = saved("w.safetensors").absolute()
    Path("sub").mkdir()
    monkeypatch.chdir("sub")
    convert(source, ".", to="hf")
    assert sorted(path.name for path in Path().iterdir())[1] == "config.json"
    assert read_file("model.safetensors")
    shutil.rmtree(here / "sub")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="of POSIX systems")
def test_names_of_classes_from_a_pipe_are_refused_without_waiting():
    torch.save(head_of(), "head.pth")
    os.mkfifo("names")
    with pytest.raises(ConfigError, match="names cannot be read .it is no regular file.; give a text file"):
        convert(saved("w.safetensors"), "m", to="hf", head="head.pth", labels="names")
