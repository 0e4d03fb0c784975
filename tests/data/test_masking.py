import json
import random
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.crops.config import AugmentationConfig
from dinov2.data.crops.masking import MaskingGenerator, sample_masks

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "masks.json").read_text())


def generator_of(name, **more):
    arguments = dict(GOLDEN["generators"][name])
    if isinstance(arguments["input_size"], list):
        arguments["input_size"] = tuple(arguments["input_size"])
    return MaskingGenerator(**arguments, **more)


def packed(mask):
    return np.packbits(mask.reshape(-1)).tobytes().hex()


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['generator']}-seed{case['seed']}")
def test_masks_and_draws_are_those_of_the_release(case):
    generator = generator_of(case["generator"])
    random.seed(case["seed"])
    masks = [generator(count) for count in case["counts"]]
    assert [packed(mask) for mask in masks] == case["masks"]
    assert [int(mask.sum()) for mask in masks] == case["masked"]
    assert random.random() == case["next_random"]


def test_another_source_of_randomness_leaves_the_global_one_alone():
    random.seed(0)
    before = random.getstate()
    mask = MaskingGenerator(16, max_num_patches=128, rng=random.Random(3))(60)
    assert mask.sum() > 50
    assert random.getstate() == before


def test_the_cap_on_rectangles_is_floored_along_the_way():
    for sizes, cap in GOLDEN["max_num_patches"].items():
        crop, patch = map(int, sizes.split("/"))
        assert AugmentationConfig(global_crops_size=crop, patch_size=patch).max_masked_patches == cap


def test_a_generator_describes_itself():
    assert repr(MaskingGenerator((8, 12), max_num_patches=48)) == (
        "MaskingGenerator(8 x 12 patches, rectangles of 4 to 48 patches, log aspect -1.204 to 1.204)"
    )
    assert MaskingGenerator((8, 12)).get_shape() == (8, 12)


def test_a_generator_without_a_cap_can_mask_most_of_the_grid():
    mask = MaskingGenerator(16, rng=random.Random(0))(200)
    assert 150 < mask.sum() <= 200


BATCH = 64


def masks_of(step, *, seed=0, numbers=None, global_batch=BATCH, side=16, **changes):
    """Masks on a grid of `side` x `side` patches."""
    if numbers is None:
        numbers = np.arange(step * global_batch, (step + 1) * global_batch)
    config = AugmentationConfig(global_crops_size=14 * side, patch_size=14, **changes)
    return sample_masks(config, seed=seed, step=step, sample_numbers=numbers, global_batch=global_batch)


def test_stream_masks_do_not_depend_on_the_split_into_ranks():
    whole = masks_of(5).view(2, 64, 256)
    parts = [masks_of(5, numbers=np.arange(320 + 16 * rank, 336 + 16 * rank)).view(2, 16, 256) for rank in range(4)]
    for rank, part in enumerate(parts):
        assert (whole[:, 16 * rank : 16 * (rank + 1)] == part).all()


def test_stream_masks_leave_the_global_random_numbers_alone():
    before = random.getstate()
    masks_of(0)
    assert random.getstate() == before


def test_the_wanted_share_of_crops_is_masked_in_every_batch():
    for step in range(20):
        assert (masks_of(step).any(dim=1)).sum() == 64
    assert masks_of(0, mask_sample_probability=0.3).any(dim=1).sum() == int(128 * 0.3)
    assert masks_of(0, mask_sample_probability=1.0).any(dim=1).all()
    assert not masks_of(0, mask_sample_probability=0.0).any()


def test_ratios_are_spread_evenly_over_the_global_batch():
    counts = masks_of(3).sum(dim=1).numpy()
    counts = np.sort(counts[counts > 0])  # 64 bins from 0.1 to 0.5 of 256 patches
    upper_ends = np.floor(256 * np.linspace(0.1, 0.5, 65)[1:])
    assert (counts <= upper_ends).all()
    assert (counts >= upper_ends - 8).mean() > 0.9  # a mask may fall a little short


def test_which_crops_are_masked_changes_from_step_to_step_and_favours_none():
    small = {"side": 4}
    chosen = np.stack([masks_of(step, **small).any(dim=1).numpy() for step in range(400)])  # [step, G*B]
    assert abs(chosen.mean(axis=0) - 0.5).max() < 5 * np.sqrt(0.25 / 400)
    pairs = (chosen[:, :64] & chosen[:, 64:]).mean()  # crops of one image are not masked together more often
    assert abs(pairs - 0.25) < 5 * np.sqrt(0.25 * 0.75 / (400 * 64))


def test_seeds_give_other_masks():
    assert (masks_of(0, seed=1) != masks_of(0, seed=2)).any()


def test_a_tiny_grid_and_a_batch_of_one_work():
    masks = masks_of(7, global_batch=1, side=2)
    assert masks.shape == (2, 4)


@pytest.mark.parametrize("grid", GOLDEN["statistics"])
@pytest.mark.parametrize("place", range(3))
def test_stream_masks_follow_the_law_of_the_release(grid, place):
    count, golden = list(GOLDEN["statistics"][grid].items())[place]
    n_draws, side, rng = 1500, int(grid.split("x")[0]), random.Random(7)
    generator = generator_of(grid, rng=rng)
    masks = np.stack([generator(int(count)) for _ in range(n_draws)])
    masked = masks.sum(axis=(1, 2))
    adjacent = (masks[:, 1:] & masks[:, :-1]).sum(axis=(1, 2)) + (masks[:, :, 1:] & masks[:, :, :-1]).sum(axis=(1, 2))
    middle = slice(side // 2 - side // 4, side // 2 + side // 4)
    figures = {
        "masked": masked,
        "exactly_count": masked == int(count),
        "adjacent_pairs": adjacent,
        "centre_rate": masks[:, middle, middle].mean(axis=(1, 2)),
        "corner_rate": masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=1),
    }
    assert (masked <= int(count)).all()
    for name, drawn in figures.items():
        value, error = golden[name]
        own_error = drawn.std() / np.sqrt(n_draws)
        assert abs(drawn.mean() - value) < 5 * np.hypot(error, own_error), name
