import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode

from dinov2.data.eval_transform import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    MaybeToTensor,
    make_classification_eval_transform,
    make_classification_train_transform,
    make_normalize_transform,
)
from dinov2.data.release import GaussianBlur
from tests.golden.recipe import pictures

GOLDEN = Path(__file__).parents[1] / "golden"
EVAL = json.loads((GOLDEN / "eval_transform.json").read_text())["cases"]
EVAL_TENSORS = load_file(GOLDEN / "eval_transform.safetensors")
TRAIN = json.loads((GOLDEN / "augment.json").read_text())["classification_train"]


def picture(count, height, width, index):
    return Image.fromarray(pictures(count, height, width)[index])


def test_defaults_are_the_statistics_of_imagenet():
    assert IMAGENET_DEFAULT_MEAN == (0.485, 0.456, 0.406)
    assert IMAGENET_DEFAULT_STD == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("name", EVAL)
def test_the_evaluation_transform_gives_the_figures_of_the_release(name):
    case = EVAL[name]
    height, width = map(int, case["picture"].removeprefix("pictures(1, ").removesuffix(")[0]").split(","))
    arguments = {
        key: InterpolationMode.BILINEAR if key == "interpolation" else int(value)
        for key, value in case["arguments"].items()
    }
    result = make_classification_eval_transform(**arguments)(picture(1, height, width, 0))
    assert list(result.shape) == case["shape"]
    torch.testing.assert_close(result[:, ::14, ::14], EVAL_TENSORS[f"{name}.slice"], atol=1e-5, rtol=0)
    sums = result.double().sum(dim=(1, 2))
    torch.testing.assert_close(sums, torch.tensor(case["sum"], dtype=torch.double), atol=0.1, rtol=1e-6)


@pytest.mark.parametrize("case", TRAIN["exact"], ids=lambda case: f"seed{case['seed']}")
def test_the_training_transform_draws_and_computes_as_the_release(case):
    torch.manual_seed(case["seed"])
    transform = make_classification_train_transform(crop_size=TRAIN["crop_size"])
    result = transform(picture(1, 96, 128, 0))
    std = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
    pixels = ((result * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == case["sha256_uint8"]
    torch.testing.assert_close(result.mean(dim=(1, 2)), torch.tensor(case["mean"]), atol=1e-5, rtol=0)


def test_no_flip_is_drawn_when_its_probability_is_zero():
    steps = make_classification_train_transform(hflip_prob=0.0).transforms
    assert not any("Flip" in type(step).__name__ for step in steps)


def test_byte_tensors_are_scaled_like_pictures():
    pixels = pictures(1, 40, 50)[0]
    transform = make_classification_eval_transform(resize_size=40, crop_size=40)
    from_picture = transform(Image.fromarray(pixels))
    from_tensor = transform(torch.from_numpy(pixels).permute(2, 0, 1))
    torch.testing.assert_close(from_picture, from_tensor, atol=0.05, rtol=0)


def test_images_of_five_channels_pass_with_one_mean_for_all():
    image = torch.randint(0, 256, (5, 40, 60), dtype=torch.uint8)
    transform = make_classification_eval_transform(resize_size=32, crop_size=28, mean=[0.5], std=[0.25])
    result = transform(image)
    assert result.shape == (5, 28, 28)
    assert -2.01 <= result.min() < result.max() <= 2.01


def test_float_tensors_stay_what_they_are():
    image = torch.rand(3, 4, 4)
    assert MaybeToTensor()(image) is image


def test_normalisation_takes_the_mean_away_and_divides():
    result = make_normalize_transform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.125))(torch.ones(3, 2, 2))
    assert result[:, 0, 0].tolist() == [1.0, 2.0, 4.0]


def test_blur_takes_true_probabilities():
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 20, 3), dtype=np.uint8))
    torch.manual_seed(0)
    never, always = GaussianBlur(p=0.0, radius_min=1.0), GaussianBlur(p=1.0, radius_min=1.0)
    assert all(never(noise) is noise for _ in range(50))
    assert all(always(noise).tobytes() != noise.tobytes() for _ in range(50))
