import os
import random
import signal
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.configs import Config, apply_overrides
from dinov2.data.crops.config import AugmentationConfig
from dinov2.data.crops.loader import crop_batches, prefetch_to
from dinov2.data.stream import SampleStream
from dinov2.errors import ConfigError, DataError

SETTINGS = AugmentationConfig(global_crops_size=32, local_crops_size=16, local_crops_number=2, patch_size=8, in_chans=3)
BACKENDS = ["pil", "tensor"]


class Squares:
    """Random squares of one size; the images at `broken` cannot be read."""

    def __init__(self, n=20, broken=(), sizes=((24, 24),)):
        self.n = n
        self.broken = frozenset(broken)
        self.sizes = sizes

    def __len__(self):
        return self.n

    def path_of(self, index):
        return f"squares/{index}.png"

    def get_tensor(self, index, *, channels=3):
        if index in self.broken:
            raise DataError(f"{self.path_of(index)} is no readable image")
        size = self.sizes[index % len(self.sizes)]
        return torch.from_numpy(np.random.RandomState(index).randint(0, 256, (channels, *size), dtype=np.uint8))

    def get_image(self, index):
        return Image.fromarray(self.get_tensor(index).permute(1, 2, 0).numpy())


class Kept:
    """Decoded images in a list."""

    def __init__(self, images):
        self.images = images

    def decode(self, index):
        return self.images.get_tensor(index)


def batches(n_batches=3, *, images=None, settings=SETTINGS, **changes):
    arguments = {"seed": 0, "batch_size": 4} | changes
    return list(islice(crop_batches(images or Squares(), settings, **arguments), n_batches))


def assert_equal_batches(left, right):
    for one, other in zip(left, right, strict=True):
        for name in ("global_crops", "local_crops", "masks", "masked_indices", "mask_weights", "sample_numbers"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.failures == other.failures


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_has_the_promised_shapes(backend):
    batch = batches(1, settings=replace(SETTINGS, augmentation_backend=backend))[0]
    assert batch.global_crops.shape == (8, 3, 32, 32)
    assert batch.local_crops.shape == (8, 3, 16, 16)
    assert batch.global_crops.dtype == torch.float32
    assert batch.masks.shape == (8, 16)
    assert 0 < batch.masks.any(dim=1).sum() <= 4  # on so small a grid a mask may find no place
    assert len(batch.masked_indices) == len(batch.mask_weights) == batch.masks.sum()
    assert batch.sample_numbers.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_no_bit(backend, num_workers):
    settings = replace(SETTINGS, augmentation_backend=backend)
    images = Squares(broken=[3, 7])
    assert_equal_batches(
        batches(5, images=images, settings=settings),
        batches(5, images=images, settings=settings, num_workers=num_workers),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_workers_that_are_spawned_make_the_same_batches(backend):
    settings = replace(SETTINGS, augmentation_backend=backend)
    spawned = batches(2, settings=settings, num_workers=1, start_method="spawn")
    assert_equal_batches(batches(2, settings=settings), spawned)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_share_the_batch_of_one_process(backend):
    settings = replace(SETTINGS, augmentation_backend=backend)
    whole = batches(3, settings=settings, batch_size=4)
    ranks = [batches(3, settings=settings, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        for rank, parts in enumerate(ranks):
            rows = slice(2 * rank, 2 * rank + 2)
            part = parts[step]
            assert torch.equal(batch.sample_numbers[rows], part.sample_numbers)
            for name in ("global_crops", "local_crops", "masks"):
                mine, all_rows = getattr(part, name), getattr(batch, name)
                torch.testing.assert_close(all_rows.unflatten(0, (2, 4))[:, rows], mine.unflatten(0, (2, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_start_goes_on_where_a_run_stopped(backend):
    settings = replace(SETTINGS, augmentation_backend=backend)
    assert_equal_batches(batches(5, settings=settings)[3:], batches(2, settings=settings, first_step=3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_numbers_are_left_alone(backend, num_workers):
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    batches(2, settings=replace(SETTINGS, augmentation_backend=backend), num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_seeds_give_other_images_crops_and_masks():
    one, other = batches(1, seed=0)[0], batches(1, seed=1)[0]
    assert not torch.equal(one.global_crops, other.global_crops)
    assert not torch.equal(one.masks, other.masks)


def test_an_iteration_can_end():
    assert len(batches(10, first_step=2, last_step=5)) == 3
    assert len(batches(10, first_step=2, last_step=5, num_workers=1)) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unreadable_image_is_replaced_by_its_substitute_and_reported(backend):
    stream = SampleStream(20, seed=0)
    broken = int(stream.index_of(2))
    images = Squares(broken=[broken])
    settings = replace(SETTINGS, augmentation_backend=backend)
    batch = batches(1, images=images, settings=settings)[0]
    assert batch.failures == [(f"squares/{broken}.png", f"squares/{broken}.png is no readable image")]
    intact = batches(1, settings=settings)[0]
    same = [torch.equal(one, other) for one, other in zip(batch.global_crops, intact.global_crops, strict=True)]
    assert same == [True, True, False, True] * 2
    assert torch.equal(batch.masks, intact.masks)


def test_a_file_that_vanished_counts_as_unreadable():
    class Vanishing(Squares):
        def get_image(self, index):
            if index % 2:
                raise FileNotFoundError(2, "No such file", self.path_of(index))
            return super().get_image(index)

    found = batches(3, images=Vanishing())
    assert sum(len(batch.failures) for batch in found) > 0
    assert all(len(batch.global_crops) == 8 for batch in found)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_without_a_readable_image_is_given_up_in_one_sentence(num_workers):
    with pytest.raises(DataError, match=r"^no readable image in 6 attempts in a row.*squares/"):
        batches(1, images=Squares(n=5, broken=range(5)), num_workers=num_workers)
    with pytest.raises(DataError, match="in 101 attempts"):
        batches(1, images=Squares(n=1000, broken=range(1000)), num_workers=num_workers)


def test_one_readable_image_among_three_is_enough():
    batch = batches(1, images=Squares(n=3, broken=[0, 2]))[0]
    assert batch.global_crops.shape[0] == 8


def test_an_empty_data_set_is_refused_at_once():
    with pytest.raises(DataError, match="no image"):
        crop_batches(Squares(n=0), SETTINGS, seed=0, batch_size=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_other_sizes_and_tiny_ones_work(backend):
    images = Squares(n=12, sizes=[(40, 30), (1, 1), (5, 100)])
    for batch in batches(3, images=images, settings=replace(SETTINGS, augmentation_backend=backend)):
        assert torch.isfinite(batch.global_crops).all()
        assert batch.global_crops.shape == (8, 3, 32, 32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels_reaches_the_crops(backend, channels):
    settings = replace(SETTINGS, augmentation_backend=backend, in_chans=channels, mean=(0.5,), std=(0.5,))
    assert batches(1, settings=settings)[0].global_crops.shape == (8, channels, 32, 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_local_crops_and_no_masks_make_a_batch(backend):
    settings = replace(SETTINGS, augmentation_backend=backend, local_crops_number=0, mask_sample_probability=0.0)
    batch = batches(1, settings=settings)[0]
    assert batch.local_crops is None
    assert batch.masked_indices.shape == (0,)


def test_images_kept_in_memory_give_the_same_batches():
    settings = replace(SETTINGS, augmentation_backend="tensor")
    assert_equal_batches(batches(settings=settings), batches(settings=settings, cache=Kept(Squares())))


def test_backends_draw_from_the_same_laws():
    """Not the same draws, but about the same pixels on average over a few hundred crops."""
    images = Squares(n=50)
    means = []
    for backend in BACKENDS:
        drawn = batches(10, images=images, settings=replace(SETTINGS, augmentation_backend=backend), batch_size=32)
        crops = torch.cat([batch.global_crops for batch in drawn])
        means.append(torch.stack([crops.mean(dim=(0, 2, 3)), crops.flatten(2).std(dim=2).mean(dim=0)]))
    torch.testing.assert_close(means[0], means[1], atol=0.1, rtol=0.1)


def test_the_pil_backend_refuses_what_it_cannot_do():
    for more in ({"cache": Kept(Squares())}, {"augment_on": "meta"}):
        with pytest.raises(ConfigError, match="augmentation_backend=tensor"):
            crop_batches(Squares(), SETTINGS, seed=0, batch_size=2, **more)


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ConfigError, match="rank 2"):
        crop_batches(Squares(), SETTINGS, seed=0, batch_size=2, rank=2, world_size=2)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_workers_outlive_an_interrupt_and_one_termination_signal():
    from torch.multiprocessing import active_children

    iterator = crop_batches(Squares(), SETTINGS, seed=0, batch_size=4, num_workers=2, prefetch=1)
    first = next(iterator)
    for worker in active_children():
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert_equal_batches([first, *islice(iterator, 6)], batches(7))
    iterator.close()


def test_batches_arrive_on_a_device_in_order():
    arrived = list(prefetch_to("cpu", batches(3)))
    assert [batch.sample_numbers[0].item() for batch in arrived] == [0, 4, 8]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_a_cuda_device_in_order():
    expected = batches(4, num_workers=1)
    arrived = list(prefetch_to("cuda", crop_batches(Squares(), SETTINGS, seed=0, batch_size=4, last_step=4)))
    for one, other in zip(expected, arrived, strict=True):
        assert other.global_crops.is_cuda
        assert torch.equal(one.global_crops, other.global_crops.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_crops_can_be_made_on_the_device():
    settings = replace(SETTINGS, augmentation_backend="tensor")
    for num_workers in (0, 1):
        on_device = batches(3, settings=settings, augment_on="cuda", num_workers=num_workers)
        for one, other in zip(batches(3, settings=settings), on_device, strict=True):
            gap = (one.global_crops - other.global_crops.cpu()).abs()
            assert gap.mean() < 0.005


def test_settings_are_read_from_a_config():
    changes = [
        "crops.global_crops_size=32",
        "crops.local_crops_size=16",
        "crops.color_jitter_strength=0.25",
        "student.patch_size=8",
        "ibot.mask_ratio_min_max=[0.2,0.4]",
        "ibot.mask_sample_probability=0.25",
        "train.augmentation_backend=tensor",
    ]
    settings = AugmentationConfig.from_config(apply_overrides(Config(), changes))
    assert settings.color_jitter_strength == 0.25
    assert settings.mask_ratio_min_max == (0.2, 0.4)
    assert settings.mask_sample_probability == 0.25
    assert settings.augmentation_backend == "tensor"
    assert settings.grid == (4, 4)


def test_settings_that_do_not_fit_together_are_refused():
    with pytest.raises(ConfigError, match=r"crops.mean has 3 values for 5 channels"):
        AugmentationConfig(in_chans=5)
    with pytest.raises(ConfigError, match="choose pil or tensor"):
        AugmentationConfig(augmentation_backend="gpu")
