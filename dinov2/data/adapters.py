"""Wrappers that change what a data set yields without touching its images."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

__all__ = ["DatasetWithEnumeratedTargets"]


class DatasetWithEnumeratedTargets(Dataset[tuple[Any, tuple[int, Any]]]):
    """Yields `(image, (index, target))`, so that rows computed out of order can be put back in order.

    A sample without a label has its own index as target. Unlike in the public release, `get_target` says the same as
    `[]` does, apart from the target transform.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def get_image_data(self, index: int) -> bytes:
        """The bytes of image `index`, as the wrapped data set gives them."""
        data: bytes = self._dataset.get_image_data(index)
        return data

    def get_target(self, index: int) -> tuple[int, int]:
        """`(index, label)`, or `(index, index)` when there is no label."""
        target = self._dataset.get_target(index)
        return index, index if target is None else target

    def get_targets(self) -> np.ndarray:
        """Labels of all samples, int64 `[S]`; their indices when the set has no labels."""
        targets = self._dataset.get_targets()
        return np.arange(len(self), dtype=np.int64) if targets is None else np.asarray(targets)

    def __getitem__(self, index: int) -> tuple[Any, tuple[int, Any]]:
        image, target = self._dataset[index]
        return image, (index, index if target is None else target)

    def __len__(self) -> int:
        return len(self._dataset)
