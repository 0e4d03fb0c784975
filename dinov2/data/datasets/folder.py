"""A folder of images, nested as deep as it likes: the data set that everybody has.

The first level of folders are the classes, when every image lies in one; a folder with images directly in it has no
labels. So `photos/` works as it is, and so does `train/<class>/.../x.jpg`.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from dinov2.data.datasets.base import FileDataset, digest
from dinov2.data.datasets.scanning import Progress, in_words, scan_folder, warn_of_others
from dinov2.data.decoding import Exif
from dinov2.errors import DataError

__all__ = ["Folder"]

logger = logging.getLogger("dinov2")

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


class Folder(FileDataset):
    """All images below `root`, in the order of their paths; EXIF orientation is applied.

    `skipped` counts the files passed over: `{"hidden": ..., "other": ...}`. Raises DataError when the folder is missing
    or holds no image.
    """

    exif: ClassVar[Exif] = "apply"

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(transform=transform, target_transform=target_transform)
        self.root = os.path.abspath(root)
        scan = scan_folder(self.root, progress=progress)
        self.skipped = {"hidden": scan.hidden, "other": sum(scan.other.values())}
        if not len(scan.paths):
            raise DataError(
                f"no image was found in {self.root} ({self.skipped['other']} other and {scan.hidden} hidden files)"
                f"{f', among them {in_words(scan.other)}' if scan.other else ''}; "
                "give a folder that holds .jpg, .png or other image files at any depth"
            )
        warn_of_others(self.root, scan.other)
        self._paths = scan.paths
        self._sizes = scan.sizes
        self.class_names, self._targets = _labels_of_first_level(scan.paths)
        if self.class_names and {name.lower() for name in self.class_names} <= _SPLIT_NAMES:
            logger.warning(
                "the classes of %s are %s, which look like splits; for labels give one of these folders instead",
                self.root,
                ", ".join(self.class_names),
            )

    def __len__(self) -> int:
        return len(self._paths)

    def path_of(self, index: int) -> str:
        return os.path.join(self.root, self._paths[index])

    def get_target(self, index: int) -> int | None:
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray | None:
        return self._targets

    def fingerprint(self) -> str:
        return digest("folder", *self._paths.arrays, self._sizes)


def _labels_of_first_level(paths: Any) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names in order and labels int64 `[S]`; `(None, None)` when an image lies outside all class folders."""
    names: dict[str, int] = {}
    targets = np.empty(len(paths), dtype=np.int64)
    for index, path in enumerate(paths):
        first, slash, _ = path.partition("/")
        if not slash:
            return None, None
        targets[index] = names.setdefault(first, len(names))  # paths are sorted, so the names come in order
    return list(names), targets
