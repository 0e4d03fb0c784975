"""Pictures of maps: values as colours over an image, sheets with captions, lines between two images, moving pictures.

Everything here is a PIL image of mode RGB. Values become colours of one palette whose lightness rises evenly, so that
it reads the same in grey and for every kind of colour vision.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from dinov2.analysis.patch_maps import Matches
from dinov2.analysis.pca import PcaBasis

__all__ = [
    "Cell",
    "colour_map",
    "display_size",
    "marked",
    "matches_picture",
    "overlay",
    "palette_colours",
    "pca_picture",
    "sheet",
    "write_gif",
]

_PALETTE = ("#000004", "#1c1044", "#4f127b", "#812581", "#b5367a", "#e55964", "#fb8761", "#fec287", "#fcfdbf")
"""Colours of 0 to 1 at even distances, dark to light; between them it is linear."""

_INK, _PAPER, _FAINT = "#171a20", "#ffffff", "#5d6673"
_LONGEST, _SHORTEST = 800, 320
_GAP, _TEXT, _BAR = 14, 14, 6


@dataclass(frozen=True)
class Cell:
    """A picture of a sheet, with what stands below it."""

    picture: Image.Image
    caption: str
    scale: tuple[str, str] | None = None
    """Words at the dark and at the light end of the palette, for pictures that use it."""


def display_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which an image is shown: at most 800, no side below 320 unless the other is very long."""
    scale = min(_LONGEST / max(height, width), 1.0)
    if min(height, width) * scale < _SHORTEST:
        scale = min(_SHORTEST / min(height, width), 2 * _LONGEST / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def palette_colours(n: int = 256) -> Tensor:  # -> uint8 [n, 3]
    """The palette at n even steps."""
    stops = torch.tensor([ImageColor.getrgb(stop) for stop in _PALETTE], dtype=torch.float32)
    place = torch.linspace(0, len(stops) - 1, n)
    left = place.floor().long().clamp_max(len(stops) - 2)
    share = (place - left)[:, None]
    return (stops[left] * (1 - share) + stops[left + 1] * share).round().to(torch.uint8)


def colour_map(values: Tensor, low: float, high: float) -> Image.Image:  # [h, w]
    """One pixel a patch; `low` and everything below is the dark end, `high` and above the light one."""
    shares = ((values.float() - low) / max(high - low, 1e-12)).nan_to_num(0.0).clamp(0, 1)
    return Image.fromarray(palette_colours()[(shares * 255).round().long()].numpy())


def pca_picture(image: Image.Image, patches: Tensor, basis: PcaBasis) -> Image.Image:  # patches [h, w, D]
    """The three strongest components as colours, one square a patch; what is background is the faded image."""
    colours = (basis.to_rgb(patches) * 255).round().to(torch.uint8).cpu().numpy()
    squares = Image.fromarray(colours).resize(image.size, Image.Resampling.NEAREST)
    if basis.foreground is None:
        return squares
    faded = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.75)
    mask = (basis.foreground_mask(patches) * 255).to(torch.uint8).cpu().numpy()
    return Image.composite(squares, faded, Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))


def overlay(image: Image.Image, colours: Image.Image, *, opacity: float = 0.75) -> Image.Image:
    """A map of one pixel a patch laid over the image in squares."""
    return Image.blend(image, colours.resize(image.size, Image.Resampling.NEAREST), opacity)


def marked(image: Image.Image, cell: tuple[int, int], grid: tuple[int, int]) -> Image.Image:
    """The image with a frame around the patch at `cell` (row, column)."""
    picture = image.copy()
    (row, column), (height, width) = cell, (image.height / grid[0], image.width / grid[1])
    left, top = round(column * width), round(row * height)
    # A patch may be thinner than a pixel of the picture.
    box = [left, top, max(left + 1, round((column + 1) * width)), max(top + 1, round((row + 1) * height))]
    draw = ImageDraw.Draw(picture)
    for grow, colour in ((3, "#000000"), (2, "#ffffff"), (1, "#ffffff"), (0, "#000000")):
        draw.rectangle([box[0] - grow, box[1] - grow, box[2] + grow - 1, box[3] + grow - 1], outline=colour)
    return picture


def matches_picture(
    first: Image.Image,
    second: Image.Image,
    matches: Matches,
    grids: tuple[tuple[int, int], tuple[int, int]],
    *,
    most: int = 40,
) -> Image.Image:
    """Two images side by side, with a line for each of the `most` most similar pairs of patches.

    The hue of a line follows its place in the first image, so that crossing lines stand out.
    """
    fine = 2  # drawn larger and shrunk: PIL's lines are not smoothed
    height = max(first.height, second.height)
    canvas = Image.new("RGB", (first.width + _GAP + second.width, height), _PAPER)
    tops = (height - first.height) // 2, (height - second.height) // 2
    canvas.paste(first, (0, tops[0]))
    canvas.paste(second, (first.width + _GAP, tops[1]))
    canvas = canvas.resize((canvas.width * fine, canvas.height * fine))
    draw = ImageDraw.Draw(canvas)
    for here, there in zip(matches.first[:most].tolist(), matches.second[:most].tolist(), strict=True):
        x0, y0 = _centre(here, grids[0], first.size)
        x1, y1 = _centre(there, grids[1], second.size)
        ends = (x0 * fine, (y0 + tops[0]) * fine, (x1 + first.width + _GAP) * fine, (y1 + tops[1]) * fine)
        hue = (here[0] / grids[0][0] + 0.35 * here[1] / grids[0][1]) % 1.0
        colour = tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.58, 0.9))
        draw.line(ends, fill=(0, 0, 0), width=3 * fine)
        draw.line(ends, fill=colour, width=2 * fine - 1)
        for x, y in (ends[:2], ends[2:]):
            draw.ellipse([x - 4 * fine, y - 4 * fine, x + 4 * fine, y + 4 * fine], fill=colour, outline=(0, 0, 0))
    return canvas.resize((canvas.width // fine, canvas.height // fine), Image.Resampling.LANCZOS)


def sheet(cells: Sequence[Cell], *, columns: int) -> Image.Image:
    """Pictures in rows of `columns`, each with its caption and scale below."""
    font = ImageFont.load_default(_TEXT)
    width = max(cell.picture.width for cell in cells)
    captions = {id(cell): _wrapped(cell.caption, font, width)[:3] for cell in cells}

    def foot(cell: Cell) -> int:
        return 8 + (_TEXT + 3) * len(captions[id(cell)]) + (_BAR + _TEXT + 8 if cell.scale else 0)

    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.picture.height + foot(cell) for cell in row) for row in rows]
    across = min(columns, len(cells))
    size = (across * (width + _GAP) + _GAP, sum(heights) + _GAP * (len(rows) + 1))
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            left = _GAP + column * (width + _GAP)
            canvas.paste(cell.picture, (left, top))
            below = top + cell.picture.height + 6
            if cell.scale:
                bar = Image.fromarray(palette_colours()[None].numpy()).resize((cell.picture.width, _BAR))
                canvas.paste(bar, (left, below))
                dark, light = cell.scale
                draw.text((left, below + _BAR + 2), dark, fill=_FAINT, font=font)
                draw.text((left + cell.picture.width, below + _BAR + 2), light, fill=_FAINT, font=font, anchor="ra")
                below += _BAR + _TEXT + 8
            for line in captions[id(cell)]:
                draw.text((left, below), line, fill=_INK, font=font)
                below += _TEXT + 3
        top += height + _GAP
    return canvas


def write_gif(path: Path | str, frames: Sequence[Image.Image], *, milliseconds: int = 120) -> None:
    """Frames as an endless GIF; all take the size of the first, and share one palette: colours do not flicker."""
    size = frames[0].size
    pictures = [frame if frame.size == size else frame.resize(size) for frame in frames]
    # The palette is found on small copies of some frames: on whole ones that takes over a second each.
    some = pictures[:: max(1, -(-len(pictures) // 12))]
    small = [picture.resize((max(1, picture.width // 5), max(1, picture.height // 5))) for picture in some]
    montage = Image.new("RGB", (small[0].width, sum(picture.height for picture in small)))
    for i, picture in enumerate(small):
        montage.paste(picture, (0, i * picture.height))
    palette = montage.quantize(256)
    indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    indexed[0].save(path, "GIF", save_all=True, append_images=indexed[1:], duration=milliseconds, loop=0)


def _centre(cell: Sequence[int], grid: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    return (cell[1] + 0.5) * size[0] / grid[1], (cell[0] + 0.5) * size[1] / grid[0]


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, as far as spaces allow."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
