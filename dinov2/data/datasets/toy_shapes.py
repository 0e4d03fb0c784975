"""The ten patterns of the toy set as signed distances, and the painting of one image.

A pattern is a function of coordinates in its own frame to a signed distance, negative where there is ink; it goes on
for ever, and the image shows a window of it. Edges are antialiased by turning distance into coverage over one pixel, so
that no supersampling is needed and the same image can be drawn at any size.
"""

import math
from collections.abc import Callable

import numpy as np

__all__ = ["PATTERNS", "draw"]

Distance = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # x, y, cells -> signed distance, all [H, W]


def _fold(t: np.ndarray, period: float) -> np.ndarray:
    """`t` folded into [-period / 2, period / 2]: the position within a repeated cell."""
    return np.mod(t + period / 2, period) - period / 2


def _bars(x: np.ndarray, period: float) -> np.ndarray:
    return np.abs(_fold(x, period)) - period / 4


def _checks(x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    a, b = _bars(x, period), _bars(y, period)
    return np.where(a * b > 0, -1.0, 1.0) * np.minimum(np.abs(a), np.abs(b))


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    row = np.rint(y / 0.95)
    return np.hypot(_fold(x + row * 0.55, 1.1), y - row * 0.95) - 0.33


def _crosses(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = np.abs(_fold(x, 1.6)), np.abs(_fold(y, 1.6))
    return np.minimum(np.maximum(a - 0.6, b - 0.18), np.maximum(b - 0.6, a - 0.18))


def _noise(x: np.ndarray, y: np.ndarray, cells: np.ndarray, period: float) -> np.ndarray:
    """Random numbers on a lattice, interpolated, cut at their middle."""
    n = len(cells)
    x, y = x / period + n / 2, y / period + n / 2
    left, top = np.floor(x).astype(np.intp), np.floor(y).astype(np.intp)
    along, down = x - left, y - top
    left, top, right, bottom = left % n, top % n, (left + 1) % n, (top + 1) % n
    upper = cells[top, left] * (1 - along) + cells[top, right] * along
    lower = cells[bottom, left] * (1 - along) + cells[bottom, right] * along
    return (upper * (1 - down) + lower * down - 0.5) * period


PATTERNS: dict[str, Distance] = {
    "pinstripes": lambda x, y, cells: _bars(x, 0.45),
    "bars": lambda x, y, cells: _bars(x, 1.5),
    "weave": lambda x, y, cells: _checks(x, y, 0.65),
    "checks": lambda x, y, cells: _checks(x, y, 1.8),
    "dots": lambda x, y, cells: _dots(x, y),
    "crosses": lambda x, y, cells: _crosses(x, y),
    "rings": lambda x, y, cells: _bars(np.hypot(x, y), 0.9),
    "sand": lambda x, y, cells: _noise(x, y, cells, 0.25),
    "blobs": lambda x, y, cells: _noise(x, y, cells, 0.9),
    "disc": lambda x, y, cells: np.hypot(x, y) - 1.2,
}
"""Signed distance by class name, in the order of the labels; every one is its own mirror image up to rotation."""


import os
SW=int(os.environ.get("SW","1"))
U0,U1,WA,CA=[float(os.environ.get(k,d)) for k,d in (("U0",".2"),("U1",".08"),("WA","0.06"),("CA",".1"))]


def draw(label: int, numbers: np.ndarray, cells: np.ndarray, grain: np.ndarray) -> np.ndarray:
    """The image uint8 `[H, W, 3]` of class `label`, from uniform numbers `[32]` and grain in [0, 1) `[H, W, 3]`."""
    size = grain.shape[0]
    u = iter(numbers.tolist())
    line = (np.arange(size) + 0.5) / size
    warp_x, warp_y, light, swap, swap2 = (_gentle_wave(line, [next(u) for _ in range(4)]) for _ in range(5))  # [H, W]
    unit = U0 + U1 * next(u)  # of the image's side
    shift_x, shift_y = (0.2 + 0.6 * next(u) for _ in range(2))
    turn = 2 * math.pi * next(u)
    x = (line[None, :] + WA * warp_x - shift_x) / unit
    y = (line[:, None] + WA * warp_y - shift_y) / unit
    own_x, own_y = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    distance = list(PATTERNS.values())[label](own_x, own_y, cells)
    coverage = np.clip(0.5 - distance * unit * size, 0.0, 1.0)  # [H, W]
    if SW:
        swapped = np.clip(0.5+(swap+swap2)*size/6,0,1)
        coverage = coverage + swapped - 2*coverage*swapped

    ground, ink = _tint(next(u), next(u)), _tint(next(u), next(u))  # [3]
    contrast = 0.35 + 0.25 * next(u)
    ink_is_lighter = next(u) < 0.5
    level = 0.1 + next(u) * (0.8 - contrast)
    ground, ink = ground + level, ink + level
    if ink_is_lighter:
        ink = ink + contrast
    else:
        ground = ground + contrast
    noise = (0.02 + 0.06 * next(u)) * (grain - 0.5)
    image = (ground + coverage[..., None] * (ink - ground)) + (CA * light[..., None] + noise)
    return np.rint(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)


def _gentle_wave(line: np.ndarray, numbers: list[float]) -> np.ndarray:
    """A plane wave of about a period over the image, with an amplitude of up to 1, `[H, W]`."""
    amplitude, across, down, phase = numbers
    along_x = 2 * math.pi * (1.2 * across * line + phase)
    along_y = 2 * math.pi * 1.2 * (2 * down - 1) * line
    # cos(a + b) by the addition theorem: cosines of lines instead of planes
    return amplitude * (np.outer(np.cos(along_y), np.cos(along_x)) - np.outer(np.sin(along_y), np.sin(along_x)))


def _tint(hue: float, saturation: float) -> np.ndarray:
    """What a hue adds to grey, RGB around 0."""
    return np.array([0.15 * saturation * math.cos(2 * math.pi * (hue + third / 3)) for third in range(3)])
