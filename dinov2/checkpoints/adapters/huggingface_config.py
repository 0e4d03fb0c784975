"""The configuration files of Hugging Face, as plain dictionaries: from a `model` table, and back to one.

`config.json` says nothing of the position rule in its stock form. Ours adds `interpolate_offset` and
`interpolate_antialias`, which the stock classes keep and ignore: since version 4.48 they use the size rule without
antialias for models without registers, where the release has the offset rule. At the native size both are equal.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dinov2.errors import WeightsError, short_repr
from dinov2.layers.swiglu_ffn import swiglu_hidden_features

__all__ = ["config_from_table", "facts_of_config", "normalisation_of", "preprocessor_from_table"]

_TYPES = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BICUBIC = 3


def config_from_table(
    table: Mapping[str, Any], *, labels: Sequence[str] | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """`config.json` of a backbone, or of a classifier with these `labels`, as the stock classes read it.

    Raises `WeightsError` for a model that those classes cannot be.
    """
    height, width = table["img_size"]
    if height != width:
        raise WeightsError(
            f"Hugging Face's classes know square position grids only, this model was made for {height}x{width} pixels; "
            "adapt it first with --img-size"
        )
    registers, depth = table["num_register_tokens"], table["depth"]
    model_type = "dinov2_with_registers" if registers else "dinov2"
    stages = ["stem", *(f"stage{index}" for index in range(1, depth + 1))]
    config: dict[str, Any] = {
        "apply_layernorm": True,
        "architectures": [_TYPES[model_type] + ("Model" if labels is None else "ForImageClassification")],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": table["embed_dim"],
        "image_size": height,
        "initializer_range": 0.02,
        "interpolate_antialias": bool(table["interpolate_antialias"]),
        "interpolate_offset": float(table["interpolate_offset"]),
        "layer_norm_eps": 1e-06,
        "layerscale_value": 1.0,
        "mlp_ratio": _whole_ratio(table),
        "model_type": model_type,
        "num_attention_heads": table["num_heads"],
        "num_channels": table["in_chans"],
        "num_hidden_layers": depth,
        "out_features": [stages[-1]],
        "out_indices": [depth],
        "patch_size": table["patch_size"],
        "qkv_bias": bool(table["qkv_bias"]),
        "reshape_hidden_states": True,
        "stage_names": stages,
        "torch_dtype": dtype,
        "use_swiglu_ffn": table["ffn_layer"] in ("swiglu", "swiglufused"),
        **({"num_register_tokens": registers} if registers else {"use_mask_token": True}),
    }
    if labels is not None:
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: index for index, label in enumerate(labels)}
    return dict(sorted(config.items()))


def preprocessor_from_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """`preprocessor_config.json`: the released file for released models, else the model's own size and statistics."""
    # Weights trained at 518 pixels are evaluated at 224, as published; others at the size they were trained at.
    crop = min(table["img_size"][0], 224)
    crop = crop // table["patch_size"] * table["patch_size"]
    return {
        "crop_size": {"height": crop, "width": crop},
        "do_center_crop": True,
        "do_convert_rgb": table["in_chans"] == 3,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(table.get("mean") or _IMAGENET_MEAN),
        "image_processor_type": "BitImageProcessor",
        "image_std": list(table.get("std") or _IMAGENET_STD),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": round(crop * 256 / 224)},
    }


def facts_of_config(config: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """What a `config.json` says, as entries of a `model` table; the position rule only where it is written.

    Raises `WeightsError` for another family of models, and for options that this package's models do not have.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _TYPES:
        raise WeightsError(
            f"{source} describes a model of the family {short_repr(family)}; this package reads {' and '.join(_TYPES)}"
        )
    for key, only in (("layer_norm_eps", 1e-6), ("hidden_act", "gelu")):
        if config.get(key, only) != only:
            raise WeightsError(
                f"{source} has {key} {short_repr(config[key])}; the models of this package have {only!r}"
            )
    default_patch = 16 if family == "dinov2_with_registers" else 14
    try:
        image, patch = _pair(config.get("image_size", 224)), _pair(config.get("patch_size", default_patch))
        facts: dict[str, Any] = {
            "img_size": image,
            "patch_size": patch[0],
            "in_chans": _whole(config.get("num_channels", 3)),
            "embed_dim": _whole(config.get("hidden_size", 768)),
            "depth": _whole(config.get("num_hidden_layers", 12)),
            "num_heads": _whole(config.get("num_attention_heads", 12)),
            "ffn_layer": "swiglufused" if _flag(config.get("use_swiglu_ffn", False)) else "mlp",
            "qkv_bias": _flag(config.get("qkv_bias", True)),
            "num_register_tokens": _whole(config.get("num_register_tokens", 4)) if "registers" in family else 0,
        }
    except (TypeError, ValueError) as error:
        raise WeightsError(
            f"{source} has a value of another kind than it should ({error}); copy the file again"
        ) from error
    facts |= {key: config[key] for key in ("interpolate_offset", "interpolate_antialias") if key in config}
    heads = facts["num_heads"]
    if patch[0] != patch[1] or min(*patch, *image, heads) < 1:
        raise WeightsError(
            f"{source} has patches of {short_repr(patch)} pixels, images of {short_repr(image)} and "
            f"{short_repr(heads)} heads; copy the file again"
        )
    return facts


def normalisation_of(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """`mean` and `std` of a `preprocessor_config.json` as they stand in it, where it normalises; else nothing."""
    statistics = {"mean": preprocessor.get("image_mean"), "std": preprocessor.get("image_std")}
    if not preprocessor.get("do_normalize", True) or None in statistics.values():
        return {}
    return {key: [value] if isinstance(value, int | float) else value for key, value in statistics.items()}


def _pair(value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):
        height, width = value
        return [_whole(height), _whole(width)]
    return [_whole(value), _whole(value)]


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(short_repr(value))
    return value


def _whole(value: Any) -> int:
    # Not `int(...)`, which also reads text, in the digits of every script, and cuts fractions off.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(short_repr(value))
    return value


def _whole_ratio(table: Mapping[str, Any]) -> int:
    """The whole `mlp_ratio` that gives the same hidden width; the newest stock classes take no other."""
    dim, ratio = table["embed_dim"], table["mlp_ratio"]
    gated = table["ffn_layer"] in ("swiglu", "swiglufused")

    def width(value: float) -> int:
        hidden = int(dim * value)
        return swiglu_hidden_features(hidden) if gated else hidden

    for whole in {round(ratio), int(ratio), int(ratio) + 1}:
        if whole > 0 and width(whole) == width(ratio):
            return whole
    raise WeightsError(
        f"this model's feed-forward networks are {width(ratio)} wide, which is no whole multiple of {dim}; "
        "Hugging Face's classes cannot be told so"
    )
