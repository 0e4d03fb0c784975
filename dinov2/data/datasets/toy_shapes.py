"""The ten glyphs of the toy set as signed distances, and the painting of one image.

An image is strewn with one glyph. Size, turn, place and colour differ from glyph to glyph, so what all crops of an
image have in common is the glyph alone; that is what self-supervised training finds. Edges are antialiased by turning
distance into coverage over one pixel, so that the same image can be drawn at any size; below 16 pixels strokes are
thinner than a pixel and come out too heavy.
"""

import math
from collections.abc import Callable

import numpy as np

__all__ = ["GLYPHS", "N_NUMBERS", "draw"]

_Coordinates = np.ndarray  # [glyphs, H, W]
_CELLS = 3  # glyphs across the image
_LATTICE = _CELLS + 2  # one more on each side, of which the image may show a part
_PER_GLYPH = 8
_MOST_TURN = 0.5  # radians; more is harder to learn, less lets raw pixels match
_MOST_JITTER = 0.5  # of a cell

N_NUMBERS = 10 + _LATTICE**2 * _PER_GLYPH
"""Uniform numbers that an image is made of, besides its grain."""


def _box(x: _Coordinates, y: _Coordinates, width: float, height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _triangle(x: _Coordinates, y: _Coordinates) -> np.ndarray:
    return np.maximum(-y - 0.5, 0.866 * np.abs(x) + 0.5 * y - 0.5)


def _arc(x: _Coordinates, y: _Coordinates) -> np.ndarray:
    return np.maximum(np.abs(np.hypot(x, y) - 0.75) - 0.28, -y)


GLYPHS: dict[str, Callable[[_Coordinates, _Coordinates], np.ndarray]] = {
    "disc": lambda x, y: np.hypot(x, y) - 0.64,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.15,
    "bar": lambda x, y: _box(x, y, 1.0, 0.32),
    "plus": lambda x, y: np.minimum(_box(x, y, 1.0, 0.17), _box(x, y, 0.17, 1.0)),
    "triangle": _triangle,
    "pair": lambda x, y: np.hypot(np.abs(x) - 0.6, y) - 0.45,
    "corner": lambda x, y: np.minimum(_box(x + 0.55, y, 0.2, 0.95), _box(x, y - 0.75, 0.75, 0.2)),
    "frame": lambda x, y: np.abs(np.maximum(np.abs(x), np.abs(y)) - 0.72) - 0.115,
    "rails": lambda x, y: _box(np.abs(x) - 0.5, y, 0.17, 0.95),
    "arc": _arc,
}
"""Signed distance by class name, in the order of the labels; negative inside, a unit is half the glyph's extent.

All cover about the same area, so that the amount of ink does not tell the class.
A mirrored glyph is still nearest to its own class, so that flipping is a fair augmentation.
"""


def draw(label: int, numbers: np.ndarray, grain: np.ndarray) -> np.ndarray:
    """The image uint8 `[H, W, 3]` of class `label`, from uniform numbers `[N_NUMBERS]` and grain `[H, W, 3]`."""
    size = grain.shape[0]
    common, own = numbers[:10], numbers[10:].reshape(_LATTICE**2, _PER_GLYPH)
    line = (np.arange(size) + 0.5) / size
    column, row = np.meshgrid(np.arange(_LATTICE) - 1, np.arange(_LATTICE) - 1)
    # In sides of the image: the lattice is shifted as a whole, then each glyph by itself.
    centre_x = (column.ravel() + common[0] + _MOST_JITTER * (2 * own[:, 0] - 1)) / _CELLS
    centre_y = (row.ravel() + common[1] + _MOST_JITTER * (2 * own[:, 1] - 1)) / _CELLS
    unit = (0.31 + 0.15 * own[:, 2]) / _CELLS
    turn = _MOST_TURN * (2 * own[:, 3] - 1)
    coverage = _coverage(label, line, centre_x, centre_y, unit, turn, size)  # [glyphs, H, W]

    ground = 0.27 + 0.06 * common[2] + 0.03 * (2 * common[3:6] - 1)  # [3]
    ink = ground + (0.29 + 0.2 * own[:, 4:5]) + 0.2 * (2 * own[:, 5:8] - 1)  # [glyphs, 3]
    slope = 0.15 * (2 * common[6:8] - 1)
    light = 1 + slope[0] * (line[None, :] - 0.5) + slope[1] * (line[:, None] - 0.5)  # [H, W]
    total = coverage.sum(axis=0)
    inked = np.einsum("ghw,gc->hwc", coverage, ink) / np.maximum(total, 1e-9)[..., None]
    share = np.minimum(total, 1.0)[..., None]
    image = (ground * (1 - share) + inked * share) * light[..., None] + 0.06 * (grain - 0.5)
    return np.rint(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)


def _coverage(
    label: int,
    line: np.ndarray,  # [size] pixel centres, in sides of the image
    centre_x: np.ndarray,  # [glyphs]
    centre_y: np.ndarray,
    unit: np.ndarray,
    turn: np.ndarray,
    size: int,
) -> np.ndarray:  # [glyphs, H, W], 0 to 1
    seen = (np.abs(centre_x - 0.5) < 0.5 + 1.5 * unit) & (np.abs(centre_y - 0.5) < 0.5 + 1.5 * unit)
    x = (line[None, None, :] - centre_x[:, None, None])[seen] / unit[seen, None, None]
    y = (line[None, :, None] - centre_y[:, None, None])[seen] / unit[seen, None, None]
    cosine, sine = (np.array([f(t) for t in turn[seen]])[:, None, None] for f in (math.cos, math.sin))
    distance = list(GLYPHS.values())[label](cosine * x + sine * y, cosine * y - sine * x)
    coverage = np.zeros((len(unit), size, size))
    coverage[seen] = np.clip(0.5 - distance * unit[seen, None, None] * size, 0.0, 1.0)
    return coverage
