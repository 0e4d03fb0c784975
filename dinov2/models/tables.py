"""The `model` table: plain values from which the same architecture is made again.

Files written here carry it (position rule and normalisation included), so that nobody has to remember with which
options weights were trained.
"""

import math
from collections.abc import Mapping
from typing import Any

from dinov2.errors import WeightsError
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["TABLE_VERSION", "build_from_table", "model_table", "ratio_for"]

TABLE_VERSION = 1
"""Version of the tables that this package writes and reads."""


def model_table(model: DinoVisionTransformer, *, mean: Any = None, std: Any = None) -> dict[str, Any]:
    """Plain values from which `build_from_table` makes the same architecture again."""
    block: Any = model.block_list[0]
    gated = hasattr(block.mlp, "w12")
    hidden = block.mlp.w12.out_features // 2 if gated else getattr(getattr(block.mlp, "fc1", None), "out_features", 0)
    feed_forward = "swiglufused" if gated else "mlp" if hidden else "identity"
    return {
        "version": TABLE_VERSION,
        "img_size": list(model.patch_embed.img_size),
        "patch_size": model.patch_size,
        "in_chans": model.patch_embed.in_chans,
        "embed_dim": model.embed_dim,
        "depth": model.n_blocks,
        "num_heads": model.num_heads,
        "mlp_ratio": ratio_for(hidden * 3 // 2 if gated else hidden, model.embed_dim) if hidden else 4.0,
        "ffn_layer": feed_forward,
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "ffn_bias": _last_linear_has_bias(block.mlp),
        "layerscale": hasattr(block.ls1, "gamma"),
        "num_register_tokens": model.num_register_tokens,
        "interpolate_offset": model.interpolate_offset,
        "interpolate_antialias": model.interpolate_antialias,
        "mean": list(mean) if mean is not None else None,
        "std": list(std) if std is not None else None,
    }


def ratio_for(hidden: int, width: int) -> float:
    """The `mlp_ratio` with which a transformer of that width gets exactly `hidden` features."""
    ratio = hidden / width
    # The product is cut, not rounded: 61 / 448 * 448 falls just short of 61.
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def build_from_table(table: Mapping[str, Any]) -> DinoVisionTransformer:
    """A fresh model of the architecture in a `model` table; blocks in a flat list.

    Raises `WeightsError` for a table of another version, or one that describes no model.
    """
    if table.get("version") != TABLE_VERSION:
        raise WeightsError(
            f"the model table of this file has version {table.get('version')}, this package reads {TABLE_VERSION}; "
            "update the package"
        )
    names = "patch_size in_chans embed_dim depth num_heads mlp_ratio ffn_layer qkv_bias proj_bias ffn_bias"
    names += " num_register_tokens interpolate_offset interpolate_antialias"
    try:
        return DinoVisionTransformer(
            img_size=tuple(table["img_size"]),
            init_values=1.0 if table["layerscale"] else None,
            block_chunks=0,
            **{name: table[name] for name in names.split()},
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AssertionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise WeightsError(
            f"the model table of this file describes no model ({reason}); copy the file again"
        ) from error


def _last_linear_has_bias(feed_forward: Any) -> bool:
    last = getattr(feed_forward, "w3", getattr(feed_forward, "fc2", None))
    return last is None or last.bias is not None
