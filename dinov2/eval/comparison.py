"""Whether one model is better than another on the same images.

Images that are easy or hard for both cancel out, so that differences are far surer than two intervals side by side
suggest.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.errors import DataError
from dinov2.eval.outcome import Outcome
from dinov2.features.metrics import SampleRecords, bootstrap_interval, sample_records

__all__ = ["Comparison", "Estimate", "compare", "holm", "mcnemar_p_value", "records_of"]


class Estimate(NamedTuple):
    """A figure and its 95 % interval, as fractions."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """The second model against the first on the images that both have seen."""

    n: int
    difference: Estimate
    """Accuracy of the second less that of the first."""
    only_first: int
    """Images that the first model alone has right."""
    only_second: int
    p_value: float
    """Of McNemar's exact test: how often equally good models would differ this much or more."""


def records_of(outcome: Outcome) -> SampleRecords:
    """The records of an outcome: hits, ranks, confidences."""
    return sample_records(outcome.probabilities, outcome.targets, indices=outcome.indices)


def compare(first: SampleRecords, second: SampleRecords, *, n_resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Two models on the images that both have scored: paired bootstrap of the difference, McNemar's exact test.

    Raises `DataError` when there are no such images.
    Paper: McNemar 1947, "Note on the sampling error of the difference between correlated proportions or percentages".
    """
    rows_first, rows_second = _common_rows(first.indices, second.indices)
    hit_first, hit_second = first.hits()[rows_first], second.hits()[rows_second]
    only_first, only_second = int((hit_first & ~hit_second).sum()), int((hit_second & ~hit_first).sum())
    low, high = bootstrap_interval(hit_second.double() - hit_first.double(), n_resamples=n_resamples, seed=seed)
    n = len(hit_first)
    difference = Estimate((only_second - only_first) / n, low, high)
    return Comparison(n, difference, only_first, only_second, mcnemar_p_value(only_first, only_second))


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


def _common_rows(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:  # int64 [R], int64 [R]
    """Rows of two lists of image numbers that name the same images, in the same order."""
    by_image = {image: row for row, image in enumerate(second.tolist())}
    pairs = [(row, by_image[image]) for row, image in enumerate(first.tolist()) if image in by_image]
    if not pairs:
        raise DataError("the two models have scored no image in common; evaluate both on one data set")
    rows = torch.tensor(pairs, dtype=torch.int64)
    return rows[:, 0], rows[:, 1]
