"""One door for every weight file: what it finds, and what it refuses in one sentence."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dinov2.checkpoints.adapters import flat_key, from_original
from dinov2.checkpoints.files import read_file, save_teacher, write_state_dict, write_tensors
from dinov2.checkpoints.load import load_into
from dinov2.checkpoints.open import open_checkpoint
from dinov2.errors import WeightsError
from dinov2.models.config import BackboneConfig
from tests.models.tiny_backbones import tiny


def refused(path: Path | str) -> str:
    with pytest.raises(WeightsError) as refusal:
        open_checkpoint(path)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def training_state(model: nn.Module, *, infix: str = "") -> dict[str, Any]:
    """What a process of the release writes when nothing is sharded: student, teacher, centres, optimiser."""
    state: dict[str, Tensor] = {}
    for who, change in (("student", 1.0), ("teacher", 0.0)):
        state |= {f"{who}.backbone.{infix}{key}": value + change for key, value in model.state_dict().items()}
        state[f"{who}.dino_head.last_layer.weight_v"] = torch.ones(4, 2)
    state |= {"dino_loss.center": torch.zeros(1, 4), "ibot_patch_loss.center": torch.zeros(1, 1, 4)}
    return {"model": state, "optimizer": {"state": {}, "param_groups": []}, "iteration": 12}


@pytest.mark.parametrize("chunks", [0, 2])
def test_a_released_file_is_found_under_flat_keys_without_a_table(tmp_path, chunks):
    model = tiny(block_chunks=chunks)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    opened = open_checkpoint(str(tmp_path / "w.pth"))
    assert opened.layout == "original" and opened.config is None and opened.head is None
    assert list(opened.state) == list(tiny().state_dict())
    assert opened.files == (tmp_path / "w.pth",)


def test_our_own_files_bring_their_table(tmp_path):
    model = tiny(num_heads=2)
    table = BackboneConfig.from_model(model, mean=[0.1] * 3, std=[0.2] * 3)
    save_teacher(tmp_path / "t.pth", {f"backbone.{key}": value for key, value in model.state_dict().items()}, table)
    write_state_dict(tmp_path / "bare.pth", model.state_dict(), table.table())
    write_tensors(tmp_path / "timm.safetensors", from_original(model.state_dict(), "timm").state, table.table())
    for name in ("t.pth", "backbone.safetensors", "bare.pth", "timm.safetensors"):
        opened = open_checkpoint(tmp_path / name)
        assert opened.layout == "own" and opened.config == table
        assert all(torch.equal(opened.state[k], v) for k, v in model.state_dict().items() if k != "mask_token")


def test_a_bare_state_dict_with_a_table_is_nothing_but_tensors_to_others(tmp_path):
    """The release's code loads it strictly, and so does any module of torch."""
    model = tiny()
    write_state_dict(tmp_path / "w.pth", model.state_dict(), BackboneConfig.from_model(model).table())
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert isinstance(content, OrderedDict) and list(content) == list(model.state_dict())
    tiny().load_state_dict(content, strict=True)
    assert read_file(tmp_path / "w.pth")["model"] == BackboneConfig.from_model(model).table()


def test_a_timm_file_of_ours_without_layer_scale_knows_what_it_is(tmp_path):
    model = tiny(init_values=None)
    state = from_original(model.state_dict(), "timm").state
    write_tensors(tmp_path / "w.safetensors", state, BackboneConfig.from_model(model).table())
    assert "mask_token" in open_checkpoint(tmp_path / "w.safetensors").state
    write_tensors(tmp_path / "w.safetensors", state)
    assert open_checkpoint(tmp_path / "w.safetensors").notes == ("mask_token: zeros, the source has none",)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_classifier_of_torch_hub_gives_backbone_and_head(tmp_path, prefix):
    model = tiny()
    head = {"linear_head.weight": torch.ones(3, 128), "linear_head.bias": torch.zeros(3)}
    torch.save({**{f"{prefix}{key}": value for key, value in model.state_dict().items()}, **head}, tmp_path / "w.pth")
    opened = open_checkpoint(tmp_path / "w.pth")
    assert list(opened.state) == list(model.state_dict())
    assert opened.head is not None and set(opened.head) == {"weight", "bias"}
    report = load_into(tiny(), read_file(tmp_path / "w.pth"))
    assert report.dropped == ("classifier.weight", "classifier.bias")
    assert str(report).endswith("; 2 of a classifier left out")


@pytest.mark.parametrize("infix", ["", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("chunks", [0, 2])
def test_a_whole_file_of_a_training_process_gives_the_teacher(tmp_path, infix, chunks):
    model = tiny(block_chunks=chunks)
    torch.save(training_state(model, infix=infix), tmp_path / "model_0000012.rank_0.pth")
    opened = open_checkpoint(tmp_path / "model_0000012.rank_0.pth")
    assert opened.layout == "training"
    assert all(torch.equal(opened.state[flat_key(key)], value) for key, value in model.state_dict().items())
    assert opened.dropped == ("dino_head.last_layer.weight_v",)


def test_a_shard_of_a_training_is_refused_with_the_way_out(tmp_path):
    way_out = "all processes' files are needed to put it together, so give the run's exported teacher"
    flat = training_state(tiny())
    flat["model"] = {key: value.flatten() for key, value in flat["model"].items()}
    torch.save(flat, tmp_path / "model_0000012.rank_1.pth")
    assert way_out in refused(tmp_path / "model_0000012.rank_1.pth")
    torch.save({"model": {"teacher.backbone._flat_param": torch.zeros(9)}}, tmp_path / "model_0000013.rank_0.pth")
    assert way_out in refused(tmp_path / "model_0000013.rank_0.pth")


def test_a_pickled_sharded_tensor_is_refused_with_the_way_out(tmp_path):
    """What the release's training really writes on several processes: one class that no safe reader knows."""
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    class Shard:
        def __reduce__(self) -> Any:
            return ShardedTensor, ()

    torch.save({"model": {"teacher.backbone._flat_param": Shard()}}, tmp_path / "model_0000012.rank_0.pth")
    assert "holds one process's shard of a training state" in refused(tmp_path / "model_0000012.rank_0.pth")


@pytest.mark.parametrize(
    "keys, reason",
    [
        (["visual.conv1.weight", "visual.class_embedding"], "it looks like CLIP"),
        (["vision_model.embeddings.class_embedding"], "it looks like CLIP or SigLIP"),
        (["embeddings.cls_token", "encoder.layer.0.layernorm_before.weight"], "a ViT, DeiT or DINO in Hugging Face's"),
        (["cls_token", "dist_token", "pos_embed", "blocks.0.norm1.weight"], "it looks like DeiT"),
        (["cls_token", "storage_tokens", "rope_embed.periods"], "it looks like DINOv3"),
        (
            ["encoder.cls_token", "encoder.patch_embed.proj.weight", "encoder.blocks.0.norm1.weight"],
            "(below 'encoder.')",
        ),
        (["conv1.weight", "layer1.0.conv1.weight"], "it looks like ResNet"),
        (["decode_head.conv_seg.weight"], "it looks like a depth or segmentation head"),
        (["weight", "bias"], "holds a linear head and no backbone; give the backbone, and this file as --head"),
        (["linear_head.weight", "linear_head.bias"], "holds a linear head and no backbone"),
        (["a", "b", "c", "d"], "holds no DINOv2 backbone but a, b, c; give a file with backbone weights"),
        ([], "holds no DINOv2 backbone; give a file with backbone weights"),
    ],
)
def test_models_of_other_kinds_are_refused_by_name(tmp_path, keys, reason):
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "w.pth")
    assert reason in refused(tmp_path / "w.pth")


@pytest.mark.parametrize("change", [{"depth": 10**9}, {"embed_dim": 10**9}, {"depth": "two"}])
def test_a_table_of_another_model_is_refused_before_anything_is_built(tmp_path, change):
    write_tensors(
        tmp_path / "w.safetensors", tiny().state_dict(), {**BackboneConfig.from_model(tiny()).table(), **change}
    )
    assert "the model table and the tensors of" in refused(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"<!DOCTYPE html><title>Not found</title>", "is no weight file but a web page"),
        (b"\n  <html><body>Sign in</body></html>", "is no weight file but a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer to one; fetch it with: git lfs pull"),
        ((9).to_bytes(8, "little") + b'{"a": not', "is no weight file (or only a part of one)"),
        ((1 << 29).to_bytes(8, "little") + b"{}", "is no weight file (or only a part of one)"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_what_a_server_sends_instead_is_said(tmp_path, content, reason, name):
    (tmp_path / name).write_bytes(content)
    assert reason in refused(tmp_path / name)


def test_the_format_is_told_by_the_content_and_not_by_the_name(tmp_path):
    state = {key: value.clone() for key, value in tiny().state_dict().items()}
    save_file(state, tmp_path / "really.pth")
    torch.save(state, tmp_path / "really.safetensors")
    for name in ("really.pth", "really.safetensors"):
        assert list(open_checkpoint(tmp_path / name).state) == list(state)


def test_a_truncated_file_and_a_missing_one_are_refused(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(data[: len(data) // 2])
    assert "is no weight file (or only a part of one); download or copy it again" in refused(tmp_path / "w.pth")
    assert "there is no weight file" in refused(tmp_path / "nowhere.pth")
    assert "there is no weight file" in refused("no\0file")


def test_positions_of_a_file_that_says_its_grid_need_not_be_square(tmp_path):
    wide = tiny(img_size=(42, 126))
    write_tensors(tmp_path / "w.safetensors", wide.state_dict(), BackboneConfig.from_model(wide).table())
    report = load_into(tiny(img_size=(126, 42)), read_file(tmp_path / "w.safetensors"))
    assert report.resized == ("pos_embed 27 -> 27 patches",)
    assert load_into(tiny(img_size=(42, 126)), read_file(tmp_path / "w.safetensors")).resized == ()


def test_a_model_without_memory_takes_the_tensors_over():
    model = tiny()
    with torch.device("meta"):
        empty = BackboneConfig.from_model(model).build()
    load_into(empty, {key: value.half() for key, value in model.state_dict().items()})
    assert empty.cls_token.dtype == torch.float32 and not any(p.is_meta for p in empty.parameters())
    assert torch.equal(empty.norm.weight, model.norm.weight.half().float())
    assert empty.norm.weight.requires_grad


@pytest.mark.parametrize("layout", ["hf", "timm"])
def test_state_dicts_of_other_libraries_load_as_they_are(layout):
    model, target = tiny(), tiny()
    with torch.no_grad():
        target.norm.weight.zero_()
    load_into(target, from_original(model.state_dict(), layout).state)
    assert torch.equal(target.norm.weight, model.norm.weight)
    with pytest.raises(WeightsError, match=r"unexpected head.weight. The file has a classifier of another kind"):
        load_into(target, {**from_original(model.state_dict(), layout).state, "head.weight": torch.zeros(3, 64)})
    with pytest.raises(WeightsError, match=r"unexpected register_tokens. The file is of a model with registers"):
        load_into(target, from_original(tiny(num_register_tokens=1).state_dict(), layout).state)


# Backbones inside other checkpoints.


def below(prefix: str, **more: Any) -> dict[str, Any]:
    return {**{f"{prefix}{key}": value for key, value in tiny().state_dict().items()}, **more}


def compiled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that blocks have which are compiled one by one, and ones wrapped for sharding."""
    return {key.replace("blocks.0.", "blocks.0._orig_mod._fsdp_wrapped_module."): value for key, value in state.items()}


NESTED: dict[str, dict[Any, Any]] = {
    "Lightning": {"state_dict": below("model.backbone.", **{"model.loss.center": torch.zeros(2)}), "epoch": 1},
    "a depth model": below("pretrained.", **{"depth_head.scratch.weight": torch.zeros(1)}),
    "a long prefix": {"net": below("_orig_mod.module.encoder.image.trunk.")},
    "another name": {"model_state_dict": below(""), "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "a moving average": {"model_ema": below("module."), "args": {"lr": 1e-3}},
    "three levels": {"checkpoint": {"models": {"backbone": below("")}}},
    "a list": {"models": [{"weight": torch.ones(1)}, below("backbone.")]},
    "a numbered one": {0: below("")},
    "compiled blocks": compiled(below("")),
    "a wrapped Hugging Face model": {
        f"model.dinov2.{key}": value for key, value in from_original(tiny().state_dict(), "hf").state.items()
    },
    "a timm model": {
        "state_dict": {f"visual.trunk.{key}": v for key, v in from_original(tiny().state_dict(), "timm").state.items()}
    },
    "no mask token": {key: value for key, value in tiny(init_values=None).state_dict().items() if key != "mask_token"},
}


@pytest.mark.parametrize("name", NESTED)
def test_a_backbone_is_found_by_its_keys_wherever_it_is(tmp_path, name):
    torch.save(NESTED[name], tmp_path / "w.pth")
    opened = open_checkpoint(tmp_path / "w.pth")
    model = tiny(init_values=None) if name == "no mask token" else tiny()
    state = {key: value for key, value in model.state_dict().items() if key != "mask_token"}
    assert set(opened.state) == {*state, "mask_token"}
    assert all(torch.equal(opened.state[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "content, taken",
    [
        ({"student": below("backbone."), "teacher": below("backbone.")}, "teacher.backbone."),
        ({"state_dict": below(""), "state_dict_ema": below("")}, "state_dict_ema."),
        ({"state_dict": {**below("base_encoder."), **below("momentum_encoder.")}}, "state_dict.momentum_encoder."),
        ({"encoder": below("module."), "target_encoder": below("module.")}, "target_encoder.module."),
        ({**below("student."), **below("other.")}, "other."),
        ({"a": below(""), "b": below("")}, "a."),
        ({"student": below("backbone.")}, "student.backbone."),
    ],
)
def test_of_several_backbones_the_averaged_one_is_taken_and_named(tmp_path, content, taken):
    torch.save(content, tmp_path / "w.pth")
    note = open_checkpoint(tmp_path / "w.pth").notes[0]
    assert note.startswith(f"backbone of {taken!r} taken")
    assert ("and not of" in note) == (str(content).count("patch_embed.proj.weight") > 1)


def test_what_lies_beside_a_backbone_is_counted(tmp_path):
    torch.save(
        below("pretrained.", **{"depth_head.a": torch.zeros(1), "depth_head.b": torch.zeros(1)}), tmp_path / "w.pth"
    )
    opened = open_checkpoint(tmp_path / "w.pth")
    assert opened.dropped == ("depth_head.a", "depth_head.b")
    report = load_into(tiny(), read_file(tmp_path / "w.pth"))
    assert str(report) == f"{report.matched} tensors loaded; 2 of other parts left out"


def test_a_classifier_on_other_features_is_left_out_with_a_note(tmp_path):
    """Of somebody's fine-tuned model: on the class token alone, where the released heads read the patches as well."""
    head = {"classifier.weight": torch.ones(3, 64), "classifier.bias": torch.zeros(3)}
    torch.save({"state_dict": below("model.", **head)}, tmp_path / "w.pth")
    opened = open_checkpoint(tmp_path / "w.pth")
    assert opened.head is None and "classifier left out, it reads other features" in opened.notes[0]


def test_a_refusal_names_the_place_of_the_backbone(tmp_path):
    torch.save({"net": below("encoder.", **{"encoder.head.weight": torch.zeros(3, 64)})}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w.pth \(below 'net.encoder.'\) does not fit this model: unexpected he"):
        load_into(tiny(), read_file(tmp_path / "w.pth"), source="w.pth")
    torch.save({"encoder.patch_embed.proj.weight": torch.zeros(64, 3, 14, 14)}, tmp_path / "w.pth")
    assert (
        "(below 'encoder.') holds no DINOv2 backbone: patch_embed.proj.weight is there and cls_token is not"
        in refused(tmp_path / "w.pth")
    )


# Identity.


def test_the_same_tensors_give_the_same_bytes_in_every_process(tmp_path):
    """The writer of the format takes metadata from a hash map; eight files without a fixed order would differ."""
    table, contents = BackboneConfig.from_model(tiny()).table(), set()
    for _ in range(8):
        write_tensors(tmp_path / "w.safetensors", tiny().state_dict(), table)
        contents.add((tmp_path / "w.safetensors").read_bytes())
    assert len(contents) == 1
    header = contents.pop()[8:200]
    assert header.startswith(b'{"__metadata__":{"checksum":"crc32:') and b'"format":"pt","model":' in header


def test_a_header_in_order_holds_any_name(tmp_path):
    state = {'é\n"': torch.zeros(2), "\x7f日本": torch.ones(3)}
    write_tensors(tmp_path / "w.safetensors", state, {"a": "ü"})
    content = read_file(tmp_path / "w.safetensors")
    assert content.pop("model") == {"a": "ü"} and list(map(len, map(content.get, state))) == [2, 3]
