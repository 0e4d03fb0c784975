"""Configuration files of Hugging Face: as the stock classes read and write them, and back to a table."""

import pytest

from dinov2.checkpoints.adapters.huggingface import (
    huggingface_config,
    huggingface_preprocessor,
    read_huggingface_config,
    read_normalisation,
)
from dinov2.errors import WeightsError
from dinov2.models.config import BackboneConfig
from tests.checkpoints.test_adapters import NAMES, released
from tests.models.tiny_backbones import tiny

SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24)}


@pytest.mark.parametrize("name", NAMES)
def test_released_backbones_get_the_configuration_of_the_published_folders(name):
    config = huggingface_config(BackboneConfig.from_state_dict(released(name)))
    dim, depth, heads = SIZES[NAMES[name].rpartition("-")[2]]
    registers = "_reg" in name
    expected = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": 518,
        "patch_size": 14,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "use_swiglu_ffn": "giant" in NAMES[name],
        "apply_layernorm": True,
        "reshape_hidden_states": True,
        "out_features": [f"stage{depth}"],
        "out_indices": [depth],
        "torch_dtype": "float32",
    }
    assert {key: config[key] for key in expected} == expected
    assert isinstance(config["mlp_ratio"], int)  # the newest classes refuse 4.0
    assert config.get("num_register_tokens") == (4 if registers else None)
    assert list(config) == sorted(config)


def test_stock_configuration_classes_keep_every_value():
    transformers = pytest.importorskip("transformers")
    for registers, family in ((0, "Dinov2"), (4, "Dinov2WithRegisters")):
        config = huggingface_config(
            BackboneConfig.from_model(tiny(num_register_tokens=registers)), labels=["cat", "dog", "owl"]
        )
        stock = getattr(transformers, f"{family}Config").from_dict(config).to_dict()
        stock["torch_dtype"] = str(stock.pop("dtype")).removeprefix("torch.")
        stock["id2label"] = {str(key): value for key, value in stock["id2label"].items()}
        assert {key: stock[key] for key in config} == config


def test_a_table_survives_the_way_to_a_configuration_and_back():
    for options in ({}, {"num_register_tokens": 3}, {"ffn_layer": "swiglufused"}, {"qkv_bias": False, "num_heads": 2}):
        config = BackboneConfig.from_model(tiny(**options))
        table, facts = config.table(), read_huggingface_config(huggingface_config(config), source="config.json")
        assert facts == {key: table[key] for key in facts}
        assert {"num_heads", "interpolate_offset", "interpolate_antialias", "img_size"} <= set(facts)


def test_defaults_are_those_of_the_stock_classes():
    plain = read_huggingface_config({"model_type": "dinov2"}, source="c")
    assert (plain["patch_size"], plain["img_size"], plain["embed_dim"]) == (14, [224, 224], 768)
    registers = read_huggingface_config({"model_type": "dinov2_with_registers"}, source="c")
    assert (registers["patch_size"], registers["num_register_tokens"]) == (16, 4)
    assert "interpolate_offset" not in plain  # stock files do not say it, and the release's rule holds


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"model_type": "dinov3_vit"}, "a model of the family 'dinov3_vit'; this package reads dinov2 and"),
        ({"model_type": None}, "a model of the family None"),
        ({"layer_norm_eps": 1e-12}, "has layer_norm_eps 1e-12; the models of this package have 1e-06"),
        ({"hidden_act": "relu"}, "has hidden_act 'relu'"),
        ({"image_size": "large"}, "has a value of another kind"),
        ({"hidden_size": None}, "has a value of another kind"),
        ({"patch_size": [14, 16]}, "has patches of [14, 16] pixels"),
        ({"patch_size": 0}, "has patches of [0, 0] pixels"),
        ({"num_attention_heads": 0}, "and 0 heads"),
        ({"image_size": -98}, "images of [-98, -98]"),
    ],
)
def test_a_configuration_of_another_kind_is_refused(change, reason):
    with pytest.raises(WeightsError) as refusal:
        read_huggingface_config(
            {**huggingface_config(BackboneConfig.from_model(tiny())), **change}, source="config.json"
        )
    assert str(refusal.value).startswith("config.json ") and reason in str(refusal.value)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"img_size": (42, 70)}, "square position grids only, this model was made for 42x70 pixels"),
        ({"mlp_ratio": 2.5}, "160 wide, which is no whole multiple of 64"),
    ],
)
def test_models_that_the_stock_classes_cannot_be_are_refused(options, reason):
    with pytest.raises(WeightsError) as refusal:
        huggingface_config(BackboneConfig.from_model(tiny(**options)))
    assert reason in str(refusal.value)


def test_the_preprocessor_of_released_models_is_the_published_file():
    assert huggingface_preprocessor(518, patch_size=14) == {
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "image_processor_type": "BitImageProcessor",
    }


def test_models_of_ones_own_keep_their_size_and_statistics():
    preprocessor = huggingface_preprocessor(98, patch_size=14, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert preprocessor["crop_size"] == {"height": 98, "width": 98} and preprocessor["size"] == {"shortest_edge": 112}
    assert read_normalisation(preprocessor) == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def test_what_normalises_nothing_tells_nothing():
    assert read_normalisation({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False}) == {}
    assert read_normalisation({}) == {} and read_normalisation({"image_mean": [0.5] * 3}) == {}
    assert read_normalisation({"image_mean": 0.5, "image_std": 2}) == {"mean": [0.5], "std": [2]}
