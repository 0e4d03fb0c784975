"""The names that transformers has used in memory since 5.18 (q_proj, gate_proj, ...), brought to those on disk.

Files hold the names on disk, whatever version wrote them, unless they were saved with `save_original_format=False`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

__all__ = [
    "files_with_names_in_memory",
    "has_names_in_memory",
    "read_with_names_on_disk",
    "rename_gates",
    "rename_projections",
    "with_names_on_disk",
]

_PROJECTIONS = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}
# Within a block of ours: heads of users may have projections of these names, which are theirs.
_IN_MEMORY = re.compile(
    r"(?P<prefix>(?:.*\.)?encoder\.layer\.\d+\.(?:attention|mlp)\.)(?:[qkvo]|gate|up|down)_proj\.(?:weight|bias)"
)


def rename_projections(state_dict: dict[str, Any], prefix: str) -> None:
    """Rewrites `q_proj`, `k_proj`, `v_proj` and `o_proj` below `prefix` to the names on disk, in place."""
    for new, on_disk in _PROJECTIONS.items():
        for kind in ("weight", "bias"):
            if (tensor := state_dict.pop(f"{prefix}{new}.{kind}", None)) is not None:
                state_dict[f"{prefix}{on_disk}.{kind}"] = tensor


def rename_gates(state_dict: dict[str, Any], prefix: str) -> None:
    """Rewrites `gate_proj`, `up_proj` and `down_proj` below `prefix` to `weights_in` and `weights_out`, in place."""
    for kind in ("weight", "bias"):
        gate, up, down = (
            state_dict.pop(f"{prefix}{name}.{kind}", None) for name in ("gate_proj", "up_proj", "down_proj")
        )
        if gate is not None and up is not None:
            state_dict[f"{prefix}weights_in.{kind}"] = torch.cat([gate, up])
        if down is not None:
            state_dict[f"{prefix}weights_out.{kind}"] = down


def files_with_names_in_memory(source: Any, subfolder: str = "") -> list[Path]:
    """The safetensors files of a local folder if they hold the names in memory; nothing for all other sources."""
    try:
        folder = Path(source) / subfolder
    except TypeError:
        return []
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        with safe_open(whole, framework="pt") as file:
            return [whole] if has_names_in_memory(file.keys()) else []
    if not index.is_file():
        return []
    places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return [folder / name for name in sorted(set(places.values()))] if has_names_in_memory(places) else []


def read_with_names_on_disk(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of the files, under the names on disk."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return with_names_on_disk(tensors)


def with_names_on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; those of blocks that have the names in memory get the names on disk."""
    renamed = dict(tensors)
    for prefix in {found["prefix"] for found in map(_IN_MEMORY.fullmatch, tensors) if found}:
        rename_projections(renamed, prefix)
        rename_gates(renamed, prefix)
    return renamed


def has_names_in_memory(keys: Iterable[str]) -> bool:
    """Whether any of the keys is a name in memory of a tensor in a block of ours."""
    return any(map(_IN_MEMORY.fullmatch, keys))
