"""Measures that need no labels: of a feature matrix, of the teacher's assignments, of the patches within an image.

Measures of features tell a collapsed model from a healthy one. They compare checkpoints of one architecture and one
kind of feature, not different models. Their sums are in float64: singular values span many orders of magnitude.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.analysis.patch_maps import high_norm_share, high_norm_threshold, patch_norms
from dinov2.encode.tokens import require_finite
from dinov2.errors import DataError

__all__ = [
    "assignment_health",
    "effective_rank",
    "feature_health",
    "nearest_distances",
    "participation_ratio",
    "patch_health",
    "rank_me",
    "spread",
    "uniformity",
]


def rank_me(features: Tensor, *, eps: float = 1e-7) -> float:
    """Effective rank, between 1 and min(S, D): the exponential of the entropy of the normalised singular values.

    `features` [S, D] are taken as they are, not centred. Paper: Garrido et al. 2023, "RankMe".
    """
    rows = _checked(features)
    # The smaller of the two Gram matrices: both have the same eigenvalues beside zeros.
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    missing = rows.shape[1] - singular.numel()
    shares = singular / singular.sum().clamp_min(1e-300) + eps
    # The directions that too few rows leave out count with their `eps`, as in the full matrix.
    entropy = -(shares * shares.log()).sum() - missing * eps * math.log(eps)
    return float(entropy.exp())


def effective_rank(features: Tensor) -> float:
    """`rank_me` of the centred features: a common offset of all rows is no direction in which they differ."""
    rows = _checked(features)
    rows = rows - rows.mean(dim=0)
    # Below rounding of the data there is no difference: identical rows would otherwise show the rank of their noise.
    if float(rows.norm()) <= 1e-6 * float(features.double().norm()):
        return 1.0
    return rank_me(rows)


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


def spread(features: Tensor) -> float:
    """Distance of L2-normalised rows `[S, D]` from their mean: 1 when they point everywhere, 0 when all are the same.

    The root of the summed variances of the coordinates, which is `sqrt(1 - |mean|^2)`.
    """
    rows = normalize(_checked(features), dim=1)
    return float((rows - rows.mean(dim=0)).pow(2).sum(dim=1).mean().sqrt())


def nearest_distances(features: Tensor) -> Tensor:
    """Distance of each L2-normalised row of `[S, D]` to its nearest other row, float64 `[S]`: what KoLeo makes large.

    0 is a duplicate; 2 would be the opposite side of the sphere. Raises `DataError` for fewer than two rows.
    """
    rows = normalize(_checked(features), dim=1)
    if len(rows) < 2:
        raise DataError("a distance to the nearest other row needs at least two rows of features")
    similarity = (rows @ rows.T).fill_diagonal_(-torch.inf)
    return (rows - rows[similarity.argmax(dim=1)]).norm(dim=1)


def feature_health(features: Tensor) -> dict[str, float]:
    """All measures of this module by name, for a log or a report."""
    return {
        "rank_me": rank_me(features),
        "participation_ratio": participation_ratio(features),
        "uniformity": uniformity(features),
    }


@torch.no_grad()
def assignment_health(assignments: Tensor) -> dict[str, float]:
    """Measures of assignments `[S, K]` whose rows sum to 1; entropies in nats.

    `teacher_entropy` (0 to ln K): mean entropy of a row. `marginal_entropy` (0 to ln K): entropy of the mean row.
    `kl_to_uniform`: ln K less the latter, the divergence of the mean row from the uniform one. `prototype_usage`
    (above 0, at most 1): different prototypes that are some row's highest, in parts of the most that S rows could have.

    Raises `DataError` when there is no row, or one that is not finite.
    """
    if assignments.ndim != 2 or assignments.shape[0] == 0:
        raise DataError(f"assignments must be [S, K] with at least one row, got shape {list(assignments.shape)}")
    if not bool(assignments.isfinite().all()):
        raise DataError("the assignments hold NaN or infinite values; the training has diverged")
    rows = assignments.double()
    n_rows, n_prototypes = rows.shape
    marginal = _entropy(rows.mean(dim=0)).item()
    used = rows.argmax(dim=1).unique().numel()
    return {
        "teacher_entropy": _entropy(rows).mean().item(),
        "marginal_entropy": marginal,
        "kl_to_uniform": math.log(n_prototypes) - marginal,
        "prototype_usage": used / min(n_rows, n_prototypes),
    }


@torch.no_grad()
def patch_health(patches: Tensor, patches_before_norm: Tensor) -> dict[str, float]:
    """Measures of the patch tokens `[B, h, w, D]` of B images after and before the backbone's final norm.

    `near_similarity`: mean cosine similarity of neighbours in a row or column. `far_similarity`: of patches that lie
    half the grid (rounded up) apart along a row or column. `similarity_decay`: the first less the second.
    `high_norm_share`: share of patches whose norm before the final norm is above `HIGH_NORM_FACTOR` medians (Darcet et
    al. 2024, "Vision transformers need registers", with a threshold that does not depend on the model). Grids of one
    patch give an empty dictionary.
    """
    if patches.ndim != 4 or patches.shape != patches_before_norm.shape:
        raise DataError(
            f"patches must be two tensors [B, h, w, D] of one shape, got {list(patches.shape)} and "
            f"{list(patches_before_norm.shape)}"
        )
    height, width = patches.shape[1:3]
    if height < 2 or width < 2:
        return {}
    unit = normalize(patches.float(), dim=-1)
    near = _similarity_at(unit, 1, 1)
    far = _similarity_at(unit, -(-height // 2), -(-width // 2))
    norms = patch_norms(patches_before_norm)
    return {
        "near_similarity": near,
        "far_similarity": far,
        "similarity_decay": near - far,
        "high_norm_share": high_norm_share(norms, high_norm_threshold(norms)),
    }


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or features.shape[0] == 0:
        raise DataError(f"features must be [S, D] with at least one row, got shape {list(features.shape)}")
    require_finite(features)
    return features.detach().double()


def _entropy(rows: Tensor) -> Tensor:  # [..., K] -> [...]
    return torch.special.entr(rows).sum(dim=-1)


def _similarity_at(unit: Tensor, rows: int, columns: int) -> float:
    """Mean cosine similarity of patches `rows` apart in a column and `columns` apart in a row."""
    down = (unit[:, rows:] * unit[:, :-rows]).sum(dim=-1)
    across = (unit[:, :, columns:] * unit[:, :, :-columns]).sum(dim=-1)
    return float(torch.cat([down.flatten(), across.flatten()]).mean())
