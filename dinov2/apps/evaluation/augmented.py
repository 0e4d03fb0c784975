"""Training batches of the linear probe as the papers make them: every image cropped, flipped and encoded anew.

Which image is sample i, and its crop, are functions of the seed and i alone, whatever the workers, processes and
restarts.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2 import distributed
from dinov2.apps.evaluation.subjects import Subject
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.eval_transform import make_classification_train_transform
from dinov2.data.stream import SampleStream, hash_keys
from dinov2.errors import DataError
from dinov2.eval.linear.training import Batches

__all__ = ["AugmentedImages", "augmented_batches"]

_ATTEMPTS = 10


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Sample i of the stream over the given images: a random crop `[C, H, H]` and its class."""

    def __init__(self, images: ImageDataset, rows: Tensor, classes: Tensor, subject: Subject, *, seed: int) -> None:
        self.images, self.rows, self.classes, self.seed = images, rows.tolist(), classes.tolist(), seed
        self.stream, self.channels = SampleStream(len(self.rows), seed), subject.channels
        transform = subject.transform
        self.transform = make_classification_train_transform(
            crop_size=transform.crop_size, mean=transform.mean, std=transform.std
        )

    def __getitem__(self, sample: int) -> tuple[Tensor, int]:
        position, failure = int(self.stream.index_of(sample)), None
        for attempt in range(_ATTEMPTS):
            index = self.rows[position]
            try:
                image: Any = (
                    self.images.get_image(index)
                    if self.channels == 3
                    else self.images.get_tensor(index, channels=self.channels)
                )
            except (DataError, OSError) as error:
                failure = error
                position = self.stream.substitute(sample, attempt + 1)
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(hash_keys(self.seed, "augmentation", sample) >> np.uint64(1)))
                return self.transform(image), self.classes[position]
        raise DataError(f"{_ATTEMPTS} images in a row could not be read, the last: {failure}") from failure


class _Samples:
    """Sample numbers of this process, batch by batch, from an iteration on and without end."""

    def __init__(self, first: int, batch_size: int) -> None:
        self.first, self.batch_size = first, batch_size
        rank, world_size = distributed.get_global_rank(), distributed.get_global_size()
        self.own = range(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)

    def __iter__(self) -> Iterator[list[int]]:
        iteration = self.first
        while True:
            yield [iteration * self.batch_size + number for number in self.own]
            iteration += 1


def augmented_batches(
    images: ImageDataset,
    rows: Tensor,  # int64 [F]
    classes: Tensor,  # int64 [F]
    subject: Subject,
    *,
    batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
) -> Batches:
    """Batches of `batch_size` images of all processes together, drawn among `rows` of `images`, as columns.

    An image that cannot be read is replaced by another one; ten in a row are a `DataError`.
    """
    dataset = AugmentedImages(images, rows, classes, subject, seed=seed)

    def batches(first: int) -> Iterable[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            dataset,
            batch_sampler=_Samples(first, batch_size),
            num_workers=num_workers,
            pin_memory=subject.device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),
        )
        for pixels, targets in loader:
            # Outside inference mode the columns are plain tensors again.
            yield subject.columns(pixels.to(subject.device, non_blocking=True)).clone(), targets

    return batches
