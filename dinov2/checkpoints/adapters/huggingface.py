"""Hugging Face's `dinov2` and `dinov2_with_registers`: names of the tensors, and the configuration files.

Files hold the names of `_TOP` and `_BLOCK` in every version of the library; its classes have had others in memory since
version 5.18 (`q_proj`, `gate_proj`, ...), which a `state_dict()` or an unusual file may hold. Both are read, the former
are written.

`config.json` says nothing of the position rule in its stock form. Ours adds `interpolate_offset` and
`interpolate_antialias`, which the stock classes keep and ignore: since version 4.48 they use the size rule without
antialias for models without registers, where the release has the offset rule. At the native size both are equal.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dinov2.errors import WeightsError, short_repr
from dinov2.layers.swiglu_ffn import swiglu_hidden_features
from dinov2.models.config import BackboneConfig

__all__ = [
    "from_huggingface",
    "huggingface_config",
    "huggingface_preprocessor",
    "read_huggingface_config",
    "read_normalisation",
    "to_huggingface",
    "with_classifier",
    "with_every_part",
    "without_prefix",
]

_TYPES = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BICUBIC = 3
_PREFIXES = ("dinov2_with_registers.", "dinov2.")
_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_BLOCK = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layer_scale2.lambda1": "ls2.gamma",
}
_IN_MEMORY = {"attention.o_proj": "attention.output.dense", "mlp.down_proj": "mlp.weights_out"}
# Tensors of the original that Hugging Face and timm hold in several, or under several names.
_SPLIT: dict[str, list[tuple[str, ...]]] = {
    "attn.qkv": [
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ],
    "mlp.w12": [("mlp.gate_proj", "mlp.up_proj")],
}
_KEY = re.compile(r"encoder\.layer\.([0-9]{1,9})\.(.+)")
_BLOCK_KEY = re.compile(r"blocks\.([0-9]{1,9})\.(.+)")


def from_huggingface(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The release's keys for a backbone under either set of names, with or without a prefix, and notes.

    A mask token that is missing becomes zeros. Keys that no map knows stay as they are. Raises `WeightsError` when one
    of the parts of a tensor is missing.
    """
    result: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    unknown: dict[str, Tensor] = {}
    for key, value in state.items():
        bare = without_prefix(key)
        match = _KEY.fullmatch(bare)
        if match is None:
            name = _renamed(bare, _TOP)
        elif (piece := _piece_of(match[2])) is not None:
            whole, index = piece
            pieces.setdefault(f"blocks.{match[1]}.{whole}", {})[index] = value
            continue
        else:
            inner = _renamed(_renamed(match[2], _IN_MEMORY) or match[2], _BLOCK)
            name = inner and f"blocks.{match[1]}.{inner}"
        if name:
            result[name] = value
        else:
            unknown[key] = value
    for name, found in pieces.items():
        n_pieces = 3 if ".qkv." in name else 2
        if len(found) < n_pieces:
            raise WeightsError(f"of {name} only {len(found)} of {n_pieces} parts are there; copy the weights again")
        result[name] = torch.cat([found[index] for index in range(n_pieces)])
    notes: tuple[str, ...] = ()
    if "mask_token" not in result and "cls_token" in result:
        result["mask_token"] = result["cls_token"].new_zeros(1, result["cls_token"].shape[-1])
        notes = ("mask_token: zeros, the source has none",)
    return {**result, **unknown}, notes


def _piece_of(key: str) -> tuple[str, int] | None:
    """`attention.q_proj.weight` -> (`attn.qkv.weight`, 0); None for a tensor that is whole."""
    for whole, spellings in _SPLIT.items():
        for names in spellings:
            for index, name in enumerate(names):
                if key in (f"{name}.weight", f"{name}.bias"):
                    return whole + key.removeprefix(name), index
    return None


def to_huggingface(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The names of the files for a backbone under the release's flat keys, and notes.

    Raises `WeightsError` for a model that those classes cannot be.
    """
    state, notes = with_every_part(state, "Hugging Face")
    top = {ours: theirs for theirs, ours in _TOP.items()}
    block = {ours: theirs for theirs, ours in _BLOCK.items()}
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _BLOCK_KEY.fullmatch(key)
        if match is None:
            result[_renamed(key, top) or key] = value
        elif match[2].startswith("attn.qkv."):
            leaf = match[2].removeprefix("attn.qkv.")
            for name, part in zip(_SPLIT["attn.qkv"][0], value.chunk(3), strict=True):
                result[f"encoder.layer.{match[1]}.{name}.{leaf}"] = part
        else:
            result[f"encoder.layer.{match[1]}.{_renamed(match[2], block) or match[2]}"] = value
    return result, notes


def with_every_part(
    state: dict[str, Tensor], whose: str, *, layerscale: bool = True, biases: bool = True
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Adds the biases of zero and scales of one without which the other side has no such model: the same function."""
    dim = state["cls_token"].shape[-1]
    added: dict[str, Tensor] = {}
    for prefix in [key.removesuffix("norm1.weight") for key in state if key.endswith("norm1.weight")]:
        if not {f"{prefix}mlp.fc1.weight", f"{prefix}mlp.w12.weight"} & set(state):
            raise WeightsError(f"{whose} has no name for a transformer without feed-forward networks; keep it as it is")
        for name in ("attn.proj", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3"):
            weight = state.get(f"{prefix}{name}.weight")
            if biases and weight is not None and f"{prefix}{name}.bias" not in state:
                added[f"{prefix}{name}.bias"] = weight.new_zeros(weight.shape[0])
        for name in ("ls1.gamma", "ls2.gamma"):
            if layerscale and f"{prefix}{name}" not in state:
                added[f"{prefix}{name}"] = state["cls_token"].new_ones(dim)
    kinds = sorted({"LayerScale of one" if key.endswith("gamma") else "biases of zero" for key in added}, reverse=True)
    notes = (f"{' and '.join(kinds)} added, which {whose} always has",) if added else ()
    return {**state, **added}, notes


def with_classifier(
    state: Mapping[str, Tensor], head: Mapping[str, Tensor] | None, *, registers: bool
) -> dict[str, Tensor]:
    """The names of a classifier's file: the backbone below the prefix of its family, and the linear layer."""
    if head is None:
        return dict(state)
    prefix = _PREFIXES[0] if registers else _PREFIXES[1]
    below = {f"{prefix}{key}": value for key, value in state.items()}
    return {**below, "classifier.weight": head["weight"], "classifier.bias": head["bias"]}


def without_prefix(key: str) -> str:
    """The key inside a classifier as it is in the backbone alone."""
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _renamed(key: str, names: Mapping[str, str]) -> str | None:
    """`key` with the module or parameter at its start renamed, or None."""
    for old, new in names.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def huggingface_config(
    config: BackboneConfig, *, labels: Sequence[str] | None = None, dtype: str = "float32"
) -> dict[str, object]:
    """`config.json` of a backbone, or of a classifier with these `labels`, as the stock classes read it.

    Raises `WeightsError` for a model that those classes cannot be.
    """
    height, width = config.img_size
    if height != width:
        raise WeightsError(
            f"Hugging Face's classes know square position grids only, this model was made for {height}x{width} pixels; "
            "adapt it first with --img-size"
        )
    registers, depth = config.num_register_tokens, config.depth
    model_type = "dinov2_with_registers" if registers else "dinov2"
    stages = ["stem", *(f"stage{index}" for index in range(1, depth + 1))]
    content: dict[str, object] = {
        "apply_layernorm": True,
        "architectures": [_TYPES[model_type] + ("Model" if labels is None else "ForImageClassification")],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": config.embed_dim,
        "image_size": height,
        "initializer_range": 0.02,
        "interpolate_antialias": config.interpolate_antialias,
        "interpolate_offset": float(config.interpolate_offset),
        "layer_norm_eps": 1e-06,
        "layerscale_value": 1.0,
        "mlp_ratio": _whole_ratio(config),
        "model_type": model_type,
        "num_attention_heads": config.num_heads,
        "num_channels": config.in_chans,
        "num_hidden_layers": depth,
        "out_features": [stages[-1]],
        "out_indices": [depth],
        "patch_size": config.patch_size,
        "qkv_bias": config.qkv_bias,
        "reshape_hidden_states": True,
        "stage_names": stages,
        "torch_dtype": dtype,
        "use_swiglu_ffn": config.is_gated,
        **({"num_register_tokens": registers} if registers else {"use_mask_token": True}),
    }
    if labels is not None:
        content["id2label"] = {str(index): label for index, label in enumerate(labels)}
        content["label2id"] = {label: index for index, label in enumerate(labels)}
    return dict(sorted(content.items()))


def huggingface_preprocessor(
    img_size: int,
    *,
    patch_size: int,
    in_chans: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, object]:
    """`preprocessor_config.json`: the released file for released models, else the model's own size and statistics."""
    # Weights trained at 518 pixels are evaluated at 224, as published; others at the size they were trained at.
    crop = min(img_size, 224)
    crop = crop // patch_size * patch_size
    return {
        "crop_size": {"height": crop, "width": crop},
        "do_center_crop": True,
        "do_convert_rgb": in_chans == 3,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean or _IMAGENET_MEAN),
        "image_processor_type": "BitImageProcessor",
        "image_std": list(std or _IMAGENET_STD),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": round(crop * 256 / 224)},
    }


def read_huggingface_config(config: Mapping[str, object], *, source: str) -> dict[str, object]:
    """Values of a `BackboneConfig` in a `config.json`; the position rule only where it is written.

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
        heads = _whole(config.get("num_attention_heads", 12))
        facts: dict[str, object] = {
            "img_size": image,
            "patch_size": patch[0],
            "in_chans": _whole(config.get("num_channels", 3)),
            "embed_dim": _whole(config.get("hidden_size", 768)),
            "depth": _whole(config.get("num_hidden_layers", 12)),
            "num_heads": heads,
            "ffn_layer": "swiglufused" if _flag(config.get("use_swiglu_ffn", False)) else "mlp",
            "qkv_bias": _flag(config.get("qkv_bias", True)),
            "num_register_tokens": _whole(config.get("num_register_tokens", 4)) if "registers" in family else 0,
        }
    except (TypeError, ValueError) as error:
        raise WeightsError(
            f"{source} has a value of another kind than it should ({error}); copy the file again"
        ) from error
    facts |= {key: config[key] for key in ("interpolate_offset", "interpolate_antialias") if key in config}
    if patch[0] != patch[1] or min(*patch, *image, heads) < 1:
        raise WeightsError(
            f"{source} has patches of {short_repr(patch)} pixels, images of {short_repr(image)} and "
            f"{short_repr(heads)} heads; copy the file again"
        )
    return facts


def read_normalisation(preprocessor: Mapping[str, object]) -> dict[str, object]:
    """`mean` and `std` of a `preprocessor_config.json` as they stand in it, where it normalises; else nothing."""
    statistics = {"mean": preprocessor.get("image_mean"), "std": preprocessor.get("image_std")}
    if not preprocessor.get("do_normalize", True) or None in statistics.values():
        return {}
    return {key: [value] if isinstance(value, int | float) else value for key, value in statistics.items()}


def _pair(value: object) -> list[int]:
    if isinstance(value, (list, tuple)):
        height, width = value
        return [_whole(height), _whole(width)]
    return [_whole(value), _whole(value)]


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(short_repr(value))
    return value


def _whole(value: object) -> int:
    # Not `int(...)`, which also reads text, in the digits of every script, and cuts fractions off.
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(short_repr(value))
    return value


def _whole_ratio(config: BackboneConfig) -> int:
    """The whole `mlp_ratio` that gives the same hidden width; the newest stock classes take no other."""
    dim, ratio, gated = config.embed_dim, config.mlp_ratio, config.is_gated

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
