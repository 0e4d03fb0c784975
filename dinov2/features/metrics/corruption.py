"""Errors under the corruptions of ImageNet-C, also relative to AlexNet's: the mean corruption error.

CE_c is the sum over severities of a model's top-1 errors divided by that of AlexNet's; mCE is its mean over the 15
corruptions, and the relative mCE does the same with the excess over the error on clean images. Both are 1 for AlexNet
(papers print per cent). They weigh corruptions by how hard AlexNet found them; the plain mean error does not.

Paper: Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations".
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.errors import DataError

__all__ = [
    "ALEXNET_CLEAN_ERROR",
    "ALEXNET_ERRORS",
    "CorruptionErrors",
    "corruption_errors",
    "errors_by_part",
    "normalised_error",
]

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

ALEXNET_CLEAN_ERROR = 0.4345
"""AlexNet's top-1 error on the clean validation images, to four digits."""

_N_SEVERITIES = 5


class CorruptionErrors(NamedTuple):
    """The figures of one model, fractions."""

    mean_error: float
    """Mean top-1 error over the 15 corruptions and 5 severities, compared with nobody."""
    mce: float
    """Mean corruption error, 1 for AlexNet."""
    relative_mce: float | None
    """Relative mean corruption error, 1 for AlexNet; None without the error on clean images."""
    errors: dict[str, float]
    """Mean over severities by corruption."""
    normalised: dict[str, float]
    """CE by corruption."""


def corruption_errors(
    errors: Mapping[str, Sequence[float]], *, clean_error: float | None = None
) -> CorruptionErrors:  # corruption -> top-1 error by severity
    """The figures from top-1 errors (fractions) at the five severities of each corruption.

    Corruptions beyond the benchmark's 15 are left aside. `clean_error` is the error on the uncorrupted images. Raises
    DataError when a corruption or a severity is missing, because a mean over fewer would pass for the real one.
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
    normalised = {name: means[name] / alexnet for name, alexnet in ALEXNET_ERRORS.items()}
    relative = None
    if clean_error is not None:
        relative = statistics.fmean(
            (means[name] - clean_error) / (alexnet - ALEXNET_CLEAN_ERROR) for name, alexnet in ALEXNET_ERRORS.items()
        )
    return CorruptionErrors(
        mean_error=statistics.fmean(means.values()),
        mce=statistics.fmean(normalised.values()),
        relative_mce=relative,
        errors=means,
        normalised=normalised,
    )


def normalised_error(corruption: str, errors: Sequence[float]) -> float | None:
    """CE of one corruption from its errors by severity; None where AlexNet's are not known.

    They are for the benchmark's 15 corruptions, and for the five severities together.
    """
    if corruption not in ALEXNET_ERRORS or len(errors) != _N_SEVERITIES:
        return None
    return statistics.fmean(errors) / ALEXNET_ERRORS[corruption]


def errors_by_part(
    hits: Tensor,  # bool [S]
    part_numbers: Tensor,  # int64 [S]
    parts: Sequence[tuple[str, int]],
) -> dict[str, list[float]]:
    """Top-1 error by corruption, severities in the order of `parts`, the `(corruption, severity)` by part number.

    `part_numbers` and `parts` are those of `dinov2.data.datasets.ImageNetC`, the former for the images that were scored
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
