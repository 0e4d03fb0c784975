"""What classifiers share: images held out to choose a setting on, the figure it is chosen by, outcomes, ReaL rows."""

from typing import Any

import torch
from torch import Tensor

from dinov2.errors import ConfigError, DataError
from dinov2.eval.classes import Classification
from dinov2.eval.outcome import Outcome
from dinov2.features.extract import Features
from dinov2.features.metrics import real_accuracy, target_ranks, wilson_interval
from dinov2.features.results import Result

__all__ = [
    "classifier_outcome",
    "random_split",
    "real_rows",
    "require_finite",
    "selection_accuracy",
    "stratified_split",
]


def stratified_split(
    classes: Tensor, *, share: float = 0.1, at_most: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:  # int64 [S] -> int64 [F], int64 [H]
    """Rows to fit on and rows held out, both ascending: `share` of each class, rounded, but never its only image.

    `at_most` bounds the rows held out in all. The draw depends on the seed and the classes alone: not on the device,
    the number of processes or the features. Raises `DataError` when every class has a single image.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the share of training images to hold out is {share}; write a number between 0 and 1")
    if at_most is not None:
        share = min(share, at_most / len(classes))
    generator = torch.Generator().manual_seed(seed)
    held_out = []
    for one in classes.unique().tolist():
        rows = (classes == one).nonzero().squeeze(1).cpu()
        order = torch.randperm(len(rows), generator=generator)
        n = min(max(1, round(len(rows) * share)), len(rows) - 1)
        held_out.append(rows[order[:n]])
    chosen = torch.cat(held_out).sort().values
    if not len(chosen):
        raise DataError(
            "every class has a single training image, so that none can be held out to choose a setting on; "
            "give more images, or a set to choose on"
        )
    return _without(len(classes), chosen), chosen


def random_split(n_rows: int, *, share: float = 0.1) -> tuple[Tensor, Tensor]:  # -> int64 [F], int64 [H]
    """The release's split (of its default device): the first tenth of torch's permutation with seed 0 is held out."""
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(0))
    n = int(n_rows * share)
    return order[n:], order[:n]


def selection_accuracy(scores: Tensor, targets: Tensor, *, metric: str) -> float:  # [S, K], int64 [S]
    """The figure that settings are chosen by: top-1, or with a metric per class its mean over the classes present.

    Targets of -1 (classes that nothing was trained on) are misses. A score that is not finite never counts.
    """
    hit = ((target_ranks(scores, targets.clamp_min(0)) == 0) & (targets >= 0)).cpu()
    if metric not in ("mean_per_class_accuracy", "per_class_accuracy"):
        return float(hit.double().mean())
    targets = targets.cpu()
    known = targets >= 0
    n_images = torch.bincount(targets[known], minlength=scores.shape[1])
    n_hits = torch.bincount(targets[known], weights=hit[known].double(), minlength=scores.shape[1])
    return float((n_hits / n_images)[n_images > 0].mean())


def classifier_outcome(probabilities: Tensor, task: Classification, train: Features, val: Features) -> Outcome:
    """The outcome of probabilities [S, C] for `task.val_features`, with class names and image numbers."""
    assert train.labels is not None and val.labels is not None  # `match_classes` has seen to it
    present = [label for label in train.labels.unique().tolist() if label >= 0]
    names = tuple(train.class_names[label] if train.class_names else str(label) for label in present)
    positions = torch.arange(len(val)) if val.indices is None else val.indices
    return Outcome(probabilities.float().cpu(), task.val_classes, names, positions[val.labels >= 0])


def real_rows(logits: Tensor, labels: Tensor, label_sets: Tensor, **fields: Any) -> list[Result]:
    """`real top-1` and `real top-5`, in percent, of scores [S, K] for the training labels `labels` [K], ascending.

    `label_sets` int64 [S, A], padded with -1, holds the acceptable labels of each image; images without any are left
    out, and a label that nothing was trained on cannot be hit. Raises `DataError` when the shapes do not fit.
    """
    if label_sets.ndim != 2 or len(label_sets) != len(logits):
        raise DataError(
            f"the label sets are {list(label_sets.shape)} for {len(logits)} images; give one row for each image, "
            "padded with -1"
        )
    position = torch.searchsorted(labels, label_sets).clamp_max(len(labels) - 1)
    known = (label_sets >= 0) & (labels[position] == label_sets)
    # An image whose labels are all unknown stays an error: it gets a class beyond the last, which has no score.
    beyond = torch.where(label_sets >= 0, len(labels), -1)
    without = logits.new_full((len(logits), 1), -torch.inf)
    n = int((label_sets >= 0).any(dim=1).sum())
    rows = []
    for k in (1, 5):
        value = real_accuracy(
            torch.cat([logits, without], dim=1), torch.where(known, position, beyond), k=min(k, len(labels))
        )
        low, high = (100 * bound for bound in wilson_interval(round(value * n), n))
        rows.append(Result(metric=f"real top-{k}", value=100 * value, ci=(low, high), n=n, **fields))
    return rows


def require_finite(features: Tensor, *, which: str) -> None:
    """Raise `DataError` when a feature [S, D] is NaN or infinite; `which` names the images."""
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:
        raise DataError(
            f"the features of {broken} of {len(features)} {which} images are not finite; check the model's weights, or "
            "compute its features in float32"
        )


def _without(n_rows: int, rows: Tensor) -> Tensor:
    rest = torch.ones(n_rows, dtype=torch.bool)
    rest[rows] = False
    return rest.nonzero().squeeze(1)
