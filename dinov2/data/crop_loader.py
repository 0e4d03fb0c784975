"""From a data set to the batches of training steps: the sample stream, read, augmented, masked and put together.

Batch `step` is a function of (data set, settings, seed, step) alone. Neither the number of workers nor the split into
ranks nor a restart changes a crop or a mask, because every draw is keyed by sample number (`dinov2.data.stream`). The
pil backend, which follows the release's transforms to the bit, seeds torch's global generator for each sample and puts
it back afterwards; the tensor backend draws nothing from it.

A worker makes a whole batch. An image that cannot be read is replaced by another one of the stream, and reported in
`CropBatch.failures`.
"""

import os
import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.data.collate import CropBatch, stack_crops
from dinov2.data.crop_settings import CropSettings
from dinov2.data.device_augmentations import BatchedAugmentation
from dinov2.data.masking import max_masked_patches, sample_masks
from dinov2.data.stream import SampleStream, mix
from dinov2.errors import ConfigError, DataError

__all__ = ["DecodedImages", "ImageSource", "crop_batches", "prefetch_to"]

_MOST_ATTEMPTS = 100


class ImageSource(Protocol):
    """What is needed of a data set; those of `dinov2.data.datasets` have it."""

    def __len__(self) -> int: ...

    def get_image(self, index: int) -> Any:
        """PIL image in RGB, untransformed. Raises DataError for an unreadable file."""

    def get_tensor(self, index: int, *, channels: int = 3) -> Tensor:
        """The same as uint8 [C, H, W]. Raises DataError for an unreadable file."""

    def path_of(self, index: int) -> str:
        """Where the image comes from, for people."""


class DecodedImages(Protocol):
    """Images kept in memory, for the tensor backend; `dinov2.data.datasets.decoded` has one."""

    def decode(self, index: int) -> Tensor:
        """The image as uint8 [C, H, W]. Raises DataError for an unreadable file."""


def crop_batches(
    dataset: ImageSource,
    settings: CropSettings,
    *,
    seed: int,
    batch_size: int,
    first_step: int = 0,
    last_step: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    cache: DecodedImages | None = None,
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
    if settings.backend == "pil" and (cache is not None or torch.device(augment_on).type != "cpu"):
        raise ConfigError(
            "the pil backend reads images itself and works on the CPU; set train.augmentation_backend=tensor for "
            "images kept in memory or augmentation on a device"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of {world_size} processes")
    source = _BatchSource(
        images=dataset,
        cache=cache,
        settings=settings,
        stream=SampleStream(len(dataset), seed),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        augment=torch.device(augment_on).type == "cpu",
    )
    steps = range(first_step, sys.maxsize if last_step is None else last_step)
    made = _made(source, steps, num_workers=num_workers, prefetch=prefetch, start_method=start_method)
    return _finished(made, settings.batched_augmentation(seed), torch.device(augment_on))


def prefetch_to(
    device: torch.device | str, batches: Iterable[CropBatch], dtype: torch.dtype | None = None
) -> Generator[CropBatch, None, None]:
    """The same batches on `device`, crops cast to `dtype`; to a CUDA device one copy runs ahead of the computation."""
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device, dtype)
        return
    copying = torch.cuda.Stream(device)
    ahead: list[tuple[CropBatch, torch.cuda.Event]] = []
    for batch in batches:
        if batch.global_crops.is_cuda:  # computed there, perhaps not yet
            copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copying):
            ahead.append((batch.to(device, dtype, non_blocking=True), copying.record_event()))
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
class _UncutBatch:
    """A batch whose crops are still to be made, on a device that workers do not touch."""

    images: Tensor | list[Tensor]
    masks: Tensor
    sample_numbers: Tensor
    failures: list[tuple[str, str]]

    def pin_memory(self) -> "_UncutBatch":
        if isinstance(self.images, list):
            return replace(self, images=[image.pin_memory() for image in self.images])
        return replace(self, images=self.images.pin_memory())


@dataclass(frozen=True)
class _Refusal:
    """An error on its way out of a worker, as data: torch would bury its one sentence in a traceback."""

    message: str


class _BatchSource(Dataset[CropBatch | _UncutBatch | _Refusal]):
    """Makes batch `step` of one rank, in whichever process."""

    def __init__(
        self,
        *,
        images: ImageSource,
        cache: DecodedImages | None,
        settings: CropSettings,
        stream: SampleStream,
        batch_size: int,
        rank: int,
        world_size: int,
        augment: bool,
    ) -> None:
        self.images = images
        self.cache = cache
        self.settings = settings
        self.stream = stream
        self.batch_size = batch_size
        self.global_batch = batch_size * world_size
        self.rank = rank
        self.augment = augment
        self.augmentation = settings.augmentation()
        self.batched_augmentation = settings.batched_augmentation(stream.seed)

    def __getitem__(self, step: int) -> CropBatch | _UncutBatch | _Refusal:
        first = step * self.global_batch + self.rank * self.batch_size
        numbers = np.arange(first, first + self.batch_size)
        failures: list[tuple[str, str]] = []
        try:
            images = [
                self._read(number, index, failures)
                for number, index in zip(numbers.tolist(), self.stream.index_of(numbers).tolist(), strict=True)
            ]
        except DataError as error:
            return _Refusal(str(error))
        masks = self._masks(step, numbers)
        sample_numbers = torch.from_numpy(numbers)
        if self.settings.backend == "pil":
            crops = self._one_by_one(images, numbers)
        else:
            same_size = len({image.shape for image in images}) == 1
            stacked = torch.stack(images) if same_size else images
            if not self.augment:
                return _UncutBatch(images=stacked, masks=masks, sample_numbers=sample_numbers, failures=failures)
            crops = self.batched_augmentation(stacked, numbers)
        return CropBatch.of(*crops, masks, sample_numbers=sample_numbers, failures=failures)

    def _read(self, number: int, index: int, failures: list[tuple[str, str]]) -> Any:
        """The image of a sample number or, if it cannot be read, its first readable substitute."""
        most = min(_MOST_ATTEMPTS, len(self.images))
        for attempt in range(1, most + 2):
            try:
                return self._image(index)
            except (DataError, OSError) as error:
                reason = str(error)
                failures.append((self.images.path_of(index), reason))
                index = self.stream.substitute(number, attempt)
        raise DataError(
            f"no readable image in {most + 1} attempts in a row, the last of them: {reason}; check the data set, most "
            "of its files seem to be damaged"
        )

    def _image(self, index: int) -> Any:
        if self.cache is not None:
            return self.cache.decode(index)
        if self.settings.backend == "pil" and self.settings.in_chans == 3:
            return self.images.get_image(index)
        return self.images.get_tensor(index, channels=self.settings.in_chans)

    def _masks(self, step: int, numbers: NDArray[np.int64]) -> Tensor:
        settings = self.settings
        return sample_masks(
            self.stream.seed,
            step,
            numbers,
            global_batch=self.global_batch,
            grid=settings.grid,
            ratio_min_max=settings.mask_ratio_min_max,
            probability=settings.mask_probability,
            max_num_patches=max_masked_patches(settings.global_crops_size, settings.patch_size),
        )

    def _one_by_one(self, images: list[Any], numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Crops of single images, each from a seed of its own; torch's global generator is left as it was."""
        generator = torch.default_generator
        before = generator.get_state()
        try:
            samples = []
            for image, key in zip(images, mix(self.stream.seed, "augmentation", numbers).tolist(), strict=True):
                generator.manual_seed(key)
                samples.append(self.augmentation(image))
        finally:
            generator.set_state(before)
        global_crops = stack_crops([sample["global_crops"] for sample in samples])
        assert global_crops is not None
        return global_crops, stack_crops([sample["local_crops"] for sample in samples])


def _made(
    source: _BatchSource, steps: range, *, num_workers: int, prefetch: int, start_method: str | None
) -> Iterator[CropBatch | _UncutBatch | _Refusal]:
    if num_workers == 0:
        for step in steps:
            yield source[step]
        return
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
    yield from loader


def _finished(
    made: Iterator[CropBatch | _UncutBatch | _Refusal], augmentation: BatchedAugmentation, device: torch.device
) -> Iterator[CropBatch]:
    for batch in made:
        match batch:
            case _Refusal(message):
                raise DataError(message)
            case _UncutBatch(images=images, masks=masks, sample_numbers=numbers, failures=failures):
                if isinstance(images, list):
                    images = [image.to(device, non_blocking=True) for image in images]
                else:
                    images = images.to(device, non_blocking=True)
                crops = augmentation(images, numbers)
                yield CropBatch.of(*crops, masks, sample_numbers=numbers, failures=failures)
            case CropBatch():
                yield batch


def _start_worker(worker_id: int) -> None:
    """One thread a worker; an interrupt is for the main process, which ends its workers when it is done."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminations: list[int] = []

    def terminate(signum: int, frame: Any) -> None:
        # Schedulers signal the whole process group, while the main process still wants to finish its step and save.
        # So the first signal is left to the main process; the second one (its own, or an impatient user's) counts.
        terminations.append(signum)
        if len(terminations) > 1:
            os._exit(0)

    signal.signal(signal.SIGTERM, terminate)
