"""The architecture of a bare backbone state dict, worked out from its tensors."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dinov2.errors import WeightsError
from dinov2.models.config import TABLE_VERSION, ratio_for

__all__ = ["recognise"]

_HEAD_WIDTH = 64
# Flat or chunked: the last number is the index among all blocks.
_BLOCK = re.compile(r"(blocks\.(?:[0-9]{1,9}\.)?([0-9]{1,9})\.)norm1\.weight")


def recognise(state: Mapping[str, Tensor], *, source: str = "the file", **known: Any) -> dict[str, Any]:
    """A `model` table (`dinov2.checkpoints.open.model_table`) for backbone tensors under bare keys.

    Two facts are in no tensor and follow the releases: heads are 64 wide, and models with registers resize positions by
    the size rule with antialias, those without by the offset rule. `known` overrides any entry.
    Raises `WeightsError` where a tensor is missing that tells the architecture.
    """
    try:
        _, channels, _, patch = state["patch_embed.proj.weight"].shape
        _, tokens, dim = state["pos_embed"].shape
    except KeyError as error:
        linear = "; it looks like a linear head" if set(state) <= {"weight", "bias"} and state else ""
        raise WeightsError(
            f"{source} holds no vision transformer of this kind: {error.args[0]} is missing{linear}; "
            "give the weights of a DINOv2 backbone"
        ) from error
    except ValueError as error:
        raise WeightsError(
            f"{source} has patch or position weights of another shape; give a DINOv2 backbone"
        ) from error
    side = math.isqrt(max(tokens - 1, 0))
    if side * side != tokens - 1 and "img_size" not in known:
        raise WeightsError(
            f"{source} has a grid of {tokens - 1} positions, which is not square, and does not say its height and "
            "width; write a file that does with: dinov2 convert FILE NEW.pth --to original --img-size HEIGHT WIDTH"
        )
    if dim % _HEAD_WIDTH and "num_heads" not in known:
        raise WeightsError(
            f"{source} is {dim} wide, which heads of {_HEAD_WIDTH} channels do not fill; give a configuration with "
            "student.num_heads"
        )
    found = [_BLOCK.fullmatch(key) for key in state]
    blocks = {int(match[2]): match[1] for match in found if match}
    if 0 not in blocks:
        raise WeightsError(f"{source} holds no transformer blocks, or not the first one; copy or download it again")
    if len(blocks) != max(blocks) + 1:
        raise WeightsError(f"{source} holds {len(blocks)} of {max(blocks) + 1} transformer blocks; copy it again")
    first = blocks[0]
    try:
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        feed_forward = _feed_forward(state, first, dim)
    except (IndexError, ZeroDivisionError) as error:
        raise WeightsError(f"{source} has weights of another shape than a DINOv2 backbone; copy it again") from error
    return {
        "version": TABLE_VERSION,
        "img_size": [side * patch, side * patch],
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": dim,
        "depth": max(blocks) + 1,
        "num_heads": max(dim // _HEAD_WIDTH, 1),
        **feed_forward,
        "qkv_bias": f"{first}attn.qkv.bias" in state,
        "proj_bias": f"{first}attn.proj.bias" in state,
        "layerscale": f"{first}ls1.gamma" in state,
        "num_register_tokens": registers,
        "interpolate_offset": 0.0 if registers else 0.1,
        "interpolate_antialias": bool(registers),
        "mean": None,
        "std": None,
        **known,
    }


def _feed_forward(state: Mapping[str, Tensor], block: str, dim: int) -> dict[str, Any]:
    if f"{block}mlp.w12.weight" in state:
        hidden = state[f"{block}mlp.w12.weight"].shape[0] // 2
        # The width asked for before two thirds of it were kept, rounded up to 8.
        return {
            "ffn_layer": "swiglufused",
            "mlp_ratio": ratio_for(hidden * 3 // 2, dim),
            "ffn_bias": f"{block}mlp.w3.bias" in state,
        }
    if f"{block}mlp.fc1.weight" in state:
        hidden = state[f"{block}mlp.fc1.weight"].shape[0]
        return {"ffn_layer": "mlp", "mlp_ratio": ratio_for(hidden, dim), "ffn_bias": f"{block}mlp.fc1.bias" in state}
    return {"ffn_layer": "identity", "mlp_ratio": 4.0, "ffn_bias": True}
