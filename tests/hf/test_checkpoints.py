"""Checkpoints: keys of the released files, both layouts of names, subclasses; `row n` counts the known defects."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dinov2.hf as hf
from dinov2.hf.naming import files_with_names_in_memory
from tests.golden.loading import golden_json
from tests.hf.model_cases import CLASSES, FAMILIES, NETWORKS, difference, images, our_model, stock_and_ours

LAYOUTS: dict[str, Any] = golden_json("hf_keys")
RELEASED = [name for name in LAYOUTS["file"] if name.startswith("dinov2-")]
HEADS = {"small": 6, "base": 12, "large": 16, "giant": 24}


def expanded(layout: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of all tensors of a released file."""
    layers = {
        f"{layout['layer_prefix']}{index}.{key}": shape
        for index in range(layout["layers"])
        for key, shape in layout["layer"].items()
    }
    return {key: tuple(shape) for key, shape in {**layout["top"], **layers}.items()}


def released_model(name: str) -> Any:
    """Our model of a released repository, on the meta device."""
    layout = LAYOUTS["file"][name]
    size = next(size for size in HEADS if f"-{size}" in name)
    kind = "ForImageClassification" if "imagenet1k" in name else "Model"
    family = "Dinov2WithRegisters" if "registers" in name else "Dinov2"
    config = getattr(hf, family + "Config")(
        hidden_size=next(iter(layout["top"].values()))[-1],
        num_hidden_layers=layout["layers"],
        num_attention_heads=HEADS[size],
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=size == "giant",
        num_labels=1000,
    )
    with torch.device("meta"):
        return getattr(hf, family + kind)(config)


@pytest.mark.parametrize("name", RELEASED)
def test_keys_and_shapes_are_those_of_the_released_files(name: str) -> None:
    layout = LAYOUTS["file"][name]
    state = released_model(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expanded(layout)
    assert (len(state), sum(value.numel() for value in state.values())) == (layout["tensors"], layout["parameters"])
    lines = sorted(f"{key} {'x'.join(map(str, value.shape))}" for key, value in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == layout["sha256"]


@pytest.mark.parametrize("name", LAYOUTS["memory_5_18"])
def test_state_dicts_with_the_newer_names_in_memory_load(name: str) -> None:
    state = {key: torch.empty(shape, device="meta") for key, shape in expanded(LAYOUTS["memory_5_18"][name]).items()}
    assert released_model(name).load_state_dict(state, strict=True, assign=True) == ([], [])


@pytest.mark.parametrize(
    "change, layout", [({"use_mask_token": False}, "tiny-mask-off"), ({"qkv_bias": False}, "tiny-no-qkv-bias")]
)
def test_settings_that_leave_tensors_out_leave_these_out(change: dict[str, Any], layout: str) -> None:
    expected = expanded(LAYOUTS["file"][layout])
    state = our_model("Dinov2", "Model", **change, num_hidden_layers=1).state_dict()
    assert state.keys() == expected.keys()


# Row 46.
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", CLASSES)
def test_tensors_of_a_saved_file_load_into_a_model(family: str, network: str, kind: str, tmp_path: Path) -> None:
    theirs, ours = stock_and_ours(family, kind, **NETWORKS[network])
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(7)
    assert ours.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True) == ([], [])
    assert difference(ours(images(), return_dict=False), theirs(images(), return_dict=False)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_missing_from_either_layout_is_reported_by_its_name_on_disk(family: str) -> None:
    theirs, ours = stock_and_ours(family, "Model", use_swiglu_ffn=True)
    state = {key: value for key, value in theirs.state_dict().items() if ".0.mlp.up_proj" not in key}
    if not any("gate_proj" in key for key in state):
        pytest.skip("this version of transformers keeps the names on disk in memory")
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert missing == ["encoder.layer.0.mlp.weights_in.weight", "encoder.layer.0.mlp.weights_in.bias"]
    assert unexpected == []


def test_only_local_folders_are_searched_for_the_newer_names(tmp_path: Path) -> None:
    our_model("Dinov2", "Model").save_pretrained(tmp_path / "on disk")
    for source in ("facebook/dinov2-small", None, tmp_path, tmp_path / "on disk"):
        assert files_with_names_in_memory(source) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_of_loading_act_on_files_with_the_newer_names(family: str, tmp_path: Path) -> None:
    theirs, _ = stock_and_ours(family, "ForImageClassification", use_swiglu_ffn=True)
    if "gate_proj" not in "".join(theirs.state_dict()):
        pytest.skip("this version of transformers writes the names on disk only")
    theirs.save_pretrained(tmp_path / "part", save_original_format=False)
    load = getattr(hf, family + "ForImageClassification").from_pretrained
    model, info = load(
        tmp_path, subfolder="part", num_labels=3, ignore_mismatched_sizes=True, dtype=torch.float16,
        attn_implementation="eager", output_loading_info=True,
    )  # fmt: skip
    assert (model.dtype, model.config._attn_implementation) == (torch.float16, "eager")
    assert model.classifier.weight.shape == (3, 64)
    assert {str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]} == {
        "classifier.weight",
        "classifier.bias",
    }
    gate = theirs.base_model.encoder.layer[1].mlp.gate_proj.weight
    assert difference(model.base_model.encoder.layer[1].mlp.weights_in.weight[: len(gate)], gate.half()) == 0


# Row 54: as the newest version.
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_keep_the_type_of_the_checkpoint_unless_told_otherwise(family: str, tmp_path: Path) -> None:
    our_model(family, "Model").bfloat16().save_pretrained(tmp_path)
    load = getattr(hf, family + "Model").from_pretrained
    assert load(tmp_path).dtype == torch.bfloat16
    assert load(tmp_path, dtype="float32").dtype == torch.float32
    assert load(tmp_path, torch_dtype=torch.float16).dtype == torch.float16


# Row 55: as the newest version, which writes safetensors only; older files are read.
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CLASSES)
def test_pickled_weights_of_older_versions_are_read(family: str, kind: str, tmp_path: Path) -> None:
    model = our_model(family, kind, use_swiglu_ffn=True)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert difference(again(images(), return_dict=False), model(images(), return_dict=False)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_asking_for_a_pickled_file_gives_a_folder_that_loads(family: str, tmp_path: Path) -> None:
    model = our_model(family, "Model")
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert difference(type(model).from_pretrained(tmp_path)(images())[0], model(images())[0]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_checkpoints_load_into_every_class_with_a_report(family: str, tmp_path: Path) -> None:
    classifier = our_model(family, "ForImageClassification")
    classifier.save_pretrained(tmp_path / "classifier")
    for kind in ("Model", "Backbone"):
        model, info = getattr(hf, family + kind).from_pretrained(tmp_path / "classifier", output_loading_info=True)
        assert set(info["unexpected_keys"]) == {"classifier.weight", "classifier.bias"}
        assert not info["missing_keys"]
        model.save_pretrained(tmp_path / kind)
        with pytest.warns(UserWarning, match="no classifier"):
            again, info = type(classifier).from_pretrained(tmp_path / kind, output_loading_info=True)
        assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
        assert difference(again.base_model(images())[0], classifier.base_model(images())[0]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_a_mask_token_says_so_and_gets_zeros(family: str, tmp_path: Path) -> None:
    model = our_model(family, "Model")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["embeddings.mask_token"]
    save_file(tensors, tmp_path / "model.safetensors")  # and without the usual metadata
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"embeddings.mask_token"}
    assert not again.embeddings.mask_token.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_size_is_an_error_unless_mismatches_are_ignored(family: str, tmp_path: Path) -> None:
    our_model(family, "Model").save_pretrained(tmp_path)
    load = getattr(hf, family + "Model").from_pretrained
    with pytest.raises(RuntimeError, match="mismatch"):
        load(tmp_path, image_size=64)
    model, info = load(tmp_path, image_size=64, ignore_mismatched_sizes=True, output_loading_info=True)
    assert len(info["mismatched_keys"]) == 1
    assert model.embeddings.position_embeddings.shape == (1, 65, 32)


class SegmentationHead(hf.Dinov2PreTrainedModel):
    """What users build: a model of their own on a backbone of ours."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dinov2 = hf.Dinov2Model(config)
        self.head = nn.Conv2d(config.hidden_size, config.num_labels, 1)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        tokens = self.dinov2(pixel_values).last_hidden_state[:, 1:]
        grid = (pixel_values.shape[2] // 8, pixel_values.shape[3] // 8)
        logits = self.head(tokens.transpose(1, 2).unflatten(2, grid))  # [B, C, h, w]
        logits = F.interpolate(logits, pixel_values.shape[2:], mode="bilinear")
        return (None if labels is None else F.cross_entropy(logits, labels)), logits


class OwnModel(hf.Dinov2WithRegistersModel):
    """A subclass in a module of its own."""


# Row 45.
@pytest.mark.parametrize("network", NETWORKS)
def test_a_subclass_loads_stock_checkpoints_whole(network: str, tmp_path: Path) -> None:
    theirs, ours = stock_and_ours("Dinov2WithRegisters", "Model", **NETWORKS[network])
    theirs.save_pretrained(tmp_path / "theirs")
    own, info = OwnModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert difference(own(images())[0], ours(images())[0]) == 0
    own.save_pretrained(tmp_path / "own")
    back = transformers.Dinov2WithRegistersModel.from_pretrained(tmp_path / "own")
    assert difference(back(images())[0], theirs(images())[0]) <= 1e-5


# Row 45.
@pytest.mark.parametrize("network", NETWORKS)
def test_a_segmentation_head_of_a_user_loads_a_stock_backbone_trains_saves_and_loads(
    network: str, tmp_path: Path
) -> None:
    theirs, _ = stock_and_ours("Dinov2", "Model", **NETWORKS[network])
    theirs.save_pretrained(tmp_path / "backbone")
    model, info = SegmentationHead.from_pretrained(tmp_path / "backbone", num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"head.weight", "head.bias"}
    assert difference(model.dinov2(images())[0], theirs(images())[0]) <= 1e-5
    x, labels = images(2, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, 16:] = 2
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss, _ = model(x, labels)
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval().save_pretrained(tmp_path / "trained")
    again, info = SegmentationHead.from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.num_labels == 3
    assert difference(again(x)[1], model(x)[1]) == 0
