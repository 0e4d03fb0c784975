"""Features on disk under a key made of their content: what was run on what, never a file name.

The key is the SHA-256 of canonical JSON, so whoever changes the weights, the transform, the precision or the images
gets another key. An entry is a folder with one safetensors file and a manifest that is written last; a folder without
a manifest, or whose tensors do not have the manifest's checksum, is refused.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov2.distributed import all_reduce_max, barrier, is_main_process
from dinov2.encode.scoring import Scoring
from dinov2.encode.stream import Features
from dinov2.errors import DataError
from dinov2.whole_files import read_json, replacing, utf8_path, write_json

__all__ = [
    "EXTRACTOR_VERSION",
    "cached_features",
    "content_key",
    "dataset_fingerprint",
    "load_features",
    "save_features",
]

EXTRACTOR_VERSION = 2
"""Part of every key; it rises when the same model and images would give other features."""

_MANIFEST, _TENSORS = "manifest.json", "features.safetensors"
_RULES = ("class_mapping", "label_sets", "part_numbers")  # tensors of `Scoring`


def content_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of `parts` as canonical JSON, in hexadecimal; the order of the keys does not matter.

    Parts should be: digest of the weights, model, kind of feature and its normalisation, transform, resolution, compute
    precision, fingerprint of the data set.
    """
    try:
        text = json.dumps({"extractor": EXTRACTOR_VERSION, **parts}, sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise DataError(f"a cache key is made of plain JSON values, {error}; turn the value into text") from error
    return hashlib.sha256(text.encode()).hexdigest()


def dataset_fingerprint(files: Iterable[tuple[str, int]], *, class_names: Iterable[str] | None = None) -> str:
    """SHA-256 of sorted (relative path, size in bytes) and the label map, for data sets that have none of their own."""
    parts = {"files": sorted(files), "class_names": None if class_names is None else list(class_names)}
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def save_features(folder: Path | str, features: Features, *, parts: Mapping[str, Any]) -> Path:
    """Write one cache entry below `folder` and return its path; nothing half-written is ever taken for an entry."""
    entry = Path(folder) / content_key(parts)
    entry.mkdir(parents=True, exist_ok=True)
    tensors = {"features": features.features}
    if features.labels is not None:
        tensors["labels"] = features.labels
    if features.indices is not None:
        tensors["indices"] = features.indices
    scoring = features.scoring
    rules = None if scoring is None else {"own_classes": scoring.own_classes, "parts": scoring.parts}
    tensors |= (
        {} if scoring is None else {name: rows for name in _RULES if (rows := getattr(scoring, name)) is not None}
    )
    (entry / _MANIFEST).unlink(missing_ok=True)  # from here until the new manifest the entry does not exist
    with replacing(entry / _TENSORS) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
        checksum = _file_checksum(unfinished)
    manifest = {
        "parts": dict(parts),
        "sha256": checksum,
        "rows": len(features),
        "width": features.features.shape[1],
        "class_names": features.class_names,
        "class_ids": features.class_ids,
        "scoring": rules,
        "unreadable": features.unreadable,
    }
    write_json(entry / _MANIFEST, manifest)
    return entry


def load_features(folder: Path | str, *, parts: Mapping[str, Any]) -> Features | None:
    """The entry for `parts`; None when there is none. Raises `DataError` for one that is damaged.

    Entries of older versions know neither identifiers of classes nor rules of scoring; both are None then.
    """
    entry = Path(folder) / content_key(parts)
    if not (entry / _MANIFEST).is_file():
        return None
    try:
        manifest = read_json(entry / _MANIFEST, dict)
        checksum = _file_checksum(entry / _TENSORS)
        if checksum != manifest["sha256"]:
            raise ValueError(f"checksum {checksum[:12]} instead of {manifest['sha256'][:12]}")
        with utf8_path(entry / _TENSORS) as path:
            tensors = load_file(path)
        names, ids, rules = manifest["class_names"], manifest.get("class_ids"), manifest.get("scoring")
        return Features(
            features=tensors["features"],
            labels=tensors.get("labels"),
            class_names=None if names is None else tuple(names),
            unreadable=tuple((path, reason) for path, reason in manifest["unreadable"]),
            indices=tensors.get("indices"),
            class_ids=None if ids is None else tuple(ids),
            scoring=None if rules is None else _scoring(rules, tensors),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"the cached features in {entry} are damaged ({error}); delete that folder") from error


def cached_features(
    folder: Path | str | None, compute: Callable[[], Features], *, parts: Mapping[str, Any]
) -> Features:
    """What is stored for `parts`, else what `compute()` returns, which is then stored; a damaged entry is replaced.

    Over several processes all must call, and all compute as soon as one of them finds nothing stored: computing is
    joint work.
    Without a folder everything is computed.
    """
    if folder is None:
        return compute()
    stored: Features | None = None
    try:
        stored = load_features(folder, parts=parts)
    except DataError:
        stored = None
    someone_lacks_it = bool(all_reduce_max(torch.tensor([int(stored is None)])))
    if stored is not None and not someone_lacks_it:
        return stored
    features = compute()
    if is_main_process():
        save_features(folder, features, parts=parts)
    barrier()
    return features


def _scoring(rules: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scoring:
    parts = tuple((str(name), int(severity)) for name, severity in rules["parts"])
    return Scoring(rules["own_classes"], parts=parts, **{name: tensors.get(name) for name in _RULES})


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
