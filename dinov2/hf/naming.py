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

from dinov2.errors import WeightsError

__all__ = [
    "files_with_names_in_memory",
    "find_adapter_keys",
    "has_names_in_memory",
    "read_with_names_on_disk",
    "refuse_adapter",
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
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Within a block of ours: heads of users may have projections of these names, which are theirs.
_IN_MEMORY = re.compile(
    r"(?P<prefix>(?:.*\.)?encoder\.layer\.\d+\.(?:attention|mlp)\.)(?:[qkvo]|gate|up|down)_proj\.(?:weight|bias)"
)


_IN_MEMORY_ADAPTER = re.compile(r"encoder\.layer\.\d+\.(?:attention|mlp)\.(?:[qkvo]|gate|up|down)_proj\.\w+\.")


def rename_projections(state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Rewrites all that is below `q_proj`, `k_proj`, `v_proj` and `o_proj` to the names on disk, in place.

    Returns the new keys.
    """
    return [key for new, on_disk in _PROJECTIONS.items() for key in _move(state_dict, prefix + new, prefix + on_disk)]


def rename_gates(state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Rewrites `gate_proj`, `up_proj` and `down_proj` below `prefix` to `weights_in` and `weights_out`, in place.

    Returns the keys that stay, since they belong to one half of `weights_in`: those of adapters.
    """
    for kind in ("weight", "bias"):
        gate, up = (state_dict.pop(f"{prefix}{name}.{kind}", None) for name in ("gate_proj", "up_proj"))
        if gate is not None and up is not None:
            state_dict[f"{prefix}weights_in.{kind}"] = torch.cat([gate, up])
    _move(state_dict, f"{prefix}down_proj", f"{prefix}weights_out")
    return [key for key in state_dict if key.startswith((f"{prefix}gate_proj.", f"{prefix}up_proj."))]


def refuse_adapter(keys: Iterable[str]) -> None:
    """Raises `WeightsError` when there is a key of an adapter tensor that no module of the model takes."""
    for key in keys:
        if "gate_proj." in key or "up_proj." in key:
            raise WeightsError(
                f"the adapter holds {key}, but gate_proj and up_proj are one matrix here (weights_in); merge the adapter "
                "into its model with the classes of transformers (merge_and_unload), save that and load it"
            )
        raise WeightsError(
            f"the adapter holds {key}, but that module was not adapted: its adapter_config.json has the names that "
            "transformers has in memory since 5.18; set target_modules of its PeftConfig to the names here (query, key, "
            'value, output.dense, fc1, fc2, or "all-linear") and load with PeftModel.from_pretrained(model, folder, '
            "config=config)"
        )


def find_adapter_keys(keys: Iterable[str]) -> list[str]:
    """The keys of adapter tensors on modules by their names in memory."""
    return [key for key in keys if _IN_MEMORY_ADAPTER.search(key)]


def _move(state_dict: dict[str, Any], old: str, new: str) -> list[str]:
    moved = []
    for key in [key for key in state_dict if key.startswith(f"{old}.")]:
        moved.append(new + key.removeprefix(old))
        state_dict[moved[-1]] = state_dict.pop(key)
    return moved


def files_with_names_in_memory(source: Any, subfolder: str = "", variant: str | None = None) -> list[Path]:
    """The weight files of a local folder if they hold the names in memory; nothing for all other sources.

    Safetensors files come before `.bin`, and one file before shards, as transformers chooses.
    """
    try:
        folder = Path(source) / subfolder
    except TypeError:
        return []
    for name in _WEIGHT_FILES:
        stem, _, ending = name.rpartition(".")
        file = folder / (f"{stem}.{variant}.{ending}" if variant else name)
        if not file.is_file():
            continue
        if ending != "json":
            return [file] if has_names_in_memory(_keys(file)) else []
        places: Mapping[str, str] = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return [folder / shard for shard in sorted(set(places.values()))] if has_names_in_memory(places) else []
    return []


def read_with_names_on_disk(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of the files, under the names on disk."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read(file)
    return with_names_on_disk(tensors)


def _keys(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    try:
        return list(torch.load(file, map_location="meta", weights_only=True))
    except Exception:  # whatever is wrong with the file, transformers reports it
        return []


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return tensors


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
