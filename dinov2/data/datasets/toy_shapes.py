"""The ten patterns of the toy set as signed distances, and the painting of one image.

A pattern is a function of coordinates in its own frame to a signed distance, negative where there is ink; it goes on
for ever, and the image shows a window of it. Edges are antialiased by turning distance into coverage over one pixel, so
that no supersampling is needed and the same image can be drawn at any size.
"""

import math
from collections.abc import Callable

import numpy as np

__all__ = ["PATTERNS", "draw"]

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]  # x, y -> signed distance, all [H, W]


def _fold(t: np.ndarray, period: float) -> np.ndarray:
    """`t` folded into [-period / 2, period / 2]: the position within a repeated cell."""
    return np.mod(t + period / 2, period) - period / 2


def _stripes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(_fold(x, 1.0)) - 0.25


def _rings(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(_fold(np.hypot(x, y), 1.0)) - 0.25


def _spokes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sector = 2 * math.pi / 10
    return np.hypot(x, y) * (np.abs(_fold(np.arctan2(y, x), sector)) - sector / 4)


def _checks(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = np.abs(_fold(x, 1.4)) - 0.35, np.abs(_fold(y, 1.4)) - 0.35
    return np.where(a * b > 0, -1.0, 1.0) * np.minimum(np.abs(a), np.abs(b))


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    row = np.rint(y / 0.95)
    return np.hypot(_fold(x + row * 0.55, 1.1), y - row * 0.95) - 0.33


def _mesh(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(np.abs(_fold(x, 1.2)), np.abs(_fold(y, 1.2))) - 0.13


def _waves(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.abs(_fold(x + 0.45 * np.sin(2 * math.pi * y / 2.2), 1.1)) - 0.27) * 0.7


def _crosses(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = np.abs(_fold(x, 1.6)), np.abs(_fold(y, 1.6))
    return np.minimum(np.maximum(a - 0.6, b - 0.18), np.maximum(b - 0.6, a - 0.18))


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.full(np.broadcast_shapes(x.shape, y.shape), -1.0)


def _rounds(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(_fold(x, 1.6), _fold(y, 1.6)) - 0.5) - 0.17


PATTERNS: dict[str, Distance] = {
    "stripes": _stripes,
    "rings": _rings,
    "spokes": _spokes,
    "checks": _checks,
    "dots": _dots,
    "mesh": _mesh,
    "waves": _waves,
    "crosses": _crosses,
    "disc": _disc,
    "rounds": _rounds,
}
"""Signed distance by class name, in the order of the labels; every one is its own mirror image up to rotation."""


import os
U0,U1,WA,CA,R0,R1=[float(os.environ.get(k,d)) for k,d in (("U0",".18"),("U1",".1"),("WA",".04"),("CA",".1"),("R0",".3"),("R1",".15"))]


def draw(label: int, numbers: np.ndarray, grain: np.ndarray) -> np.ndarray:
    """The image uint8 `[H, W, 3]` of class `label`, from uniform numbers `[32]` and grain in [0, 1) `[H, W, 3]`."""
    size = grain.shape[0]
    u = iter(numbers.tolist())
    line = (np.arange(size) + 0.5) / size
    warp_x, warp_y, light = (_gentle_wave(line, [next(u) for _ in range(4)]) for _ in range(3))  # [H, W]
    x = line[None, :] + WA * warp_x
    y = line[:, None] + WA * warp_y
    radius = R0 + R1 * next(u)
    mid_x, mid_y = (radius*.8 + (1 - radius * 1.6) * next(u) for _ in range(2))
    inside = np.clip(0.5 + (radius - np.hypot(x - mid_x, y - mid_y)) * size, 0.0, 1.0)
    unit = U0 + U1 * next(u)  # of the image's side
    shift_x, shift_y = (radius * (next(u) - 0.5) for _ in range(2))
    turn = 2 * math.pi * next(u)
    x, y = (x - mid_x - shift_x) / unit, (y - mid_y - shift_y) / unit
    own_x, own_y = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    distance = list(PATTERNS.values())[label](own_x, own_y)
    coverage = inside * np.clip(0.5 - distance * unit * size, 0.0, 1.0)  # [H, W]

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
