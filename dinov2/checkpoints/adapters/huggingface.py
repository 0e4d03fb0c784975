"""The names that Hugging Face's `dinov2` and `dinov2_with_registers` give to the tensors of a backbone.

Files hold the names of `_TOP` and `_BLOCK` in every version of the library; its classes have had others in memory since
version 5.18 (`q_proj`, `gate_proj`, ...), which a `state_dict()` or an unusual file may hold. Both are read, the former
are written.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dinov2.errors import WeightsError

__all__ = ["from_huggingface", "to_huggingface", "with_classifier", "with_every_part", "without_prefix"]

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
