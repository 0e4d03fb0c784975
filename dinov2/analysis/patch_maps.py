"""Maps of patch features: similarity to one patch, norms, and mutual nearest patches of two images.

Patch features are `[h, w, D]`, rows of the picture first. Similarities are cosines. Norms are taken of the residual
stream, before the final layer norm, which would make them equal: some models put a few patches of very high norm on
plain background, which hold information about the whole image (arXiv 2309.16588).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.errors import ConfigError, DataError

__all__ = [
    "HIGH_NORM_FACTOR",
    "Matches",
    "PatchView",
    "high_norm_share",
    "high_norm_threshold",
    "mutual_nearest",
    "patch_at",
    "patch_norms",
    "similarity_map",
]

HIGH_NORM_FACTOR = 2.0
"""A patch is of high norm above this many medians of all norms: a fixed norm would fit one model only."""

# Rows compared at once: bounds the similarity matrix of two large images.
_ROWS = 2048


@dataclass(frozen=True)
class PatchView:
    """Maps of one image by one model, on the CPU."""

    patches: Tensor
    """[h, w, D] after the final norm."""
    norms: Tensor
    """float32 [h, w]."""
    attention: Tensor | None = None
    """float32 [Q, heads, h, w]: from the class token, each register, and the chosen patch if any, to the patches;
    None for models that do not show it."""
    shares: tuple[float, float, float] | None = None
    """Shares of the class token's attention that go to itself, the registers and the patches; sum to 1."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.patches.shape[0], self.patches.shape[1]


class Matches(NamedTuple):
    """Pairs of patches, most similar first."""

    first: Tensor
    """int64 [M, 2]: row and column in the first image."""
    second: Tensor
    """int64 [M, 2]: row and column in the second image."""
    similarity: Tensor
    """float32 [M]."""


def patch_at(x: float, y: float, *, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the patch that covers pixel (x, y) of an image of `size` (height, width).

    Raises `ConfigError` when the point lies outside.
    """
    height, width = size
    if not (0 <= x < width and 0 <= y < height):
        raise ConfigError(
            f"the point ({x:g}, {y:g}) lies outside of the image, which is {width} pixels wide and {height} high; "
            f"choose x from 0 to {width - 1} and y from 0 to {height - 1}"
        )
    return int(y * grid[0] / height), int(x * grid[1] / width)


def similarity_map(patches: Tensor, query: Tensor) -> Tensor:  # [h, w, D], [D] -> float32 [h, w]
    """Cosine of every patch with `query`, in [-1, 1]; the query may come from another image."""
    if patches.shape[-1] != query.shape[-1]:
        raise DataError(
            f"features of {patches.shape[-1]} and {query.shape[-1]} numbers cannot be compared; take both of one model"
        )
    return (normalize(patches.float(), dim=-1) @ normalize(query.float(), dim=-1)).clamp(-1.0, 1.0)


def patch_norms(patches: Tensor) -> Tensor:  # [..., D] -> float32 [...]
    """Length of every patch's feature vector."""
    return patches.float().norm(dim=-1)


def high_norm_threshold(norms: Tensor) -> float:
    """`HIGH_NORM_FACTOR` times the median of norms of any shape; give it those of all images together."""
    if norms.numel() == 0:
        raise DataError("there are no patches whose norms could be looked at; give at least one image")
    return HIGH_NORM_FACTOR * float(norms.float().median())


def high_norm_share(norms: Tensor, threshold: float) -> float:
    """Share of the patches whose norm lies above `threshold`, from 0 to 1."""
    return float((norms > threshold).float().mean())


def mutual_nearest(first: Tensor, second: Tensor) -> Matches:  # [h, w, D], [h', w', D]
    """Patches of two images each of which is the other's most similar one.

    Of several equally similar patches the first counts. Raises `DataError` for features of different length.
    """
    if first.shape[-1] != second.shape[-1]:
        raise DataError(
            f"features of {first.shape[-1]} and {second.shape[-1]} numbers cannot be matched; take both of one model"
        )
    rows, columns = (normalize(side.float().flatten(0, 1), dim=-1) for side in (first, second))  # [N, D], [N', D]
    best = torch.full((len(columns),), -torch.inf, device=rows.device)
    best_row = torch.zeros(len(columns), dtype=torch.long, device=rows.device)
    similarity, nearest = [], []
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS] @ columns.T
        value, index = block.max(dim=1)
        similarity.append(value)
        nearest.append(index)
        value, index = block.max(dim=0)
        better = value > best
        best, best_row = torch.where(better, value, best), torch.where(better, index + start, best_row)
    values, there = torch.cat(similarity), torch.cat(nearest)
    here = torch.arange(len(rows), device=rows.device)
    mutual = best_row[there] == here
    order = values[mutual].argsort(descending=True, stable=True)
    return Matches(
        first=_cells(here[mutual][order], first.shape[1]),
        second=_cells(there[mutual][order], second.shape[1]),
        similarity=values[mutual][order].clamp(-1.0, 1.0),
    )


def _cells(index: Tensor, width: int) -> Tensor:  # [M] -> [M, 2]
    return torch.stack([index // width, index % width], dim=1)
