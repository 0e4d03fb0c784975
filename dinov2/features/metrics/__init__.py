"""What an evaluation says in numbers: accuracies, calibration, corruption errors, and how sure each figure is.

Everything is a function of values. `records` holds what is known of each image, gathered over processes with each
image counted once; `figures` makes all of a classifier's figures from it, with their intervals.
"""

from dinov2.features.metrics.accuracy import (
    best_ranks,
    mean_per_class_accuracy,
    per_class_accuracy,
    per_class_means,
    real_accuracy,
    renumber_labels,
    restrict_probabilities,
    restrict_scores,
    target_ranks,
    top_k_accuracy,
    top_k_hits,
    voted_ranks,
)
from dinov2.features.metrics.calibration import (
    Bins,
    area_under_risk_coverage,
    bin_numbers,
    brier_scores,
    confidence_bins,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihoods,
    risk_coverage_curve,
)
from dinov2.features.metrics.corruption import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    CorruptionErrors,
    corruption_errors,
    errors_by_part,
    normalised_error,
)
from dinov2.features.metrics.figures import Figure, classification_figures
from dinov2.features.metrics.intervals import (
    bootstrap_interval,
    bootstrap_statistic,
    mean_interval,
    wilson_interval,
)
from dinov2.features.metrics.records import SampleRecords, gather_records, sample_records

__all__ = [
    "ALEXNET_CLEAN_ERROR",
    "ALEXNET_ERRORS",
    "Bins",
    "CorruptionErrors",
    "Figure",
    "SampleRecords",
    "area_under_risk_coverage",
    "best_ranks",
    "bin_numbers",
    "bootstrap_interval",
    "bootstrap_statistic",
    "brier_scores",
    "classification_figures",
    "confidence_bins",
    "corruption_errors",
    "errors_by_part",
    "expected_calibration_error",
    "fit_temperature",
    "gather_records",
    "mean_interval",
    "mean_per_class_accuracy",
    "negative_log_likelihoods",
    "normalised_error",
    "per_class_accuracy",
    "per_class_means",
    "real_accuracy",
    "renumber_labels",
    "restrict_probabilities",
    "restrict_scores",
    "risk_coverage_curve",
    "sample_records",
    "target_ranks",
    "top_k_accuracy",
    "top_k_hits",
    "voted_ranks",
    "wilson_interval",
]
