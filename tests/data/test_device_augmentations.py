import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, functional

from dinov2.data.crops.augment_batch import _bicubic_matrices, augment_batch, crop_and_resize
from dinov2.data.crops.color_augment import apply_color_and_blur
from dinov2.data.crops.config import AugmentationConfig
from dinov2.data.crops.parameters import draw_crop_parameters
from dinov2.errors import DataError
from tests.data.distributions import (
    assert_same_distribution,
    kolmogorov_smirnov_bound,
    kolmogorov_smirnov_distance,
    measures,
    two_sample_distance,
)
from tests.golden.recipe import pictures

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "augment.json").read_text())
PARTS = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)
CONFIG = AugmentationConfig(
    global_crops_scale=(0.32, 1.0),
    local_crops_scale=(0.05, 0.32),
    local_crops_number=1,
    blur_p=(0.0, 0.9, 0.5),
    solarize_p=0.2,
    horizontal_flip_p=0.5,
    color_jitter_p=0.8,
    color_jitter_strength=1.0,
    grayscale_p=0.2,
)
N_TESTS = 10 * 3  # tests of laws times crops, for the bound on chance
SURE = 0.01 / N_TESTS


def draw(n=20_000, *, seed=0, height=96, width=128, config=CONFIG):
    sizes = {"heights": np.full(n, height), "widths": np.full(n, width)}
    return draw_crop_parameters(config, seed=seed, sample_numbers=np.arange(n), **sizes)


def uniform(low, high):
    return lambda values: np.clip((values - low) / (high - low), 0, 1)


def natural(n, height, width, seed=0):
    """Pictures with smooth parts, edges and colour, uint8 [n, H, W, 3]."""
    rng = np.random.RandomState(seed)
    coarse = rng.randint(0, 256, (n, max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8)
    big = [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR)) for one in coarse]
    return np.clip(np.stack(big) + rng.normal(0, 8, (n, height, width, 3)), 0, 255).astype(np.uint8)


def as_batch(array):
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def by_pillow(image, size, parameters, row):
    """One crop with the given parameters, through torchvision's functions on a PIL image; float [H, W, 3]."""
    box = [int(getattr(parameters, name)[row]) for name in ("top", "left", "height", "width")]
    crop = functional.resized_crop(Image.fromarray(image), *box, [size, size], InterpolationMode.BICUBIC)
    if parameters.flip[row]:
        crop = functional.hflip(crop)
    if parameters.jitter[row]:
        for part in parameters.order[row]:
            crop = PARTS[part](crop, parameters.factors[row][part])
    if parameters.grayscale[row]:
        crop = functional.to_grayscale(crop, 3)
    if parameters.blur[row]:
        crop = functional.gaussian_blur(crop, [9, 9], [float(parameters.sigma[row])] * 2)
    if parameters.solarize[row]:
        crop = functional.solarize(crop, 128)
    return np.asarray(crop, dtype=np.float64)


# Laws of the parameters


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_factors_are_uniform(name):
    place = ["brightness", "contrast", "saturation", "hue"].index(name)
    low, high = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)][place]
    factors = draw().factors[..., place]
    for drawn in factors:
        assert kolmogorov_smirnov_distance(drawn, uniform(low, high)) < kolmogorov_smirnov_bound(len(drawn), SURE)


def test_blur_widths_are_uniform_given_that_blur_is_drawn():
    parameters = draw()
    for crop in (1, 2):
        drawn = parameters.sigma[crop][parameters.blur[crop]]
        assert kolmogorov_smirnov_distance(drawn, uniform(0.1, 2.0)) < kolmogorov_smirnov_bound(len(drawn), SURE)


def test_gates_open_as_often_as_they_should():
    parameters = draw()
    wanted = {
        "flip": (0.5, 0.5, 0.5),
        "jitter": (0.8, 0.8, 0.8),
        "grayscale": (0.2, 0.2, 0.2),
        "blur": (0.0, 0.9, 0.5),
        "solarize": (0.0, 0.2, 0.0),
    }
    for name, probabilities in wanted.items():
        for drawn, p in zip(getattr(parameters, name), probabilities, strict=True):
            assert abs(drawn.mean() - p) <= 4.5 * np.sqrt(p * (1 - p) / len(drawn)), name


def test_all_orders_of_the_colour_operations_are_equally_frequent():
    orders = draw(24_000).order[0] @ [1000, 100, 10, 1]
    counts = np.unique(orders, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 23 + 5 * np.sqrt(2 * 23)


@pytest.mark.parametrize(("height", "width"), [(96, 128), (120, 80), (64, 64), (40, 200)])
def test_boxes_have_the_law_of_the_release(height, width):
    parameters = draw(6000, height=height, width=width)
    for crop, name in ((0, "global"), (2, "local")):
        top, left, h, w = (getattr(parameters, part)[crop] for part in ("top", "left", "height", "width"))
        figures = {
            "area": h * w / (height * width),
            "log_aspect": np.log(w / h),
            "centre_y": (top + h / 2) / height,
            "centre_x": (left + w / 2) / width,
        }
        assert_same_distribution(figures, GOLDEN["operations"][f"{name}.crop.{height}x{width}"])


def test_boxes_have_the_law_of_torchvision():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, 32, 32)
    drawn = np.array([RandomResizedCrop.get_params(image, [0.32, 1.0], [3 / 4, 4 / 3]) for _ in range(20_000)])
    ours = draw(height=32, width=32)
    for name, theirs in zip(("top", "left", "height", "width"), drawn.T, strict=True):
        bound = np.sqrt(2) * kolmogorov_smirnov_bound(20_000, SURE)
        assert two_sample_distance(getattr(ours, name)[0], theirs) < bound, name


def test_places_are_uniform_given_the_size():
    parameters = draw(40_000, height=32, width=32)
    height, top = parameters.height[0], parameters.top[0]
    for size in (20, 24, 28):
        tops = top[height == size]
        counts = np.bincount(tops, minlength=32 - size + 1)
        expected = len(tops) / len(counts)
        assert len(counts) == 32 - size + 1
        assert ((counts - expected) ** 2 / expected).sum() < len(counts) + 5 * np.sqrt(2 * len(counts))


def test_boxes_stay_inside_images_of_any_shape():
    for height, width in ((1, 1), (1, 50), (70, 2), (3, 4)):
        parameters = draw(500, height=height, width=width)
        assert (parameters.height >= 1).all()
        assert (parameters.width >= 1).all()
        assert (parameters.top >= 0).all()
        assert (parameters.top + parameters.height <= height).all()
        assert (parameters.left + parameters.width <= width).all()


def test_parameters_belong_to_the_sample_and_the_crop():
    sizes = {"heights": np.full(3, 40), "widths": np.full(3, 50)}
    some = draw_crop_parameters(CONFIG, seed=0, sample_numbers=np.array([5, 900, 7]), **sizes)
    all_of_them = draw(1000, height=40, width=50)
    for name in ("top", "width", "order", "factors", "sigma"):
        assert np.array_equal(getattr(some, name), getattr(all_of_them, name)[:, [5, 900, 7]])
    assert not np.array_equal(all_of_them.top[0], all_of_them.top[1])
    assert not np.array_equal(all_of_them.sigma[0], draw(1000, seed=1).sigma[0])


# Same pixels as Pillow for the same parameters


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (32, 32, 16), (75, 60, 28), (200, 150, 56)])
def test_pixels_are_those_of_pillow_for_the_same_parameters(height, width, size):
    array = natural(24, height, width)
    parameters = draw(24, height=height, width=width, config=replace(CONFIG, blur_p=(0.5, 0.5, 0.5), solarize_p=0.3))
    flat = parameters.crops(0, 3)
    boxes = np.stack([flat.top, flat.left, flat.height, flat.width], axis=-1)
    crops = crop_and_resize(as_batch(array), torch.from_numpy(boxes), torch.from_numpy(flat.flip), size)
    crops = apply_color_and_blur(crops, flat).permute(0, 2, 3, 1).double().numpy()
    expected = np.stack([by_pillow(array[row % 24], size, flat, row) for row in range(72)])
    errors = np.abs(crops - expected).mean(axis=(1, 2, 3))
    assert errors[~flat.jitter].max() <= 0.3
    assert errors.max() <= 1.0
    assert errors.mean() <= 0.1
    assert abs((crops - expected).mean()) <= 0.02


@pytest.mark.parametrize("part", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_colour_operation_is_that_of_pillow(part):
    array = natural(12, 20, 20, seed=part)
    parameters = draw(12).crops(0, 1)
    neutral = np.tile([1.0, 1.0, 1.0, 0.0], (12, 1))
    neutral[:, part] = parameters.factors[:, part]
    off = np.zeros(12, dtype=bool)
    only = replace(parameters, factors=neutral, jitter=~off, grayscale=off, blur=off, solarize=off)
    crops = apply_color_and_blur(as_batch(array).float(), only).permute(0, 2, 3, 1).numpy()
    expected = []
    for row, picture in enumerate(array):
        crop = Image.fromarray(picture)
        for place in only.order[row]:
            crop = PARTS[place](crop, only.factors[row][place])
        expected.append(np.asarray(crop, dtype=np.float32))
    assert np.abs(crops - np.stack(expected)).mean() < 0.02


def test_gray_pixels_keep_their_value_when_the_hue_turns():
    ramp = torch.arange(256.0).view(1, 1, 16, 16).expand(4, 3, 16, 16).clone()
    parameters = draw(4).crops(0, 1)
    factors = np.tile([1.0, 1.0, 1.0, 0.08], (4, 1))
    off = np.zeros(4, dtype=bool)
    only = replace(parameters, factors=factors, jitter=~off, grayscale=off, blur=off, solarize=off)
    assert torch.equal(apply_color_and_blur(ramp.clone(), only), ramp)


def test_resizing_is_that_of_pillow_up_to_one_unit():
    array = natural(1, 96, 96)[0]
    # Pillow resizes the vertical axis first where that is less work, which rounds the third box otherwise.
    for box, mean_gap in (([0, 0, 96, 96], 0.01), ([3, 0, 7, 96], 0.01), ([10, 20, 50, 30], 0.3)):
        top, left, h, w = box
        expected = (
            Image.fromarray(array).crop((left, top, left + w, top + h)).resize((32, 32), Image.Resampling.BICUBIC)
        )
        result = crop_and_resize(as_batch(array[None]), torch.tensor([box]), torch.tensor([False]), 32)[0]
        gap = np.abs(result.permute(1, 2, 0).numpy() - np.asarray(expected, dtype=np.float32))
        assert gap.max() <= 1
        assert gap.mean() <= mean_gap


def test_both_ways_to_resize_agree():
    array = natural(3, 60, 80)
    boxes = torch.tensor([[0, 0, 60, 80], [10, 30, 40, 20], [5, 5, 9, 9]])
    flips = torch.tensor([False, True, True])
    together = crop_and_resize(as_batch(array), boxes, flips, 24)
    one_by_one = crop_and_resize(list(as_batch(array)), boxes, flips, 24)
    assert (together - one_by_one).abs().mean() < 0.02


def test_resampling_to_the_same_size_changes_nothing():
    matrices = _bicubic_matrices(torch.tensor([2, 0]), torch.tensor([5, 5]), 8, 5, torch.tensor([False, True]))
    identity = torch.zeros(2, 5, 8)
    for place in range(5):
        identity[0, place, 2 + place] = 1
        identity[1, place, 4 - place] = 1
    torch.testing.assert_close(matrices, identity, atol=1e-6, rtol=0)


# The whole


def augmentation(local=2, **changes):
    sizes = {"local_crops_number": local, "global_crops_size": 32, "local_crops_size": 16}
    return partial(augment_batch, config=AugmentationConfig(**(sizes | changes)), seed=0)


def test_crops_are_crop_major_and_normalised():
    images = as_batch(natural(5, 40, 36))
    global_crops, local_crops = augmentation(3)(images, np.arange(5))
    assert global_crops.shape == (10, 3, 32, 32)
    assert local_crops.shape == (15, 3, 16, 16)
    assert global_crops.is_contiguous()
    assert -2.2 < global_crops.min() < global_crops.max() < 2.7
    of_one = augmentation(3)(images[2:3], np.array([2]))
    torch.testing.assert_close(of_one[0], global_crops[[2, 7]])
    torch.testing.assert_close(of_one[1], local_crops[[2, 7, 12]])


def test_without_changes_a_crop_is_the_image():
    off = {"horizontal_flip_p": 0.0, "color_jitter_p": 0.0, "grayscale_p": 0.0, "solarize_p": 0.0, "blur_p": (0, 0, 0)}
    images = as_batch(natural(40, 32, 32))
    plain = augmentation(0, global_crops_scale=(1.0, 1.0), mean=(0.0,), std=(1.0,), **off)
    crops, local = plain(images, np.arange(40))
    assert local is None
    torch.testing.assert_close(crops, images.float().repeat(2, 1, 1, 1) / 255)


def test_images_of_different_sizes_are_cropped_one_by_one():
    images = [as_batch(natural(1, height, width))[0] for height, width in ((40, 50), (7, 5), (64, 30))]
    global_crops, local_crops = augmentation()(images, np.array([3, 1, 4]))
    assert global_crops.shape == (6, 3, 32, 32)
    assert local_crops.shape == (6, 3, 16, 16)
    alone = augmentation()(images[:1], np.array([3]))[0]
    torch.testing.assert_close(alone, global_crops[[0, 3]])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(channels):
    images = torch.randint(0, 256, (6, channels, 24, 24), dtype=torch.uint8)
    everything = {"color_jitter_p": 1.0, "grayscale_p": 1.0, "solarize_p": 1.0, "blur_p": (1.0, 1.0, 1.0)}
    global_crops, local_crops = augmentation(mean=(0.5,), std=(0.5,), **everything)(images, np.arange(6))
    assert global_crops.shape == (12, channels, 32, 32)
    assert -1 <= global_crops.min() < global_crops.max() <= 1
    assert torch.isfinite(local_crops).all()


def test_the_number_of_threads_changes_no_bit():
    images = as_batch(natural(16, 32, 32))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(augmentation()(images, np.arange(16)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_images_without_sample_numbers_are_refused():
    with pytest.raises(DataError, match="one for each"):
        augmentation()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), np.arange(3))


@pytest.mark.parametrize("picture", [0, 1])
@pytest.mark.slow
def test_whole_crops_have_the_statistics_of_the_release(picture):
    array = [pictures(1, 96, 128)[0], pictures(2, 120, 80)[1]][picture]
    batched = partial(augment_batch, config=AugmentationConfig(**GOLDEN["arguments"]), seed=0)
    images = as_batch(array[None]).expand(500, -1, -1, -1)
    crops = {"global1": [], "global2": [], "local": []}
    for start in range(0, 2000, 500):
        global_crops, local_crops = batched(images, np.arange(start, start + 500))
        crops["global1"].append(global_crops[:500])
        crops["global2"].append(global_crops[500:])
        crops["local"].append(local_crops[:500])
    for name, drawn in crops.items():
        assert_same_distribution(measures(torch.cat(drawn)), GOLDEN["pipeline"][f"picture{picture}.{name}"])


@pytest.mark.parametrize("crop", ["global1", "global2", "local"])
def test_changes_of_appearance_have_the_statistics_of_the_release(crop):
    place = ["global1", "global2", "local"].index(crop)
    parameters = draw(1500).crops(place, place + 1)
    images = as_batch(pictures(1, 32, 32)).float().repeat(1500, 1, 1, 1)
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    crops = (apply_color_and_blur(images, parameters) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    golden = GOLDEN["operations"][f"{crop}.appearance"]
    figures = measures(crops)
    for name in ("mean", "std"):
        expected = {f"{name}_{letter}": golden[name][channel] for channel, letter in enumerate("rgb")}
        assert_same_distribution(figures, expected)
    assert_same_distribution(figures, {name: golden[name] for name in ("abs_dx", "abs_dy")})
