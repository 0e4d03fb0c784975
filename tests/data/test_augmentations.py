import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from dinov2.data.eval_transform import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from dinov2.data.release import DataAugmentationDINO
from tests.data.distributions import assert_same_distribution, measures
from tests.golden.recipe import pictures

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((GOLDEN_FOLDER / "augment.json").read_text())
CROPS = load_file(GOLDEN_FOLDER / "augment_crops.safetensors")
PICTURES = [Image.fromarray(pictures(1, 96, 128)[0]), Image.fromarray(pictures(2, 120, 80)[1])]


def pixels_of(crop):
    """The normalised crop turned back to bytes, [H, W, C]."""
    std = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
    return ((crop * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()


def plain(**changes):
    """Settings without any random change of appearance."""
    off = {"horizontal_flip_p": 0.0, "color_jitter_p": 0.0, "grayscale_p": 0.0, "solarize_p": 0.0}
    arguments = {"global_crops_size": 32, "local_crops_size": 16, "blur_p": (0.0, 0.0, 0.0)} | off
    return DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, **(arguments | changes))


@pytest.mark.parametrize("case", GOLDEN["exact"], ids=lambda case: f"picture{case['picture']}-seed{case['seed']}")
def test_crops_and_draws_are_those_of_the_release(case):
    augmentation = DataAugmentationDINO(**GOLDEN["arguments"])
    torch.manual_seed(case["seed"])
    result = augmentation(PICTURES[case["picture"]])
    crops = result["global_crops"] + result["local_crops"]
    assert len(crops) == len(case["crops"])
    for crop, golden in zip(crops, case["crops"], strict=True):
        pixels = pixels_of(crop)
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == golden["sha256_uint8"]
        assert crop.mean(dim=(1, 2)).tolist() == pytest.approx(golden["mean"], abs=1e-5)
        stored = CROPS[f"picture{case['picture']}.seed{case['seed']}.{golden['crop']}"]
        assert np.array_equal(pixels.transpose(2, 0, 1)[:, ::7, ::7], stored)
    assert torch.rand(1).item() == pytest.approx(case["next_torch_rand"], abs=1e-9)


def test_the_dictionary_is_that_of_the_release():
    result = plain()(PICTURES[0])
    assert set(result) == {"global_crops", "global_crops_teacher", "local_crops", "offsets"}
    assert result["global_crops_teacher"][0] is result["global_crops"][0]
    assert result["offsets"] == ()
    assert [tuple(crop.shape) for crop in result["local_crops"]] == [(3, 16, 16)] * 2


def test_no_local_crops_are_allowed():
    result = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 0, 32, 16)(PICTURES[0])
    assert result["local_crops"] == []


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_tensors_of_any_number_of_channels_are_augmented(channels):
    image = torch.randint(0, 256, (channels, 40, 50), dtype=torch.uint8)
    always = {"color_jitter_p": 1.0, "grayscale_p": 1.0, "solarize_p": 1.0, "blur_p": (1.0, 1.0, 1.0)}
    result = plain(mean=[0.5], std=[0.5], **always)(image)
    for crop in result["global_crops"] + result["local_crops"]:
        assert crop.shape[0] == channels
        assert torch.isfinite(crop).all()
        assert -1 <= crop.min() <= crop.max() <= 1


def test_the_number_of_draws_does_not_depend_on_the_channels():
    augmentation = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 3, 32, 16, mean=[0.5], std=[0.5])
    following = []
    for channels in (1, 3, 4):
        torch.manual_seed(0)
        augmentation(torch.zeros(channels, 40, 50, dtype=torch.uint8))
        following.append(torch.rand(1).item())
    assert len(set(following)) == 1


def test_a_jitter_of_strength_zero_changes_nothing():
    torch.manual_seed(3)
    jittered = plain(color_jitter_p=1.0, color_jitter_strength=0.0)(PICTURES[0])["global_crops"][0]
    torch.manual_seed(3)
    untouched = plain(color_jitter_p=0.0)(PICTURES[0])["global_crops"][0]
    assert torch.equal(jittered, untouched)


def test_the_whole_picture_is_taken_when_the_scale_says_so():
    augmentation = DataAugmentationDINO((1.0, 1.0), (1.0, 1.0), 0, 96, blur_p=(0, 0, 0), color_jitter_p=0.0)
    square = Image.fromarray(pictures(1, 96, 96)[0])
    torch.manual_seed(0)
    crops = [augmentation(square)["global_crops"][0] for _ in range(20)]
    whole = [np.asarray(square), np.asarray(square)[:, ::-1]]
    gray = [np.asarray(square.convert("L").convert("RGB")), np.asarray(square.convert("L").convert("RGB"))[:, ::-1]]
    exact = [any(np.array_equal(pixels_of(crop), view) for view in whole + gray) for crop in crops]
    assert sum(exact) >= 5  # the others were drawn with an aspect that is not square, which cannot have the full area


@pytest.mark.parametrize("picture", [0, 1])
@pytest.mark.slow
def test_whole_crops_have_the_statistics_of_the_release(picture):
    augmentation = DataAugmentationDINO(**GOLDEN["arguments"])
    torch.manual_seed(100 + picture)
    results = [augmentation(PICTURES[picture]) for _ in range(1000)]
    crops = {
        "global1": [result["global_crops"][0] for result in results],
        "global2": [result["global_crops"][1] for result in results],
        "local": [result["local_crops"][0] for result in results],
    }
    for name, drawn in crops.items():
        assert_same_distribution(measures(torch.stack(drawn)), GOLDEN["pipeline"][f"picture{picture}.{name}"])
