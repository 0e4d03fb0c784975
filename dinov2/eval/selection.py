"""Choice of a trained classifier's setting: sets fit to train on, held-out images, and the figure to choose by."""

import torch
from torch import Tensor

from dinov2.encode.stream import Features
from dinov2.encode.tokens import require_finite
from dinov2.errors import ConfigError, DataError
from dinov2.eval.metrics import per_class_means, target_ranks
from dinov2.eval.scoring import ClassPredictions, match_classes

__all__ = [
    "SELECTION_METRICS",
    "random_split",
    "require_metric",
    "require_trainable",
    "selection_accuracy",
    "stratified_split",
]

SELECTION_METRICS = ("mean_accuracy", "mean_per_class_accuracy", "per_class_accuracy", "imagenet_real_accuracy")
"""The release's names of metrics; settings are chosen by top-1, or by its mean over classes for the two per class."""


def require_metric(metric: str) -> None:
    """Raise `ConfigError` for an unknown metric."""
    if metric not in SELECTION_METRICS:
        raise ConfigError(f"no metric is called {metric!r}; choose one of {', '.join(SELECTION_METRICS)}")


def require_trainable(train: Features, val: Features) -> ClassPredictions:
    """The matched sets (`match_classes`). Raises `DataError` for one class only, or features that are not finite."""
    task = match_classes(train, val)
    if task.n_classes < 2:
        raise DataError(
            "all training images are of one class, and a classifier needs two; give images of another class"
        )
    require_finite(task.train_features, of="training images")
    require_finite(task.val_features, of="validation images")
    return task


def stratified_split(
    classes: Tensor, *, share: float = 0.1, at_most: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:  # int64 [S] -> int64 [F], int64 [H]
    """Rows to fit on and rows held out, both ascending: `share` of each class, rounded, but never its only image.

    `at_most` bounds the rows held out in all, though a class of two images or more always gives one. The draw depends
    on the seed and the classes alone: not on the device, the number of processes or the features. Raises `DataError`
    when every class has a single image.
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
    return float(per_class_means(hit, targets.cpu(), n_classes=scores.shape[1]).nanmean())


def _without(n_rows: int, rows: Tensor) -> Tensor:
    rest = torch.ones(n_rows, dtype=torch.bool)
    rest[rows] = False
    return rest.nonzero().squeeze(1)
