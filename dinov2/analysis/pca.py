"""Principal components of patch features, and their three strongest as colours.

One basis is fitted on the patches of several images, so that equal colours mean equal features across pictures. The
sign of a component is arbitrary; here the entry of largest magnitude is positive, so that the same features always give
the same colours. Statistics are in float64: patch features share a large mean that float32 sums would blur.

A basis may carry a foreground split: the first component of all patches, cut where it falls into two groups best, and
the group that touches the borders of the pictures less is the foreground. The colours are then those of the foreground
alone, where the strongest direction is no longer "object or not" but a part of the object.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dinov2.encode.tokens import require_finite
from dinov2.errors import DataError
from dinov2.whole_files import escape_name, unescape_name, utf8_path

__all__ = [
    "ForegroundSplit",
    "PcaBasis",
    "fit_foreground_pca",
    "fit_image_pca",
    "fit_pca",
    "load_pca",
    "match_colours",
    "save_pca",
]

# Rows that a basis over images is fitted on; more change no colour that can be seen.
_FIT_ROWS = 50_000
_TENSORS = ("mean", "components", "low", "high", "explained")


@dataclass(frozen=True)
class ForegroundSplit:
    """A plane that parts foreground from background."""

    direction: Tensor
    """float32 [D], of unit length; points to the foreground."""
    threshold: float
    """Foreground lies where features times direction exceed this."""

    def mask(self, features: Tensor) -> Tensor:  # [..., D] -> bool [...]
        """True on foreground."""
        return features.float() @ self.direction.to(features.device) > self.threshold


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
    foreground: ForegroundSplit | None = None
    """Split of foreground and background, when the colours are those of the foreground."""
    fitted_on: str = ""
    """Origin in words: a model, a block."""

    def foreground_mask(self, features: Tensor) -> Tensor:  # [..., D] -> bool [...]
        """True on foreground; everywhere when the basis has no split."""
        if self.foreground is None:
            return torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device)
        return self.foreground.mask(features)

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
    require_finite(features, of="patches")
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


def fit_image_pca(maps: Sequence[Tensor], *, n_components: int = 3) -> PcaBasis:  # each [h, w, D]
    """One basis on the patches of several images, which may differ in size; large sets are fitted on a part.

    Raises `DataError` like `fit_pca`.
    """
    return fit_pca(_at_most(_stack(maps), _FIT_ROWS), n_components=n_components)


def fit_foreground_pca(maps: Sequence[Tensor], *, n_components: int = 3) -> PcaBasis:  # each [h, w, D]
    """One basis on the foreground patches of several images, with their split from the background.

    Raises `DataError` like `fit_pca`, and when fewer than two patches are left on either side of the split.
    """
    rows = _stack(maps)
    first = fit_pca(_at_most(rows, _FIT_ROWS), n_components=1)
    direction = first.components[0]
    along = rows.float() @ direction  # [S]
    threshold = _best_cut(along)
    border = torch.cat([_border(*map_.shape[:2]) for map_ in maps])
    above = along > threshold
    if not 2 <= int(above.sum()) <= len(rows) - 2:
        raise DataError("no foreground can be told from the background: the patch features hardly differ")
    if above[border].float().mean() > above[~border].float().mean():  # a NaN, without inner patches, keeps the sign
        direction, threshold, above = -direction, -threshold, ~above
    split = ForegroundSplit(direction, threshold)
    return replace(fit_pca(_at_most(rows[above], _FIT_ROWS), n_components=n_components), foreground=split)


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
    return replace(
        basis,
        components=basis.components[rows] * signs.unsqueeze(1),
        low=torch.where(flipped, -high, low),
        high=torch.where(flipped, -low, high),
        explained=basis.explained[rows],
    )


def save_pca(path: Path | str, basis: PcaBasis) -> None:
    """Write the basis as safetensors."""
    tensors = {name: getattr(basis, name).contiguous() for name in _TENSORS}
    if basis.foreground is not None:
        tensors["foreground_direction"] = basis.foreground.direction.contiguous()
        tensors["foreground_threshold"] = torch.tensor([basis.foreground.threshold], dtype=torch.float64)
    # Not by `save_file`, whose files nobody else may read: colours are made to be shared.
    Path(path).write_bytes(save(tensors, metadata={"fitted_on": escape_name(basis.fitted_on)}))


def load_pca(path: Path | str) -> PcaBasis:
    """Read a basis of `save_pca`. Raises `DataError` when the file is none."""
    try:
        with utf8_path(path) as name, safe_open(name, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            fitted_on = unescape_name((file.metadata() or {}).get("fitted_on", ""))
        split = None
        if "foreground_direction" in tensors:
            threshold = float(tensors.pop("foreground_threshold"))
            split = ForegroundSplit(tensors.pop("foreground_direction"), threshold)
        return PcaBasis(**tensors, foreground=split, fitted_on=fitted_on)
    except Exception as error:  # safetensors has its own error type, and foreign files lack or add names
        raise DataError(f"{path} holds no PCA basis ({error}); name a new file, and one is written there") from error


def _stack(maps: Sequence[Tensor]) -> Tensor:  # each [h, w, D] -> [S, D]
    if not maps:
        raise DataError("principal components need the patches of at least one image")
    return torch.cat([map_.detach().cpu().flatten(0, 1) for map_ in maps])


def _border(height: int, width: int) -> Tensor:  # -> bool [h * w]
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    return ~inside.flatten()


def _best_cut(values: Tensor, *, n_bins: int = 256) -> float:  # [S]
    """The cut into two groups whose means differ most for their sizes (Otsu 1979)."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return low
    edges = torch.linspace(low, high, n_bins + 1, dtype=torch.float64)
    counts = torch.histc(values.double(), bins=n_bins, min=low, max=high)
    centres = (edges[:-1] + edges[1:]) / 2
    below, sums = counts.cumsum(0), (counts * centres).cumsum(0)
    above = below[-1] - below
    gap = sums / below.clamp_min(1) - (sums[-1] - sums) / above.clamp_min(1)
    between = below * above * gap**2
    best = (between >= between.max() * (1 - 1e-9)).nonzero().flatten()  # a plateau, where bins are empty
    return float(edges[1:][best[len(best) // 2]])


def _at_most(rows: Tensor, n: int) -> Tensor:
    """Evenly chosen rows: `torch.quantile` refuses very long inputs."""
    return rows[:: max(1, -(-len(rows) // n))]


def _standardised(columns: Tensor) -> Tensor:  # [S, n]
    columns = columns.double() - columns.double().mean(dim=0)
    return columns / columns.pow(2).mean(dim=0).sqrt().clamp_min(1e-12)
