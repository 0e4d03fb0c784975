"""What counts as an image, and what is said about the rest."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.eval_transform import EvalTransform
from dinov2.encode.image_inputs import as_list, to_model_input
from dinov2.errors import DataError

TRANSFORM = EvalTransform(crop_size=32, patch_size=8)


def picture(width: int = 40, height: int = 48) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def ready(image, **options):
    return to_model_input(image, TRANSFORM, patch_size=8, **options)


def test_a_path_a_picture_an_array_and_a_tensor_of_the_same_pixels_are_the_same_input(tmp_path: Path):
    image = picture(32, 32)
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    wanted = TRANSFORM(image)
    for given in (tmp_path / "image.png", str(tmp_path / "image.png"), image, array):
        assert torch.equal(ready(given), wanted)
    assert torch.equal(ready(torch.from_numpy(array.copy()).permute(2, 0, 1)), wanted)


def test_pixels_go_through_the_transform_whatever_their_size():
    assert ready(picture(40, 48)).shape == (3, 32, 32)
    assert ready(np.asarray(picture(100, 20))).shape == (3, 32, 32)


def test_a_normalised_tensor_only_gets_zeros_around_it_up_to_the_next_patch():
    image = torch.randn(3, 30, 41)
    padded = ready(image)
    assert padded.shape == (3, 32, 48)
    assert torch.equal(padded[:, 1:31, 3:44], image)
    assert float(padded.abs().sum()) == pytest.approx(float(image.abs().sum()))
    assert ready(torch.randn(3, 16, 24)).shape == (3, 16, 24)


def test_grey_becomes_rgb_and_models_of_one_channel_get_one(tmp_path: Path):
    grey = picture(32, 32).convert("L")
    assert torch.equal(ready(grey), TRANSFORM(grey.convert("RGB")))
    assert torch.equal(ready(np.asarray(grey)), TRANSFORM(grey.convert("RGB")))
    one = EvalTransform(crop_size=32, mean=[0.5], std=[0.5])
    grey.save(tmp_path / "g.png")
    assert to_model_input(tmp_path / "g.png", one, patch_size=8, channels=1).shape == (1, 32, 32)


@pytest.mark.parametrize(
    "image, reason",
    [
        ("nowhere.jpg", "the image nowhere.jpg cannot be read"),
        (torch.randn(4, 32, 32), r"shape \[4, 32, 32\] was given to a model that takes \[3, H, W\]"),
        (torch.randn(32, 32, 3), "move the channels to the front"),
        (np.zeros((32, 32, 3), np.float32), "move the channels to the front"),
        (torch.zeros(3, 32, 32, dtype=torch.int64), "use uint8 for pixels"),
        (np.zeros((32, 32, 3), np.uint16), "uint16 was given; use uint8 for pixels"),
        (np.zeros((32, 32), bool), "bool was given; use uint8 for pixels"),
        (torch.rand(3, 32, 32) * 255, "from .* floats are taken as normalised; give pixels as uint8"),
        (np.random.rand(32, 32, 3) * 255, "floats are taken as normalised; give pixels as uint8"),
        (torch.rand(3, 32, 32) * 65535, "floats are taken as normalised"),
        ("https://example.org/a.jpg", "https://example.org/a.jpg is an address, and images are not downloaded"),
        (b"\xff\xd8", r"of type bytes was given; give a path, PIL.Image.open\(io.BytesIO\(data\)\)"),
        (torch.zeros(2, 3, 3, 3, 3), r"of shape \[2, 3, 3, 3, 3\]"),
        (object(), "of type object"),
    ],
)
def test_what_is_no_image_is_refused(image, reason):
    with pytest.raises(DataError, match=reason):
        ready(image)


def test_one_image_and_several_are_told_apart():
    image = picture()
    assert as_list("a.jpg") == (["a.jpg"], True)
    assert as_list(image) == ([image], True)
    assert as_list([image, "b.jpg"]) == ([image, "b.jpg"], False)
    batch, single = as_list(torch.zeros(2, 3, 8, 8))
    assert len(batch) == 2 and batch[0].shape == (3, 8, 8) and not single
    assert as_list(np.zeros((8, 8, 3)))[1]
    with pytest.raises(DataError, match="a int is no image"):
        as_list(3)


def test_floats_that_may_be_pixels_are_warned_of_and_taken_as_normalised():
    pixels = torch.rand(3, 32, 32)
    with pytest.warns(UserWarning, match=r"an image of torch.float32 from .* floats are taken as normalised already"):
        assert torch.equal(ready(pixels), pixels)
    with pytest.warns(UserWarning, match="not as pixels of 0..1"), pytest.raises(DataError, match="move the channels"):
        ready(np.random.default_rng(0).random((32, 32, 3)))
    for plain in (torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.randn(3, 8, 8), torch.full((3, 8, 8), torch.nan)):
        assert ready(plain).shape == (3, 8, 8)


def test_bytes_and_open_files_are_told_how_to_become_images(tmp_path: Path):
    picture().save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        for given in (b"123", bytearray(3), memoryview(b"1"), file):
            with pytest.raises(DataError, match="was given as an image; give its path, or PIL.Image.open"):
                as_list(given)


def test_a_photograph_that_exif_turns_is_the_same_input_as_path_and_as_picture(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "phone.png", exif=exif)
    wanted = TRANSFORM(picture().transpose(Image.Transpose.ROTATE_270))
    for given in (tmp_path / "phone.png", Image.open(tmp_path / "phone.png")):
        assert torch.equal(ready(given), wanted)
    assert torch.equal(TRANSFORM(Image.open(tmp_path / "phone.png")), wanted)
    grey = EvalTransform(crop_size=32, mean=[0.5], std=[0.5])
    one = [to_model_input(given, grey, patch_size=8, channels=1) for given in (picture(), picture().convert("L"))]
    assert torch.equal(*one)
