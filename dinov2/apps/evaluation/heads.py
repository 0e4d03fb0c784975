"""A linear classifier that exists already, released or in a file, on labelled images: nothing is trained.

Its classes and those of the images are brought together by a mapping that is given, by the identifiers of ImageNet's
classes, or, where both have equally many, by their numbers.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov2.apps.evaluation.datasets import LabelledDataset
from dinov2.apps.evaluation.features import FeatureCache, FeatureExtractor
from dinov2.apps.evaluation.stored import StoredCache
from dinov2.checkpoints.files import read_file
from dinov2.checkpoints.heads import head_from_state
from dinov2.checkpoints.locate import ShowProgress, locate_checkpoint
from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES
from dinov2.encode.stream import Features, Scoring
from dinov2.errors import DataError, WeightsError
from dinov2.eval.linear import evaluate_head
from dinov2.eval.outcome import Evaluation
from dinov2.eval.scoring import Provenance
from dinov2.models.heads import LinearHead
from dinov2.pretrained import Pretrained, digest_of_files

__all__ = [
    "attach_head",
    "head_parts",
    "knows_classes_of",
    "mapped",
    "read_class_mapping",
    "score_head",
    "score_head_on",
]


@dataclass(frozen=True)
class _HeadFile:
    """Origin of a classifier, for the results."""

    name: str
    sha256: str


def attach_head(
    loaded: Pretrained, source: str | os.PathLike[str], *, progress: ShowProgress | None = None
) -> _HeadFile:
    """Puts the classifier of a file, an address or a release's name on a loaded backbone.

    Raises `WeightsError` when it does not fit or is none.
    """
    found = locate_checkpoint(source, progress=progress)
    path = found.head or found.path
    loaded.head = head_from_state(read_file(path), embed_dim=loaded.embed_dim, source=str(source)).to(loaded.device)
    return _HeadFile(Path(str(source)).name, digest_of_files([path]))


def head_parts(head: LinearHead, extractor: FeatureExtractor) -> tuple[str, ...]:
    """The columns that a classifier reads. Raises `WeightsError` when the model does not show enough blocks."""
    if head.layers == 1:
        return ("cls", "mean")
    if extractor.blocks < head.layers:
        raise WeightsError(
            f"the classifier reads {head.layers} blocks, but {extractor.name} shows {extractor.blocks}; give a 1-layer "
            "one"
        )
    return ("earlier", "cls", "mean")


def read_class_mapping(file: str | os.PathLike[str]) -> Tensor:  # int64 [C_test]
    """A `.npy` file with the classifier's class of each class of the data set. Raises `DataError` for other files."""
    if Path(file).expanduser().exists() and not Path(file).expanduser().is_file():  # a pipe would wait for a writer
        raise DataError(f"the class mapping {file} is no regular file; give a .npy file of whole numbers")
    try:
        numbers = np.load(Path(file).expanduser(), allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no .npy file of numbers"
        raise DataError(
            f"the class mapping {file} cannot be read ({reason}); give a .npy file of whole numbers"
        ) from error
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(
            f"the class mapping {file} holds {numbers.dtype} {list(numbers.shape)}; give a .npy file with a whole "
            "number for each class of the data set"
        )
    return torch.from_numpy(numbers.astype(np.int64))


def mapped(features: Features, mapping: Tensor | None) -> Features:
    """The features with an explicit class mapping, which goes before what the data set says; None changes nothing."""
    if mapping is None:
        return features
    return replace(features, scoring=replace(features.scoring or Scoring(), class_mapping=mapping))


def score_head(
    head: LinearHead,
    val: Features,
    *,
    settings: Mapping[str, object] | None = None,
    provenance: Provenance | None = None,
) -> Evaluation:
    """Scores features `[S, (1+layers)*D]` of labelled images with a classifier; `settings` join those of the rows.

    Raises `DataError` when the classes do not fit.
    """
    if head.out_features == len(IMAGENET_CLASSES):
        wnids, names = zip(*IMAGENET_CLASSES, strict=True)
        if val.class_ids is not None:
            return evaluate_head(
                head, val, class_ids=wnids, class_names=names, settings=settings, provenance=provenance
            )
    n_own = _n_classes(val)
    if n_own != head.out_features and (val.scoring is None or val.scoring.class_mapping is None):
        raise DataError(
            f"the classifier knows {head.out_features} classes and the images have {n_own}, and their names do not "
            "tell which is which; name the class folders by ImageNet's identifiers (n01440764), or give a class mapping"
        )
    return evaluate_head(head, val, settings=settings, provenance=provenance)


def knows_classes_of(head: LinearHead, val: Features) -> bool:
    """Whether `score_head` can bring the classes of a classifier and of images together."""
    return (head.out_features == len(IMAGENET_CLASSES) and val.class_ids is not None) or (
        _n_classes(val) == head.out_features
    )


def _n_classes(val: Features) -> int:
    assert val.labels is not None  # of a set that is labelled
    return len(val.class_names or ()) or int(val.labels.max()) + 1


def score_head_on(
    loaded: Pretrained,
    extractor: FeatureExtractor,
    sets: Sequence[LabelledDataset],
    cache: FeatureCache | StoredCache,
    *,
    mappings: Sequence[Tensor | None] = (),
    settings: Mapping[str, object] | None = None,
) -> dict[str, Evaluation]:
    """The loaded model's own classifier on each data set, by its name; `settings` join those of the rows.

    Raises `WeightsError` when there is no classifier, or it needs more blocks than the model shows.
    """
    if loaded.head is None:
        raise WeightsError(
            f"{loaded.source} holds a backbone without a classifier; give a --train-dataset to train one, a model such "
            "as dinov2_vits14_lc, or a --classifier-fpath"
        )
    parts = head_parts(loaded.head, extractor)
    chosen = [*mappings, *[None] * (len(sets) - len(mappings))]
    found = {}
    for one, mapping in zip(sets, chosen, strict=True):
        evaluation = score_head(
            loaded.head,
            mapped(cache.features(extractor, one, parts=parts), mapping),
            settings=settings,
            provenance=extractor.provenance(one.name),
        )
        found[one.name] = evaluation
    return found
