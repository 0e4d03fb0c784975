"""The names that transformers has used in memory since 5.18 (q_proj, gate_proj, ...), brought to those on disk.

Files hold the names on disk, whatever version wrote them, unless they were saved with `save_original_format=False`.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dinov2.errors import WeightsError

__all__ = [
    "files_with_names_in_memory",
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


def rename_projections(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Rewrites `q_proj`, `k_proj`, `v_proj` and `o_proj` below `prefix` to the names on disk, in place."""
    for new, on_disk in _PROJECTIONS.items():
        for kind in ("weight", "bias"):
            if (tensor := state_dict.pop(f"{prefix}{new}.{kind}", None)) is not None:
                state_dict[f"{prefix}{on_disk}.{kind}"] = tensor


def rename_gates(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Rewrites `gate_proj`, `up_proj` and `down_proj` below `prefix` to `weights_in` and `weights_out`, in place."""
    for kind in ("weight", "bias"):
        gate, up, down = (
            state_dict.pop(f"{prefix}{name}.{kind}", None) for name in ("gate_proj", "up_proj", "down_proj")
        )
        if gate is not None and up is not None:
            state_dict[f"{prefix}weights_in.{kind}"] = torch.cat([gate, up])
        if down is not None:
            state_dict[f"{prefix}weights_out.{kind}"] = down


def refuse_adapter(keys: Iterable[str], prefix: str = "") -> None:
    """Raises `WeightsError` for a tensor of an adapter on a module by its name in memory, which no module here takes.

    PEFT puts an adapter on the modules that it finds and leaves out the tensors of all others.
    """
    for key in keys:
        if key.startswith(prefix) and _IN_MEMORY_ADAPTER.search(key):
            raise WeightsError(
                f"the adapter was trained with the names that transformers has in memory since 5.18 ({key}), and would "
                "load in part; put it on transformers' own class, call merge_and_unload, save, and load the result here"
            )


def files_with_names_in_memory(
    source: str | os.PathLike[str] | None, subfolder: str = "", variant: str | None = None
) -> list[Path]:
    """The weight files of a local folder if they hold the names in memory; nothing for all other sources.

    Safetensors files come before `.bin`, and one file before shards, as transformers chooses.
    """
    if source is None:
        return []
    folder = Path(source) / subfolder
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
