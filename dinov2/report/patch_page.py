"""The page on which a click compares a patch with all patches of all images; it opens offline and loads nothing.

The page gets features as int8, colours, norms and attention as bytes. Features are unit vectors; where they would not
fit into `PAGE_LIMIT` bytes they are first turned onto the directions in which all of them together are largest, and the
smallest directions are left out. The page says what that cost: the largest error of a similarity, measured on its
features.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.analysis.patch_maps import Matches, PatchView, high_norm_share
from dinov2.analysis.pca import PcaBasis
from dinov2.errors import DataError
from dinov2.report.map_pictures import palette_colours
from dinov2.report.render import render
from dinov2.whole_files import atomic_write

__all__ = [
    "MOST_IMAGES",
    "PAGE_LIMIT",
    "PageImage",
    "PageMatches",
    "PageModel",
    "WrittenPage",
    "quantised_features",
    "write_patch_page",
]

PAGE_LIMIT = 16_000_000
"""Bytes of the file, at most."""
MOST_IMAGES = 12
"""Images on one page, at most; of more some at even distances are taken."""

_PATCH_BYTES = 9_000_000  # everything about patches, before base64 makes 4 bytes of 3
_PICTURE_BYTES = 200_000  # one JPEG
_FEWEST_DIMS = 16
_MOST_LINES = 40
_VIEWS = {"similarity": "Similarity", "pca": "PCA", "attention": "Attention", "norm": "Norms", "image": "Image"}


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
    """An image at the size at which it is shown, with the maps of each model, in the order of the models."""

    name: str
    picture: Image.Image
    views: tuple[PatchView, ...]
    size: tuple[int, int] = (0, 0)
    """Height and width of the file."""


@dataclass(frozen=True)
class PageMatches:
    """Matches between two images of the page, by one of its models."""

    first: int
    second: int
    model: int
    matches: Matches


@dataclass(frozen=True)
class WrittenPage:
    """The file, and what is on it."""

    path: Path
    n_bytes: int
    n_images: int
    dims: tuple[int, ...]
    """Numbers stored of each patch, by model."""
    largest_error: float
    """Of a cosine similarity on the page, against float32 features."""


def write_patch_page(
    path: Path | str,
    *,
    models: Sequence[PageModel],
    images: Sequence[PageImage],
    start: tuple[float, float] = (0.5, 0.5),
    matches: Sequence[PageMatches] = (),
    notes: Sequence[str] = (),
) -> WrittenPage:
    """Write the page of at most `MOST_IMAGES` images.

    `start` is the place (x, y as shares of width and height) in the first image whose patch is chosen at first. Raises
    `DataError` when there is no image, or one has so many patches that a page of it would not fit.
    """
    if not images or len(images) > MOST_IMAGES:
        raise DataError(f"a page shows 1 to {MOST_IMAGES} images, got {len(images)}; choose some of them")
    panes, dims, errors = zip(*[_panes(m, models, images) for m in range(len(models))], strict=True)
    attention = any(view.attention is not None for image in images for view in image.views)
    page = render(
        "patches.html.jinja",
        heading=" and ".join(model.name for model in models),
        facts=[
            ("images", str(len(images))),
            *((model.name if len(models) > 1 else "features", model.about) for model in models),
        ],
        views={key: name for key, name in _VIEWS.items() if key != "attention" or attention},
        heads=[
            [[head.name for head in _heads(view, model)] for model, view in zip(models, image.views, strict=True)]
            for image in images
        ],
        models=models,
        images=images,
        jpegs=[_jpeg(image.picture) for image in images],
        matches=[_lines(pair, images) for pair in matches],
        dims=dims,
        largest_error=max(errors),
        limit=PAGE_LIMIT,
        notes=notes,
        data={
            "start": [0, *start],
            "palette": palette_colours().tolist(),
            "models": [{"name": model.name, "norms": _norm_range(m, images)} for m, model in enumerate(models)],
            "images": [
                {"name": image.name, "panes": [panes[m][i] for m in range(len(models))]}
                for i, image in enumerate(images)
            ],
        },
    ).encode("utf-8", "backslashreplace")
    target = Path(path)
    with atomic_write(target) as unfinished:
        unfinished.write_bytes(page)
    return WrittenPage(target, len(page), len(images), dims, max(errors))


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
    split = rounded.to(torch.int8).split([len(unit) for unit in units])
    return [part.unflatten(0, map_.shape[:2]) for part, map_ in zip(split, maps, strict=True)], error


def _panes(
    m: int, models: Sequence[PageModel], images: Sequence[PageImage]
) -> tuple[list[dict[str, object]], int, float]:
    """Each image under model `m` as the script takes it; the numbers stored of a patch; the error of a similarity.

    Raises `DataError` when there are so many patches that next to nothing of each would fit.
    """
    model, views = models[m], [image.views[m] for image in images]
    dims = _dims_that_fit(model, views, _PATCH_BYTES // len(models))
    features, error = quantised_features([view.patches for view in views], dims)
    panes: list[dict[str, object]] = []
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
                "norms": _text(_as_bytes(view.norms, low, high)),
                "norm_low": round(low, 5),
                "norm_high": round(high, 5),
                "high_share": high_norm_share(view.norms, model.norm_threshold),
                "heads": [_packed_head(head) for head in _heads(view, model)],
            }
        )
    return panes, dims, error


def _dims_that_fit(model: PageModel, views: Sequence[PatchView], room: int) -> int:
    """Numbers of each patch that fit into `room` bytes beside its other maps."""
    n_patches = sum(view.norms.numel() for view in views)
    dims = room // n_patches - 5 - max(len(_heads(view, model)) for view in views)
    if dims < _FEWEST_DIMS:
        raise DataError(
            f"{n_patches} patches are too many for one page; choose fewer images or a smaller size, or leave the page "
            "out"
        )
    return int(min(dims, views[0].patches.shape[-1]))


class _Head(NamedTuple):
    label: int
    """Number of the head, or -1 for a register."""
    name: str
    values: Tensor
    """[h, w]."""


def _heads(view: PatchView, model: PageModel) -> list[_Head]:
    """Attention of the class token by head, and of the registers averaged over heads."""
    if view.attention is None:
        return []
    heads = [_Head(h, f"head {h}", values) for h, values in enumerate(view.attention[0])]
    registers = view.attention[1 : 1 + model.num_register_tokens].mean(dim=1)
    return heads + [_Head(-1, f"register {r}", values) for r, values in enumerate(registers)]


def _packed_head(head: _Head) -> dict[str, object]:
    # One spike would leave nothing of the other patches in 256 steps.
    values = head.values.flatten()
    high = max(float(torch.quantile(values[:: max(1, len(values) // 100_000)], 0.995)), 1e-12)
    return {"label": head.label, "high": high, "values": _text(_as_bytes(head.values, 0.0, high))}


def _as_bytes(values: Tensor, low: float, high: float) -> Tensor:
    return ((values.float() - low) / max(high - low, 1e-12) * 255).round().clamp(0, 255).to(torch.uint8)


def _text(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().cpu().numpy().tobytes()).decode("ascii")


def _norm_range(m: int, images: Sequence[PageImage]) -> list[float]:
    norms = torch.cat([image.views[m].norms.flatten() for image in images])
    return [round(float(norms.min()), 5), round(float(norms.max()), 5)]


class _Line(NamedTuple):
    x1: float
    y1: float
    x2: float
    y2: float
    hue: int


class _DrawnPair(NamedTuple):
    """Two images side by side on a width of 100; lines join patches that are each other's most similar one."""

    first: int
    second: int
    model: int
    n: int
    widths: tuple[float, float]
    height: float
    lines: list[_Line]


def _lines(pair: PageMatches, images: Sequence[PageImage]) -> _DrawnPair:
    first, second = images[pair.first], images[pair.second]
    (rows, columns), (rows_2, columns_2) = first.views[pair.model].grid, second.views[pair.model].grid
    # The pictures share one height; the second starts behind the first and a gap of 2 % of the width.
    ratio, ratio_2 = (image.picture.width / image.picture.height for image in (first, second))
    width, width_2 = 98 * ratio / (ratio + ratio_2), 98 * ratio_2 / (ratio + ratio_2)
    height = width / ratio
    lines = []
    ends = zip(pair.matches.first[:_MOST_LINES].tolist(), pair.matches.second[:_MOST_LINES].tolist(), strict=True)
    for (row, column), (row_2, column_2) in ends:
        lines.append(
            _Line(
                x1=(column + 0.5) / columns * width,
                y1=(row + 0.5) / rows * height,
                x2=width + 2 + (column_2 + 0.5) / columns_2 * width_2,
                y2=(row_2 + 0.5) / rows_2 * height,
                hue=round(360 * (row / rows + 0.35 * column / columns)) % 360,
            )
        )
    n = len(pair.matches.similarity)
    return _DrawnPair(pair.first, pair.second, pair.model, n, (width, width_2), height, lines)


def _jpeg(picture: Image.Image) -> bytes:
    """A JPEG of at most `_PICTURE_BYTES`: pictures that do not compress are shown smaller."""
    while True:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88, optimize=True)
        if buffer.tell() <= _PICTURE_BYTES:
            return buffer.getvalue()
        picture = picture.resize((max(1, picture.width * 4 // 5), max(1, picture.height * 4 // 5)))
