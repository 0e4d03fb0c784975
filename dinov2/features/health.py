"""Measures of a feature matrix that need no labels: how many directions it uses, how evenly it covers the sphere.

They tell a collapsed model from a living one. They compare checkpoints of one architecture and one kind of feature, not
different models. Sums are in float64: singular values span many orders of magnitude.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.errors import DataError

__all__ = ["feature_health", "participation_ratio", "rank_me", "uniformity"]


def rank_me(features: Tensor, *, eps: float = 1e-7) -> float:
    """Effective rank, between 1 and min(S, D): the exponential of the entropy of the normalised singular values.

    `features` [S, D] are taken as they are, not centred. Paper: Garrido et al. 2023, "RankMe".
    """
    rows = _checked(features)
    singular = torch.linalg.eigvalsh(rows.T @ rows).clamp_min(0.0).sqrt()
    shares = singular / singular.sum().clamp_min(1e-300) + eps
    return float((-(shares * shares.log()).sum()).exp())


def participation_ratio(features: Tensor) -> float:
    """(sum of variances)^2 / sum of squared variances along the principal directions of the centred features [S, D].

    D for white features, 1 when everything lies on a line, 0 when all rows are the same.
    """
    rows = _checked(features)
    rows = rows - rows.mean(dim=0)
    # A variance below rounding of the data is none: otherwise a constant matrix would look white.
    noise = 1e-12 * features.double().pow(2).mean().item() * features.shape[1]
    covariance = rows.T @ rows / len(rows)
    total = covariance.trace().item()
    return 0.0 if total <= noise else total**2 / covariance.pow(2).sum().item()


def uniformity(features: Tensor, *, t: float = 2.0, max_rows: int = 2048) -> float:
    """log of the mean Gaussian potential exp(-t |x - y|^2) over pairs of L2-normalised rows; lower is more even.

    0 means that all rows are the same. Uses at most `max_rows` evenly chosen rows.
    Paper: Wang and Isola 2020, "Understanding contrastive representation learning".
    """
    rows = _checked(features)
    rows = normalize(rows[:: max(1, -(-len(rows) // max_rows))], dim=1)
    if len(rows) < 2:
        raise DataError("uniformity compares pairs and needs at least two rows of features")
    return torch.pdist(rows).pow(2).mul(-t).exp().mean().log().item()


def feature_health(features: Tensor) -> dict[str, float]:
    """All measures of this module by name, for a log or a report."""
    return {
        "rank_me": rank_me(features),
        "participation_ratio": participation_ratio(features),
        "uniformity": uniformity(features),
    }


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or features.shape[0] == 0:
        raise DataError(f"features must be [S, D] with at least one row, got shape {list(features.shape)}")
    if not bool(features.isfinite().all()):
        raise DataError("the features hold NaN or infinite values; look at the training log, the model has diverged")
    return features.detach().double()
