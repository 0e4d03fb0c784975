"""Ten classes of drawn patterns, made from numbers alone: data for a first run, tests and demonstrations.

The class is the *pattern*: stripes, rings, checks, ... Everything that pixels compare is left to chance: where it
lies, how large, turned and bent it is, its colours, whether it is lighter or darker than the ground, the light, the
grain. So raw pixels and colours say little about the class, while a network that learns what crops of one image share
finds it. A pattern's mirror image is a pattern of the same class, so that flipping is a fair augmentation.

Image `i` of a split is a function of `(split, size, i)` alone: its numbers come from Philox keyed by a hash of split
and index, as raw 64-bit draws, whose values no numpy release changes. Sine and cosine may differ in the last bit
between machines, and with them a grey level here and there.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from dinov2.data.datasets.base import PixelDataset, digest
from dinov2.data.datasets.toy_shapes import PATTERNS, draw
from dinov2.errors import DataError

__all__ = ["Toy"]

_DEFAULT_COUNT = {"TRAIN": 5000, "VAL": 1000}
_VERSION = "toy-1"  # part of the fingerprint: another drawing is another data set
_N_NUMBERS = 48
_N_CELLS = 24


class Toy(PixelDataset):
    """Drawn patterns, `size` x `size` RGB, `n` images with labels 0, 1, ..., 9, 0, ...; the splits are drawn apart.

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
        if count < 1 or size < 8:
            raise DataError(
                f"a toy set of {count} images of {size} pixels cannot be drawn; n is 1 or more, size 8 or more"
            )
        self.split = split
        self.size = size
        self.class_names = list(PATTERNS)
        self._count = count
        self._drawn: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_drawn": {}}  # drawn again where they are needed

    def get_pixels(self, index: int) -> np.ndarray:
        if index not in self._drawn:
            numbers, cells, grain = _random_numbers(self.split, index, self.size)
            self._drawn[index] = draw(self.get_target(index), numbers, cells, grain)
        return self._drawn[index]

    def get_target(self, index: int) -> int:
        return index % len(PATTERNS)

    def get_targets(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.int64) % len(PATTERNS)

    def path_of(self, index: int) -> str:
        return f"toy:{self.split}/{index}"

    def fingerprint(self) -> str:
        return digest(_VERSION, self.split, str(self.size), str(len(self)))


def _random_numbers(split: str, index: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers in [0, 1) for image `index`: for its parameters `[48]`, its cells `[24, 24]` and grain `[size, size, 3]`.

    Cells and grain need a byte a number, so that eight share a draw.
    """
    key = int.from_bytes(hashlib.blake2b(f"{split}/{index}".encode(), digest_size=16).digest(), "little")
    n_bytes = _N_CELLS**2 + size * size * 3
    raw = np.random.Philox(key=key).random_raw(_N_NUMBERS + -(-n_bytes // 8))
    numbers = (raw[:_N_NUMBERS] >> np.uint64(11)) * 2.0**-53
    fine = raw[_N_NUMBERS:].astype("<u8").view(np.uint8)[:n_bytes] / 256
    return numbers, fine[: _N_CELLS**2].reshape(_N_CELLS, _N_CELLS), fine[_N_CELLS**2 :].reshape(size, size, 3)
