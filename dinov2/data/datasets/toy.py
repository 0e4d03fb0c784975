"""Ten classes of strewn glyphs, made from numbers alone: data for a first run, tests and demonstrations.

The class is the *glyph*: disc, ring, plus, ... Everything that pixels compare is left to chance: where the glyphs lie,
how large and turned they are, their colours, the ground, the light, the grain. So raw pixels and colours say little
about the class, while a network that learns what crops of one image share finds it.

Image `i` of a split is a function of `(split, size, i)` alone: its numbers come from Philox keyed by a hash of split
and index, as raw 64-bit draws, whose values no numpy release changes. Sine and cosine may differ in the last bit
between machines, and with them a grey level here and there.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from dinov2.data.datasets.base import PixelDataset, digest
from dinov2.data.datasets.toy_shapes import GLYPHS, N_NUMBERS, draw
from dinov2.errors import DataError

__all__ = ["Toy"]

_DEFAULT_COUNT = {"TRAIN": 5000, "VAL": 1000}
_MOST_IMAGES, _LARGEST_SIZE = 10_000_000, 4096
_VERSION = "toy-2"  # part of the fingerprint: another drawing is another data set


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
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(transform=transform, target_transform=target_transform)
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
        self.class_names = list(GLYPHS)
        self._count = count
        self._drawn: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_drawn": {}}  # drawn again where they are needed

    def get_pixels(self, index: int) -> np.ndarray:
        if index not in self._drawn:
            numbers, grain = _random_numbers(self.split, index, self.size)
            self._drawn[index] = draw(self.get_target(index), numbers, grain)
        return self._drawn[index]

    def get_target(self, index: int) -> int:
        return index % len(GLYPHS)

    def get_targets(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.int64) % len(GLYPHS)

    def path_of(self, index: int) -> str:
        return f"toy:{self.split}/{index}"

    def fingerprint(self) -> str:
        return digest(_VERSION, self.split, str(self.size), str(len(self)))


def _random_numbers(split: str, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers in [0, 1) for image `index`: for its parameters `[N_NUMBERS]` and its grain `[size, size, 3]`.

    Grain needs a byte a number, so that eight share a draw.
    """
    key = int.from_bytes(hashlib.blake2b(f"{split}/{index}".encode(), digest_size=16).digest(), "little")
    n_bytes = size * size * 3
    raw = np.random.Philox(key=key).random_raw(N_NUMBERS + -(-n_bytes // 8))
    numbers = (raw[:N_NUMBERS] >> np.uint64(11)) * 2.0**-53
    grain = raw[N_NUMBERS:].astype("<u8").view(np.uint8)[:n_bytes] / 256
    return numbers, grain.reshape(size, size, 3)
