"""Features that evaluations keep, under a key made of their content: what was run on what, never a file name.

The key is the SHA-256 of canonical JSON, so that other weights, another transform, precision or other images give
another key. An entry is a folder of .npy columns that `open_features` opens as it does any other, with a manifest that
is written last; a folder without a manifest, or whose files are not as it says, is no entry. Entries of earlier days,
one safetensors file and `manifest.json`, are read too.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from dinov2.encode.store.hashing_writer import FileFacts
from dinov2.encode.store.shards import MANIFEST
from dinov2.encode.store.tables import StoredTable, write_table
from dinov2.encode.stream import Features
from dinov2.errors import DataError
from dinov2.whole_files import read_json, utf8_path, write_json

__all__ = ["EXTRACTOR_VERSION", "content_key", "has_features", "load_features", "save_features"]

EXTRACTOR_VERSION = 2
"""Part of every key; it rises when the same model and images would give other features."""

_TABLE, _OLD_MANIFEST = "features.npy", "manifest.json"


def content_key(parts: Mapping[str, object]) -> str:
    """SHA-256 of `parts` as canonical JSON, in hexadecimal; the order of the keys does not matter."""
    try:
        text = json.dumps({"extractor": EXTRACTOR_VERSION, **parts}, sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise DataError(f"a cache key is made of plain JSON values, {error}; turn the value into text") from error
    return hashlib.sha256(text.encode()).hexdigest()


def has_features(folder: Path, parts: Mapping[str, object]) -> bool:
    """Whether there is an entry for `parts`; only its manifest is looked at."""
    entry = folder / content_key(parts)
    return (entry / MANIFEST).is_file() or (entry / _OLD_MANIFEST).is_file()


def save_features(
    folder: Path, features: Features, *, parts: Mapping[str, object], column: str, about: Mapping[str, object]
) -> Path:
    """Write one cache entry below `folder` and return its path; nothing half-written is ever taken for an entry.

    The matrix becomes the column of that name. `about` has the `request` of what `open_features` gives, and more.
    """
    entry = folder / content_key(parts)
    entry.mkdir(parents=True, exist_ok=True)
    table = {"index": np.arange(len(features)) if features.indices is None else features.indices.numpy()}
    if features.labels is not None:
        table["label"] = features.labels.numpy()
    table[column] = features.features.numpy()
    for manifest in (MANIFEST, _OLD_MANIFEST):
        (entry / manifest).unlink(missing_ok=True)  # from here until the new manifest the entry does not exist
    facts = write_table(entry / _TABLE, [table], "npy")
    content = {
        "schema": 1,
        "state": "complete",
        **about,
        "key": parts,
        "rows": len(features),
        "tables": [{"file": _TABLE, "rows": len(features)}],
        "files": {name: fact._asdict() for name, fact in facts.items()},
        "class_names": features.class_names,
        "unreadable": features.unreadable,
    }
    write_json(entry / MANIFEST, content)
    return entry


def load_features(folder: Path, *, parts: Mapping[str, object], column: str) -> Features | None:
    """The entry for `parts`; None when there is none. Raises `DataError` for one that is damaged."""
    entry = folder / content_key(parts)
    if not has_features(folder, parts):
        return None
    try:
        if not (entry / MANIFEST).is_file():
            return _load_old(entry)
        manifest = read_json(entry / MANIFEST, dict)
        for name, fact in manifest["files"].items():
            if not FileFacts(**fact).match(entry / name):
                raise ValueError(f"{name} is not as it was written")
        table = StoredTable(entry / _TABLE)
        labels = torch.from_numpy(np.array(table["label"])) if "label" in table else None
        return _features(torch.from_numpy(np.array(table[column])), labels, np.array(table["index"]), manifest)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, DataError) as error:
        raise DataError(f"the cached features in {entry} are damaged ({error}); delete that folder") from error


def _load_old(entry: Path) -> Features:
    from safetensors.torch import load_file

    manifest, file = read_json(entry / _OLD_MANIFEST, dict), entry / "features.safetensors"
    if not FileFacts(file.stat().st_size, manifest["sha256"]).match(file):
        raise ValueError(f"{file.name} is not as it was written")
    with utf8_path(file) as path:
        tensors = load_file(path)
    indices = tensors["indices"].numpy() if "indices" in tensors else np.arange(manifest["rows"])
    return _features(tensors["features"], tensors.get("labels"), indices, manifest)


def _features(
    matrix: torch.Tensor, labels: torch.Tensor | None, indices: np.ndarray, manifest: Mapping[str, object]
) -> Features:
    names, failures = manifest["class_names"], manifest["unreadable"]
    if not isinstance(failures, list) or not isinstance(names, list | None):
        raise TypeError("its manifest is no manifest")
    unreadable = tuple((str(path), str(reason)) for path, reason in failures)
    return Features(matrix, labels, None if names is None else tuple(names), unreadable, torch.from_numpy(indices))
