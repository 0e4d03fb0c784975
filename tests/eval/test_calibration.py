"""Calibration against torchmetrics, scikit-learn and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dinov2.errors import DataError
from dinov2.eval.figures import (
    area_under_risk_coverage,
    brier_scores,
    confidence_bins,
    expected_calibration_error,
    negative_log_likelihoods,
)

calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve
sklearn_metrics = pytest.importorskip("sklearn.metrics")
torchmetrics = pytest.importorskip("torchmetrics.classification")

N, C = 157, 6


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(N, C, generator=generator)


@pytest.fixture(scope="module")
def targets(logits: torch.Tensor) -> torch.Tensor:
    # Drawn from the logits at temperature 2.5, so that they are over-confident by that factor.
    return torch.multinomial((logits / 2.5).softmax(dim=1), 1, generator=torch.Generator().manual_seed(1)).squeeze(1)


@pytest.fixture(scope="module")
def answers(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    confidences, predictions = logits.softmax(dim=1).max(dim=1)
    return confidences, predictions == targets


@pytest.mark.parametrize("n_bins", [15, 7, 1])
def test_the_calibration_error_equals_torchmetrics(
    logits: torch.Tensor, targets: torch.Tensor, answers: tuple[torch.Tensor, torch.Tensor], n_bins: int
) -> None:
    theirs = torchmetrics.MulticlassCalibrationError(C, n_bins=n_bins, norm="l1")(logits.softmax(dim=1), targets)
    assert expected_calibration_error(*answers, n_bins=n_bins) == pytest.approx(theirs.item(), abs=1e-6)


def test_bins_of_equal_width_equal_scikit_learn(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    confidences, correct = answers
    bins = confidence_bins(confidences, correct)
    accuracy, confidence = calibration_curve(correct, confidences, n_bins=15, strategy="uniform")
    filled = bins.counts > 0
    assert_close(bins.accuracies[filled], torch.from_numpy(accuracy))
    assert_close(bins.confidences[filled], torch.from_numpy(confidence), rtol=1e-6, atol=0)
    assert bins.accuracies[~filled].isnan().all() and int(bins.counts.sum()) == N


def test_bins_of_equal_mass_equal_scikit_learn_where_the_sizes_divide(
    answers: tuple[torch.Tensor, torch.Tensor],
) -> None:
    confidences, correct = answers[0][:150], answers[1][:150]
    bins = confidence_bins(confidences, correct, binning="equal-mass")
    accuracy, confidence = calibration_curve(correct, confidences, n_bins=15, strategy="quantile")
    assert bins.counts.tolist() == [10] * 15
    assert_close(bins.accuracies, torch.from_numpy(accuracy))
    assert_close(bins.confidences, torch.from_numpy(confidence), rtol=1e-6, atol=0)
    error = expected_calibration_error(confidences, correct, binning="equal-mass")
    assert error == pytest.approx(np.abs(accuracy - confidence).mean(), abs=1e-7)


def test_bins_of_equal_mass_differ_by_one_sample_where_they_do_not(
    answers: tuple[torch.Tensor, torch.Tensor],
) -> None:
    counts = confidence_bins(*answers, binning="equal-mass").counts
    assert set(counts.tolist()) == {10, 11} and int(counts.sum()) == N


def test_every_confidence_has_a_bin_the_edges_included() -> None:
    confidences = torch.tensor([0.0, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0])
    bins = confidence_bins(confidences, torch.ones(6, dtype=torch.bool), n_bins=5)
    assert bins.counts.tolist() == [1, 1, 1, 1, 2]


def test_a_calibrated_and_a_boastful_classifier_have_the_errors_of_the_formula() -> None:
    # 10 answers at 0.9 of which 9 are right, 10 at 0.9 of which 4 are right.
    confidences = torch.full((10,), 0.9)
    assert expected_calibration_error(confidences, torch.arange(10) < 9) == pytest.approx(0.0, abs=1e-7)
    assert expected_calibration_error(confidences, torch.arange(10) < 4) == pytest.approx(0.5, abs=1e-7)


def test_log_loss_and_brier_equal_scikit_learn(logits: torch.Tensor, targets: torch.Tensor) -> None:
    probabilities = logits.double().softmax(dim=1)
    ours = negative_log_likelihoods(probabilities, targets).mean().item()
    assert ours == pytest.approx(sklearn_metrics.log_loss(targets, probabilities, labels=range(C)))
    theirs = sklearn_metrics.brier_score_loss(targets, probabilities, labels=list(range(C)), scale_by_half=False)
    assert brier_scores(probabilities, targets).mean().item() == pytest.approx(theirs)


def test_an_unknown_class_is_as_wrong_as_a_class_without_probability() -> None:
    probabilities = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    targets = torch.tensor([1, -1, -1])
    assert brier_scores(probabilities, targets).tolist() == [2.0, 2.0, 1.5]
    assert negative_log_likelihoods(probabilities, targets).tolist() == pytest.approx([15.9424] * 3, abs=1e-4)


def brute_force_aurc(confidences: np.ndarray, correct: np.ndarray) -> float:
    order = np.argsort(-confidences, kind="stable")
    risks = [1 - correct[order][: i + 1].mean() for i in range(len(order))]
    return float(np.mean(risks))


def test_the_area_under_the_risk_coverage_curve_is_the_mean_risk(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    confidences, correct = answers
    assert len(confidences.unique()) == N
    expected = brute_force_aurc(confidences.numpy(), correct.numpy())
    assert area_under_risk_coverage(confidences, correct) == pytest.approx(expected)


def test_ties_of_confidence_count_as_the_mean_over_their_orders() -> None:
    confidences = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1])
    correct = torch.tensor([True, False, True, True, False])
    orders = [
        brute_force_aurc(confidences.numpy(), correct.numpy()[[0, *middle, 4]])
        for middle in itertools.permutations((1, 2, 3))
    ]
    assert area_under_risk_coverage(confidences, correct) == pytest.approx(np.mean(orders))
    assert area_under_risk_coverage(torch.full((5,), 0.7), correct) == pytest.approx(0.4)  # the error rate


@pytest.mark.parametrize(
    ("confidences", "message"),
    [
        (torch.tensor([0.5, 1.5]), "not between 0 and 1; give probabilities"),
        (torch.tensor([math.nan, 0.5]), "not between 0 and 1"),
        (torch.tensor([0.5]), r"got \[1\] and \[2\]"),
    ],
)
def test_confidences_that_are_none_are_refused(confidences: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expected_calibration_error(confidences, torch.tensor([True, False]))


def test_no_sample_and_no_bin_are_refused() -> None:
    nothing = torch.empty(0), torch.empty(0, dtype=torch.bool)
    with pytest.raises(DataError, match="at least one sample"):
        area_under_risk_coverage(*nothing)
    with pytest.raises(DataError, match="at least one bin, got 0"):
        expected_calibration_error(torch.tensor([0.5]), torch.tensor([True]), n_bins=0)
    with pytest.raises(DataError, match="a target 2, but there are 2 classes"):
        brier_scores(torch.zeros(1, 2), torch.tensor([2]))
