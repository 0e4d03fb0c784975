"""Accuracies as functions of scores and targets, over all classes of the scores or over a part of them.

All are fractions in [0, 1]. Ties are broken by the lower class number, and a score that is not finite never counts as a
hit. The public release leaves ties to the sorting routine and its averages over classes to a library whose meaning
changed with its version, so `mean_per_class_accuracy` names the two readings.
"""

from typing import Literal

import torch
from torch import Tensor

from dinov2.errors import DataError

__all__ = [
    "best_ranks",
    "mean_per_class_accuracy",
    "per_class_accuracy",
    "per_class_means",
    "real_accuracy",
    "renumber_labels",
    "restrict_probabilities",
    "restrict_scores",
    "target_ranks",
    "top_k_accuracy",
    "top_k_hits",
    "voted_ranks",
]


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:  # [S, C], int64 [S] -> int64 [S]
    """How many classes stand before the target: 0 means that it is the prediction.

    Of equal scores the lower class stands first. A row whose target score is not finite has rank C.
    """
    _check(scores, targets)
    own = scores.gather(1, targets.unsqueeze(1))  # [S, 1]
    classes = torch.arange(scores.shape[1], device=scores.device)
    earlier = (scores == own) & (classes < targets.unsqueeze(1))
    ranks = ((scores > own) | scores.isnan() | earlier).sum(dim=1)
    return torch.where(own.squeeze(1).isfinite(), ranks, scores.shape[1])


def voted_ranks(probabilities: Tensor, targets: Tensor) -> Tensor:  # [S, C], int64 [S] -> int64 [S]
    """`target_ranks`, where a target of -1 (a class that is no answer) or without any probability has rank C.

    Without that rule top-5 would depend on chance: among k neighbours fewer than five classes are common, and a sorting
    routine fills the five with arbitrary classes of score zero.
    """
    known = targets.clamp_min(0)
    voted_for = (targets >= 0) & (probabilities.gather(1, known.unsqueeze(1)).squeeze(1) > 0)
    return torch.where(voted_for, target_ranks(probabilities, known), probabilities.shape[1])


def best_ranks(probabilities: Tensor, label_sets: Tensor) -> Tensor:  # [S, C], int64 [S, A] -> int64 [S]
    """The lowest of `voted_ranks` over the labels of each image; C for one without any.

    Labels are classes, -1 for padding, or C for a right answer that is none of the classes.
    """
    n_classes = probabilities.shape[1]
    targets = torch.where(label_sets < n_classes, label_sets, -1).unbind(dim=1)
    return torch.stack([voted_ranks(probabilities, one) for one in targets]).amin(dim=0)


def top_k_hits(scores: Tensor, targets: Tensor, *, k: int = 1) -> Tensor:  # -> bool [S]
    """Whether the target is among the k best classes; k is limited to the number of classes."""
    return target_ranks(scores, targets) < min(k, scores.shape[1])


def top_k_accuracy(scores: Tensor, targets: Tensor, *, k: int = 1) -> float:
    """Share of samples [S, C] whose target is among their k best classes (the release's `mean_accuracy`)."""
    return top_k_hits(scores, targets, k=k).double().mean().item()


def per_class_accuracy(scores: Tensor, targets: Tensor, *, k: int = 1) -> Tensor:  # -> float64 [C]
    """Recall of each class: the share of its samples that are hit; NaN for a class without samples."""
    return per_class_means(top_k_hits(scores, targets, k=k), targets, n_classes=scores.shape[1])


def per_class_means(values: Tensor, targets: Tensor, *, n_classes: int) -> Tensor:  # [S], int64 [S] -> float64 [C]
    """Mean of a value over the samples of each class; NaN for a class without samples.

    Samples with a negative target belong to none of the classes and are in no mean.
    """
    values, targets = values[targets >= 0].double(), targets[targets >= 0]
    sums = torch.bincount(targets, weights=values, minlength=n_classes)
    return sums / torch.bincount(targets, minlength=n_classes)


def mean_per_class_accuracy(
    scores: Tensor, targets: Tensor, *, k: int = 1, over: Literal["present", "all"] = "present"
) -> float:
    """Recall averaged over classes.

    `over="present"` averages the classes that have samples. `over="all"` divides by the number of classes, so that a
    class without samples counts as zero: the figure of the release's pinned library, kept for comparison.
    """
    recalls = per_class_accuracy(scores, targets, k=k)
    match over:
        case "present":
            return recalls.nanmean().item()
        case "all":
            return recalls.nan_to_num().mean().item()


def real_accuracy(scores: Tensor, label_sets: Tensor, *, k: int = 1) -> float:
    """Share of images with any of their acceptable labels among the k best classes ("ReaL" labels).

    `label_sets` is int64 [S, A], padded with -1. Images without any label are left out.
    Paper: Beyer et al. 2020, "Are we done with ImageNet?".
    """
    labelled = (label_sets >= 0).any(dim=1)
    if not bool(labelled.any()):
        raise DataError("no image has a label, so there is nothing to score; check the file of acceptable labels")
    scores, label_sets = scores[labelled], label_sets[labelled]
    n_sets, set_size = label_sets.shape
    rows = torch.arange(n_sets, device=scores.device).repeat_interleave(set_size)
    candidates = label_sets.flatten()
    real = candidates >= 0
    hits = top_k_hits(scores[rows[real]], candidates[real], k=k)
    hit_images = torch.zeros(n_sets, dtype=torch.bool, device=scores.device)
    hit_images[rows[real][hits]] = True
    return hit_images.double().mean().item()


def restrict_scores(scores: Tensor, class_mapping: Tensor) -> Tensor:  # [S, C], int64 [C_test] -> [S, C_test]
    """Scores among the classes of a test set alone: `class_mapping[j]` is the class of the scores that is its class j.

    This is how ImageNet-A and R, which have 200 of the 1,000 classes, are scored. Raises DataError when the
    mapping does not fit.
    """
    n_classes = scores.shape[1]
    if class_mapping.ndim != 1 or not len(class_mapping) or class_mapping.is_floating_point():
        raise DataError(
            f"a class mapping is a list of class numbers, got {class_mapping.dtype} {list(class_mapping.shape)}"
        )
    lowest, highest = int(class_mapping.min()), int(class_mapping.max())
    if lowest < 0 or highest >= n_classes:
        raise DataError(
            f"the class mapping runs from {lowest} to {highest}, but there are {n_classes} classes of scores; "
            "is the classifier one of another data set?"
        )
    if len(class_mapping.unique()) != len(class_mapping):
        raise DataError("the class mapping names a class twice, so its two classes could not be told apart")
    return scores[:, class_mapping.to(scores.device)]


def restrict_probabilities(probabilities: Tensor, class_mapping: Tensor) -> Tensor:  # [S, C], [C_test] -> [S, C_test]
    """`restrict_scores`, and every row divided by its sum; a row without any probability there stays zero.

    Of a softmax it is the softmax of the restricted logits.
    """
    own = restrict_scores(probabilities, class_mapping)
    sums = own.sum(dim=1, keepdim=True)
    return torch.where(sums > 0, own / sums, 0.0)


def renumber_labels(labels: Tensor, numbers: Tensor) -> Tensor:  # int64 any shape, int64 [C_old] -> the same shape
    """Labels in another numbering: `numbers[c]` is the new number of class c, or -1 for a class that is not there.

    Negative labels (padding, no label) stay -1. Brings ReaL's label sets to the classes of a classifier.
    """
    if labels.numel() and int(labels.max()) >= len(numbers):
        raise DataError(
            f"there is a label {int(labels.max())}, but the new numbering has {len(numbers)} classes; "
            "give the numbering of all classes"
        )
    return torch.where(labels >= 0, numbers.to(labels.device)[labels.clamp_min(0)], -1)


def _check(scores: Tensor, targets: Tensor) -> None:
    if scores.ndim != 2 or targets.shape != scores.shape[:1]:
        raise DataError(
            f"scores must be [S, C] and targets [S], got {list(scores.shape)} and {list(targets.shape)}; "
            "give one row of scores for each target"
        )
    if len(targets) == 0:
        raise DataError("there are no samples to score; check that the evaluation data set is not empty")
    lowest, highest = int(targets.min()), int(targets.max())
    if lowest < 0 or highest >= scores.shape[1]:
        raise DataError(
            f"targets run from {lowest} to {highest}, but there are {scores.shape[1]} classes of scores; "
            "remap the labels to 0, 1, ... first"
        )
