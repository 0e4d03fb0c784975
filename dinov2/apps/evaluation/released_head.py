"""A linear classifier that exists already, released or in a file, on labelled images: nothing is trained.

Its classes and those of the images are brought together by a mapping that the data set has (ImageNet-A, R, ...), by the
identifiers or names of ImageNet's classes, or, where both have equally many, by their numbers.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.apps.evaluation.datasets import NamedSet
from dinov2.apps.evaluation.features import FeatureBank
from dinov2.apps.evaluation.subjects import Subject
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES
from dinov2.data.datasets.subset import Subset
from dinov2.errors import DataError, WeightsError
from dinov2.eval.linear import evaluate_head
from dinov2.eval.outcome import Evaluation
from dinov2.features.extract import Features
from dinov2.models.linear_head import LinearHead, head_from_state
from dinov2.models.weights import read_file
from dinov2.pretrained import Pretrained, digest_of_files
from dinov2.sources import ShowProgress, find

__all__ = [
    "HeadFile",
    "attach_head",
    "head_parts",
    "knows_classes_of",
    "label_sets_of",
    "read_class_mapping",
    "score_head",
    "score_head_on",
    "wnids_of",
]


@dataclass(frozen=True)
class HeadFile:
    """Where a classifier came from, for the results."""

    name: str
    sha256: str


def attach_head(
    loaded: Pretrained, source: str | os.PathLike[str], *, progress: ShowProgress | None = None
) -> HeadFile:
    """Puts the classifier of a file, an address or a release's name on a loaded backbone.

    Raises `WeightsError` when it does not fit or is none.
    """
    found = find(source, progress=progress)
    path = found.head or found.path
    loaded.head = head_from_state(read_file(path), embed_dim=loaded.embed_dim, source=str(source)).to(loaded.device)
    return HeadFile(Path(str(source)).name, digest_of_files([path]))


def head_parts(head: LinearHead, subject: Subject) -> tuple[str, ...]:
    """The columns that a classifier reads. Raises `WeightsError` when the model does not show enough blocks."""
    if head.layers == 1:
        return ("cls", "mean")
    if subject.blocks < head.layers:
        raise WeightsError(
            f"the classifier reads {head.layers} blocks, but {subject.name} shows {subject.blocks}; give a 1-layer one"
        )
    return ("earlier", "cls", "mean")


def wnids_of(images: ImageDataset) -> list[str] | None:
    """ImageNet's identifier of each class of a data set; None where its classes are others."""
    inner: Any = images.dataset if isinstance(images, Subset) else images
    names = list(images.class_names or ())
    if (known := getattr(inner, "class_ids", None)) is not None:
        return list(known)
    if hasattr(inner, "find_class_id"):
        return [str(inner.find_class_id(number)) for number in range(len(names))]
    by_name = {row.name: row.wnid for row in IMAGENET_CLASSES}
    wnids = {row.wnid for row in IMAGENET_CLASSES}
    if any(name in wnids for name in names):
        return names
    if any(name in by_name for name in names):
        return [by_name.get(name, name) for name in names]
    return None


def label_sets_of(images: ImageDataset, features: Features) -> Tensor | None:  # int64 [S, A]
    """Reassessed labels of the images that could be read, where the data set has some (ReaL)."""
    sets = getattr(images, "label_sets", None)
    if sets is None:
        return None
    rows = torch.arange(len(features)) if features.indices is None else features.indices
    return torch.as_tensor(np.asarray(sets))[rows]


def read_class_mapping(file: str | os.PathLike[str]) -> Tensor:  # int64 [C_test]
    """A `.npy` file with the classifier's class of each class of the data set. Raises `DataError` for other files."""
    try:
        numbers = np.load(Path(file).expanduser(), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the class mapping {file} cannot be read ({error}); give a .npy file of whole numbers"
        ) from error
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(
            f"the class mapping {file} holds {numbers.dtype} {list(numbers.shape)}; give a .npy file with a whole "
            "number for each class of the data set"
        )
    return torch.from_numpy(numbers.astype(np.int64))


def score_head(
    head: LinearHead, val: Features, images: ImageDataset, *, mapping: Tensor | None = None, **fields: Any
) -> Evaluation:
    """Scores features `[S, (1+layers)*D]` of all readable `images` with a classifier; `fields` are those of the rows.

    With a `mapping`, and for data sets that have one (ImageNet-A, R, ...), only their classes are answers. Raises
    `DataError` when the classes do not fit.
    """
    fields["label_sets"] = label_sets_of(images, val)
    own = getattr(images, "class_mapping", None)
    if mapping is None and own is not None and head.out_features == len(IMAGENET_CLASSES):
        mapping = torch.as_tensor(np.asarray(own), dtype=torch.int64)
    if mapping is not None:
        return evaluate_head(head, val, class_mapping=mapping, **fields)
    if head.out_features == len(IMAGENET_CLASSES) and (wnids := wnids_of(images)) is not None:
        of_head = tuple(row.wnid for row in IMAGENET_CLASSES)
        found = evaluate_head(head, replace(val, class_names=tuple(wnids)), class_names=of_head, **fields)
        names = tuple(row.name for row in IMAGENET_CLASSES)
        outcomes = {key: replace(outcome, class_names=names) for key, outcome in found.outcomes.items()}
        return Evaluation(found.rows, outcomes)
    n_own = _n_classes(images)
    if n_own != head.out_features:
        raise DataError(
            f"the classifier knows {head.out_features} classes and the images have {n_own}, and their names do not "
            "tell which is which; name the class folders by ImageNet's identifiers (n01440764), or give a class mapping"
        )
    return evaluate_head(head, val, **fields)


def knows_classes_of(head: LinearHead, images: ImageDataset) -> bool:
    """Whether `score_head` can bring the classes of a classifier and of a data set together."""
    if head.out_features == len(IMAGENET_CLASSES) and (hasattr(images, "class_mapping") or wnids_of(images)):
        return True
    return _n_classes(images) == head.out_features


def _n_classes(images: ImageDataset) -> int:
    return len(images.class_names or ()) or int(np.asarray(images.get_targets()).max()) + 1


def score_head_on(
    loaded: Pretrained,
    subject: Subject,
    sets: Sequence[NamedSet],
    bank: FeatureBank,
    *,
    mappings: Sequence[Tensor | None] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Evaluation]:
    """The loaded model's own classifier on each data set, by its name; `settings` join those of the rows.

    Raises `WeightsError` when there is no classifier, or it needs more blocks than the model shows.
    """
    if loaded.head is None:
        raise WeightsError(
            f"{loaded.source} holds a backbone without a classifier; give a --train-dataset to train one, a model such "
            "as dinov2_vits14_lc, or a --classifier-fpath"
        )
    parts = head_parts(loaded.head, subject)
    chosen = [*mappings, *[None] * (len(sets) - len(mappings))]
    found = {}
    for one, mapping in zip(sets, chosen, strict=True):
        evaluation = score_head(
            loaded.head,
            bank.features(subject, one, parts=parts),
            one.images,
            mapping=mapping,
            dataset=one.name,
            model=subject.described,
            transform=subject.transform.describe(),
            precision=subject.precision,
        )
        rows = [replace(row, settings={**row.settings, **(settings or {})}) for row in evaluation.rows]
        found[one.name] = Evaluation(rows, evaluation.outcomes)
    return found
