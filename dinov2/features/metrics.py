"""Classification metrics as functions of scores and targets, and their uncertainty.

All accuracies are fractions in [0, 1]. Ties are broken by the lower class number, and a score that is not finite never
counts as a hit. The public release leaves ties to the sorting routine and its averages over classes to a library whose
meaning changed with its version, so `mean_per_class_accuracy` names the two readings.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dinov2.errors import DataError

__all__ = [
    "bootstrap_interval",
    "mean_interval",
    "mean_per_class_accuracy",
    "per_class_accuracy",
    "real_accuracy",
    "target_ranks",
    "top_k_accuracy",
    "top_k_hits",
    "wilson_interval",
]

_Z_95 = 1.959963984540054

# 97.5 % points of Student's t for 1, 2, ... 20 degrees of freedom.
_T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)


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


def top_k_hits(scores: Tensor, targets: Tensor, *, k: int = 1) -> Tensor:  # -> bool [S]
    """Whether the target is among the k best classes; k is limited to the number of classes."""
    return target_ranks(scores, targets) < min(k, scores.shape[1])


def top_k_accuracy(scores: Tensor, targets: Tensor, *, k: int = 1) -> float:
    """Share of samples [S, C] whose target is among their k best classes (the release's `mean_accuracy`)."""
    return top_k_hits(scores, targets, k=k).double().mean().item()


def per_class_accuracy(scores: Tensor, targets: Tensor, *, k: int = 1) -> Tensor:  # -> float64 [C]
    """Recall of each class: the share of its samples that are hit; NaN for a class without samples."""
    n_classes = scores.shape[1]
    hits = torch.bincount(targets, weights=top_k_hits(scores, targets, k=k).double(), minlength=n_classes)
    return hits / torch.bincount(targets, minlength=n_classes)


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


def wilson_interval(n_hits: int, n: int, *, z: float = _Z_95) -> tuple[float, float]:
    """Interval for a share of n independent samples (Wilson 1927), 95 % by default; it stays inside [0, 1]."""
    if n <= 0:
        raise DataError("an interval needs at least one sample, got none")
    share = n_hits / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of a few repetitions, by Student's t. Raises `DataError` for fewer than two."""
    if len(values) < 2:
        raise DataError(f"the spread of repetitions needs at least two of them, got {len(values)}")
    freedom = len(values) - 1
    t = _T_95[freedom - 1] if freedom <= len(_T_95) else _Z_95 + (_Z_95**3 + _Z_95) / (4 * freedom)
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    middle = statistics.fmean(values)
    return middle - half, middle + half


def bootstrap_interval(
    per_sample: Tensor,  # [S], for example hits
    *,
    n_resamples: int = 10_000,
    level: float = 0.95,
    groups: Tensor | None = None,  # int64 [S]
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean over resampled samples.

    With `groups` (class numbers) every group is resampled on its own and the mean is that of the group means, which is
    the interval of `mean_per_class_accuracy`.
    """
    if per_sample.numel() == 0:
        raise DataError("an interval needs at least one sample, got none")
    values = per_sample.double().cpu()
    parts = [values] if groups is None else [values[groups.cpu() == group] for group in groups.unique().cpu()]
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([_resampled_means(part, n_resamples, generator) for part in parts]).mean(dim=0)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _resampled_means(values: Tensor, n_resamples: int, generator: torch.Generator) -> Tensor:  # [S] -> [n_resamples]
    at_once = max(1, 4_000_000 // len(values))  # bounds the index matrix to 32 MB
    means = []
    for start in range(0, n_resamples, at_once):
        shape = (min(at_once, n_resamples - start), len(values))
        means.append(values[torch.randint(len(values), shape, generator=generator)].mean(dim=1))
    return torch.cat(means)


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
