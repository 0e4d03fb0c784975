"""All figures of a classifier with their intervals, calibration among them, and the comparison of two models.

Probabilities are [S, C], targets int64 [S]. A target of -1 is a class that the classifier does not know: no answer is
right, and its probability is zero. Confidence is the largest probability of a row.

The figures that are no means depend on the order of confidences. Their intervals sort once and then count how often
each image was drawn, because sorting anew for each of a thousand resamples would take half a minute for ImageNet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dinov2.errors import DataError
from dinov2.eval.metrics import (
    Estimate,
    bootstrap_interval,
    bootstrap_statistic,
    mcnemar_p_value,
    per_class_means,
    voted_ranks,
)

__all__ = [
    "Bins",
    "Comparison",
    "SampleRecords",
    "area_under_risk_coverage",
    "brier_scores",
    "classification_figures",
    "compare",
    "confidence_bins",
    "expected_calibration_error",
    "negative_log_likelihoods",
    "sample_records",
]

_FLOOR = torch.finfo(torch.float32).eps
_Binning = Literal["equal-width", "equal-mass"]


class Bins(NamedTuple):
    """Samples in bins of rising confidence, the points of a reliability diagram; means of an empty bin are NaN."""

    counts: Tensor
    """int64 [M]."""
    confidences: Tensor
    """Mean confidence, float64 [M]."""
    accuracies: Tensor
    """Share of right answers, float64 [M]."""


class Comparison(NamedTuple):
    """The second model against the first on the images that both have scored."""

    n: int
    difference: Estimate
    """Accuracy of the second less that of the first."""
    only_first: int
    """Images that the first model alone has right."""
    only_second: int
    p_value: float
    """Of McNemar's exact test: how often equally good models would differ this much or more."""


@dataclass(frozen=True)
class SampleRecords:
    """One row an image; all tensors are [S]."""

    indices: Tensor
    """int64: position of the image in its data set."""
    targets: Tensor
    """int64; -1 is a class that the classifier does not know."""
    predictions: Tensor
    """int64: the class with the largest probability, the lowest of several; -1 where nothing was voted for."""
    confidences: Tensor
    """That probability, in the precision it came in: in another one it may cross the edge of a bin."""
    ranks: Tensor
    """int64: classes that stand before the target, 0 for a hit; C where the target has no probability at all."""
    log_losses: Tensor
    """float64: -ln of the target's probability."""
    brier: Tensor
    """float64: squared distance of the probabilities to the right answer."""
    n_classes: int
    """C."""

    def __len__(self) -> int:
        return self.indices.shape[0]

    def hits(self, *, k: int = 1) -> Tensor:  # -> bool [S]
        """Whether the target is among the k best classes; k is limited to the number of classes."""
        return self.ranks < min(k, self.n_classes)


def sample_records(
    probabilities: Tensor,  # [S, C]
    targets: Tensor,  # int64 [S]
    *,
    indices: Tensor | None = None,  # int64 [S]; 0, 1, 2, ... unless given
) -> SampleRecords:
    """The records of some images, on the CPU, from class probabilities.

    A row of zeros is an image that nothing was voted for: it hits nothing, whatever its target. Raises DataError when
    shapes or targets do not fit.
    """
    log_losses, brier = negative_log_likelihoods(probabilities, targets), brier_scores(probabilities, targets)
    confidences, predictions = probabilities.max(dim=1)
    return SampleRecords(
        indices=(torch.arange(len(targets)) if indices is None else indices).cpu(),
        targets=targets.cpu(),
        predictions=torch.where(confidences > 0, predictions, -1).cpu(),
        confidences=confidences.cpu(),
        ranks=voted_ranks(probabilities, targets).cpu(),
        log_losses=log_losses.cpu(),
        brier=brier.cpu(),
        n_classes=probabilities.shape[1],
    )


def classification_figures(
    records: SampleRecords,
    *,
    n_bins: int = 15,
    n_resamples: int = 10_000,
    n_curve_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
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
        figures[name] = Estimate(values.double().mean().item(), *interval)

    known = records.targets >= 0
    if bool(known.any()):
        hits, targets = records.hits(k=1)[known], records.targets[known]
        recalls = per_class_means(hits, targets, n_classes=records.n_classes)
        interval = bootstrap_interval(hits, groups=targets, n_resamples=n_resamples, seed=seed)
        figures["mean-per-class"] = Estimate(recalls.nanmean().item(), *interval)

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
        figures[name] = Estimate(value, *interval)
    return figures


def compare(first: SampleRecords, second: SampleRecords, *, n_resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Two models on the images that both have scored: paired bootstrap of the difference, McNemar's exact test.

    Images that are easy or hard for both cancel out, so that differences are far surer than two intervals side by side.
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


def confidence_bins(
    confidences: Tensor,  # [S], in [0, 1]
    correct: Tensor,  # bool [S]
    *,
    n_bins: int = 15,
    binning: _Binning = "equal-width",
) -> Bins:
    """Samples sorted into bins: [m/M, (m+1)/M) of confidence, 1 in the last, or M shares of equally many samples.

    With equal mass, sizes differ by one at most; of samples with the same confidence the earlier ones go to the lower
    bin. Raises DataError when there is no sample or a confidence outside [0, 1].
    """
    _check_confidences(confidences, correct)
    if n_bins < 1:
        raise DataError(f"calibration needs at least one bin, got {n_bins}")
    values, numbers = confidences.double(), _bin_numbers(confidences, n_bins=n_bins, binning=binning)
    counts = torch.bincount(numbers, minlength=n_bins)
    sums = [torch.bincount(numbers, weights=x, minlength=n_bins) for x in (values, correct.double())]
    return Bins(counts, sums[0] / counts, sums[1] / counts)


def expected_calibration_error(
    confidences: Tensor,  # [S], in [0, 1]
    correct: Tensor,  # bool [S]
    *,
    n_bins: int = 15,
    binning: _Binning = "equal-width",
) -> float:
    """Distance between confidence and accuracy, averaged over bins by their samples: sum_m |B_m|/n |acc - conf|.

    Paper: Guo et al. 2017, "On Calibration of Modern Neural Networks"; equal mass: Nguyen and O'Connor 2015.
    """
    bins = confidence_bins(confidences, correct, n_bins=n_bins, binning=binning)
    gaps = (bins.accuracies - bins.confidences).abs().nan_to_num()
    return float((gaps * bins.counts).sum() / bins.counts.sum())


def negative_log_likelihoods(probabilities: Tensor, targets: Tensor, *, floor: float = _FLOOR) -> Tensor:  # -> [S]
    """-ln of the probability of each target, float64, in nats.

    A probability below `floor` counts as the floor, so that a class without a vote costs 15.9 nats and not infinity.
    """
    _check_probabilities(probabilities, targets)
    of_target = probabilities.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1).double()
    return -torch.where(targets >= 0, of_target, 0.0).clamp_min(floor).log()


def brier_scores(probabilities: Tensor, targets: Tensor) -> Tensor:  # [S, C], int64 [S] -> float64 [S]
    """Squared distance of each row to the right answer, sum_c (p_c - y_c)^2, from 0 to 2 (Brier 1950)."""
    _check_probabilities(probabilities, targets)
    of_target = probabilities.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1).double()
    # sum p^2 - 2 p_y + 1, without a matrix of one-hot rows or of squares.
    squares = torch.linalg.vector_norm(probabilities, dim=1, dtype=torch.float64).square()
    return squares - 2 * torch.where(targets >= 0, of_target, 0.0) + 1


def area_under_risk_coverage(confidences: Tensor, correct: Tensor) -> float:
    """Mean over all coverages of the risk, the share of errors among the most confident samples (AURC).

    0 is perfect, the error rate is what random confidences get. Samples of equal confidence come in no order: their
    errors are spread evenly over them, which is the mean over all orders. Papers: El-Yaniv and Wiener 2010; Geifman and
    El-Yaniv 2017.
    """
    _check_confidences(confidences, correct)
    return _mean_risk(confidences, correct)(torch.arange(len(correct)))


def _bin_numbers(confidences: Tensor, *, n_bins: int, binning: _Binning = "equal-width") -> Tensor:  # [S] -> int64 [S]
    """The bin of each sample, as `confidence_bins` defines them."""
    match binning:
        case "equal-width":
            # The bounds in the precision of the confidences: float32 of 9/15 belongs to the bin that begins there.
            bounds = torch.arange(1, n_bins, dtype=torch.float64, device=confidences.device) / n_bins
            return torch.bucketize(confidences, bounds.to(confidences.dtype), right=True)
        case "equal-mass":
            numbers = torch.empty(len(confidences), dtype=torch.int64, device=confidences.device)
            order = confidences.argsort(stable=True)
            numbers[order] = torch.arange(len(order), device=order.device) * n_bins // len(order)
            return numbers


_OfRows = Callable[[Tensor], float]  # of row numbers int64 [S]


def _equal_width_error(confidences: Tensor, hits: Tensor, n_bins: int) -> _OfRows:
    numbers = _bin_numbers(confidences, n_bins=n_bins)
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
    # Equal confidences are one group, over which its errors are spread.
    levels, group = (-confidences).unique(return_inverse=True)  # the most confident first
    wrong = 1 - hits.double()
    counts = torch.arange(1, len(wrong) + 1, dtype=torch.float64)

    def risk(rows: Tensor) -> float:
        sizes = torch.bincount(group[rows], minlength=len(levels))
        errors = torch.bincount(group[rows], weights=wrong[rows], minlength=len(levels))
        spread = (errors / sizes.clamp_min(1)).repeat_interleave(sizes)
        return float((spread.cumsum(dim=0) / counts).mean())

    return risk


def _check_confidences(confidences: Tensor, correct: Tensor) -> None:
    if confidences.ndim != 1 or confidences.shape != correct.shape or not len(confidences):
        raise DataError(
            f"confidences and answers must be [S] with at least one sample, got {list(confidences.shape)} "
            f"and {list(correct.shape)}"
        )
    # Sums of float32 probabilities may exceed 1 by a rounding.
    if not bool(((confidences >= 0) & (confidences <= 1 + 1e-4)).all()):
        raise DataError("a confidence is not between 0 and 1; give probabilities, such as the softmax of logits")


def _check_probabilities(probabilities: Tensor, targets: Tensor) -> None:
    if probabilities.ndim != 2 or targets.shape != probabilities.shape[:1] or not len(targets):
        raise DataError(
            f"probabilities must be [S, C] and targets [S] with at least one sample, got {list(probabilities.shape)} "
            f"and {list(targets.shape)}"
        )
    if int(targets.max()) >= probabilities.shape[1]:
        raise DataError(
            f"there is a target {int(targets.max())}, but there are {probabilities.shape[1]} classes; "
            "remap the labels to 0, 1, ... first"
        )


def _common_rows(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:  # int64 [R], int64 [R]
    """Rows of two lists of image numbers that name the same images, in the same order."""
    by_image = {image: row for row, image in enumerate(second.tolist())}
    pairs = [(row, by_image[image]) for row, image in enumerate(first.tolist()) if image in by_image]
    if not pairs:
        raise DataError("the two models have scored no image in common; evaluate both on one data set")
    rows = torch.tensor(pairs, dtype=torch.int64)
    return rows[:, 0], rows[:, 1]
