"""Folders of Hugging Face and timm: what belongs to a model is read, what disagrees or is missing is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov2.checkpoints.adapters import from_original
from dinov2.checkpoints.adapters.timm import timm_config
from dinov2.checkpoints.load import load_into
from dinov2.checkpoints.open import open_checkpoint
from dinov2.errors import WeightsError
from dinov2.models.config import BackboneConfig
from tests.golden.recipe import images
from tests.models.tiny_backbones import all_tokens, huggingface_folder, tiny


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as refusal:
        open_checkpoint(path)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def into_shards(folder: Path) -> list[Path]:
    """Splits the weights in two files with an index, as large models are published."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    keys = sorted(state)
    places = {key: names[index > len(keys) // 2] for index, key in enumerate(keys)}
    for name in names:
        save_file({key: state[key] for key in keys if places[key] == name}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / name for name in names]


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "shards of bin"])
@pytest.mark.parametrize("registers", [0, 2])
def test_a_hugging_face_folder_is_read_in_every_form(tmp_path, form, registers):
    model = tiny(num_register_tokens=registers, num_heads=2)
    head = {"weight": torch.randn(3, 128), "bias": torch.zeros(3)}
    folder = huggingface_folder(tmp_path / "m", model, head=head)
    if "bin" in form:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    if "shards" in form:
        shards = into_shards(folder)
    if "bin" in form:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
    if form == "shards of bin":
        content = torch.load(folder / "pytorch_model.bin")
        (folder / "pytorch_model.bin").unlink()
        torch.save(content, folder / "pytorch_model-00001-of-00001.bin")
        places = dict.fromkeys(content, "pytorch_model-00001-of-00001.bin")
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    opened = open_checkpoint(folder)
    assert opened.layout == "hf" and opened.notes == () and opened.dropped == ()
    expected = BackboneConfig.from_model(model, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert opened.config == expected
    assert opened.head is not None and torch.equal(opened.head["weight"], head["weight"])
    assert list(opened.state) == list(model.state_dict())
    assert all(torch.equal(opened.state[key], value) for key, value in model.state_dict().items())
    assert folder / "config.json" in opened.files
    if form == "shards":
        assert set(shards) <= set(opened.files)


def test_a_timm_folder_is_read_with_its_statistics_and_heads(tmp_path):
    model = tiny(num_register_tokens=2, num_heads=4)
    config = timm_config(BackboneConfig.from_model(model), mean=[0.5, 0.5, 0.5], std=[0.1, 0.2, 0.3])
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(from_original(model.state_dict(), "timm").state, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert opened.layout == "timm" and len(opened.notes) == 2
    assert opened.config == BackboneConfig.from_model(model, mean=[0.5] * 3, std=[0.1, 0.2, 0.3])
    again = opened.config.build().eval()
    load_into(again, opened.state)
    torch.testing.assert_close(all_tokens(again, images(1, 98, 98)), all_tokens(model, images(1, 98, 98)))


def test_the_file_in_a_folder_means_the_folder(tmp_path):
    """Else the number of heads, which no tensor tells, would be a guess although it is written beside the file."""
    folder = huggingface_folder(tmp_path / "m", tiny(num_heads=2))
    assert open_checkpoint(folder / "model.safetensors").config == open_checkpoint(folder).config
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    assert open_checkpoint(folder / "mine.safetensors").config is None


def test_the_stock_folder_without_a_position_rule_gets_that_of_the_release(tmp_path):
    folder = huggingface_folder(tmp_path / "m", tiny())
    config = json.loads((folder / "config.json").read_text())
    del config["interpolate_offset"], config["interpolate_antialias"]
    (folder / "config.json").write_text(json.dumps(config))
    config = open_checkpoint(folder).config
    assert config is not None and (config.interpolate_offset, config.interpolate_antialias) == (0.1, False)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"num_hidden_layers": 3}, "depth is 3 in the one and 2 in the other; take both from the same model"),
        ({"hidden_size": 128}, "embed_dim is 128 in the one and 64 in the other"),
        ({"patch_size": 16, "image_size": 112}, "patch_size is 16 in the one and 14 in the other"),
        ({"num_channels": 1}, "in_chans is 1 in the one and 3 in the other"),
        ({"use_swiglu_ffn": True}, "ffn_layer is swiglufused in the one and mlp in the other"),
        ({"qkv_bias": False}, "qkv_bias is False in the one and True in the other"),
        ({"model_type": "dinov2_with_registers"}, "num_register_tokens is 4 in the one and 0 in the other"),
        ({"image_size": 224}, "image_size makes a grid of 16x16 patches and the positions are 49"),
        ({"model_type": "vit"}, "describes a model of the family 'vit'"),
    ],
)
def test_a_configuration_that_disagrees_with_the_tensors_is_refused(tmp_path, change, reason):
    folder = huggingface_folder(tmp_path / "m", tiny(), **change)
    sentence = refused(folder)
    assert str(folder / "config.json") in sentence and reason in sentence


@pytest.mark.parametrize("value", [None, "x", -1, 0, 1e400, [], {}, [[1]], True, 10**30, 0.5])
def test_absurd_values_are_refused_or_do_not_matter(tmp_path, value):
    """Whatever stands in the files, a caller sees one kind of error."""
    folder = huggingface_folder(tmp_path / "m", tiny())
    refusals: list[WeightsError] = []
    for file in ("config.json", "preprocessor_config.json"):
        original = (folder / file).read_text()
        for key in json.loads(original):
            (folder / file).write_text(json.dumps({**json.loads(original), key: value}))
            try:
                table = open_checkpoint(folder).config
                with torch.device("meta"):
                    assert table is not None and table.build().n_blocks == 2
            except WeightsError as error:
                refusals.append(error)
        (folder / file).write_text(original)
    assert refusals and not any("\n" in str(error) for error in refusals)


def test_a_missing_shard_is_named(tmp_path):
    folder = huggingface_folder(tmp_path / "m", tiny())
    _, second = into_shards(folder)
    second.unlink()
    assert refused(folder) == f"{second} is missing, one of the 2 files of this model; copy it as well"


def test_a_tensor_that_is_in_no_shard_is_named(tmp_path):
    folder = huggingface_folder(tmp_path / "m", tiny())
    _, second = into_shards(folder)
    state = load_file(second)
    del state["layernorm.weight"]
    save_file(state, second)
    assert "layernorm.weight is in none of the files that model.safetensors.index.json names" in refused(folder)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "..", ""])
def test_an_index_cannot_reach_out_of_its_folder(tmp_path, name):
    folder = huggingface_folder(tmp_path / "m", tiny())
    into_shards(folder)
    (tmp_path / "elsewhere.safetensors").write_bytes(b"x")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "outside of its folder, which is refused" in refused(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": []}'])
def test_an_index_that_names_nothing_is_refused(tmp_path, index):
    folder = huggingface_folder(tmp_path / "m", tiny())
    (folder / "model.safetensors.index.json").write_text(index)
    assert "names no files; download or copy it again" in refused(folder)


@pytest.mark.parametrize(
    "config, reason",
    [
        ("{", "cannot be read (it is no JSON)"),
        ("[]", "holds no JSON object"),
        ("\udcff", "cannot be read (it is no JSON)"),
        ("{}", "describes a model of the family None"),
    ],
)
def test_a_damaged_configuration_is_refused(tmp_path, config, reason):
    folder = huggingface_folder(tmp_path / "m", tiny())
    (folder / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    assert reason in refused(folder)


def test_a_folder_without_weights_says_what_it_lacks(tmp_path):
    assert "holds no weights; a model folder has a model.safetensors in it" in refused(tmp_path)
    folder = huggingface_folder(tmp_path / "m", tiny())
    os.remove(folder / "model.safetensors")
    assert "holds no weights beside its config.json" in refused(folder)
    for name in ("a.pth", "b.pth"):
        torch.save(tiny().state_dict(), tmp_path / name)
    assert "holds several weight files (a.pth, b.pth); give one of them" in refused(tmp_path)


def test_the_only_weight_file_of_a_folder_is_its_model(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    assert open_checkpoint(tmp_path).files == (tmp_path / "w.pth",)
