"""Evaluation of features that `dinov2 embed` wrote, or that an earlier evaluation kept: no model and no image is read.

Labels are the column `label` of the features; where there is none, those of a labelled data set of the same images.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.apps.evaluation.datasets import EvaluationSets, LabelledDataset, check_sets, labelled, split_set
from dinov2.apps.evaluation.features import PARTS, Extraction, FeatureExtractor
from dinov2.data.datasets.base import ImageDataset, digest
from dinov2.data.eval_transform import MAX_TOKENS, EvalTransform
from dinov2.encode.store import StoredFeatures, open_features
from dinov2.encode.stream import Features
from dinov2.encode.tokens import require_finite
from dinov2.errors import ConfigError, DataError

__all__ = ["StoredCache", "open_stored"]


def open_stored(
    files: Sequence[str | os.PathLike[str]], datasets: Sequence[str | None], device: torch.device
) -> tuple[FeatureExtractor, EvaluationSets]:
    """The extractor and the sets of one file of features, which is split, or of two, to learn from and to score on.

    `datasets` are labelled data sets of the same images, in the same order, where the files have no labels.
    Raises `ConfigError` or `DataError` for files that say too little, or that do not belong together.
    """
    if len(files) > 2:
        raise ConfigError(f"{len(files)} files of features were named; give one, or one to learn from and one to score")
    opened = [open_features(file) for file in files]
    models = [_request(stored, "model").get("sha256") for stored in opened]
    if models[0] != models[-1]:
        raise ConfigError(f"{files[0]} and {files[-1]} hold features of two models; embed both sets with one")
    names = [*datasets, None, None]
    train, *others = (
        LabelledDataset(str(file), _StoredImages(stored, name))
        for file, stored, name in zip(files, opened, names, strict=False)
    )
    sets = check_sets(train, others[0]) if others else split_set(train)
    return _extractor(opened, device), sets


class StoredCache:
    """Features of the sets of `open_stored`, in place of those that a model computes."""

    batch_size = 1

    def __init__(self) -> None:
        self.extractions: dict[str, Extraction] = {}

    def features(
        self, extractor: FeatureExtractor, images: LabelledDataset, *, parts: Sequence[str] = ("cls",)
    ) -> Features:
        """The columns of the parts side by side. Raises `ConfigError` for images whose features are not there."""
        if not isinstance(images.images, _StoredImages):
            raise ConfigError(f"the features of {images.name} would need a model; name --model in place of --features")
        columns = [column for part in PARTS if part in parts for column in _columns(images.images.stored, part)]
        found = images.images.features(columns)
        require_finite(found.features, of=f"rows of {images.name}")
        return images.with_rules(found)

    def is_kept(self, extractor: FeatureExtractor, images: LabelledDataset, *, parts: Sequence[str] = ("cls",)) -> bool:
        """Whether nothing has to be computed: always."""
        return True

    def forget(self) -> None:
        """Nothing is held."""


class _StoredImages(ImageDataset):
    """The images that rows of features are of: names and labels, without pixels."""

    def __init__(self, stored: StoredFeatures, dataset: str | None) -> None:
        super().__init__()
        self.stored = stored
        self._paths = stored.read("path").tolist() if "path" in stored.columns else None
        if dataset is not None:
            images = labelled(dataset)
            self._targets, self.class_names = self._labels_from(images, dataset), images.class_names
        elif "label" in stored.columns and bool(((labels := stored.read("label")) >= 0).any()):
            self._targets, self.class_names = labels, stored.manifest.get("class_names")
        else:
            raise DataError(
                f"the features in {stored.path} have no labels; name the labelled data set of the same images "
                "(--dataset, --train-dataset, --val-dataset), or embed a folder of class folders"
            )

    def __len__(self) -> int:
        return len(self.stored)

    def get_image_data(self, index: int) -> bytes:
        raise ConfigError(f"{self.stored.path} holds features and no images; this needs --model and data sets")

    def get_image(self, index: int) -> Any:
        return self.get_image_data(index)

    def get_tensor(self, index: int, *, channels: int = 3) -> Any:
        return self.get_image_data(index)

    def get_target(self, index: int) -> int | None:
        target = int(self._targets[index])
        return None if target < 0 else target

    def get_targets(self) -> np.ndarray | None:
        return self._targets

    def path_of(self, index: int) -> str:
        return f"row {index}" if self._paths is None else str(self._paths[index])

    def fingerprint(self) -> str:
        return digest(str(self.stored.path), str(len(self)))

    def features(self, columns: Sequence[str]) -> Features:
        """The given columns side by side, with labels; rows are numbered as they are in the file."""
        vectors = [torch.from_numpy(np.require(self.stored.read(name), np.float32, ["C", "W"])) for name in columns]
        labels = torch.from_numpy(np.array(self._targets, dtype=np.int64))
        names = None if self.class_names is None else tuple(self.class_names)
        return Features(torch.cat(vectors, dim=1) if len(vectors) > 1 else vectors[0], labels, names)

    def _labels_from(self, images: ImageDataset, name: str) -> np.ndarray:
        targets = np.asarray(images.get_targets(), dtype=np.int64)
        if images.fingerprint() == _request(self.stored, "source").get("fingerprint"):
            return targets[self.stored.read("index")]
        label_of = {os.path.realpath(images.path_of(number)): label for number, label in enumerate(targets.tolist())}
        root = self.stored.manifest.get("root") or ""
        paths = [os.path.realpath(os.path.join(root, path)) for path in self._paths or ()]
        missing = [path for path in paths if path not in label_of]
        if missing or not paths:
            example = missing[0] if missing else "its rows, which have no path"
            raise DataError(
                f"{name} has no label for {example}, of the features in {self.stored.path}; name the data set that was "
                "embedded"
            )
        return np.array([label_of[path] for path in paths])


def _request(stored: StoredFeatures, key: str) -> dict[str, Any]:
    found = stored.manifest.get("request", {}).get(key)
    return found if isinstance(found, dict) else {}


def _columns(stored: StoredFeatures, part: str) -> list[str]:
    """The stored columns of a part of the extractor's columns; none where the part was not embedded."""
    if part in stored.columns:
        return [part]
    if part != PARTS[0]:
        return []
    earlier: list[str] = []
    for block in range((stored.manifest.get("depth") or 0) - 2, -1, -1):
        if len(earlier) == 3 or f"layer{block}_cls" not in stored.columns:
            break
        earlier.insert(0, f"layer{block}_cls")
    return earlier


def _extractor(opened: Sequence[StoredFeatures], device: torch.device) -> FeatureExtractor:
    first, model, transform = opened[0], _request(opened[0], "model"), _request(opened[0], "transform")
    common = [name for name in first.columns if all(name in stored.columns for stored in opened)]
    parts = {part: columns for part in PARTS if (columns := _columns(first, part)) and set(columns) <= set(common)}
    if "cls" not in parts:
        raise ConfigError(f"{' and '.join(str(stored.path) for stored in opened)} have no column cls to evaluate")
    size = dict.fromkeys(parts, 0)
    for part, columns in parts.items():
        size[part] = sum(next(iter(first.pieces(column))).shape[1] for column in columns)
    resize, fit = transform.get("resize"), transform.get("fit", "crop")
    patch = transform["pad_to"] if fit == "pad" else int(str(resize).rpartition(" ")[2]) if fit == "aspect" else 14
    return FeatureExtractor(
        name=str(model.get("name", Path(first.path).name)),
        columns=_no_model,
        parts=size,
        blocks=1 + len(parts.get(PARTS[0], ())),
        described={"name": first.path.name, **model, "features": str(first.path)},
        identity={"weights": model.get("sha256")},
        transform=EvalTransform(
            crop_size=transform.get("size", 224),
            resize_size=resize if isinstance(resize, int) else 0,
            fit=fit,
            patch_size=patch,
            max_tokens=transform.get("max_tokens", MAX_TOKENS),
            **{key: transform[key] for key in ("mean", "std") if key in transform},
        ),
        precision=str(first.manifest.get("request", {}).get("precision", "float32")),
        device=device,
    )


def _no_model(images: torch.Tensor) -> torch.Tensor:
    raise ConfigError("features were named in place of a model; this needs --model")
