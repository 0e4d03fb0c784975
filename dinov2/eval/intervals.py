"""95 % intervals by one rule for each kind of figure, and the p-values of comparisons.

A mean over images is resampled (percentile bootstrap); the mean over classes is resampled within each class; a mean
over few-shot draws has Student's interval, because the spread over draws is larger than that of the images.

A resample of n samples that take few distinct values is a multinomial count of these values, so hits and differences of
hits are drawn as counts: the same distribution as drawing samples one by one, at a thousandth of the cost.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.errors import DataError

__all__ = [
    "Estimate",
    "bootstrap_interval",
    "bootstrap_statistic",
    "holm",
    "mcnemar_p_value",
    "mean_interval",
]

_Z_95 = 1.959963984540054

# 97.5 % points of Student's t for 1, 2, ... 20 degrees of freedom.
_T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)

_FEW = 32  # distinct values up to which counts are drawn


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
    """Means [n_resamples] of resamples of values [S]."""
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
