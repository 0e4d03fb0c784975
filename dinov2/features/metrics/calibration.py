"""Whether a classifier's confidence means something: calibration errors, proper scores, temperature, selective risk.

Probabilities are [S, C], targets int64 [S]. A target of -1 is a class that the classifier does not know: no answer is
right, and its probability is zero. Confidence is the largest probability of a row.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dinov2.errors import DataError

__all__ = [
    "Bins",
    "area_under_risk_coverage",
    "bin_numbers",
    "brier_scores",
    "confidence_bins",
    "expected_calibration_error",
    "fit_temperature",
    "negative_log_likelihoods",
    "risk_coverage_curve",
]

_FLOOR = torch.finfo(torch.float32).eps
_HOTTEST, _COLDEST = 100.0, 0.01


class Bins(NamedTuple):
    """Samples in bins of rising confidence, the points of a reliability diagram; means of an empty bin are NaN."""

    counts: Tensor
    """int64 [M]."""
    confidences: Tensor
    """Mean confidence, float64 [M]."""
    accuracies: Tensor
    """Share of right answers, float64 [M]."""


def confidence_bins(
    confidences: Tensor,  # [S], in [0, 1]
    correct: Tensor,  # bool [S]
    *,
    n_bins: int = 15,
    binning: Literal["equal-width", "equal-mass"] = "equal-width",
) -> Bins:
    """Samples sorted into bins: [m/M, (m+1)/M) of confidence, 1 in the last, or M shares of equally many samples.

    With equal mass, sizes differ by one at most; of samples with the same confidence the earlier ones go to the lower
    bin. Raises DataError when there is no sample or a confidence outside [0, 1].
    """
    _check_confidences(confidences, correct)
    if n_bins < 1:
        raise DataError(f"calibration needs at least one bin, got {n_bins}")
    values, numbers = confidences.double(), bin_numbers(confidences, n_bins=n_bins, binning=binning)
    counts = torch.bincount(numbers, minlength=n_bins)
    sums = [torch.bincount(numbers, weights=x, minlength=n_bins) for x in (values, correct.double())]
    return Bins(counts, sums[0] / counts, sums[1] / counts)


def bin_numbers(
    confidences: Tensor, *, n_bins: int, binning: Literal["equal-width", "equal-mass"] = "equal-width"
) -> Tensor:  # [S] -> int64 [S]
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


def expected_calibration_error(
    confidences: Tensor,  # [S], in [0, 1]
    correct: Tensor,  # bool [S]
    *,
    n_bins: int = 15,
    binning: Literal["equal-width", "equal-mass"] = "equal-width",
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


def fit_temperature(logits: Tensor, targets: Tensor, *, n_iterations: int = 100) -> float:  # [S, C], int64 [S]
    """The T that makes softmax(logits / T) most likely, from 0.01 to 100 (Guo et al. 2017).

    Fit it on the set that settings are selected on, never on the one that is reported. Samples with target -1 are left
    out. The likelihood is concave in 1/T, so Newton's steps inside a shrinking bracket find its only maximum; where
    that lies outside (all answers right, or worse than chance) the nearer end is returned. Raises DataError when a
    logit is not finite: take logarithms of probabilities only where none is zero.
    """
    logits, targets = logits[targets >= 0].detach(), targets[targets >= 0]
    _check_probabilities(logits, targets)
    if not bool(logits.isfinite().all()):
        raise DataError("a temperature needs finite logits; clamp the probabilities before taking their logarithm")
    centred = (logits - logits.gather(1, targets.unsqueeze(1))).float()  # [S, C], 0 at the target

    def slopes(inverse: float) -> tuple[float, float]:
        """First and second derivative of the mean negative log-likelihood by 1/T."""
        p = (centred * inverse).softmax(dim=1)
        mean = (p * centred).sum(dim=1)
        variance = (p * (centred - mean.unsqueeze(1)).square()).sum(dim=1)
        return float(mean.double().mean()), float(variance.double().mean())

    low, high = 1 / _HOTTEST, 1 / _COLDEST
    if slopes(low)[0] >= 0:
        return _HOTTEST
    if slopes(high)[0] <= 0:
        return _COLDEST
    inverse = 1.0
    for _ in range(n_iterations):
        first, second = slopes(inverse)
        low, high = (inverse, high) if first < 0 else (low, inverse)
        step = inverse - first / second if second > 0 else math.inf
        # Geometric, because the bracket spans four decades.
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following - inverse) <= 1e-5 * inverse:
            break
        inverse = following
    return 1 / inverse


def risk_coverage_curve(confidences: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage i/n and risk, float64 [S] each: the share of errors among the i most confident samples.

    Samples of equal confidence come in no order: their errors are spread evenly over them, which is the mean over all
    orders. Papers: El-Yaniv and Wiener 2010; Geifman and El-Yaniv 2017.
    """
    _check_confidences(confidences, correct)
    n = len(confidences)
    values, order = confidences.sort(descending=True)
    wrong = 1 - correct[order].double()
    _, group, sizes = values.unique_consecutive(return_inverse=True, return_counts=True)
    spread = torch.zeros(len(sizes), dtype=torch.float64, device=wrong.device).index_add_(0, group, wrong) / sizes
    counts = torch.arange(1, n + 1, dtype=torch.float64, device=wrong.device)
    return counts / n, spread[group].cumsum(dim=0) / counts


def area_under_risk_coverage(confidences: Tensor, correct: Tensor) -> float:
    """Mean risk over all coverages (AURC): 0 is perfect, the error rate is what random confidences get."""
    return float(risk_coverage_curve(confidences, correct)[1].mean())


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
