"""All figures of one classifier on one test set, each with its interval, from the records of its images.

The figures that are no means depend on the order of confidences. Their intervals sort once and then count how often
each image was drawn, because sorting anew for each of a thousand resamples would take half a minute for ImageNet.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.errors import DataError
from dinov2.features.metrics.accuracy import per_class_means
from dinov2.features.metrics.calibration import (
    area_under_risk_coverage,
    bin_numbers,
    expected_calibration_error,
)
from dinov2.features.metrics.intervals import bootstrap_interval, bootstrap_statistic
from dinov2.features.metrics.records import SampleRecords

__all__ = ["Figure", "classification_figures"]


class Figure(NamedTuple):
    """A value and its 95 % interval, both as fractions (log-loss: nats)."""

    value: float
    ci: tuple[float, float]


def classification_figures(
    records: SampleRecords,
    *,
    n_bins: int = 15,
    n_resamples: int = 10_000,
    n_curve_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Figure]:
    """`top-1`, `top-5`, `mean-per-class`, `ece`, `ece-equal-mass`, `log-loss`, `brier` and `aurc`.

    Intervals are percentiles of resampled images: of `n_resamples` for the accuracies, of `n_curve_resamples` for the
    others. Those of the mean over classes resample each class on its own, and classes without images are in no mean.
    Calibration errors are biased upwards on few images, so their interval, whose resamples are biased once more, may
    lie above the figure. Images of a class that the classifier does not know count as errors everywhere but in the
    mean over classes, which does not know how many classes they are.

    Raises DataError when there is no record.
    """
    if not len(records):
        raise DataError("there are no samples to score; check that the evaluation data set is not empty")
    figures = {}
    for name, values, resamples in (
        ("top-1", records.hits(k=1), n_resamples),
        ("top-5", records.hits(k=5), n_resamples),
        ("log-loss", records.log_losses, n_curve_resamples),
        ("brier", records.brier, n_curve_resamples),
    ):
        interval = bootstrap_interval(values, n_resamples=resamples, seed=seed)
        figures[name] = Figure(values.double().mean().item(), interval)

    known = records.targets >= 0
    if bool(known.any()):
        hits, targets = records.hits(k=1)[known], records.targets[known]
        recalls = per_class_means(hits, targets, n_classes=records.n_classes)
        interval = bootstrap_interval(hits, groups=targets, n_resamples=n_resamples, seed=seed)
        figures["mean-per-class"] = Figure(recalls.nanmean().item(), interval)

    confidences, hits = records.confidences.clamp_max(1.0), records.hits(k=1)
    for name, value, of_rows in (
        (
            "ece",
            expected_calibration_error(confidences, hits, n_bins=n_bins),
            _equal_width_error(confidences, hits, n_bins),
        ),
        (
            "ece-equal-mass",
            expected_calibration_error(confidences, hits, n_bins=n_bins, binning="equal-mass"),
            _equal_mass_error(confidences, hits, n_bins),
        ),
        ("aurc", area_under_risk_coverage(confidences, hits), _mean_risk(confidences, hits)),
    ):
        interval = bootstrap_statistic(of_rows, len(records), n_resamples=n_curve_resamples, seed=seed)
        figures[name] = Figure(value, interval)
    return figures


_OfRows = Callable[[Tensor], float]  # of row numbers int64 [S]


def _equal_width_error(confidences: Tensor, hits: Tensor, n_bins: int) -> _OfRows:
    numbers = bin_numbers(confidences, n_bins=n_bins)
    gaps = hits.double() - confidences.double()

    def error(rows: Tensor) -> float:
        sums = torch.bincount(numbers[rows], weights=gaps[rows], minlength=n_bins)
        return float(sums.abs().sum()) / len(rows)

    return error


def _equal_mass_error(confidences: Tensor, hits: Tensor, n_bins: int) -> _OfRows:
    order = confidences.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    gaps = (hits.double() - confidences.double())[order]  # in rising order of confidence
    numbers = torch.arange(len(order)) * n_bins // len(order)  # the bins of any sorted resample

    def error(rows: Tensor) -> float:
        drawn = torch.bincount(places[rows], minlength=len(order))
        sums = torch.bincount(numbers, weights=gaps.repeat_interleave(drawn), minlength=n_bins)
        return float(sums.abs().sum()) / len(rows)

    return error


def _mean_risk(confidences: Tensor, hits: Tensor) -> _OfRows:
    # Equal confidences are one group, over which its errors are spread, as in `risk_coverage_curve`.
    levels, group = (-confidences).unique(return_inverse=True)  # the most confident first
    wrong = 1 - hits.double()
    counts = torch.arange(1, len(wrong) + 1, dtype=torch.float64)

    def risk(rows: Tensor) -> float:
        sizes = torch.bincount(group[rows], minlength=len(levels))
        errors = torch.bincount(group[rows], weights=wrong[rows], minlength=len(levels))
        spread = (errors / sizes.clamp_min(1)).repeat_interleave(sizes)
        return float((spread.cumsum(dim=0) / counts).mean())

    return risk
