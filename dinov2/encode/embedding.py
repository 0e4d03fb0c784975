"""Batches of decoded images while the model runs, and the columns that tokens become.

Decoding happens in threads of this process: Pillow releases the interpreter while it decodes and resizes, so one thread
beside the model is enough on a laptop, and nothing has to be copied between processes. Batches come in the order asked
for, and which images share a batch does not depend on the number of threads.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.base import ImageDataset
from dinov2.encode.tokens import Tokens
from dinov2.errors import DataError

__all__ = ["DecodedBatch", "Wanted", "decoded_batches", "embedded"]


@dataclass(frozen=True)
class Wanted:
    """What is kept of an image besides its class token."""

    registers: bool = False
    mean: bool = False
    """The mean over its patch tokens."""
    patches: bool = False
    layers: tuple[int, ...] = ()
    """Blocks, counted from 0, of which the same is kept."""


class DecodedBatch(NamedTuple):
    """The readable images of one batch, in order."""

    indices: list[int]
    """Positions in the data set."""
    groups: list[tuple[list[int], Tensor]]
    """Rows of this batch that have one size, and their pixels [n, C, H, W] as the model takes them."""
    sizes: list[tuple[int, int]]
    """Height and width of each image as it is stored, upright."""
    unreadable: list[tuple[str, str]]
    """(path, reason) of the images left out."""


def decoded_batches(
    dataset: ImageDataset,
    transform: Callable[[object], Tensor],
    batches: Iterable[range],
    *,
    channels: int = 3,
    threads: int = 1,
    pin_memory: bool = False,
) -> Generator[DecodedBatch, None, None]:
    """Decode and transform `batches` of image numbers ahead of use; at most `threads + 1` of them wait at any time."""

    def decode(numbers: range) -> DecodedBatch:
        return _decoded(dataset, transform, numbers, channels=channels, pin_memory=pin_memory)

    waiting: deque[Future[DecodedBatch]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for numbers in batches:
            waiting.append(pool.submit(decode, numbers))
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def embedded(
    encode: Callable[[Tensor, Sequence[int]], Tokens], batch: DecodedBatch, wanted: Wanted
) -> dict[str, np.ndarray]:
    """Columns float32 of a batch, by name: `cls` [B, D], `registers` [B, R, D], `mean` [B, D], `patches` [B, h, w, D].

    Those of block i are called `layer<i>_cls` and so on. Raises DataError when patches are wanted and sizes differ.
    """
    if wanted.patches and len(batch.groups) > 1:
        raise DataError(
            "patch features need images of one size, and these differ after the transform; use --fit crop, or leave "
            "--patches out"
        )
    found = [_columns(encode(pixels, wanted.layers), wanted) for _, pixels in batch.groups]
    if len(found) == 1:
        return found[0]
    order = np.argsort([row for rows, _ in batch.groups for row in rows])
    return {name: np.concatenate([columns[name] for columns in found])[order] for name in found[0]}


def _columns(tokens: Tokens, wanted: Wanted) -> dict[str, np.ndarray]:
    columns = _of_block(tokens, wanted, "")
    for layer in wanted.layers:
        columns |= _of_block(tokens.layers[layer], wanted, f"layer{layer}_")
    return columns


def _of_block(tokens: Tokens, wanted: Wanted, prefix: str) -> dict[str, np.ndarray]:
    parts = {"cls": tokens.cls}
    if wanted.registers:
        parts["registers"] = tokens.registers
    if wanted.mean:
        parts["mean"] = tokens.patches.mean(dim=(1, 2))
    if wanted.patches:
        parts["patches"] = tokens.patches
    return {f"{prefix}{name}": tensor.float().cpu().numpy() for name, tensor in parts.items()}


def _decoded(
    dataset: ImageDataset,
    transform: Callable[[object], Tensor],
    numbers: range,
    *,
    channels: int,
    pin_memory: bool,
) -> DecodedBatch:
    images: list[Tensor] = []
    batch = DecodedBatch([], [], [], [])
    for index in numbers:
        try:
            if channels == 3:
                picture = dataset.get_image(index)
                size = (picture.height, picture.width)
                images.append(transform(picture))
            else:
                pixels = dataset.get_tensor(index, channels=channels)
                size = (pixels.shape[1], pixels.shape[2])
                images.append(transform(pixels))
        except (DataError, OSError) as error:
            batch.unreadable.append((dataset.path_of(index), str(error) or type(error).__name__))
            continue
        batch.indices.append(index)
        batch.sizes.append(size)
    shapes: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        shapes.setdefault(image.shape, []).append(row)
    for rows in shapes.values():
        pixels = torch.stack([images[row] for row in rows])
        batch.groups.append((rows, pixels.pin_memory() if pin_memory else pixels))
    return batch
