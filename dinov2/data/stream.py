"""The sample stream: which image is sample `i` of a run, and the random numbers that belong to it.

Every draw is a hash of what it is for (seed, purpose, sample number, crop, ...), never the next value of a generator
that somebody else may have advanced. So the image and the augmentation of sample `i` do not depend on the loader's
worker, the rank or a restart. The order of an epoch is a keyed permutation with random access: nothing of the size of
the data set is ever stored, and a position is one number, counted in samples.
"""

import math
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from dinov2.errors import DataError

__all__ = ["SampleStream", "hash_keys", "permute", "to_unit_interval"]

_Key = int | str | NDArray[np.integer]

_WORD = (1 << 64) - 1
_WEYL = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 over the golden ratio
_ROUNDS = 8  # with six the order of five images is not yet uniform over keys


def hash_keys(*keys: _Key) -> NDArray[np.uint64]:
    """Hash the keys, in order, to 64 well-mixed bits; arrays broadcast against each other.

    Integers count modulo 2^64, strings stand for themselves (in every process alike). The bit mixer is the finaliser of
    SplitMix64 (Steele, Lea and Flood 2014), applied once a key.
    """
    state: NDArray[np.uint64] = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = _finalise((state ^ _as_words(key)) + _WEYL)
    return state if any(isinstance(key, np.ndarray) for key in keys) else state.reshape(())


def to_unit_interval(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn hashed words into floats in [0, 1), of which the 53 leading bits decide."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(positions: NDArray[np.int64], n: int, *, key: int) -> NDArray[np.int64]:
    """The elements at `positions` of a pseudo-random permutation of `range(n)` under an integer key.

    Nothing of size `n` is made: the numbers below `n` are laid on a grid of about sqrt(n) x sqrt(n) cells; each round
    of a Feistel network shifts the row by a hash of the column, and then the column by a hash of the row. Cells beyond
    `n - 1` are walked through until one inside is met (Black and Rogaway 2002).
    """
    return _permute(positions.reshape(-1), n, np.full(1, key & _WORD, dtype=np.uint64)).reshape(positions.shape)


class SampleStream:
    """The endless, seeded order in which the `n_images` of a data set are seen: each once an epoch, in a new order.

    Sample number `i` belongs to epoch `i // n_images`. The position of a run is the number of samples it has used, so
    that a restart with another number of workers or ranks goes on exactly where it stopped.
    """

    def __init__(self, n_images: int, seed: int) -> None:
        if n_images < 1:
            raise DataError("the data set holds no image, so there is nothing to stream; point to a folder with images")
        self.n_images = n_images
        self.seed = seed

    def index_of(self, sample_numbers: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """The index in the data set of each global sample number, int64 of the same shape."""
        numbers = np.asarray(sample_numbers, dtype=np.int64)
        epochs, positions = np.divmod(numbers.reshape(-1), self.n_images)
        return _permute(positions, self.n_images, hash_keys(self.seed, "epoch", epochs)).reshape(numbers.shape)

    def substitute(self, sample_number: int, attempt: int) -> int:
        """The index that stands in for an unreadable image; `attempt` counts from 1.

        Each sample number has an order of its own over all images, so `n_images` attempts have tried every one.
        """
        key = int(hash_keys(self.seed, "substitute", sample_number))
        return int(permute(np.array([(attempt - 1) % self.n_images]), self.n_images, key=key)[0])


def _finalise(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _as_words(key: _Key) -> NDArray[np.uint64]:
    if isinstance(key, str):
        key = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
    if isinstance(key, np.ndarray):
        return key.astype(np.int64, copy=False).view(np.uint64)  # the bits of uint64 stay
    return np.array([int(key) & _WORD], dtype=np.uint64)


def _permute(positions: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Permute `positions` [k] below `n` under one key, or under a key each [k]."""
    n_rows = math.isqrt(n - 1) + 1
    n_columns = -(-n // n_rows)
    keys = np.broadcast_to(_finalise(keys + _WEYL), positions.shape)  # so that neighbouring keys share no round
    result = _shuffle_grid(positions, n_rows, n_columns, keys)
    while (outside := np.flatnonzero(result >= n)).size:
        result[outside] = _shuffle_grid(result[outside], n_rows, n_columns, keys[outside])
    return result


def _shuffle_grid(cells: NDArray[np.int64], n_rows: int, n_columns: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    rows, columns = np.divmod(cells.view(np.uint64), np.uint64(n_columns))
    for round_number in range(_ROUNDS):
        salted = keys + np.uint64(2 * round_number)
        rows = (rows + _finalise(_finalise(salted + _WEYL) ^ columns) % np.uint64(n_rows)) % np.uint64(n_rows)
        salted = keys + np.uint64(2 * round_number + 1)
        columns = (columns + _finalise(_finalise(salted + _WEYL) ^ rows) % np.uint64(n_columns)) % np.uint64(n_columns)
    return (rows * np.uint64(n_columns) + columns).view(np.int64)
