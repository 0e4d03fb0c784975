"""Records of images, and all figures of a classifier from them."""

import pytest
import torch

from dinov2.errors import DataError
from dinov2.eval.figures import (
    SampleRecords,
    area_under_risk_coverage,
    classification_figures,
    expected_calibration_error,
    sample_records,
)
from dinov2.eval.metrics import bootstrap_statistic, target_ranks

scipy_stats = pytest.importorskip("scipy.stats")
sklearn_metrics = pytest.importorskip("sklearn.metrics")

N, C = 211, 7


@pytest.fixture(scope="module")
def probabilities() -> torch.Tensor:
    return (2 * torch.randn(N, C, generator=torch.Generator().manual_seed(0))).double().softmax(dim=1)


@pytest.fixture(scope="module")
def targets(probabilities: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(1)).squeeze(1)


def test_a_record_says_what_the_row_of_probabilities_says(probabilities: torch.Tensor, targets: torch.Tensor) -> None:
    records = sample_records(probabilities, targets)
    assert torch.equal(records.predictions, probabilities.argmax(dim=1))
    assert torch.equal(records.confidences, probabilities.amax(dim=1))
    for k in (1, 3, 5):
        assert torch.equal(records.hits(k=k), target_ranks(probabilities, targets) < k)
    assert records.indices.tolist() == list(range(N)) and len(records) == N


def test_what_got_no_vote_is_no_answer_and_an_unknown_class_no_hit() -> None:
    probabilities = torch.tensor([[0.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.6, 0.4, 0.0]])
    records = sample_records(probabilities, torch.tensor([0, 2, -1, 1]))
    assert records.predictions.tolist() == [-1, 0, 0, 0]
    assert records.ranks.tolist() == [3, 3, 3, 1]
    assert records.hits(k=5).tolist() == [False, False, False, True]


def test_every_figure_equals_its_oracle(probabilities: torch.Tensor, targets: torch.Tensor) -> None:
    records = sample_records(probabilities, targets)
    figures = classification_figures(records, n_resamples=500, n_curve_resamples=50)
    predictions = probabilities.argmax(dim=1)
    hits = predictions == targets
    confidences = probabilities.amax(dim=1)
    oracle = {
        "top-1": hits.double().mean().item(),
        "top-5": (probabilities.topk(5).indices == targets.unsqueeze(1)).any(dim=1).double().mean().item(),
        "mean-per-class": sklearn_metrics.recall_score(targets, predictions, average="macro"),
        "log-loss": sklearn_metrics.log_loss(targets, probabilities, labels=range(C)),
        "brier": sklearn_metrics.brier_score_loss(targets, probabilities, labels=list(range(C)), scale_by_half=False),
        "ece": expected_calibration_error(confidences, hits),
        "ece-equal-mass": expected_calibration_error(confidences, hits, binning="equal-mass"),
        "aurc": area_under_risk_coverage(confidences, hits),
    }
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(oracle, abs=1e-9)
    for name in ("top-1", "top-5", "mean-per-class", "log-loss", "brier", "aurc"):
        assert figures[name].low < figures[name].value < figures[name].high


def test_the_interval_of_top_1_is_about_wilsons(probabilities: torch.Tensor, targets: torch.Tensor) -> None:
    records = sample_records(probabilities, targets)
    figure = classification_figures(records, n_curve_resamples=1)["top-1"]
    wilson = scipy_stats.binomtest(int(records.hits().sum()), N).proportion_ci(method="wilson")
    assert figure[1:] == pytest.approx((wilson.low, wilson.high), abs=0.01)


@pytest.mark.parametrize("votes", [False, True], ids=["all different", "many ties"])
def test_the_intervals_of_curves_are_those_of_figures_computed_anew_for_each_resample(
    probabilities: torch.Tensor, targets: torch.Tensor, votes: bool
) -> None:
    # Votes of ten neighbours: confidences are tenths, as k-NN gives them.
    records = sample_records((10 * probabilities).round() / 10 if votes else probabilities, targets)
    figures = classification_figures(records, n_resamples=10, n_curve_resamples=100)
    confidences, hits = records.confidences, records.hits()
    anew = {
        "ece": lambda rows: expected_calibration_error(confidences[rows], hits[rows]),
        "aurc": lambda rows: area_under_risk_coverage(confidences[rows], hits[rows]),
    }
    if not votes:  # which of equal confidences goes to the lower of two bins of equal mass is arbitrary
        anew["ece-equal-mass"] = lambda rows: expected_calibration_error(
            confidences[rows], hits[rows], binning="equal-mass"
        )
    for name, statistic in anew.items():
        assert figures[name][1:] == pytest.approx(bootstrap_statistic(statistic, N, n_resamples=100), abs=1e-9)


def test_images_of_unknown_classes_are_errors_in_all_but_the_mean_over_classes() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.7, 0.3]])
    figures = classification_figures(
        sample_records(probabilities, torch.tensor([0, 1, 1, -1])), n_resamples=10, n_curve_resamples=2
    )
    assert figures["top-1"].value == 0.5
    assert figures["mean-per-class"].value == 0.75
    nobody = classification_figures(sample_records(probabilities, torch.full((4,), -1)), n_curve_resamples=2)
    assert "mean-per-class" not in nobody and nobody["top-1"].value == 0.0


def test_no_record_has_no_figure() -> None:
    nothing, none = torch.empty(0), torch.empty(0, dtype=torch.int64)
    with pytest.raises(DataError, match="no samples to score"):
        classification_figures(SampleRecords(none, none, none, nothing, none, nothing, nothing, n_classes=C))
