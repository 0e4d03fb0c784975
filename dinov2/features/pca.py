"""Principal components of patch features, and their three strongest as colours.

One basis is fitted on the patches of several images, so that equal colours mean equal features across pictures. The
sign of a component is arbitrary; here the entry of largest magnitude is positive, so that the same features always give
the same colours. Statistics are in float64: patch features share a large mean that float32 sums would blur.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov2.errors import DataError

__all__ = ["PcaBasis", "fit_pca", "load_pca", "match_colours", "save_pca"]


@dataclass(frozen=True)
class PcaBasis:
    """Mean, directions and colour range of a principal component analysis."""

    mean: Tensor
    """float32 [D]."""
    components: Tensor
    """float32 [n, D], orthonormal rows, strongest first (as fitted)."""
    low: Tensor
    """float32 [n]: the projection that becomes colour 0."""
    high: Tensor
    """float32 [n]: the projection that becomes colour 1."""
    explained: Tensor
    """float32 [n]: share of the variance along each component."""

    def project(self, features: Tensor) -> Tensor:  # [..., D] -> [..., n]
        """Coordinates along the components."""
        return (features.float() - self.mean.to(features.device)) @ self.components.to(features.device).T

    def to_rgb(self, features: Tensor) -> Tensor:  # [..., D] -> [..., 3]
        """Colours in [0, 1] of the first three components; fewer components repeat the last one."""
        projected = self.project(features)
        low, high = self.low.to(projected.device), self.high.to(projected.device)
        colours = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0.0, 1.0)
        channels = torch.arange(3, device=colours.device).clamp_max(colours.shape[-1] - 1)
        return colours[..., channels]


def fit_pca(features: Tensor, *, n_components: int = 3, clip: float = 0.01) -> PcaBasis:  # [S, D]
    """Fit a basis on the rows of `features`; colours span the `clip` to `1 - clip` quantiles of the projections.

    Raises `DataError` for fewer than two rows or values that are not finite.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise DataError(f"principal components need at least two rows [S, D], got shape {list(features.shape)}")
    if not bool(features.isfinite().all()):
        raise DataError("the features hold NaN or infinite values; look at the training log, the model has diverged")
    rows = features.detach().double().cpu()
    mean = rows.mean(dim=0)
    centred = rows - mean
    eigenvalues, eigenvectors = torch.linalg.eigh(centred.T @ centred / len(rows))  # ascending
    n_components = min(n_components, features.shape[1])
    components = eigenvectors.flip(1)[:, :n_components].T  # [n, D]
    largest = components.abs().argmax(dim=1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    variance = eigenvalues.flip(0).clamp_min(0.0)
    projected = centred @ components.T
    low, high = torch.quantile(_at_most(projected, 100_000), torch.tensor([clip, 1 - clip]).double(), dim=0)
    return PcaBasis(
        mean=mean.float(),
        components=components.float().contiguous(),
        low=low.float(),
        high=high.float(),
        explained=(variance[:n_components] / variance.sum().clamp_min(1e-300)).float(),
    )


def match_colours(basis: PcaBasis, features: Tensor, reference: Tensor) -> PcaBasis:  # [S, D], [S, n]
    """The basis with order and signs of its components such that `features` look most like `reference`.

    `reference` are projections of the same S things by another basis, for example by that of an earlier checkpoint.
    Fitted anew, components swap and flip from one checkpoint to the next although the features hardly change.
    """
    projected, reference = _standardised(basis.project(features)), _standardised(reference)
    similarity = projected.T @ reference / len(reference)  # [n, n]
    n = len(similarity)
    order = max(itertools.permutations(range(n)), key=lambda p: sum(abs(float(similarity[p[j], j])) for j in range(n)))
    rows = torch.tensor(order)
    flipped = similarity[rows, torch.arange(n)] < 0
    signs = torch.where(flipped, -1.0, 1.0)
    low, high = basis.low[rows], basis.high[rows]
    return PcaBasis(
        mean=basis.mean,
        components=basis.components[rows] * signs.unsqueeze(1),
        low=torch.where(flipped, -high, low),
        high=torch.where(flipped, -low, high),
        explained=basis.explained[rows],
    )


def save_pca(path: Path | str, basis: PcaBasis) -> None:
    """Write the basis as safetensors."""
    tensors = {name: getattr(basis, name).contiguous() for name in ("mean", "components", "low", "high", "explained")}
    save_file(tensors, path)


def load_pca(path: Path | str) -> PcaBasis:
    """Read a basis of `save_pca`. Raises `DataError` when the file is none."""
    try:
        return PcaBasis(**load_file(path))
    except Exception as error:  # safetensors has its own error type, and foreign files lack or add names
        raise DataError(f"{path} holds no PCA basis ({error}); write one with save_pca") from error


def _at_most(rows: Tensor, n: int) -> Tensor:
    """Evenly chosen rows: `torch.quantile` refuses very long inputs."""
    return rows[:: max(1, -(-len(rows) // n))]


def _standardised(columns: Tensor) -> Tensor:  # [S, n]
    columns = columns.double() - columns.double().mean(dim=0)
    return columns / columns.pow(2).mean(dim=0).sqrt().clamp_min(1e-12)
