"""Ten classes of strewn glyphs, made from numbers alone: data for a first run, tests and demonstrations.

The class is the *glyph*: disc, ring, plus, ... An image is strewn with one glyph, and everything that pixels compare is
left to chance: where the glyphs lie, how large and turned they are, their colours, the ground, the light, the grain. So
raw pixels and colours say little about the class, while a network that learns what crops of one image share finds it.

Glyphs are signed distances. Edges are antialiased by turning distance into coverage over one pixel, so that the same
image can be drawn at any size; below 16 pixels strokes are thinner than a pixel and come out too heavy.

Image `i` of a split is a function of `(split, size, i)` alone: its numbers come from Philox keyed by a hash of split
and index, as raw 64-bit draws, whose values no numpy release changes. Sine and cosine may differ in the last bit
between machines, and with them a grey level here and there.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Literal, Unpack

import numpy as np

from dinov2.data.datasets.base import PixelDataset, Transforms, digest
from dinov2.errors import DataError

__all__ = ["Toy"]

_DEFAULT_COUNT = {"TRAIN": 5000, "VAL": 1000}
_MOST_IMAGES, _LARGEST_SIZE = 10_000_000, 4096
_VERSION = "toy-2"  # part of the fingerprint: another drawing is another data set


_Coordinates = np.ndarray  # [glyphs, H, W]
_CELLS = 3  # glyphs across the image
_LATTICE = _CELLS + 2  # one more on each side, of which the image may show a part
_PER_GLYPH = 8
_MOST_TURN = 0.5  # radians; more is harder to learn, less lets raw pixels match
_MOST_JITTER = 0.5  # of a cell
_N_NUMBERS = 10 + _LATTICE**2 * _PER_GLYPH  # uniform numbers that an image is made of, besides its grain


class Toy(PixelDataset):
    """Strewn glyphs, `size` x `size` RGB, `n` images with labels 0, 1, ..., 9, 0, ...; the splits are drawn apart.

    An image is drawn at its first use and kept. Raises DataError for an unknown split or an impossible size.
    """

    def __init__(
        self,
        *,
        split: Literal["TRAIN", "VAL"] = "TRAIN",
        size: int = 32,
        n: int | None = None,
        **transforms: Unpack[Transforms],
    ) -> None:
        super().__init__(**transforms)
        if split not in _DEFAULT_COUNT:
            raise DataError(f"the toy set has no split {split!r}; write TRAIN or VAL")
        count = _DEFAULT_COUNT[split] if n is None else n
        if not (1 <= count <= _MOST_IMAGES and 8 <= size <= _LARGEST_SIZE):
            raise DataError(
                f"a toy set of {count} images of {size} pixels cannot be drawn; n is 1 to {_MOST_IMAGES:,}, size 8 to "
                f"{_LARGEST_SIZE:,}"
            )
        self.split = split
        self.size = size
        self.class_names = list(_GLYPHS)
        self._count = count
        self._drawn: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_drawn": {}}  # drawn again where they are needed

    def get_pixels(self, index: int) -> np.ndarray:
        if index not in self._drawn:
            numbers, grain = _random_numbers(self.split, index, self.size)
            self._drawn[index] = _draw(self.get_target(index), numbers, grain)
        return self._drawn[index]

    def get_target(self, index: int) -> int:
        return index % len(_GLYPHS)

    def get_targets(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.int64) % len(_GLYPHS)

    def path_of(self, index: int) -> str:
        return f"toy:{self.split}/{index}"

    def fingerprint(self) -> str:
        return digest(_VERSION, self.split, str(self.size), str(len(self)))


def _random_numbers(split: str, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers in [0, 1) for image `index`: for its parameters `[_N_NUMBERS]` and its grain `[size, size, 3]`.

    Grain needs a byte a number, so that eight share a draw.
    """
    key = int.from_bytes(hashlib.blake2b(f"{split}/{index}".encode(), digest_size=16).digest(), "little")
    n_bytes = size * size * 3
    raw = np.random.Philox(key=key).random_raw(_N_NUMBERS + -(-n_bytes // 8))
    numbers = (raw[:_N_NUMBERS] >> np.uint64(11)) * 2.0**-53
    grain = raw[_N_NUMBERS:].astype("<u8").view(np.uint8)[:n_bytes] / 256
    return numbers, grain.reshape(size, size, 3)


def _box(x: _Coordinates, y: _Coordinates, width: float, height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _triangle(x: _Coordinates, y: _Coordinates) -> np.ndarray:
    return np.maximum(-y - 0.5, 0.866 * np.abs(x) + 0.5 * y - 0.5)


def _arc(x: _Coordinates, y: _Coordinates) -> np.ndarray:
    return np.maximum(np.abs(np.hypot(x, y) - 0.75) - 0.28, -y)


_GLYPHS: dict[str, Callable[[_Coordinates, _Coordinates], np.ndarray]] = {
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
A mirrored glyph is still nearest to its class, so that flipping is a fair augmentation.
"""


def _draw(label: int, numbers: np.ndarray, grain: np.ndarray) -> np.ndarray:
    """The image uint8 `[H, W, 3]` of class `label`, from uniform numbers `[_N_NUMBERS]` and grain `[H, W, 3]`."""
    size = grain.shape[0]
    shared, single = numbers[:10], numbers[10:].reshape(_LATTICE**2, _PER_GLYPH)
    line = (np.arange(size) + 0.5) / size
    column, row = np.meshgrid(np.arange(_LATTICE) - 1, np.arange(_LATTICE) - 1)
    # In sides of the image: the lattice is shifted as a whole, then each glyph by itself.
    centre_x = (column.ravel() + shared[0] + _MOST_JITTER * (2 * single[:, 0] - 1)) / _CELLS
    centre_y = (row.ravel() + shared[1] + _MOST_JITTER * (2 * single[:, 1] - 1)) / _CELLS
    unit = (0.31 + 0.15 * single[:, 2]) / _CELLS
    turn = _MOST_TURN * (2 * single[:, 3] - 1)
    coverage = _coverage(label, line, centre_x, centre_y, unit, turn, size)  # [glyphs, H, W]

    ground = 0.27 + 0.06 * shared[2] + 0.03 * (2 * shared[3:6] - 1)  # [3]
    ink = ground + (0.29 + 0.2 * single[:, 4:5]) + 0.2 * (2 * single[:, 5:8] - 1)  # [glyphs, 3]
    slope = 0.15 * (2 * shared[6:8] - 1)
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
    distance = list(_GLYPHS.values())[label](cosine * x + sine * y, cosine * y - sine * x)
    coverage = np.zeros((len(unit), size, size))
    coverage[seen] = np.clip(0.5 - distance * unit[seen, None, None] * size, 0.0, 1.0)
    return coverage
