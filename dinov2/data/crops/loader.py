"""Batches of training steps from a data set: samples read, augmented, masked and collated.

Batch `step` is a function of (data set, configuration, seed, step) alone. Neither the number of workers nor the split
into ranks nor a restart changes a crop or a mask, because every draw is keyed by sample number (`dinov2.data.stream`).
The pil backend, which follows the release's transforms to the bit, seeds torch's global generator for each sample and
puts it back afterwards; the tensor backend draws nothing from it.

A worker makes a whole batch. An image that cannot be read is replaced by another one of the stream, and reported in
`CropBatch.failures`.
"""

import os
import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from types import FrameType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.data.crops.augment_batch import augment_batch
from dinov2.data.crops.augment_image import augment_image
from dinov2.data.crops.collate import CropBatch, stack_crops
from dinov2.data.crops.config import AugmentationConfig
from dinov2.data.crops.masking import sample_masks
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.stream import SampleStream, hash_keys
from dinov2.errors import ConfigError, DataError

__all__ = ["DecodedCache", "crop_batches", "prefetch_to"]

_MOST_ATTEMPTS = 100
_PROBES = 16


class DecodedCache:
    """Images of a set that fits into memory: uint8 `[C, H, W]`, decoded at their first use instead of once an epoch.

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
            shapes = {single.shape for single in self._single.values()}
            if len(self._single) == min(_PROBES, len(self.dataset)) and len(shapes) == 1:
                # Reserved memory is only taken from the system page by page as images arrive.
                self._block = torch.empty((len(self.dataset), *image.shape), dtype=torch.uint8)
                for place, single in self._single.items():
                    self._block[place] = single
                    self._in_block[place] = True
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


def crop_batches(
    dataset: ImageDataset,
    config: AugmentationConfig,
    *,
    seed: int,
    batch_size: int,
    first_step: int = 0,
    last_step: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    cache: DecodedCache | None = None,
    augment_on: torch.device | str = "cpu",
    start_method: str | None = None,
) -> Iterator[CropBatch]:
    """The batches of this rank from step `first_step` on; endless, or up to `last_step` (not included).

    Step s uses the samples from `s * batch_size * world_size` on, of which each rank takes `batch_size` in a row.
    `num_workers` processes (0: this one) run ahead by `prefetch` batches each; `start_method` (fork, spawn, ...) is
    theirs. `cache` replaces decoding, and `augment_on` is the device that computes the crops, both for the tensor
    backend alone.

    Raises DataError at once when the data set is empty, and in the iteration when no readable image is found for a
    sample.
    """
    device = torch.device(augment_on)
    if config.augmentation_backend == "pil" and (cache is not None or device.type != "cpu"):
        raise ConfigError(
            "the pil backend reads images itself and works on the CPU; set train.augmentation_backend=tensor for "
            "images kept in memory or augmentation on a device"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of {world_size} processes")
    source = _BatchSource(
        images=dataset,
        cache=cache,
        config=config,
        stream=SampleStream(len(dataset), seed),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        augment=device.type == "cpu",
    )
    steps = range(first_step, sys.maxsize if last_step is None else last_step)
    if num_workers == 0:
        return _augment_on_device((source[step] for step in steps), config, seed, device)
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        multiprocessing_context=start_method,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else the loader takes its (unused) base seed from the global one
    )
    return _augment_on_device(loader, config, seed, device)


def prefetch_to(device: torch.device | str, batches: Iterable[CropBatch]) -> Generator[CropBatch, None, None]:
    """The same batches on `device`; to a CUDA device one copy runs ahead of the computation."""
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying = torch.cuda.Stream(device)
    ahead: list[tuple[CropBatch, torch.cuda.Event]] = []
    for batch in batches:
        if batch.global_crops.is_cuda:  # computed there, perhaps not yet
            copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copying):
            ahead.append((batch.to(device, non_blocking=True), copying.record_event()))
        if len(ahead) == 2:
            yield _arrived(*ahead.pop(0))
    for uploaded, event in ahead:
        yield _arrived(uploaded, event)


def _arrived(batch: CropBatch, event: torch.cuda.Event) -> CropBatch:
    """Make the computing stream wait for the batch, and the allocator for the computing stream."""
    computing = torch.cuda.current_stream(batch.masks.device)
    computing.wait_event(event)
    for tensor in batch.device_tensors():
        tensor.record_stream(computing)
    return batch


@dataclass(frozen=True, kw_only=True)
class _RawBatch:
    """Images whose crops are computed on a device that workers do not touch."""

    images: Tensor | list[Tensor]
    masks: Tensor
    sample_numbers: Tensor
    failures: list[tuple[str, str]]

    def pin_memory(self) -> "_RawBatch":
        if isinstance(self.images, list):
            return replace(self, images=[image.pin_memory() for image in self.images])
        return replace(self, images=self.images.pin_memory())


@dataclass(frozen=True)
class _WorkerError:
    """Picklable error returned by a worker: torch would bury its one sentence in a traceback."""

    message: str


@dataclass(frozen=True, kw_only=True)
class _BatchSource(Dataset[CropBatch | _RawBatch | _WorkerError]):
    """The batches of one rank by step, computed in any process."""

    images: ImageDataset
    cache: DecodedCache | None
    config: AugmentationConfig
    stream: SampleStream
    batch_size: int
    rank: int
    world_size: int
    augment: bool

    def __getitem__(self, step: int) -> CropBatch | _RawBatch | _WorkerError:
        global_batch = self.batch_size * self.world_size
        first = step * global_batch + self.rank * self.batch_size
        numbers = np.arange(first, first + self.batch_size)
        seed, config = self.stream.seed, self.config
        failures: list[tuple[str, str]] = []
        try:
            images = [
                self._load_raw(number, index, failures)
                for number, index in zip(numbers.tolist(), self.stream.index_of(numbers).tolist(), strict=True)
            ]
        except DataError as error:
            return _WorkerError(str(error))
        masks = sample_masks(config, seed=seed, step=step, sample_numbers=numbers, global_batch=global_batch)
        sample_numbers = torch.from_numpy(numbers)
        tensors = [image for image in images if isinstance(image, Tensor)]
        if config.augmentation_backend == "pil":
            crops = _augment_one_by_one(images, numbers, config, seed)
        else:
            same_size = len({image.shape for image in tensors}) == 1
            stacked = torch.stack(tensors) if same_size else tensors
            if not self.augment:
                return _RawBatch(images=stacked, masks=masks, sample_numbers=sample_numbers, failures=failures)
            crops = augment_batch(stacked, numbers, config, seed=seed)
        return CropBatch.from_crops(*crops, masks, sample_numbers=sample_numbers, failures=failures)

    def _load_raw(self, number: int, index: int, failures: list[tuple[str, str]]) -> Image.Image | Tensor:
        """The image of a sample number or, if it cannot be read, its first readable substitute."""
        most = min(_MOST_ATTEMPTS, len(self.images))
        for attempt in range(1, most + 2):
            try:
                return self._load(index)
            except (DataError, OSError) as error:
                reason = str(error)
                failures.append((self.images.path_of(index), reason))
                index = self.stream.substitute(number, attempt)
        raise DataError(
            f"no readable image in {most + 1} attempts in a row, the last of them: {reason}; check the data set, most "
            "of its files seem to be damaged"
        )

    def _load(self, index: int) -> Image.Image | Tensor:
        if self.cache is not None:
            return self.cache.decode(index)
        if self.config.augmentation_backend == "pil" and self.config.in_chans == 3:
            return self.images.get_image(index)
        return self.images.get_tensor(index, channels=self.config.in_chans)


def _augment_one_by_one(
    images: list[Image.Image | Tensor], numbers: NDArray[np.int64], config: AugmentationConfig, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Crops of single images, each from a seed of its own; torch's global generator is left as it was."""
    generator = torch.default_generator
    before = generator.get_state()
    try:
        samples = []
        for image, key in zip(images, hash_keys(seed, "augmentation", numbers).tolist(), strict=True):
            generator.manual_seed(key)
            samples.append(augment_image(image, config))
    finally:
        generator.set_state(before)
    global_crops = stack_crops([crops for crops, _ in samples])
    assert global_crops is not None
    return global_crops, stack_crops([crops for _, crops in samples])


def _augment_on_device(
    batches: Iterable[CropBatch | _RawBatch | _WorkerError], config: AugmentationConfig, seed: int, device: torch.device
) -> Iterator[CropBatch]:
    for batch in batches:
        match batch:
            case _WorkerError(message):
                raise DataError(message)
            case _RawBatch(images=images, masks=masks, sample_numbers=numbers, failures=failures):
                if isinstance(images, list):
                    images = [image.to(device, non_blocking=True) for image in images]
                else:
                    images = images.to(device, non_blocking=True)
                crops = augment_batch(images, numbers.numpy(), config, seed=seed)
                yield CropBatch.from_crops(*crops, masks, sample_numbers=numbers, failures=failures)
            case CropBatch():
                yield batch


def _start_worker(worker_id: int) -> None:
    """One thread a worker; an interrupt is for the main process, which ends its workers when it is done."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminations: list[int] = []

    def terminate(signum: int, frame: FrameType | None) -> None:
        # Schedulers signal the whole process group, while the main process still wants to finish its step and save.
        # So the first signal is left to the main process; the second one (its own, or an impatient user's) counts.
        terminations.append(signum)
        if len(terminations) > 1:
            os._exit(0)

    signal.signal(signal.SIGTERM, terminate)
