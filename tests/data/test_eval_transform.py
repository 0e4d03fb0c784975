"""The three ways to fit an image to the patch grid."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, functional

from dinov2.data.eval_transform import EvalTransform, make_classification_eval_transform, pad_to_multiple
from dinov2.errors import ConfigError, DataError


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_padding_is_half_on_each_side_with_the_odd_one_at_the_end():
    padded = pad_to_multiple(torch.ones(1, 30, 41), 14)
    assert padded.shape == (1, 42, 42)
    assert padded[0, :, 20].tolist() == [0] * 6 + [1] * 30 + [0] * 6
    assert padded[0, 20].tolist() == [1] * 41 + [0]
    same = torch.ones(1, 28, 14)
    assert pad_to_multiple(same, 14) is same


def test_aspect_keeps_the_whole_image_and_rounds_both_sides_to_patches():
    transform = EvalTransform(crop_size=56, patch_size=14, fit="aspect")
    image = picture(100, 50)
    assert transform(image).shape == (3, 56, 112)
    resized = functional.resize(image, [56, 112], interpolation=InterpolationMode.BICUBIC)
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.mean, transform.std))
    assert torch.allclose(transform(image), (functional.to_tensor(resized) - mean) / std)
    assert transform(picture(57, 61)).shape == (3, 56, 56)
    assert transform(picture(300, 2)).shape == (3, 56, 8400)


def test_pad_changes_no_pixel():
    transform = EvalTransform(patch_size=14, fit="pad")
    image = picture(30, 41)
    fitted = transform(image)
    assert fitted.shape == (3, 42, 42)
    plain = EvalTransform(crop_size=1, patch_size=1, fit="pad")(image)
    assert torch.equal(fitted[:, 0:41, 6:36], plain)
    assert not fitted[:, :, :6].any() and not fitted[:, 41:].any()


def test_a_changed_size_brings_its_own_resize_and_a_changed_fit_keeps_the_rest():
    transform = EvalTransform(crop_size=224, resize_size=256, mean=[0.1] * 3, std=[0.2] * 3)
    assert transform.with_(fit="pad").mean == (0.1,) * 3
    assert (transform.with_(fit="aspect").crop_size, transform.with_(fit="aspect").resize_size) == (224, 256)
    assert (transform.with_(crop_size=98).crop_size, transform.with_(crop_size=98).resize_size) == (98, 0)


def test_what_a_transform_does_is_told_by_its_description():
    descriptions = [EvalTransform(fit=fit).describe() for fit in ("crop", "aspect", "pad")]
    assert len({str(description) for description in descriptions}) == 3
    assert descriptions[2]["pad_to"] == 14


def test_an_unknown_fit_is_refused():
    with pytest.raises(ConfigError, match="no way to fit images is called 'squash'; choose one of crop, aspect, pad"):
        EvalTransform(fit="squash")  # type: ignore[arg-type]


def test_an_image_of_too_many_tokens_is_shrunk_or_refused():
    transform = EvalTransform(crop_size=56, patch_size=14, fit="aspect", max_tokens=100)
    assert transform(picture(100, 50)).shape == (3, 56, 112)  # 32 tokens
    for size in ((3000, 100), (100, 3000), (90, 1), (500, 100)):
        rows, columns = (side // 14 for side in transform(Image.new("RGB", size)).shape[1:])
        assert 1 <= rows * columns <= 100
        assert (rows > columns) == (size[1] > size[0])
    with pytest.raises(DataError, match=r"an image of 1 x 9000 pixels takes 900 tokens .*--max-tokens"):
        transform.with_(max_tokens=90)(Image.new("RGB", (1, 9000)))
    padded = transform.with_(fit="pad")
    assert padded(picture(140, 140)).shape == (3, 140, 140)
    with pytest.raises(DataError, match="takes 110 tokens with the fit pad, and 100 are allowed"):
        padded(picture(141, 140))
    with pytest.raises(ConfigError, match="largest number of tokens of an image is 0"):
        transform.with_(max_tokens=0)
    assert transform.describe() != transform.with_(max_tokens=101).describe()


@pytest.mark.parametrize("size", [(600, 20), (20, 601), (1000, 33), (999, 3)])
def test_the_crop_of_a_strip_is_that_of_the_whole_strip(size, monkeypatch):
    strip = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8)).resize(size)
    transform = EvalTransform(crop_size=28)
    whole = make_classification_eval_transform(resize_size=32, crop_size=28)
    assert (transform(strip) - whole(strip)).abs().max() < 0.3  # half a pixel
    sizes = []
    resize = functional.resize
    monkeypatch.setattr(functional, "resize", lambda image, *a, **k: sizes.append(image.size) or resize(image, *a, **k))
    assert transform(Image.new("RGB", (60_000, 4))).shape == (3, 28, 28)
    assert sizes == [(64, 4)]
    tensor = torch.zeros(3, 4, 60_001, dtype=torch.uint8)
    assert EvalTransform(crop_size=28)(tensor).shape == (3, 28, 28)


def test_a_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture(40, 30)
    turned.info["exif"] = exif.tobytes()
    transform = EvalTransform(patch_size=1, fit="pad")
    assert torch.equal(transform(turned), transform(picture(40, 30).transpose(Image.Transpose.ROTATE_270)))
