"""What the page of patch features holds of each patch: features as int8, colours, norms and attention as bytes.

Features are unit vectors rounded to int8. Where they would not fit they are first turned onto the directions in which
all of them together are largest, and the smallest directions are left out.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.analysis.patch_maps import Matches, PatchView, high_norm_share
from dinov2.analysis.pca import PcaBasis
from dinov2.errors import DataError

__all__ = ["PATCH_BYTES", "PageImage", "PageMatches", "PageModel", "head_maps", "packed_panes", "quantised_features"]

PATCH_BYTES = 9_000_000
"""Everything about patches, before base64 makes 4 bytes of 3."""

_FEWEST_DIMS = 16


@dataclass(frozen=True)
class PageModel:
    """A model on the page."""

    name: str
    about: str
    """A few words: patch size, block."""
    basis: PcaBasis
    norm_threshold: float
    norm_kind: str = "before the final norm"
    num_register_tokens: int = 0


@dataclass(frozen=True)
class PageImage:
    """An image on the page, and what each model makes of it, in the order of the models."""

    name: str
    picture: Image.Image
    views: tuple[PatchView, ...]


@dataclass(frozen=True)
class PageMatches:
    """Matches between two images of the page, by one of its models."""

    first: int
    second: int
    model: int
    matches: Matches


def packed_panes(
    m: int, models: Sequence[PageModel], images: Sequence[PageImage]
) -> tuple[list[dict[str, Any]], int, float]:
    """What the script needs of each image under model `m`; the numbers kept of a patch; the error of a similarity.

    Raises `DataError` when there are so many patches that next to nothing of each would fit.
    """
    model, views = models[m], [image.views[m] for image in images]
    dims = _dims_that_fit(m, models, images)
    features, error = quantised_features([view.patches for view in views], dims)
    panes = []
    for view, quantised in zip(views, features, strict=True):
        low, high = float(view.norms.min()), float(view.norms.max())
        rgb = (model.basis.to_rgb(view.patches) * 255).round()
        seen = model.basis.foreground_mask(view.patches)[..., None] * 255
        panes.append(
            {
                "rows": view.grid[0],
                "cols": view.grid[1],
                "features": _text(quantised),
                "pca": _text(torch.cat([rgb, seen.to(rgb)], dim=-1).to(torch.uint8)),
                "norms": _text(_bytes_of(view.norms, low, high)),
                "norm_low": round(low, 5),
                "norm_high": round(high, 5),
                "high_share": high_norm_share(view.norms, model.norm_threshold),
                "heads": [_head(label, values) for label, _, values in head_maps(view, model)],
            }
        )
    return panes, dims, error


def quantised_features(maps: Sequence[Tensor], dims: int) -> tuple[list[Tensor], float]:  # each [h, w, D]
    """int8 `[h, w, dims]` of each map, whose cosines are nearly those of the features, and their largest error.

    Each patch is scaled so that its largest number is 127. The error is that of at most 64 patches at even distances,
    each against all.
    """
    units = [normalize(map_.float().flatten(0, 1), dim=-1) for map_ in maps]
    rows = torch.cat(units)
    turned = rows
    if dims < rows.shape[1]:
        _, directions = torch.linalg.eigh(rows.double().T @ rows.double())  # ascending
        turned = rows @ directions[:, -dims:].float()
    scale = turned.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    rounded = (turned / scale * 127).round()
    chosen = torch.linspace(0, len(rows) - 1, min(64, len(rows))).round().long()
    approximate = normalize(rounded, dim=1)[chosen] @ normalize(rounded, dim=1).T
    error = float((approximate - rows[chosen] @ rows.T).abs().max())
    parts = rounded.to(torch.int8).split([len(unit) for unit in units])
    return [part.unflatten(0, map_.shape[:2]) for part, map_ in zip(parts, maps, strict=True)], error


def head_maps(view: PatchView, model: PageModel) -> list[tuple[int, str, Tensor]]:
    """(number of the head, or -1 for a register; name; map [h, w]) of everything that attends to patches."""
    if view.attention is None:
        return []
    heads = [(h, f"head {h}", values) for h, values in enumerate(view.attention[0])]
    registers = view.attention[1 : 1 + model.num_register_tokens].mean(dim=1)
    return heads + [(-1, f"register {r}", values) for r, values in enumerate(registers)]


def _dims_that_fit(m: int, models: Sequence[PageModel], images: Sequence[PageImage]) -> int:
    """How many numbers of each patch the share of model `m` in the page's room holds."""
    views = [image.views[m] for image in images]
    n_patches = sum(view.norms.numel() for view in views)
    maps = 5 + max(0 if view.attention is None else len(head_maps(view, models[m])) for view in views)
    room = PATCH_BYTES // len(models) // n_patches - maps
    if room < _FEWEST_DIMS:
        raise DataError(
            f"{n_patches} patches are too many for one page; choose fewer images or a smaller size, or leave the page "
            "out"
        )
    return int(min(room, views[0].patches.shape[-1]))


def _head(label: int, values: Tensor) -> dict[str, Any]:
    # One spike would leave nothing of the other patches in 256 steps.
    high = max(float(torch.quantile(values.flatten()[:: max(1, values.numel() // 100_000)], 0.995)), 1e-12)
    return {"label": label, "high": high, "values": _text(_bytes_of(values, 0.0, high))}


def _bytes_of(values: Tensor, low: float, high: float) -> Tensor:
    return ((values.float() - low) / max(high - low, 1e-12) * 255).round().clamp(0, 255).to(torch.uint8)


def _text(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().cpu().numpy().tobytes()).decode("ascii")
