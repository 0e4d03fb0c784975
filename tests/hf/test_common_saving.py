"""What transformers checks of every model: files, loading reports, starting values, types and devices."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dinov2.hf as hf
from tests.hf.common_cases import EVERY_CLASS, EVERY_FAMILY, leaves, our_class
from tests.hf.model_cases import difference, images, our_model, settings

HALVES = (torch.float16, torch.bfloat16)


def outputs(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return leaves(model(images()))


def rewritten(folder: Path, change: Any) -> dict[str, torch.Tensor]:
    """Replaces the weights in a folder by what `change` makes of them."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def mismatched(info: dict[str, Any]) -> set[str]:
    """Names of the parameters whose shapes do not fit; version 4 gives names, version 5 names with shapes."""
    return {one if isinstance(one, str) else one[0] for one in info["mismatched_keys"]}


def is_fresh(name: str, value: torch.Tensor, spread: float) -> bool:
    """Whether a parameter looks as a newly built model's."""
    value = value.detach()
    if name.endswith(("bias", "mask_token", "register_tokens")):
        return not value.any()
    if "norm" in name or name.endswith("lambda1"):
        return bool((value == 1).all())
    several = 6 * spread / value.numel() ** 0.5  # six standard errors of a mean; of a spread even more
    return abs(float(value.mean())) < several and abs(float(value.std()) - spread) < several


# Files; the older format stands in test_checkpoints.py.


@EVERY_CLASS
def test_a_saved_model_loads_with_the_same_outputs(family: str, kind: str, tmp_path: Path) -> None:
    model = our_model(family, kind)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded, info = our_class(family, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert not loaded.training
    assert difference(outputs(loaded), outputs(model)) == 0


@EVERY_CLASS
def test_a_model_saved_in_shards_loads_with_the_same_outputs(family: str, kind: str, tmp_path: Path) -> None:
    model = our_model(family, kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert len(set(index["weight_map"].values())) > 2
    loaded = our_class(family, kind).from_pretrained(tmp_path)
    assert difference(outputs(loaded), outputs(model)) == 0


@EVERY_CLASS
def test_the_file_holds_exactly_the_keys_of_the_state_dict(family: str, kind: str, tmp_path: Path) -> None:
    model = our_model(family, kind)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) == set(model.state_dict())
    loaded = our_class(family, kind).from_pretrained(tmp_path, use_safetensors=True)
    assert list(loaded.state_dict()) == list(model.state_dict())


@EVERY_CLASS
def test_weights_can_come_without_a_checkpoint(family: str, kind: str) -> None:
    model = our_model(family, kind)
    loaded = our_class(family, kind).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert difference(outputs(loaded), outputs(model)) == 0


@EVERY_CLASS
def test_whole_models_and_their_states_survive_torch_save_and_copying(family: str, kind: str, tmp_path: Path) -> None:
    model = our_model(family, kind)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "states.pt")
    other = our_model(family, kind)
    torch.nn.init.zeros_(other.base_model.embeddings.cls_token)
    other.load_state_dict(torch.load(tmp_path / "states.pt", weights_only=True))
    for same in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model), other):
        assert difference(outputs(same), outputs(model)) == 0


@EVERY_CLASS
def test_strided_weights_are_saved_and_load_contiguous(family: str, kind: str, tmp_path: Path) -> None:
    model = our_model(family, kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach().T.contiguous().T)
    assert not model.base_model.encoder.layer[0].mlp.fc1.weight.is_contiguous()
    model.save_pretrained(tmp_path)
    loaded = our_class(family, kind).from_pretrained(tmp_path)
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    assert difference(outputs(loaded), outputs(model)) < 1e-5


@EVERY_CLASS
def test_keys_to_ignore_are_left_out_of_the_file(family: str, kind: str, tmp_path: Path) -> None:
    model = our_model(family, kind)
    key = next(name for name in model.state_dict() if name.endswith("cls_token"))
    model._keys_to_ignore_on_save = {key}
    model.save_pretrained(tmp_path)
    assert set(model.state_dict()) - set(load_file(tmp_path / "model.safetensors")) == {key}
    _, info = our_class(family, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {key}


# Reports and starting values.


@EVERY_CLASS
def test_missing_keys_are_reported_and_start_fresh(family: str, kind: str, tmp_path: Path) -> None:
    model = our_model(family, kind, initializer_range=0.03)
    model.save_pretrained(tmp_path)
    gone = {name for name in model.state_dict() if "encoder.layer.1." in name or "embeddings." in name}
    rewritten(tmp_path, lambda tensors: {name: one for name, one in tensors.items() if name not in gone})
    loaded, info = our_class(family, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == gone
    assert not info["unexpected_keys"]
    for name, value in loaded.state_dict().items():
        if name in gone:
            assert is_fresh(name, value, 0.03), name
        else:
            assert torch.equal(value, model.state_dict()[name]), name


@EVERY_CLASS
@pytest.mark.parametrize("on_meta", [False, True])
def test_a_checkpoint_without_any_weight_gives_a_fresh_model(
    family: str, kind: str, on_meta: bool, tmp_path: Path
) -> None:
    our_model(family, kind, initializer_range=0.03).save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: {"remark": torch.zeros(1)})
    options = {"low_cpu_mem_usage": True} if on_meta else {}
    with (
        pytest.warns(UserWarning, match="classifier") if kind == "ForImageClassification" else contextlib.nullcontext()
    ):
        loaded = our_class(family, kind).from_pretrained(tmp_path, **options)
    assert [name for name, value in loaded.state_dict().items() if not is_fresh(name, value, 0.03)] == []


@EVERY_CLASS
def test_unexpected_keys_are_reported_and_do_not_matter(family: str, kind: str, tmp_path: Path) -> None:
    model = our_model(family, kind)
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda tensors: {**tensors, "decoder.weight": torch.ones(3)})
    loaded, info = our_class(family, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"decoder.weight"}
    assert difference(outputs(loaded), outputs(model)) == 0


@EVERY_FAMILY
def test_backbone_and_classifier_folders_load_in_each_others_class(family: str, tmp_path: Path) -> None:
    model, classifier = our_model(family, "Model"), our_model(family, "ForImageClassification")
    model.save_pretrained(tmp_path / "model")
    classifier.save_pretrained(tmp_path / "classifier")
    load = our_class(family, "Model").from_pretrained
    base, info = load(tmp_path / "classifier", output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["missing_keys"]
    assert difference(outputs(base), outputs(classifier.base_model)) == 0
    with pytest.warns(UserWarning, match="holds a backbone and no classifier"):
        head, info = our_class(family, "ForImageClassification").from_pretrained(
            tmp_path / "model", num_labels=3, output_loading_info=True
        )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert difference(outputs(head.base_model), outputs(model)) == 0
    for source in ("model", "classifier"):
        _, info = our_class(family, "Backbone").from_pretrained(tmp_path / source, output_loading_info=True)
        assert not info["missing_keys"]


@EVERY_FAMILY
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_another_number_of_labels_is_an_error_unless_a_fresh_head_is_wanted(
    family: str, shards: dict[str, Any], tmp_path: Path
) -> None:
    model = our_model(family, "ForImageClassification", initializer_range=0.03)
    model.save_pretrained(tmp_path, **shards)
    load = our_class(family, "ForImageClassification").from_pretrained
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        load(tmp_path, num_labels=42)
    loaded, info = load(tmp_path, num_labels=42, ignore_mismatched_sizes=True, output_loading_info=True)
    assert mismatched(info) == {"classifier.weight", "classifier.bias"}
    assert loaded(images()).logits.shape == (2, 42)
    assert is_fresh("classifier.weight", loaded.classifier.weight, 0.03)
    assert is_fresh("classifier.bias", loaded.classifier.bias, 0.03)
    assert difference(outputs(loaded.base_model), outputs(model.base_model)) == 0


@EVERY_CLASS
def test_another_native_size_is_an_error_unless_fresh_positions_are_wanted(
    family: str, kind: str, tmp_path: Path
) -> None:
    our_model(family, kind).save_pretrained(tmp_path)
    load = our_class(family, kind).from_pretrained
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        load(tmp_path, image_size=64)
    loaded, info = load(tmp_path, image_size=64, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [name.endswith("embeddings.position_embeddings") for name in mismatched(info)] == [True]
    assert loaded.base_model.embeddings.position_embeddings.shape == (1, 65, 32)


@EVERY_CLASS
def test_starting_values_have_the_configured_spread(family: str, kind: str) -> None:
    config = getattr(hf, family + "Config")(
        **settings(family, hidden_size=64, initializer_range=0.05, layerscale_value=0.5)
    )
    for name, value in our_class(family, kind)(config).named_parameters():
        if name.endswith("lambda1"):
            assert (value == 0.5).all()
        else:
            assert is_fresh(name, value, 0.05), name


@EVERY_CLASS
def test_a_model_without_spread_has_only_zeros_and_ones(family: str, kind: str) -> None:
    config = getattr(hf, family + "Config")(**settings(family, initializer_range=1e-10))
    for name, value in our_class(family, kind)(config).state_dict().items():
        assert round(float(value.mean()) * 1e9) / 1e9 in (0.0, 1.0), name


@EVERY_CLASS
def test_there_are_no_buffers_that_could_be_forgotten(family: str, kind: str) -> None:
    assert list(our_model(family, kind).buffers()) == []


@EVERY_CLASS
def test_the_model_of_these_tests_is_small(family: str, kind: str) -> None:
    assert our_model(family, kind).num_parameters() < 1_000_000


# Types.


@EVERY_CLASS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_a_type_can_be_asked_for_by_either_keyword(
    family: str, kind: str, dtype: torch.dtype, keyword: str, tmp_path: Path
) -> None:
    our_model(family, kind).save_pretrained(tmp_path)
    for asked in (dtype, str(dtype).removeprefix("torch.")):
        loaded = our_class(family, kind).from_pretrained(tmp_path, **{keyword: asked})
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert loaded.dtype == dtype
    assert {tensor.dtype for tensor in outputs(loaded)} == {dtype}


@EVERY_CLASS
def test_the_default_type_is_that_of_the_checkpoint(family: str, kind: str, tmp_path: Path) -> None:
    our_model(family, kind).bfloat16().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config.get("dtype") or config.get("torch_dtype")) == "bfloat16"
    load = our_class(family, kind).from_pretrained
    assert load(tmp_path).dtype == torch.bfloat16
    assert load(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32


@EVERY_FAMILY
def test_modules_kept_in_float32_stay_in_float32(family: str, tmp_path: Path) -> None:
    class Careful(our_class(family, "Model")):  # type: ignore[misc]
        _keep_in_fp32_modules: ClassVar[list[str]] = ["layernorm"]

    our_model(family, "Model").save_pretrained(tmp_path)
    loaded = Careful.from_pretrained(tmp_path, dtype=torch.float16)
    assert loaded.layernorm.weight.dtype == torch.float32
    assert loaded.encoder.layer[0].mlp.fc1.weight.dtype == torch.float16


# Devices.


@EVERY_CLASS
def test_a_model_can_be_built_on_the_meta_device_and_filled_later(family: str, kind: str) -> None:
    expected = our_model(family, kind)
    with torch.device("meta"):
        model = our_class(family, kind)(expected.config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.load_state_dict(expected.state_dict(), assign=True)
    assert difference(outputs(model.eval()), outputs(expected)) == 0


@EVERY_CLASS
def test_loading_heeds_device_contexts_and_defaults(family: str, kind: str, tmp_path: Path) -> None:
    model = our_model(family, kind)
    model.save_pretrained(tmp_path)
    load = our_class(family, kind).from_pretrained
    with torch.device("cpu"):
        assert difference(outputs(load(tmp_path)), outputs(model)) == 0
    torch.set_default_device("cpu")
    try:
        assert difference(outputs(load(tmp_path)), outputs(model)) == 0
    finally:
        torch.set_default_device(None)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="version 4 of transformers loads there")
@EVERY_CLASS
def test_loading_refuses_a_context_of_the_meta_device(family: str, kind: str, tmp_path: Path) -> None:
    our_model(family, kind).save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta"):
        our_class(family, kind).from_pretrained(tmp_path)


@EVERY_CLASS
def test_a_device_map_places_the_model(family: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = our_model(family, kind)
    model.save_pretrained(tmp_path)
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        loaded = our_class(family, kind).from_pretrained(tmp_path, device_map=device_map)
        assert difference(outputs(loaded), outputs(model)) == 0


@EVERY_CLASS
def test_weights_can_be_offloaded_to_disk(family: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from accelerate import disk_offload

    model = our_model(family, kind)
    expected = outputs(model)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert difference(outputs(model), expected) < 1e-5


# Embeddings.


@EVERY_CLASS
def test_input_embeddings_are_the_patch_embedding_and_can_be_replaced(family: str, kind: str) -> None:
    model = our_model(family, kind)
    before = model.get_input_embeddings()
    assert isinstance(before, getattr(hf, family + "PatchEmbeddings"))
    assert model.get_output_embeddings() is None
    other = copy.deepcopy(before)
    torch.nn.init.zeros_(other.projection.weight)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    with torch.no_grad():
        assert difference(leaves(model(images()))[:1], leaves(model(2 * images()))[:1]) == 0
