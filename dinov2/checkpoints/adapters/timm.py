"""The names that timm's `vit_*_patch14_dinov2` give to the tensors of a backbone, and the configuration beside them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2.checkpoints.adapters.huggingface import with_every_part
from dinov2.layers.swiglu_ffn import swiglu_hidden_features
from dinov2.models.config import BackboneConfig, ratio_for

__all__ = ["from_timm", "timm_config", "to_timm"]

_SIZES = {384: "small", 768: "base", 1024: "large"}


def from_timm(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The release's keys for a backbone of timm's, and notes.

    The mask token becomes zeros; where a class token already holds its position, that position becomes zeros.
    """
    result = dict(state)
    notes: list[str] = []
    for key in [key for key in result if key.endswith(".mlp.fc1.weight")]:
        prefix = key.removesuffix("fc1.weight")
        second = result.get(f"{prefix}fc2.weight")
        if second is not None and result[key].shape[0] == 2 * second.shape[1]:
            for old, new in (("fc1", "w12"), ("fc2", "w3")):
                for leaf in ("weight", "bias"):
                    if f"{prefix}{old}.{leaf}" in result:
                        result[f"{prefix}{new}.{leaf}"] = result.pop(f"{prefix}{old}.{leaf}")
    position = result.get("pos_embed")
    if "reg_token" in result:
        result["register_tokens"] = result.pop("reg_token")
        if position is not None and position.ndim == 3 and not _has_class_position(position):
            result["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
            notes.append("cls_token: holds the sum of class token and its position, which stays zero")
    if "mask_token" not in result and "cls_token" in result:
        result["mask_token"] = result["cls_token"].new_zeros(1, result["cls_token"].shape[-1])
        notes.append("mask_token: zeros, the source has none")
    return result, tuple(notes)


def to_timm(flat: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """timm's names for a backbone under the release's flat keys, and notes on what was folded or left out.

    Raises `WeightsError` for a model that timm's class cannot be.
    """
    # timm has one switch for the biases of the projection and of the feed-forward network.
    some_bias = any(key.endswith((".proj.bias", ".fc1.bias", ".w12.bias")) for key in flat if key.startswith("blocks."))
    flat, added = with_every_part(flat, "timm", layerscale=False, biases=some_bias)
    notes = list(added)
    result: dict[str, Tensor] = {}
    registers = "register_tokens" in flat
    for key, value in flat.items():
        match key:
            case "mask_token":
                zero = not bool(value.any()) if not value.is_meta else False
                notes.append(f"mask_token: left out, timm has none{' (it is zero)' if zero else ''}")
            case "register_tokens":
                result["reg_token"] = value
            case "cls_token" if registers:
                # The sum of two half-precision values is none: this one tensor stays in float32.
                result[key] = value.float() + flat["pos_embed"][:, :1].float()
                notes.append("cls_token: the sum of class token and its position, as timm keeps it")
            case "pos_embed" if registers:
                result[key] = value[:, 1:]
            case _:
                result[key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = value
    return result, tuple(notes)


def _has_class_position(position: Tensor) -> bool:
    patches = position.shape[1] - 1
    return math.isqrt(patches) ** 2 == patches


def timm_config(config: BackboneConfig, *, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """`config.json` with which `timm.create_model("local-dir:FOLDER")` builds the model in that folder."""
    gated, dim, registers = config.is_gated, config.embed_dim, config.num_register_tokens
    size = "giant" if gated else _SIZES.get(dim, "small")
    hidden = int(dim * config.mlp_ratio)
    height, width = config.img_size
    return {
        "architecture": f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2",
        "num_classes": 0,
        "num_features": dim,
        "global_pool": "token",
        "model_args": {
            "img_size": [height, width],
            "patch_size": config.patch_size,
            "in_chans": config.in_chans,
            "embed_dim": dim,
            "depth": config.depth,
            "num_heads": config.num_heads,
            # timm's gated network counts both halves.
            "mlp_ratio": ratio_for(2 * swiglu_hidden_features(hidden), dim) if gated else config.mlp_ratio,
            "qkv_bias": config.qkv_bias,
            "proj_bias": config.proj_bias or config.ffn_bias,
            "init_values": 1.0 if config.layerscale else None,
            "reg_tokens": registers,
            "num_classes": 0,
        },
        "pretrained_cfg": {
            "tag": "",
            "custom_load": False,
            "input_size": [config.in_chans, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
