"""Picture files of patch maps: a sheet for each image and kind of map, or a moving picture of all images.

A row of a sheet is the image, then the map of each model, so that two models stand side by side.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from dinov2.analysis.patch_maps import high_norm_share, mutual_nearest, patch_at, similarity_map
from dinov2.report.map_pictures import (
    Cell,
    colour_map,
    marked,
    matches_picture,
    overlay,
    pca_picture,
    sheet,
    write_gif,
)
from dinov2.report.patch_page import PageImage, PageMatches, PageModel

__all__ = ["match_images", "write_pictures"]

_MOST_MATCHED = 6  # images that the first one is matched with


def match_images(images: Sequence[PageImage], models: Sequence[PageModel]) -> list[PageMatches]:
    """Matches of the first image with the next ones, at most six, by each model."""
    return [
        PageMatches(0, other, m, mutual_nearest(images[0].views[m].patches, images[other].views[m].patches))
        for other in range(1, min(len(images), 1 + _MOST_MATCHED))
        for m in range(len(models))
    ]


def write_pictures(
    folder: Path,
    images: Sequence[PageImage],
    models: Sequence[PageModel],
    maps: Sequence[str],
    *,
    place: tuple[float, float],
    has_point: bool,
    matches: Sequence[PageMatches] = (),
    moving: bool = False,
) -> list[Path]:
    """Write the pictures of `maps` (`pca`, `attention`, `similarity`, `norm`) and of the matches; their paths.

    `place` is where the chosen patch lies in the first image, as shares of width and height; `has_point` says that the
    views hold its attention. `moving` makes one GIF of each kind instead of one file an image.
    """
    stems = _stems(images)
    scales = [_scale(images, m, place) for m in range(len(models))]
    files: list[Path] = []
    for kind in maps:
        if kind == "matches" or (kind == "attention" and images[0].views[0].attention is None and len(models) == 1):
            continue
        rows = [_row(kind, image, models, scales, is_first=i == 0) for i, image in enumerate(images)]
        if moving:
            files.append(folder / f"{kind}.gif")
            write_gif(files[-1], [_moving_frame(row) for row in rows])
            continue
        for i, (stem, row) in enumerate(zip(stems, rows, strict=True)):
            files.append(folder / f"{stem}_{kind}.png")
            sheet(row, columns=len(row)).save(files[-1])
            if kind == "attention" and len(row) > 1:
                files.append(folder / f"{stem}_attention_heads.png")
                _heads_sheet(images[i], models, has_point=has_point and i == 0).save(files[-1])
    for pair in matches:
        first, second = images[pair.first], images[pair.second]
        grids = (first.views[pair.model].grid, second.views[pair.model].grid)
        name = f"{stems[pair.first]}_matches_{stems[pair.second]}" + (f"_{pair.model + 1}" if pair.model else "")
        files.append(folder / f"{name}.png")
        matches_picture(first.picture, second.picture, pair.matches, grids).save(files[-1])
    return files


def _stems(images: Sequence[PageImage]) -> list[str]:
    """A file name for each image without its suffix; images of one name are numbered."""
    stems: list[str] = []
    for image in images:
        stem = re.sub(r"\.(?=[^.]*$)[A-Za-z0-9]+", "", image.name).replace(" ", "_")  # a frame's name ends in a number
        number, unique = 2, stem
        while unique in stems:
            unique, number = f"{stem}-{number}", number + 1
        stems.append(unique)
    return stems


class _Scale(NamedTuple):
    """The chosen patch and the ends of the palette, as one model sees them in all images."""

    query: Tensor
    """[D]: features of the chosen patch."""
    cell: tuple[int, int]
    """Row and column of that patch in the first image."""
    lowest_similarity: float
    """At the dark end of the palette; the light end is 1."""
    norms: tuple[float, float]


def _scale(images: Sequence[PageImage], m: int, place: tuple[float, float]) -> _Scale:
    views = [image.views[m] for image in images]
    cell = patch_at(*place, size=(1, 1), grid=views[0].grid)
    query = views[0].patches[cell]
    similar = torch.cat([similarity_map(view.patches, query).flatten() for view in views])
    norms = torch.cat([view.norms.flatten() for view in views])
    return _Scale(query, cell, _quantile(similar, 0.02), (float(norms.min()), float(norms.max())))


def _row(
    kind: str, image: PageImage, models: Sequence[PageModel], scales: Sequence[_Scale], *, is_first: bool
) -> list[Cell]:
    """The image, then its map by each model; models that show no attention are left out of such maps."""
    chosen = kind == "similarity" and is_first
    picture = marked(image.picture, scales[0].cell, image.views[0].grid) if chosen else image.picture
    cells = [Cell(picture, image.name)]
    for model, view, scale in zip(models, image.views, scales, strict=True):
        if kind == "pca":
            share = 100 * float(model.basis.explained[:3].sum())
            caption = (
                f"{'foreground: ' if model.basis.foreground else ''}three components, {share:.0f} % of the variance"
            )
            cells.append(Cell(pca_picture(image.picture, view.patches, model.basis), _by(model, models, caption)))
        elif kind == "similarity":
            values = similarity_map(view.patches, scale.query)
            caption = "cosine with the framed patch" + ("" if is_first else " of the first image")
            words, ends = (f"{scale.lowest_similarity:.2f}", "1"), (scale.lowest_similarity, 1.0)
            cells.append(_map_cell(image, values, ends, _by(model, models, caption), words))
        elif kind == "norm":
            low, high = scale.norms
            share = 100 * high_norm_share(view.norms, model.norm_threshold)
            caption = f"norm {model.norm_kind}; {share:.1f} % above {model.norm_threshold:.4g}"
            words = (f"{low:.4g}", f"{high:.4g}")
            cells.append(_map_cell(image, view.norms, scale.norms, _by(model, models, caption), words))
        elif view.attention is not None and view.shares is not None:
            itself, registers, _ = (100 * share for share in view.shares)
            caption = f"class token; {itself:.0f} % to itself"
            caption += f", {registers:.0f} % to registers" if model.num_register_tokens else ""
            cells.append(_attention_cell(image, view.attention[0].mean(dim=0), _by(model, models, caption)))
    return cells


def _heads_sheet(image: PageImage, models: Sequence[PageModel], *, has_point: bool) -> Image.Image:
    """Every head of the class token; registers and the chosen patch averaged over heads."""
    small = PageImage(image.name, image.picture.copy(), image.views)
    small.picture.thumbnail((280, 280))
    cells: list[Cell] = []
    for model, view in zip(models, image.views, strict=True):
        if view.attention is None:
            continue
        maps = [("class token, mean of heads", view.attention[0].mean(dim=0))]
        maps += [(f"class token, head {h}", values) for h, values in enumerate(view.attention[0])]
        n_registers = model.num_register_tokens
        maps += [(f"register {r}, mean", view.attention[1 + r].mean(dim=0)) for r in range(n_registers)]
        if has_point:
            maps.append(("chosen patch, mean", view.attention[-1].mean(dim=0)))
        cells += [_attention_cell(small, values, _by(model, models, name)) for name, values in maps]
    return sheet(cells, columns=min(len(cells), 4))


def _moving_frame(cells: Sequence[Cell], *, longest: int = 320) -> Image.Image:
    """The pictures of a row side by side and without words, small enough for a GIF."""
    pictures = [cell.picture.copy() for cell in cells]
    for picture in pictures:
        picture.thumbnail((longest, longest))
    width = sum(picture.width for picture in pictures) + 4 * (len(pictures) - 1)
    frame = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        frame.paste(picture, (left, 0))
        left += picture.width + 4
    return frame


def _attention_cell(image: PageImage, values: Tensor, caption: str) -> Cell:
    # Up to the 99.5th percentile: a single spike would leave everything else black.
    high = _quantile(values.flatten(), 0.995)
    return _map_cell(image, values, (0.0, high), caption, ("0", f"{100 * high:.2g} %"))


def _map_cell(
    image: PageImage, values: Tensor, ends: tuple[float, float], caption: str, words: tuple[str, str]
) -> Cell:
    return Cell(overlay(image.picture, colour_map(values, *ends), opacity=0.85), caption, words)


def _by(model: PageModel, models: Sequence[PageModel], caption: str) -> str:
    return f"{model.name}: {caption}" if len(models) > 1 else caption


def _quantile(values: Tensor, share: float) -> float:  # [S]
    return float(torch.quantile(values.float()[:: max(1, len(values) // 100_000)], share))
