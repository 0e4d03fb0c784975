"""How sure a figure is: intervals by formula and by resampling.

A resample of n samples that take few distinct values is a multinomial count of these values, so hits and differences of
hits are drawn as counts: the same distribution as drawing samples one by one, at a thousandth of the cost.
"""

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dinov2.errors import DataError

__all__ = ["bootstrap_interval", "bootstrap_statistic", "mean_interval", "wilson_interval"]

_Z_95 = 1.959963984540054

# 97.5 % points of Student's t for 1, 2, ... 20 degrees of freedom.
_T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)

_FEW = 32  # distinct values up to which counts are drawn


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
