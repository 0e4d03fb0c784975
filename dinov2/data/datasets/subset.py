"""Some images of another data set, named in a text file: few-shot lists, such as the 1 % and 10 % of ImageNet.

The published lists (SimCLR's `1percent.txt` and `10percent.txt`) hold one file name a line, without folders; those of
others hold paths. Both are understood: a name is compared with the end of each image's path.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dinov2.data.datasets.base import ImageDataset, digest
from dinov2.data.datasets.listing import read_text
from dinov2.errors import DataError

__all__ = ["Subset", "rows_by_name"]


class Subset(ImageDataset):
    """Images `rows` (int64 `[R]`) of `dataset`, in that order, with its classes and their numbers.

    The transforms of `dataset` are not applied; give those of the subset. Raises DataError when a row is outside.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        rows: np.ndarray,
        *,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(transform=transform, target_transform=target_transform)
        self.dataset = dataset
        self.rows = np.asarray(rows, dtype=np.int64)
        if not len(self.rows) or self.rows.min() < 0 or self.rows.max() >= len(dataset):
            raise DataError(f"a subset needs at least one image and numbers from 0 to {len(dataset) - 1}")
        self.class_names = dataset.class_names

    def __len__(self) -> int:
        return len(self.rows)

    def get_image_data(self, index: int) -> bytes:
        return self.dataset.get_image_data(int(self.rows[index]))

    def get_image(self, index: int) -> Image.Image:
        return self.dataset.get_image(int(self.rows[index]))

    def get_tensor(self, index: int, *, channels: int = 3) -> Tensor:
        return self.dataset.get_tensor(int(self.rows[index]), channels=channels)

    def get_target(self, index: int) -> int | None:
        return self.dataset.get_target(int(self.rows[index]))

    def get_targets(self) -> np.ndarray | None:
        targets = self.dataset.get_targets()
        return None if targets is None else targets[self.rows]

    def path_of(self, index: int) -> str:
        return self.dataset.path_of(int(self.rows[index]))

    def fingerprint(self) -> str:
        return digest("subset", self.dataset.fingerprint(), self.rows)


def rows_by_name(dataset: ImageDataset, file: str | os.PathLike[str]) -> np.ndarray:  # -> int64 [R]
    """Numbers of the images that a text file names, one a line, in the order of the data set.

    A name without a folder stands for the file of that name; with folders, for the path that ends so. Raises DataError
    when a name fits no image or several, or stands there twice.
    """
    lines = read_text(os.fspath(file)).splitlines()
    names = [line.strip().replace(os.sep, "/").removeprefix("./") for line in lines if line.strip()]
    if not names:
        raise DataError(f"the list {file} names no image; write one file name a line")
    found: dict[str, int] = {}
    depths = {name.count("/") + 1 for name in names}
    wanted = set(names)
    for index in range(len(dataset)):
        parts = dataset.path_of(index).replace(os.sep, "/").split("/")
        for depth in depths:
            name = "/".join(parts[-depth:])
            if name not in wanted:
                continue
            if name in found:
                raise DataError(f"{name} in the list {file} is the name of several images; write more of its path")
            found[name] = index
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(names)} images that {file} names are not in the data set, "
            f"the first is {missing[0]}"
        )
    rows = np.unique([found[name] for name in names])
    if len(rows) != len(names):
        raise DataError(f"the list {file} names {len(names) - len(rows)} images twice; name each once")
    return rows
