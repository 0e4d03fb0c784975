"""Accuracies from scores and targets, the corruption errors of ImageNet-C, and intervals of figures.

Figures are fractions. 95 % intervals follow one rule for each kind of figure: a mean over images is resampled
(percentile bootstrap), the mean over classes within each class, and a mean over few-shot draws has Student's interval,
because the spread over draws is larger than that of the images.

Of equal scores the lower class stands first, and a score that is not finite never counts as a
hit. The public release leaves ties to the sorting routine and its averages over classes to a library whose meaning
changed with its version, so `mean_per_class_accuracy` names the two readings.

The corruption error CE is the sum over severities of a model's top-1 errors divided by that of AlexNet's; mCE is its
mean over the 15 corruptions, and 1 for AlexNet. Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness
to Common Corruptions and Perturbations".
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.errors import DataError

__all__ = [
    "ALEXNET_ERRORS",
    "CorruptionErrors",
    "Estimate",
    "best_ranks",
    "bootstrap_interval",
    "bootstrap_statistic",
    "corruption_error",
    "corruption_errors",
    "errors_by_part",
    "holm",
    "mcnemar_p_value",
    "mean_interval",
    "mean_per_class_accuracy",
    "per_class_means",
    "real_accuracy",
    "renumber_labels",
    "restrict_scores",
    "target_ranks",
    "top_k_accuracy",
    "voted_ranks",
]

_Z_95 = 1.959963984540054

# 97.5 % points of Student's t for 1, 2, ... 20 degrees of freedom.
_T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)

_FEW = 32  # distinct values up to which counts are drawn
_N_SEVERITIES = 5
_ALEXNET_CLEAN_ERROR = 0.4345  # AlexNet's top-1 error on the clean validation images, to four digits

ALEXNET_ERRORS: Mapping[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's top-1 error under each corruption, mean over the five severities."""


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:  # [S, C], int64 [S] -> int64 [S]
    """Number of classes ranked before the target: 0 means that it is the prediction.

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


def top_k_accuracy(scores: Tensor, targets: Tensor, *, k: int = 1) -> float:
    """Share of samples [S, C] whose target is among their k best classes (the release's `mean_accuracy`)."""
    return (target_ranks(scores, targets) < min(k, scores.shape[1])).double().mean().item()


def mean_per_class_accuracy(
    scores: Tensor, targets: Tensor, *, k: int = 1, over: Literal["present", "all"] = "present"
) -> float:
    """Recall averaged over classes.

    `over="present"` averages the classes that have samples. `over="all"` divides by the number of classes, so that a
    class without samples counts as zero: the figure of the release's pinned library, kept for comparison.
    """
    n_classes = scores.shape[1]
    recalls = per_class_means(target_ranks(scores, targets) < min(k, n_classes), targets, n_classes=n_classes)
    match over:
        case "present":
            return recalls.nanmean().item()
        case "all":
            return recalls.nan_to_num().mean().item()


def per_class_means(values: Tensor, targets: Tensor, *, n_classes: int) -> Tensor:  # [S], int64 [S] -> float64 [C]
    """Mean of a value over the samples of each class; NaN for a class without samples.

    Samples with a negative target belong to none of the classes and are in no mean.
    """
    values, targets = values[targets >= 0].double(), targets[targets >= 0]
    sums = torch.bincount(targets, weights=values, minlength=n_classes)
    return sums / torch.bincount(targets, minlength=n_classes)


def real_accuracy(scores: Tensor, label_sets: Tensor, *, k: int = 1) -> float:
    """Share of images with any of their acceptable labels among the k best classes ("ReaL" labels).

    `label_sets` is int64 [S, A], padded with -1. Images without any label are left out.
    Paper: Beyer et al. 2020, "Are we done with ImageNet?".
    """
    labelled = (label_sets >= 0).any(dim=1)
    if not bool(labelled.any()):
        raise DataError("no image has a label, so there is nothing to score; check the file of acceptable labels")
    scores, n_classes = scores[labelled], scores.shape[1]
    ranks = [
        torch.where(labels >= 0, target_ranks(scores, labels.clamp_min(0)), n_classes)
        for labels in label_sets[labelled].unbind(dim=1)
    ]
    return (torch.stack(ranks).amin(dim=0) < min(k, n_classes)).double().mean().item()


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


class CorruptionErrors(NamedTuple):
    """The figures of one model over the 15 corruptions, fractions."""

    mean_error: float
    """Mean top-1 error over corruptions and severities, compared with nobody."""
    mce: float
    """Mean corruption error, 1 for AlexNet."""
    relative_mce: float | None
    """The same of the excess over the error on clean images, 1 for AlexNet; None where that error is not given."""


def corruption_errors(
    errors: Mapping[str, Sequence[float]], *, clean_error: float | None = None
) -> CorruptionErrors:  # corruption -> top-1 error by severity
    """The figures from top-1 errors (fractions) at the five severities of each corruption.

    Corruptions beyond the benchmark's 15 are left aside. Raises DataError when a corruption or a severity is missing,
    because a mean over fewer would pass for the real one.
    """
    missing = [name for name in ALEXNET_ERRORS if name not in errors]
    if missing:
        raise DataError(f"the mean corruption error needs 15 corruptions; {len(missing)} lack: {', '.join(missing)}")
    for name in ALEXNET_ERRORS:
        if len(errors[name]) != _N_SEVERITIES or not all(0 <= error <= 1 for error in errors[name]):
            raise DataError(
                f"{name} has {len(errors[name])} errors ({', '.join(f'{error:g}' for error in errors[name])}); "
                f"give the {_N_SEVERITIES} of its severities as fractions"
            )
    means = {name: statistics.fmean(errors[name]) for name in ALEXNET_ERRORS}
    mce = statistics.fmean(means[name] / alexnet for name, alexnet in ALEXNET_ERRORS.items())
    relative = None
    if clean_error is not None:
        relative = statistics.fmean(
            (means[name] - clean_error) / (alexnet - _ALEXNET_CLEAN_ERROR) for name, alexnet in ALEXNET_ERRORS.items()
        )
    return CorruptionErrors(statistics.fmean(means.values()), mce, relative)


def corruption_error(corruption: str, errors: Sequence[float]) -> float | None:
    """CE of one corruption from its top-1 errors at the five severities; None where AlexNet's errors are not known."""
    if corruption not in ALEXNET_ERRORS or len(errors) != _N_SEVERITIES:
        return None
    return statistics.fmean(errors) / ALEXNET_ERRORS[corruption]


def errors_by_part(
    hits: Tensor,  # bool [S]
    part_numbers: Tensor,  # int64 [S]
    parts: Sequence[tuple[str, int]],
) -> dict[str, list[float]]:
    """Top-1 error by corruption, severities in the order of `parts`, the `(corruption, severity)` by part number.

    `part_numbers` and `parts` are those of the data set ImageNetC, the former for the images that were scored
    (all readable ones). Raises DataError for a part without any image.
    """
    sums = torch.bincount(part_numbers, weights=1 - hits.double(), minlength=len(parts))
    counts = torch.bincount(part_numbers, minlength=len(parts))
    if not bool((counts > 0).all()):
        name, severity = parts[int(counts.argmin())]
        raise DataError(
            f"no image of {name} at severity {severity} was scored; check that its folder holds readable images"
        )
    found: dict[str, list[float]] = {}
    for (name, _), error in zip(parts, (sums / counts).tolist(), strict=True):
        found.setdefault(name, []).append(error)
    return found


class Estimate(NamedTuple):
    """A figure and its 95 % interval, as fractions."""

    value: float
    low: float
    high: float


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
    the interval of `mean_per_class_accuracy`. Raises DataError when there is no sample.
    """
    if per_sample.numel() == 0:
        raise DataError("an interval needs at least one sample, got none")
    values = per_sample.detach().double().cpu().numpy()
    generator = np.random.default_rng(seed)
    if groups is None:
        means = _resampled_means(values, n_resamples, generator)
    else:
        members = _members(groups)
        means = np.zeros(n_resamples)
        for rows in members:
            means += _resampled_means(values[rows], n_resamples, generator) / len(members)
    return _percentiles(means, level)


def bootstrap_statistic(
    statistic: Callable[[Tensor], float],  # of row numbers int64 [S]
    n: int,
    *,
    n_resamples: int = 1000,
    level: float = 0.95,
    groups: Tensor | None = None,  # int64 [n]
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a figure that is no mean, such as a calibration error.

    `statistic` computes the figure from the numbers of resampled rows, and is called once a resample. With `groups`
    every group is resampled on its own. Raises DataError when there is no sample.
    """
    if n <= 0:
        raise DataError("an interval needs at least one sample, got none")
    generator = np.random.default_rng(seed)
    members = [np.arange(n)] if groups is None else _members(groups)
    found = np.empty(n_resamples)
    for number in range(n_resamples):
        rows = [part[generator.integers(len(part), size=len(part))] for part in members]
        found[number] = statistic(torch.from_numpy(np.concatenate(rows)))
    return _percentiles(found, level)


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Two-sided probability of a split this uneven or more among images that one model alone has right."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    counts = torch.arange(fewer + 1, dtype=torch.float64)
    log_n = math.lgamma(n + 1)
    log_terms = log_n - torch.lgamma(counts + 1) - torch.lgamma(n - counts + 1) - n * math.log(2)
    return min(1.0, 2 * float(log_terms.exp().sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, raised so that all of them together keep their error (Holm 1979)."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = least
    return adjusted


def _members(groups: Tensor) -> list[np.ndarray]:
    """Row numbers of each group, groups ascending."""
    numbers = groups.cpu().numpy()
    order = np.argsort(numbers, kind="stable")
    _, firsts = np.unique(numbers[order], return_index=True)
    return np.split(order, firsts[1:])


def _resampled_means(values: np.ndarray, n_resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Means [n_resamples] of resamples of values [S].

    A resample of n samples that take few distinct values is a multinomial count of these values: the same distribution
    as drawing samples one by one, at a thousandth of the cost.
    """
    n = len(values)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW:
        return generator.multinomial(n, counts / n, size=n_resamples) @ distinct / n
    at_once = max(1, 4_000_000 // n)  # bounds the row numbers to 16 MB
    means = np.empty(n_resamples)
    for first in range(0, n_resamples, at_once):
        part = means[first : first + at_once]
        part[:] = values[generator.integers(n, size=(len(part), n), dtype=np.int32)].mean(axis=1)
    return means


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


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
