"""The classes that a training and a validation set share, and few-shot draws from the former.

Data sets number their classes on their own, and a validation folder may lack some of them. Numbers are only trusted
where one of the sets knows no names.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.errors import DataError
from dinov2.features.extract import Features

__all__ = ["Classification", "few_shot_rows", "match_classes"]


class Classification(NamedTuple):
    """Two sets of features with classes 0 .. C - 1 (of a validation class that nothing was trained on: -1)."""

    train_features: Tensor
    train_classes: Tensor
    val_features: Tensor
    val_classes: Tensor
    n_classes: int
    notes: tuple[str, ...]


def match_classes(train: Features, val: Features) -> Classification:
    """Bring both sets to one numbering, by class name where both know names that differ, else by label.

    Images without a label are left out, and validation images of a class that the training set lacks stay in as
    errors, each with a note. Raises `DataError` when a set has no label at all or the two share no class.
    """
    notes: list[str] = []
    train_features, train_labels = _labelled(train, "training", notes)
    val_features, val_labels = _labelled(val, "validation", notes)
    if train.class_names is not None and val.class_names is not None and train.class_names != val.class_names:
        numbers = {name: number for number, name in enumerate(train.class_names)}
        by_name = torch.tensor([numbers.get(name, -1) for name in val.class_names])
        val_labels = by_name[val_labels]
    classes, train_classes = train_labels.unique(return_inverse=True)  # classes ascending
    position = torch.searchsorted(classes, val_labels).clamp_max(len(classes) - 1)
    known = classes[position] == val_labels
    if not bool(known.any()):
        raise DataError(
            "the training and the validation images have no class in common; check that both data sets use the same "
            "class folders"
        )
    if not bool(known.all()):
        n_unknown = int((~known).sum())
        notes.append(f"{n_unknown} validation images are of classes without training images and count as errors")
    val_classes = torch.where(known, position, -1)
    if len(classes) < 5:
        notes.append(f"there are only {len(classes)} classes, so top-5 is top-{len(classes)}")
    return Classification(train_features, train_classes, val_features, val_classes, len(classes), tuple(notes))


def few_shot_rows(labels: Tensor, *, n_per_class: int, seed: int) -> Tensor:  # int64 [S] -> int64 [R]
    """Rows of `n_per_class` images of each class, classes in ascending order; all of a class that has fewer.

    The draw is the release's: one permutation per class from torch's generator with that seed.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().squeeze(1)
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:n_per_class]])
    return torch.cat(chosen)


def _labelled(features: Features, which: str, notes: list[str]) -> tuple[Tensor, Tensor]:
    if features.labels is None or not bool((features.labels >= 0).any()):
        raise DataError(
            f"the {which} images have no labels, and scores need them; "
            "give a data set with class folders or a label column"
        )
    has_label = features.labels >= 0
    if bool(has_label.all()):
        return features.features, features.labels
    notes.append(f"{int((~has_label).sum())} {which} images without a label were left out")
    return features.features[has_label], features.labels[has_label]
