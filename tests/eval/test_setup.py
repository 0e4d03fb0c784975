import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from dinov2.data.eval_transform import EvalTransform
from dinov2.errors import ConfigError
from dinov2.eval.setup import eval_transform_for
from tests.golden.recipe import pictures

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "eval_transform.json").read_text())["cases"]


def picture(height, width):
    return Image.fromarray(pictures(1, height, width)[0])


def test_the_rule_is_the_releases_256_for_224():
    result = EvalTransform(crop_size=224)(picture(300, 400))
    expected = GOLDEN["default_landscape"]
    assert list(result.shape) == expected["shape"]
    assert_close(result.double().sum(dim=(1, 2)), torch.tensor(expected["sum"]).double(), atol=0.5, rtol=0)


def test_a_given_resize_is_used():
    result = EvalTransform(crop_size=56, resize_size=64)(picture(96, 128))
    assert_close(result.double().sum(dim=(1, 2)), torch.tensor(GOLDEN["small"]["sum"]).double(), atol=0.5, rtol=0)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_images_of_the_crop_size_are_not_resampled(as_tensor):
    pixels = pictures(1, 32, 32)[0]
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy()) if as_tensor else Image.fromarray(pixels)
    result = EvalTransform(crop_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)(image)
    assert_close(result.permute(1, 2, 0).numpy(), (pixels / 255 - 0.5).astype(np.float32) / np.float32(0.5))


def test_a_given_resize_holds_for_images_of_the_crop_size_too():
    exact, enlarged = (EvalTransform(crop_size=32, resize_size=r)(picture(32, 32)) for r in (0, 36))
    assert (exact - enlarged).abs().max() > 0.01


def test_the_transform_follows_the_config():
    cfg = SimpleNamespace(
        crops=SimpleNamespace(global_crops_size=28, mean=[0.5], std=[0.25]),
        evaluation=SimpleNamespace(resize_size=30),
    )
    facts = eval_transform_for(cfg).describe()
    assert (facts["crop"], facts["resize"], facts["mean"], facts["std"]) == (28, 30, [0.5], [0.25])
    json.dumps(facts)


def test_the_transform_travels_to_loader_workers():
    transform = pickle.loads(pickle.dumps(EvalTransform(crop_size=16)))
    assert transform(picture(20, 30)).shape == (3, 16, 16)


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="must be positive"):
        EvalTransform(crop_size=0)
