"""Configurations take what any version takes; `row n` counts the known defects of the stock classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import dinov2.hf as hf
from dinov2.errors import ConfigError
from tests.hf.model_cases import FAMILIES, images, our_model, settings

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str, *values: Any, **named: Any) -> Any:
    return getattr(hf, family + "Config")(*values, **named)


# Row 17.
@pytest.mark.parametrize("ratio", [2.5, 4.0])
def test_a_fractional_mlp_ratio_is_taken_also_from_a_file(family: str, ratio: float, tmp_path: Path) -> None:
    model = our_model(family, "Model", mlp_ratio=ratio)
    model.save_pretrained(tmp_path)
    again = getattr(hf, family + "Model").from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mlp_ratio"] == ratio
    assert again.encoder.layer[0].mlp.fc1.weight.shape == (int(32 * ratio), 32)
    again.config.mlp_ratio = 2.5  # validation of assignments refuses this in stock classes


# Row 18.
def test_an_integer_layer_scale_is_taken(family: str) -> None:
    config = config_of(family, **settings(family, layerscale_value=2))
    model = getattr(hf, family + "Model")(config)
    assert torch.equal(model.encoder.layer[0].layer_scale1.lambda1, torch.full((32,), 2.0))


# Row 18.
def test_a_callable_activation_works_and_is_saved_by_name(family: str, tmp_path: Path) -> None:
    model = our_model(family, "Model", hidden_act=F.relu)
    named = our_model(family, "Model", hidden_act="relu")
    torch.testing.assert_close(model(images()).last_hidden_state, named(images()).last_hidden_state)
    model.save_pretrained(tmp_path)
    again = getattr(hf, family + "Model").from_pretrained(tmp_path)
    assert again.config.hidden_act == "relu"
    torch.testing.assert_close(again(images()).last_hidden_state, named(images()).last_hidden_state)


@pytest.mark.parametrize("name", ["gelu", "relu", "selu", "gelu_new"])
def test_documented_activations_are_those_of_the_framework(family: str, name: str) -> None:
    model = our_model(family, "Model", hidden_act=name)
    functions = {"gelu": F.gelu, "relu": F.relu, "selu": F.selu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}
    mlp = model.encoder.layer[0].mlp
    x = images()[0, 0, :, :32]
    expected = F.linear(functions[name](F.linear(x, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)
    torch.testing.assert_close(mlp(x), expected)


def test_an_unknown_activation_is_refused_with_the_known_ones(family: str) -> None:
    with pytest.raises(ConfigError, match=r"hidden_act is 'gelo'; give a callable, or one of .*gelu, .*selu"):
        our_model(family, "Model", hidden_act="gelo")


# Row 19.
def test_positional_arguments_have_their_order(family: str) -> None:
    names, values = [*_FIRST], [384, 3, 6, 2, "relu", 0.1, 0.2, 0.03, 1e-5, 98, 7, 1, False, 0.5, 0.1, True]
    if family == "Dinov2WithRegisters":
        names, values = [*names, "num_register_tokens"], [*values, 7]
    names, values = [*names, *_LAST], [*values, ["stage1"], [1], False, False]
    if family == "Dinov2":
        names, values = [*names, "use_mask_token"], [*values, False]
    plain = config_of(family, *values).to_dict()
    assert {name: plain[name] for name in names} == dict(zip(names, values, strict=True))


_FIRST = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "image_size", "patch_size", "num_channels",
    "qkv_bias", "layerscale_value", "drop_path_rate", "use_swiglu_ffn",
)  # fmt: skip
_LAST = ("out_features", "out_indices", "apply_layernorm", "reshape_hidden_states")


# Row 20: as the newest version, which rounds the width of a head down.
def test_heads_that_do_not_divide_the_width_are_narrower(family: str) -> None:
    model = our_model(family, "Model", hidden_size=34, num_attention_heads=4)
    attention = model.encoder.layer[0].attention
    assert attention.attention.query.weight.shape == (32, 34)
    assert attention.output.dense.weight.shape == (34, 32)
    assert model(images()).last_hidden_state.shape[-1] == 34


def test_more_heads_than_channels_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="64 attention heads do not fit into a hidden_size of 32"):
        our_model(family, "Model", num_attention_heads=64)


# Row 37: the constructor knows the kinds of problems, and a mistyped one ends there.
def test_an_unknown_problem_type_is_refused_at_once(family: str) -> None:
    with pytest.raises(ValueError, match="problem_type is 'segmentation'; choose one of regression"):
        config_of(family, problem_type="segmentation")


# Row 48.
@pytest.mark.parametrize("indices", [[-9], [5], [0, 9]])
def test_stages_that_do_not_exist_are_a_value_error(family: str, indices: list[int]) -> None:
    with pytest.raises(ValueError, match="valid indices for stage_names"):
        config_of(family, num_hidden_layers=3, out_indices=indices)


# Row 49.
def test_stages_follow_a_changed_depth(family: str) -> None:
    config = config_of(family, **settings(family))
    config.num_hidden_layers = 4
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert (config.out_features, config.out_indices) == (["stage4"], [4])
    maps = getattr(hf, family + "Backbone")(config)(images()).feature_maps
    assert [tuple(one.shape) for one in maps] == [(2, 32, 5, 7)]


# Row 49.
def test_chosen_stages_stay_when_the_depth_grows_and_end_with_a_depth_below_them(family: str) -> None:
    config = config_of(family, num_hidden_layers=3, out_features=["stage1"])
    config.num_hidden_layers = 6
    assert config.out_features == ["stage1"]
    config.out_indices = [2, 5]
    config.num_hidden_layers = 4
    assert config.out_features == ["stage4"]


# Row 49.
def test_a_depth_changed_after_the_backbone_was_built_is_named(family: str) -> None:
    backbone = our_model(family, "Backbone")
    backbone.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="asks for stage5, but this backbone has 2 blocks; build it again"):
        backbone(images())


# Row 50: kept, since files say so; no block is run for it.
def test_no_stages_give_no_maps(family: str) -> None:
    backbone = our_model(family, "Backbone", out_features=[])
    assert backbone.config.out_indices == []
    assert backbone(images()).feature_maps == ()


@pytest.mark.parametrize(
    "chosen, message",
    [
        ({"out_features": "stage1"}, "must be a list"),
        ({"out_features": ["stage9"]}, "subset of stage_names"),
        ({"out_features": ["stage1", "stage1"]}, "duplicates"),
        ({"out_features": ["stage2", "stage1"]}, r"same order as stage_names, expected \['stage1', 'stage2'\]"),
        ({"out_indices": 2}, "must be a list"),
        ({"out_indices": [-3, 1]}, "duplicates"),
        ({"out_indices": [2, 0]}, r"same order as stage_names, expected \[0, 2\]"),
        ({"out_features": ["stage1"], "out_indices": [0, 1]}, "same length"),
        ({"out_features": ["stage1"], "out_indices": [2]}, "correspond to the same stages"),
    ],
)
def test_choices_of_stages_that_make_no_sense_are_value_errors(
    family: str, chosen: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(family, num_hidden_layers=3, **chosen)


def test_names_and_indices_of_stages_follow_each_other(family: str) -> None:
    config = config_of(family, num_hidden_layers=3)
    assert (config.out_features, config.out_indices) == (["stage3"], [3])
    config.out_features = ("stem", "stage2")
    assert (config.out_features, config.out_indices) == (["stem", "stage2"], [0, 2])
    config.out_indices = (-1,)
    assert (config.out_features, config.out_indices) == (["stage3"], [-1])
    config.out_indices = None
    assert (config.out_features, config.out_indices) == (["stage3"], [3])


# Row 62: the defaults of the newest stock classes, as they are.
def test_defaults_are_those_of_the_installed_version(family: str) -> None:
    ours, theirs = config_of(family).to_dict(), getattr(transformers, family + "Config")().to_dict()
    if transformers.__version__.startswith("5"):
        assert ours.keys() - theirs.keys() <= {"output_attentions"}
    assert {name: ours[name] for name in theirs if name in ours} == {
        name: value for name, value in theirs.items() if name in ours
    }
    assert ours["patch_size"] == (16 if family == "Dinov2WithRegisters" else 14)


def test_settings_survive_files_and_dictionaries(family: str, tmp_path: Path) -> None:
    config = config_of(family, out_indices=[1], remark="mine", id2label={0: "a", 1: "b", 2: "c"}, mlp_ratio=3.5)
    config.save_pretrained(tmp_path)
    for again in (type(config).from_pretrained(tmp_path), type(config).from_dict(config.to_dict())):
        assert again.to_dict() == config.to_dict()
        assert (again.remark, again.num_labels, again.id2label[2]) == ("mine", 3, "c")


def test_the_rule_of_positions_is_written_only_when_it_was_changed(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    assert "position_interpolation" not in config.to_json_string()
    config.position_interpolation = "original"
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).position_interpolation == "original"
    with pytest.raises(ValueError, match="position_interpolation is 'meta'; choose 'hf' or 'original'"):
        config.position_interpolation = "meta"


def test_configurations_compare_by_value(family: str, tmp_path: Path) -> None:
    config = config_of(family, hidden_size=32, num_labels=3)
    assert config == config_of(family, hidden_size=32, num_labels=3)
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path) == config
    changes: list[dict[str, Any]] = [
        {"hidden_size": 64}, {"num_hidden_layers": 2}, {"num_labels": 4}, {"out_features": ["stem"]},
        {"remark": "ours"}, {"dtype": "float16"}, {"position_interpolation": "original"},
    ]  # fmt: skip
    for change in changes:
        assert config != config_of(family, **{"hidden_size": 32, "num_labels": 3, **change}), change
    other = config_of(next(name for name in FAMILIES if name != family), hidden_size=32, num_labels=3)
    assert config != other
    own = type("OwnConfig", (type(config),), {"model_type": "own"})
    assert own(hidden_size=32) == own(hidden_size=32) != own(hidden_size=64)
    assert own(hidden_size=32) != config_of(family, hidden_size=32)


def test_a_config_in_memory_that_was_saved_loads_its_model(family: str, tmp_path: Path) -> None:
    model = our_model(family, "Model").to(torch.bfloat16)
    model.save_pretrained(tmp_path)  # version 4 writes the type as text into the object
    for config in (model.config, type(model.config).from_pretrained(tmp_path)):
        again = type(model).from_pretrained(tmp_path, config=config)
        assert again.dtype == torch.bfloat16
        assert torch.equal(again.layernorm.weight, model.layernorm.weight)
