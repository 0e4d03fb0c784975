"""Labelled images to train and to score on, from any data set strings; one set alone is split in two by its names.

The split depends on nothing but class and name of each image: the same images in another order, on another machine or
below another folder are split alike.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.base import FileDataset, ImageDataset, Subset, digest
from dinov2.data.datasets.imagenet_classes import infer_class_ids
from dinov2.data.loaders import make_dataset
from dinov2.encode.stream import Features, Scoring
from dinov2.errors import ConfigError, DataError
from dinov2.eval.scoring import class_numbers

__all__ = [
    "EvaluationSets",
    "LabelledDataset",
    "check_sets",
    "labelled",
    "open_sets",
    "split_rows",
    "split_set",
]

_VAL_SHARE = 0.2
"""Share of each class that is scored when there is only one set."""

_STAT_THREADS = 16


def labelled(dataset: str) -> ImageDataset:
    """The data set of a string or path; raises `DataError` when it has no labels."""
    images = make_dataset(dataset)
    targets = images.get_targets()
    if targets is None or not bool((np.asarray(targets) >= 0).any()):
        raise DataError(
            f"{dataset} has no labels, which an evaluation needs; sort the images into one folder a class, "
            "or give a list:FILE with a label column"
        )
    return images


@dataclass(eq=False)
class LabelledDataset:
    """A labelled data set and the string that it was opened from."""

    name: str
    images: ImageDataset
    _identity: dict[str, object] | None = field(default=None, init=False, repr=False)

    def identity(self) -> dict[str, object]:
        """Identity of these images for features: the images, when files were last written, labels and class names.

        The times are in it because a picture that was edited may keep its name and its size. All files are looked at
        once for each opened set.
        """
        if self._identity is None:
            self._identity = self._looked_at()
        return self._identity

    @cached_property
    def class_ids(self) -> tuple[str, ...] | None:
        """Identifier of each class, where they are ImageNet's."""
        found = infer_class_ids(self.images)
        return None if found is None else tuple(found)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of each class, where the set knows them."""
        return None if self.images.class_names is None else tuple(self.images.class_names)

    def with_rules(self, features: Features) -> Features:
        """Features of these images with what the set itself says of its classes and of how answers are scored.

        It is said anew each time, so that features that an older version has kept are scored by today's rules.
        """
        images = torch.arange(len(features)) if features.indices is None else features.indices
        return replace(features, class_ids=self.class_ids, scoring=Scoring.of(self.images, images))

    def _looked_at(self) -> dict[str, object]:
        targets = self.images.get_targets()
        return {
            "images": self.images.fingerprint(),
            "written": _times_of(self.images),
            "labels": "" if targets is None else digest(np.asarray(targets, dtype=np.int64)),
            "class_names": list(self.images.class_names or ()),
        }


@dataclass(frozen=True)
class EvaluationSets:
    """Training and scored images; `split` is None when these are two data sets."""

    train: LabelledDataset
    val: LabelledDataset
    split: dict[str, object] | None = None
    """Description of the split of one set, for the results."""

    def divided(self, train: Features, val: Features) -> tuple[Features, Features]:
        """The training and validation rows of the features of `self.train` and `self.val`."""
        if self.split is None:
            return train, val
        train_images, val_images = split_rows(self.train.images)
        return _rows_of(train, train_images), _rows_of(val, val_images)


def open_sets(train_dataset: str | None, val_dataset: str | None, dataset: str | None = None) -> EvaluationSets:
    """Opens a training and a validation set, or one set that is split.

    Raises `ConfigError` when none or too many were named, `DataError` for sets without labels, of one class only or
    with no class in common.
    """
    if dataset and (train_dataset or val_dataset):
        raise ConfigError("one data set to be split and others besides were named; give --dataset alone, or the others")
    only = dataset or train_dataset
    if not only:
        raise ConfigError("no labelled images were named; give --train-dataset and --val-dataset, or one --dataset")
    train = LabelledDataset(only, labelled(only))
    return check_sets(train, LabelledDataset(val_dataset, labelled(val_dataset))) if val_dataset else split_set(train)


def check_sets(train: LabelledDataset, val: LabelledDataset) -> EvaluationSets:
    """A set to learn from and a set to score on. Raises `DataError` for one class only or none in common."""
    _require_two_classes(train)
    _require_common_class(train, val)
    return EvaluationSets(train, val)


def split_set(train: LabelledDataset) -> EvaluationSets:
    """One set, of which a share of each class is scored. Raises `DataError` for one class, or one image a class."""
    _require_two_classes(train)
    train_images, val_images = split_rows(train.images)
    if not len(val_images):
        raise DataError(
            f"{train.name} has one image a class, which leaves none to score on; give --val-dataset, or more images"
        )
    split = {
        "rule": "by SHA-256 of class and name, within each class",
        "val_share": _VAL_SHARE,
        "n_train": len(train_images),
        "n_val": len(val_images),
    }
    return EvaluationSets(train, train, split)


def split_rows(images: ImageDataset) -> tuple[Tensor, Tensor]:  # int64 [S_train], int64 [S_val]
    """Positions of the labelled images to train and to score on, ascending; a class of one image trains."""
    targets = images.get_targets()
    assert targets is not None  # of a set that `labelled` opened
    names, by_class = _names_of(images), dict[int, list[int]]()
    for index, label in enumerate(np.asarray(targets).tolist()):
        if label >= 0:
            by_class.setdefault(label, []).append(index)
    train: list[int] = []
    val: list[int] = []
    for label, members in by_class.items():
        called = images.class_names[label] if images.class_names else str(label)
        order = sorted(
            members,
            key=lambda index: hashlib.sha256(f"{called}\n{names[index]}".encode("utf-8", "surrogatepass")).digest(),
        )
        n_val = max(1, round(_VAL_SHARE * len(order))) if len(order) > 1 else 0
        val += order[:n_val]
        train += order[n_val:]
    return torch.tensor(sorted(train), dtype=torch.int64), torch.tensor(sorted(val), dtype=torch.int64)


def _names_of(images: ImageDataset) -> list[str]:
    """Names of the images without the folder that they lie in as a whole."""
    paths = [images.path_of(index) for index in range(len(images))]
    if not _are_files(images):
        return paths
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]


def _are_files(images: ImageDataset) -> bool:
    """Whether each image, also of a subset, is a file of its own."""
    return isinstance(images.dataset if isinstance(images, Subset) else images, FileDataset)


def _rows_of(features: Features, images: Tensor) -> Features:
    """The rows of those images that could be read."""
    positions = torch.arange(len(features)) if features.indices is None else features.indices
    return features.take(torch.isin(positions, images).nonzero().squeeze(1))


def _times_of(images: ImageDataset) -> str:
    if not _are_files(images):
        return ""

    def time_of(index: int) -> int:
        try:
            return os.stat(images.path_of(index)).st_mtime_ns
        except OSError:  # it will be listed as unreadable
            return -1

    with ThreadPoolExecutor(max_workers=_STAT_THREADS) as pool:  # a network disk answers many at a time
        return digest(np.fromiter(pool.map(time_of, range(len(images)), chunksize=1024), np.int64, len(images)))


def _classes_of(named: LabelledDataset) -> set[int]:
    targets = named.images.get_targets()
    assert targets is not None
    return {int(label) for label in np.unique(np.asarray(targets)) if label >= 0}


def _require_two_classes(train: LabelledDataset) -> None:
    classes = _classes_of(train)
    if len(classes) < 2:
        names = train.images.class_names
        only = repr(names[min(classes)]) if names else str(min(classes))
        raise DataError(
            f"all labelled images of {train.name} are of the one class {only}; an evaluation needs two or more classes"
        )


def _require_common_class(train: LabelledDataset, val: LabelledDataset) -> None:
    numbers = class_numbers(train, val)
    of_val = _classes_of(val)
    if not _classes_of(train) & (of_val if numbers is None else {int(numbers[label]) for label in of_val}):
        raise DataError(
            f"{train.name} and {val.name} have no class in common; check that both use the same class folders"
        )
