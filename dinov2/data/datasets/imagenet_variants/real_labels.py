"""ImageNet's validation images with the reassessed labels of ReaL: all classes that an image really shows.

`real.json` is a list of 50,000 lists of official class numbers, in the order of the image numbers; an empty list is an
image on which the annotators did not agree, and it is not scored. Beyer et al. 2020, "Are we done with ImageNet?".
"""

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from dinov2.data.datasets import imagenet_classes
from dinov2.data.datasets.base import FileDataset, digest, read_bytes
from dinov2.data.datasets.image_net import ImageNet
from dinov2.data.datasets.imagenet_variants.class_folders import official_class
from dinov2.errors import DataError

__all__ = ["ImageNetReaL"]

_FILE = "real.json"


class ImageNetReaL(FileDataset):
    """The VAL split of `ImageNet(root=..., extra=...)` with ReaL's label sets from `labels`, or `root/real.json`.

    The target of an image is its original label, as official number whichever classes are there; `label_sets` (int64
    `[S, A]`, padded with -1) are ReaL's, for `dinov2.features.metrics.real_accuracy`. Images without any label stay
    in: the metric leaves them out. `class_mapping` is the identity.

    Raises DataError when the file is missing or no list of lists of class numbers.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        labels: str | os.PathLike[str] | None = None,
        extra: str | os.PathLike[str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(transform=transform, target_transform=target_transform)
        self._images = ImageNet(split=ImageNet.Split.VAL, root=root, extra=extra)
        self.root = self._images.root
        self.class_ids = [row.wnid for row in imagenet_classes.IMAGENET_CLASSES]
        self.class_names = [row.name for row in imagenet_classes.IMAGENET_CLASSES]
        self.class_mapping = np.arange(len(imagenet_classes.IMAGENET_CLASSES), dtype=np.int64)
        own_targets = self._images.get_targets()
        assert own_targets is not None
        self._targets = self._official(own_targets)
        file = self._find(labels)
        by_image = _read(file)
        rows = [self._image_number(index) - 1 for index in range(len(self))]
        if max(rows) >= len(by_image):
            raise DataError(
                f"{file} has labels of {len(by_image)} images and none of image {max(rows) + 1}; "
                f"expected is the {_FILE} of ReaL, with a list for each of the 50,000"
            )
        self.label_sets = _padded([by_image[row] for row in rows])

    def __len__(self) -> int:
        return len(self._images)

    def path_of(self, index: int) -> str:
        return self._images.path_of(index)

    def get_target(self, index: int) -> int:
        return int(self._targets[index])

    def get_targets(self) -> np.ndarray:
        return self._targets

    def fingerprint(self) -> str:
        return digest("ImageNetReaL", self._images.fingerprint(), self._targets, self.label_sets)

    def _official(self, targets: np.ndarray) -> np.ndarray:  # int64 [S] -> int64 [S]
        own = np.unique(targets)
        wnids = [self._images.find_class_id(int(number)) for number in own]
        numbers = [official_class(wnid) for wnid in wnids]
        if None in numbers:
            raise DataError(
                f"{wnids[numbers.index(None)]} in {self.root} is no class of ImageNet-1k, so ReaL has no labels for it"
            )
        return np.array(numbers, dtype=np.int64)[np.searchsorted(own, targets)]

    def _find(self, labels: str | os.PathLike[str] | None) -> str:
        if labels is not None:
            return os.path.abspath(labels)
        inside = [os.path.join(self.root, *folder, _FILE) for folder in ((), ("val",), ("reassessed-imagenet",))]
        file = next((path for path in inside if os.path.isfile(path)), None)
        if file is None:
            raise DataError(
                f"there is no {_FILE} in {self.root}; put the file of ReaL's authors there, or give labels=FILE"
            )
        return file

    def _image_number(self, index: int) -> int:
        path = os.path.relpath(self._images.path_of(index), self.root)
        return self._images.split.parse_image_relpath(path)[1]


def _read(file: str) -> list[list[int]]:
    try:
        read = json.loads(read_bytes(file))
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error}); expected is the {_FILE} of ReaL") from error
    if not isinstance(read, list) or not all(isinstance(row, list) and all(map(_is_class, row)) for row in read):
        raise DataError(f"{file} is no list of lists of class numbers from 0 to 999; expected is the {_FILE} of ReaL")
    return read


def _is_class(number: Any) -> bool:
    return isinstance(number, int) and 0 <= number < len(imagenet_classes.IMAGENET_CLASSES)


def _padded(sets: list[list[int]]) -> np.ndarray:  # -> int64 [S, A]
    # One dtype whatever the lists hold; numpy's own padding of an empty list would make it float64.
    padded = np.full((len(sets), max(1, *map(len, sets))), -1, dtype=np.int64)
    for row, labels in zip(padded, sets, strict=True):
        row[: len(labels)] = labels
    return padded
