"""The release's samplers, with their exact orders: what a run of the public code would have read, index by index.

They are kept for parity and for data loaders of one's own. Their known weaknesses belong to the order and are kept:
`EpochSampler` seeds with `seed * epoch`; a shard of `ShardedInfiniteSampler` never meets the images of another rank,
and the remainder of its permutation is never seen; its `advance` counts passes in images of the whole set. Training
here reads `dinov2.data.stream.SampleStream` instead, which has none of them.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from dinov2.distributed import get_global_rank, get_global_size
from dinov2.errors import DataError

__all__ = ["EpochSampler", "InfiniteSampler", "ShardedInfiniteSampler"]


class EpochSampler(Sampler[int]):
    """`size` indices below `sample_count` an epoch (repeated when more are asked), every `step`-th one from `start`.

    `start` and `step` default to this process's rank and the number of processes. Call `set_epoch` for another order.
    """

    def __init__(
        self,
        *,
        size: int,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
    ) -> None:
        _require_samples(sample_count)
        self._size = size
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start = get_global_rank() if start is None else start
        self._step = get_global_size() if step is None else step
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


class InfiniteSampler(Sampler[int]):
    """Endless passes over `range(sample_count)`, each a new permutation that all ranks share.

    A rank takes every `step`-th element of it from `start` on. `advance` skips that many items of this rank's stream.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
    ) -> None:
        _require_samples(sample_count)
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start = get_global_rank() if start is None else start
        self._step = get_global_size() if step is None else step
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


class ShardedInfiniteSampler(Sampler[int]):
    """Endless passes over this rank's fixed shard of one permutation, shuffled anew for each pass.

    `use_new_shuffle_tensor_slice` chooses between the release's two ways to shuffle a shard; both are its published
    behaviour (sampler types SHARDED_INFINITE and SHARDED_INFINITE_NEW). Without `shuffle` the shard keeps its order.
    Passes are counted by the sampler: another iteration begins with the pass that the one before was in.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
        use_new_shuffle_tensor_slice: bool = False,
    ) -> None:
        _require_samples(sample_count)
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start = get_global_rank() if start is None else start
        self._step = get_global_size() if step is None else step
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


def _require_samples(sample_count: int) -> None:
    if sample_count < 1:
        raise DataError(f"a sampler needs at least one sample, got {sample_count}; is the data set empty?")
