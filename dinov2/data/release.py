"""Interfaces of the public release: its augmentation, mask collation, samplers and data loader.

Orders and draws are the release's, index by index and number by number; training here uses `dinov2.data.crops` and
`dinov2.data.stream` instead. The known weaknesses of the samplers belong to their order and stay: `EpochSampler` seeds
with `seed * epoch`; a shard of `ShardedInfiniteSampler` never meets the images of another rank, and the remainder of
its permutation is never seen; its `advance` counts passes in images of the whole set.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision import transforms

from dinov2.data.crops.augment_image import Picture, blur_at_random, crop_at_random, disturb_color
from dinov2.data.crops.collate import CollatedBatch, masked_patches, stack_crops
from dinov2.data.crops.config import AugmentationConfig
from dinov2.data.crops.masking import MaskingGenerator
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.eval_transform import MaybeToTensor, make_normalize_transform
from dinov2.distributed import get_global_rank, get_global_size
from dinov2.errors import ConfigError, DataError

__all__ = [
    "DataAugmentationDINO",
    "DatasetWithEnumeratedTargets",
    "EpochSampler",
    "GaussianBlur",
    "InfiniteSampler",
    "SamplerType",
    "ShardedInfiniteSampler",
    "collate_data_and_cast",
    "make_data_loader",
]


class DataAugmentationDINO:
    """Image -> two global crops and `local_crops_number` local ones, in the release's dictionary.

    `settings` are others of `AugmentationConfig`, such as `mean`. The attributes `geometric_augmentation_global`,
    `geometric_augmentation_local` (image -> crop), `global_transfo1`, `global_transfo2` and `local_transfo` (crop ->
    tensor) are called for each crop and may be replaced.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        **settings: Any,
    ) -> None:
        self.global_crops_scale, self.local_crops_scale = global_crops_scale, local_crops_scale
        self.local_crops_number = local_crops_number
        self.global_crops_size, self.local_crops_size = global_crops_size, local_crops_size
        self._config = config = AugmentationConfig(**settings)
        self.normalize = transforms.Compose([MaybeToTensor(), make_normalize_transform(config.mean, config.std)])
        # The release's names for the steps, under which they may be replaced.
        self.geometric_augmentation_global: Callable[[Any], Any] = self._global_crop
        self.geometric_augmentation_local: Callable[[Any], Any] = self._local_crop
        first, second, local = (partial(disturb_color, config=config, blur_p=p) for p in config.blur_p)
        self.global_transfo1: Callable[[Any], Tensor] = partial(first, solarize=False)
        self.global_transfo2: Callable[[Any], Tensor] = partial(second, solarize=True)
        self.local_transfo: Callable[[Any], Tensor] = partial(local, solarize=False)

    def __call__(self, image: Picture) -> dict[str, Any]:
        """Crop `image`; `global_crops_teacher` repeats `global_crops`, `offsets` is empty, as in the release."""
        global_crops = [
            self.global_transfo1(self.geometric_augmentation_global(image)),
            self.global_transfo2(self.geometric_augmentation_global(image)),
        ]
        local_crops = [
            self.local_transfo(self.geometric_augmentation_local(image)) for _ in range(self.local_crops_number)
        ]
        return {
            "global_crops": global_crops,
            "global_crops_teacher": global_crops,
            "local_crops": local_crops,
            "offsets": (),
        }

    def _global_crop(self, image: Picture) -> Picture:
        return crop_at_random(image, self.global_crops_scale, self.global_crops_size, self._config.horizontal_flip_p)

    def _local_crop(self, image: Picture) -> Picture:
        return crop_at_random(image, self.local_crops_scale, self.local_crops_size, self._config.horizontal_flip_p)


class GaussianBlur:
    """Blur with a 9 x 9 Gaussian of random sigma, with probability `p`; draws from torch's global generator.

    `p` is the true probability. The class of that name in the release blurred with probability 1 - p.
    """

    def __init__(self, *, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0) -> None:
        self.p = p
        self.radius_min = radius_min
        self.radius_max = radius_max

    def __call__(self, image: Picture) -> Picture:
        return blur_at_random(image, self.p, self.radius_min, self.radius_max)

    def __repr__(self) -> str:
        return f"GaussianBlur(p={self.p}, radius_min={self.radius_min}, radius_max={self.radius_max})"


def collate_data_and_cast(
    samples_list: Sequence[tuple[Mapping[str, Any], object]],
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: MaskingGenerator | None = None,
) -> CollatedBatch:
    """The release's collate function: samples (augmentation dictionary, target) to its dictionary of a batch.

    `n_tokens` is the number of patches N of a global crop (default: those of the generator's grid). Ratios and the
    order of masks come from Python's global `random`, the shapes from the generator's own source. Without local crops
    `collated_local_crops` is None.
    """
    if mask_generator is None:
        raise DataError("collate_data_and_cast got no mask_generator; pass a MaskingGenerator for the patch grid")
    if n_tokens is None:
        n_tokens = mask_generator.num_patches
    global_crops = stack_crops([sample[0]["global_crops"] for sample in samples_list])
    local_crops = stack_crops([sample[0]["local_crops"] for sample in samples_list])
    if global_crops is None:
        raise DataError("the samples hold no global crops; each needs a dictionary with the list 'global_crops'")

    n_crops = len(global_crops)
    n_masked_crops = int(n_crops * mask_probability)
    ratios = torch.linspace(*mask_ratio_tuple, n_masked_crops + 1)
    upperbound = 0
    masks = []
    for low, high in pairwise(ratios):
        ratio = low + (high - low) * random.random()  # in float32, as the release draws it
        masks.append(mask_generator(int(n_tokens * ratio)))
        upperbound += int(n_tokens * high)
    masks += [mask_generator(0) for _ in range(n_crops - n_masked_crops)]
    random.shuffle(masks)

    collated_masks = torch.from_numpy(np.stack(masks)).flatten(1)  # [G*B, N]
    mask_indices_list, masks_weight = masked_patches(collated_masks)
    return {
        "collated_global_crops": global_crops.to(dtype),
        "collated_local_crops": None if local_crops is None else local_crops.to(dtype),
        "collated_masks": collated_masks,
        "mask_indices_list": mask_indices_list,
        "masks_weight": masks_weight,
        "upperbound": upperbound,
        "n_masked_patches": torch.full((1,), len(mask_indices_list), dtype=torch.long),
    }


class DatasetWithEnumeratedTargets(Dataset[tuple[object, tuple[int, object]]]):
    """Yields `(image, (index, target))`, so that rows computed out of order can be put back in order.

    A sample without a label has its own index as target. Unlike in the public release, `get_target` says the same as
    `[]` does, apart from the target transform.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    def get_image_data(self, index: int) -> bytes:
        """The bytes of image `index`, as the wrapped data set gives them."""
        return self._dataset.get_image_data(index)

    def get_target(self, index: int) -> tuple[int, int]:
        """`(index, label)`, or `(index, index)` when there is no label."""
        target = self._dataset.get_target(index)
        return index, index if target is None else target

    def get_targets(self) -> np.ndarray:
        """Labels of all samples, int64 `[S]`; their indices when the set has no labels."""
        targets = self._dataset.get_targets()
        return np.arange(len(self), dtype=np.int64) if targets is None else np.asarray(targets)

    def __getitem__(self, index: int) -> tuple[object, tuple[int, object]]:
        image, target = self._dataset[index]
        return image, (index, index if target is None else target)

    def __len__(self) -> int:
        return len(self._dataset)


class SamplerType(Enum):
    """The release's orders of samples."""

    DISTRIBUTED = 0
    EPOCH = 1
    INFINITE = 2
    SHARDED_INFINITE = 3
    SHARDED_INFINITE_NEW = 4


def make_data_loader(
    *,
    dataset: Dataset[object],
    batch_size: int,
    num_workers: int,
    shuffle: bool = True,
    seed: int = 0,
    sampler_type: SamplerType | None = SamplerType.INFINITE,
    sampler_size: int = -1,
    sampler_advance: int = 0,
    drop_last: bool = True,
    persistent_workers: bool = False,
    collate_fn: Callable[[list[Any]], object] | None = None,
) -> DataLoader[Any]:
    """A PyTorch loader over `dataset` in one of the release's orders.

    `sampler_size` is for EPOCH alone (-1: the data set's length), `sampler_advance` skips that many samples of the
    INFINITE and SHARDED_INFINITE orders. Without a sampler the order is that of the data set, so `shuffle` must be
    False. Memory is pinned where there is a CUDA device.

    Raises ConfigError, a ValueError, for options that the order does not have; NotImplementedError for an advance of
    EPOCH, as the release does.
    """
    sampler = _make_sampler(
        dataset, sampler_type=sampler_type, shuffle=shuffle, seed=seed, size=sampler_size, advance=sampler_advance
    )
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
        persistent_workers=persistent_workers and num_workers > 0,
        collate_fn=collate_fn,
    )


def _make_sampler(
    dataset: Dataset[object], *, sampler_type: SamplerType | None, shuffle: bool, seed: int, size: int, advance: int
) -> Sampler[int] | None:
    if sampler_type is not SamplerType.EPOCH and size > 0:
        raise ConfigError(f"sampler_size is {size}, which only SamplerType.EPOCH knows; leave it at -1")
    if sampler_type in (SamplerType.EPOCH, SamplerType.DISTRIBUTED) and advance > 0:
        error = NotImplementedError if sampler_type is SamplerType.EPOCH else ConfigError
        raise error(f"{sampler_type} cannot begin at sample {advance}; use SamplerType.INFINITE or SHARDED_INFINITE")
    count = len(dataset)  # type: ignore[arg-type]
    match sampler_type:
        case None:
            if shuffle:
                raise ConfigError(
                    "shuffle=True needs a sampler: without one the order is the data set's; "
                    "pass shuffle=False, or a sampler_type such as SamplerType.EPOCH"
                )
            return None
        case SamplerType.EPOCH:
            return EpochSampler(size=size if size > 0 else count, sample_count=count, shuffle=shuffle, seed=seed)
        case SamplerType.INFINITE:
            return InfiniteSampler(sample_count=count, shuffle=shuffle, seed=seed, advance=advance)
        case SamplerType.DISTRIBUTED:
            # With rank and number of processes, so that one process needs no process group.
            rank, processes = get_global_rank(), get_global_size()
            return DistributedSampler(dataset, num_replicas=processes, rank=rank, shuffle=shuffle, seed=seed)
    return ShardedInfiniteSampler(
        sample_count=count,
        shuffle=shuffle,
        seed=seed,
        advance=advance,
        use_new_shuffle_tensor_slice=sampler_type is SamplerType.SHARDED_INFINITE_NEW,
    )


class _RankSampler(Sampler[int]):
    """A sampler of which each rank takes every `step`-th index from `start` on, by default its own share."""

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
    ) -> None:
        if sample_count < 1:
            raise DataError(f"a sampler needs at least one sample, got {sample_count}; is the data set empty?")
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start = get_global_rank() if start is None else start
        self._step = get_global_size() if step is None else step


class EpochSampler(_RankSampler):
    """`size` indices below `sample_count` an epoch, repeated when there are fewer. `set_epoch` chooses the order.

    `options` are `sample_count`, `shuffle`, `seed`, `start` and `step`.
    """

    def __init__(self, *, size: int, **options: Any) -> None:
        super().__init__(**options)
        self._size = size
        self._epoch = 0

    def __iter__(self) -> Iterator[int]:
        repeats = -(-self._size // self._sample_count)
        indices = np.tile(np.arange(self._sample_count), repeats)
        if self._shuffle:
            seed = self._seed * self._epoch if self._seed != 0 else self._epoch
            indices = np.random.default_rng(seed).choice(indices, self._size, replace=False)
        yield from indices[: self._size][self._start :: self._step].tolist()

    def __len__(self) -> int:
        return max(0, -(-(self._size - self._start) // self._step))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self._epoch = epoch


class InfiniteSampler(_RankSampler):
    """Endless passes over `range(sample_count)`, each a new permutation that all ranks share.

    `advance` skips that many items of this rank's stream; `options` are those of `EpochSampler`.
    """

    def __init__(self, *, advance: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._advance = advance

    def __iter__(self) -> Iterator[int]:
        return islice(self._passes(), self._advance, None)

    def _passes(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            if self._shuffle:
                indices = torch.randperm(self._sample_count, generator=generator)
                # The release draws once for the last element too, of which there is no choice.
                torch.randint(1, (), generator=generator)
            else:
                indices = torch.arange(self._sample_count)
            yield from indices[self._start :: self._step].tolist()


class ShardedInfiniteSampler(_RankSampler):
    """Endless passes over this rank's fixed shard of one permutation, shuffled anew for each pass.

    `use_new_shuffle_tensor_slice` chooses between the release's two ways to shuffle a shard; both are its published
    behaviour (sampler types SHARDED_INFINITE and SHARDED_INFINITE_NEW). Without `shuffle` the shard keeps its order.
    Passes are counted by the sampler: another iteration begins with the pass that the one before was in. `options` are
    those of `EpochSampler`.
    """

    def __init__(self, *, advance: int = 0, use_new_shuffle_tensor_slice: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._advance = advance
        self._pass_number = 0
        self._shuffle_shard = _shuffle_at_once if use_new_shuffle_tensor_slice else _shuffle_one_by_one

    def __iter__(self) -> Iterator[int]:
        # Whole passes are counted in images of all ranks, as in the release, and only once, whoever iterates.
        passes, self._advance = divmod(self._advance, self._sample_count)
        self._pass_number += passes
        stream = self._shuffled_passes() if self._shuffle else self._ordered_passes()
        return islice(stream, self._advance, None)

    def _ordered_passes(self) -> Iterator[int]:
        while True:
            yield from range(self._start, self._sample_count, self._step)

    def _shuffled_passes(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        everything = torch.randperm(self._sample_count, generator=generator)
        shard = everything[self._start :: self._step][: self._sample_count // self._step]
        if len(shard) == 0:
            raise DataError(
                f"{self._sample_count} samples cannot be shared by {self._step} processes; use fewer processes"
            )
        while True:
            generator.manual_seed(self._seed + self._start + (self._pass_number << 24))
            yield from self._shuffle_shard(shard, generator).tolist()
            self._pass_number += 1


def _shuffle_one_by_one(shard: Tensor, generator: torch.Generator) -> Tensor:
    """The inside-out Fisher-Yates shuffle, one draw an element."""
    shuffled = shard.clone()
    for i in range(1, len(shard)):
        j = int(torch.randint(i + 1, (), generator=generator))
        shuffled[i] = shuffled[j]
        shuffled[j] = shard[i]
    return shuffled


def _shuffle_at_once(shard: Tensor, generator: torch.Generator) -> Tensor:
    return shard[torch.randperm(len(shard), generator=generator)]
