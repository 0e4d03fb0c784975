"""Decoded images kept in memory, for sets that fit: small pictures are decoded once instead of once an epoch."""

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.base import ImageDataset
from dinov2.errors import DataError

__all__ = ["DecodedCache"]

_PROBES = 16


class DecodedCache:
    """Decodes image `i` of `dataset` at its first use to uint8 `[C, H, W]` and keeps it.

    When the images decoded first all have one size, there is one block `[S, C, H, W]` for all of that size, reserved at
    once and filled as it is used; images of other sizes are kept one by one. Tensors are handed out without a copy: do
    not write into them. An image that failed once is not read again; its reason is remembered.

    A copy in another process starts empty.
    """

    def __init__(self, dataset: ImageDataset, *, channels: int = 3) -> None:
        self.dataset = dataset
        self.channels = channels
        self._block: Tensor | None = None  # [S, C, H, W]
        self._in_block = np.zeros(len(dataset), dtype=bool)
        self._single: dict[int, Tensor] = {}
        self._failures: dict[int, str] = {}

    def decode(self, index: int) -> Tensor:
        """Image `index` as uint8 `[C, H, W]`. Raises DataError naming its path when it cannot be read."""
        if self._block is not None and self._in_block[index]:
            return self._block[index]
        if index in self._single:
            return self._single[index]
        if index in self._failures:
            raise DataError(self._failures[index])
        try:
            image = self.dataset.get_tensor(index, channels=self.channels)
        except DataError as error:
            self._failures[index] = str(error)
            raise
        return self._keep(index, image)

    def estimate_bytes(self) -> int:
        """Memory for all images once decoded, from a few of them spread over the set (these are decoded and kept)."""
        count = len(self.dataset)
        sizes = []
        for index in np.linspace(0, count - 1, num=min(_PROBES, count), dtype=int).tolist():
            try:
                sizes.append(self.decode(index).numel())
            except DataError:
                continue
        return int(count * sum(sizes) / len(sizes)) if sizes else 0

    def __reduce__(self) -> tuple[object, ...]:
        return _new_cache, (self.dataset, self.channels)

    def _keep(self, index: int, image: Tensor) -> Tensor:
        if self._block is None:
            self._single[index] = image
            probed = len(self._single) == min(_PROBES, len(self.dataset))
            if probed and len({kept.shape for kept in self._single.values()}) == 1:
                # Reserved memory is only taken from the system page by page as images arrive.
                self._block = torch.empty((len(self.dataset), *image.shape), dtype=torch.uint8)
                for earlier, kept in self._single.items():
                    self._block[earlier] = kept
                    self._in_block[earlier] = True
                self._single = {}
            return image
        if self._block.shape[1:] != image.shape:
            self._single[index] = image
            return image
        self._block[index] = image
        self._in_block[index] = True
        return self._block[index]


def _new_cache(dataset: ImageDataset, channels: int) -> DecodedCache:
    return DecodedCache(dataset, channels=channels)
