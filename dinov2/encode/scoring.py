"""Scoring rules for images that do not have one label each among all classes.

ImageNet-A and R ask for the best of their own 200 classes, ReaL takes any of several labels of an image, and ImageNet-C
counts errors by corruption and severity. Data sets say so themselves (`class_mapping`, `label_sets`, `part_numbers`),
and features carry it along, so that every classifier is scored by the same rules.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.base import Subset

__all__ = ["Scoring"]


@dataclass(frozen=True)
class Scoring:
    """The rules of a test set; classes are counted as its labels count them."""

    own_classes: bool = False
    """Whether answers are chosen among the set's own classes alone."""
    class_mapping: Tensor | None = None
    """int64 [C_test]: the training label of each, where neither identifiers nor names shall tell; implies the above."""
    label_sets: Tensor | None = None
    """int64 [S, A], padded with -1: all labels of an image that are right; one without any is in no such figure."""
    parts: tuple[tuple[str, int], ...] = ()
    """(corruption, severity) of each part."""
    part_numbers: Tensor | None = None
    """int64 [S]: the part that an image belongs to."""

    @classmethod
    def of(cls, dataset: Any, images: Tensor) -> "Scoring | None":
        """The rules of a data set for the images at these positions (int64 [S]); None for the usual ones."""
        if isinstance(dataset, Subset):
            return cls.of(dataset.dataset, torch.from_numpy(dataset.rows)[images])
        own_classes = getattr(dataset, "class_mapping", None) is not None
        label_sets, part_numbers = (_rows(dataset, name, images) for name in ("label_sets", "part_numbers"))
        if not own_classes and label_sets is None and part_numbers is None:
            return None
        parts = tuple((str(name), int(severity)) for name, severity in getattr(dataset, "parts", ()))
        return cls(own_classes, label_sets=label_sets, parts=parts, part_numbers=part_numbers)

    def take(self, rows: Tensor) -> "Scoring":
        """The rules for the given rows (int64 [R])."""
        label_sets, part_numbers = (None if x is None else x[rows] for x in (self.label_sets, self.part_numbers))
        return replace(self, label_sets=label_sets, part_numbers=part_numbers)


def _rows(dataset: Any, name: str, images: Tensor) -> Tensor | None:
    values = getattr(dataset, name, None)
    return None if values is None else torch.as_tensor(np.asarray(values), dtype=torch.int64)[images]
