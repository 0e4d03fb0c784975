"""Decoded images kept in memory, for sets that fit: small pictures are decoded once instead of once an epoch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.base import ImageDataset
from dinov2.errors import DataError

__all__ = ["DecodedCache"]

_PROBES = 16


class DecodedCache:
    """Decodes image `i` of `dataset` at its first use to uint8 `[C, H, W]` and keeps it.

    When the images looked at first all have one size, there is one block `[S, C, H, W]` for all of that size, reserved
    at once and filled as it is used; images of other sizes are kept one by one. Tensors are handed out without a copy:
    do not write into them. An image that failed once is not read again; its reason is remembered.

    A copy in another process starts empty.
    """

    def __init__(self, dataset: ImageDataset, *, channels: int = 3) -> None:
        self.dataset = dataset
        self.channels = channels
        self._start_empty()

    def __len__(self) -> int:
        return len(self.dataset)

    def decode(self, index: int) -> Tensor:
        """Image `index` as uint8 `[C, H, W]`. Raises DataError naming its path when it cannot be read."""
        image, reason = self.try_decode(index)
        if image is None:
            raise DataError(reason)
        return image

    def try_decode(self, index: int) -> tuple[Tensor | None, str]:
        """`(image, "")`, or `(None, reason)` with the path in the reason."""
        if index in self._failures:
            return None, self._failures[index]
        if self._in_block is not None and self._in_block[index]:
            assert self._block is not None
            return self._block[index], ""
        if index in self._apart:
            return self._apart[index], ""
        try:
            image = self.dataset.get_tensor(index, channels=self.channels)
        except DataError as error:
            self._failures[index] = str(error)
            return None, self._failures[index]
        return self._keep(index, image), ""

    @property
    def failures(self) -> dict[int, str]:
        """Reasons by index of the images that could not be read so far."""
        return dict(self._failures)

    @property
    def one_size(self) -> bool:
        """Whether all images kept so far have the same height and width."""
        return len({tuple(image.shape) for image in self._apart.values()}) + (self._block is not None) <= 1

    def estimate_bytes(self) -> int:
        """Memory for all images once decoded, from a few of them spread over the set (these are decoded and kept)."""
        probes = np.linspace(0, len(self) - 1, num=min(_PROBES, len(self)), dtype=int).tolist() if len(self) else []
        sizes = [image.numel() for image in (self.try_decode(index)[0] for index in probes) if image is not None]
        return int(len(self) * sum(sizes) / len(sizes)) if sizes else 0

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "channels": self.channels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def _start_empty(self) -> None:
        self._block: Tensor | None = None  # [S, C, H, W]
        self._in_block: np.ndarray | None = None  # bool [S]
        self._apart: dict[int, Tensor] = {}
        self._failures: dict[int, str] = {}

    def _keep(self, index: int, image: Tensor) -> Tensor:
        if self._block is None or self._in_block is None or self._block.shape[1:] != image.shape:
            self._apart[index] = image
            if self._block is None and len(self._apart) == min(_PROBES, len(self)) and self.one_size:
                self._move_into_block(image.shape)
            return image
        self._block[index] = image
        self._in_block[index] = True
        return self._block[index]

    def _move_into_block(self, shape: torch.Size) -> None:
        # Reserved memory is only taken from the system page by page as images arrive.
        self._block = torch.empty((len(self), *shape), dtype=torch.uint8)
        self._in_block = np.zeros(len(self), dtype=bool)
        for index, image in self._apart.items():
            self._block[index] = image
            self._in_block[index] = True
        self._apart = {}
