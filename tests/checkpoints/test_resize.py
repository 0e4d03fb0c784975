"""Backbones for other images: what is changed keeps its meaning, what is not asked for stays."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.checkpoints.load import load_into
from dinov2.checkpoints.resize import resize_model, resize_patch_kernel
from dinov2.errors import WeightsError
from dinov2.models.config import BackboneConfig
from tests.golden.recipe import images
from tests.models.tiny_backbones import all_tokens, tiny


def adapted(model, **asked):
    result = resize_model(model.state_dict(), BackboneConfig.from_model(model), **asked)
    changed = result.config.build().eval()
    assert load_into(changed, {**result.state, "model": result.config.table()}).resized == ()
    return changed, result


def test_nothing_is_changed_unasked():
    model = tiny()
    result = resize_model(model.state_dict(), BackboneConfig.from_model(model), img_size=98, patch_size=14, in_chans=3)
    assert result.notes == () and result.config == BackboneConfig.from_model(model)
    assert all(torch.equal(result.state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [42, (70, 126)])
def test_another_image_size_gives_what_the_model_itself_makes_of_that_size(registers, size):
    model = tiny(num_register_tokens=registers)
    changed, result = adapted(model, img_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert result.notes == (f"position grid 7x7 -> {height // 14}x{width // 14} (resampled by the model's rule)",)
    assert changed.patch_embed.img_size == (height, width)
    x = images(1, height, width)
    torch.testing.assert_close(all_tokens(changed, x), all_tokens(model, x), rtol=0, atol=1e-6)


def test_a_grid_that_is_not_square_can_be_left_again():
    wide, result = adapted(tiny(), img_size=(42, 126))
    back = resize_model(result.state, result.config, img_size=98)
    assert back.state["pos_embed"].shape == (1, 50, 64)
    assert wide.pos_embed.shape == (1, 28, 64)


@pytest.mark.parametrize("patch", [15, 20, 28])
def test_larger_patches_give_the_tokens_of_the_original_ones_enlarged(patch):
    """arXiv 2212.08013, equation 4: exact when enlarging. Torch's own bilinear resizing is the judge."""
    model, x = tiny(), images(2, 14, 14)
    kernel = model.patch_embed.proj.weight
    tokens = F.conv2d(x, kernel)
    enlarged = F.interpolate(x, size=(patch, patch), mode="bilinear", align_corners=False)
    torch.testing.assert_close(F.conv2d(enlarged, resize_patch_kernel(kernel, patch)), tokens, rtol=0, atol=2e-5)


def test_smaller_patches_are_the_nearest_in_the_least_squares_sense():
    """No other kernel answers patches of noise better, on average, once they are shrunk."""
    kernel = tiny().patch_embed.proj.weight.detach()[:4].double()
    small = resize_patch_kernel(kernel, 7)
    x = torch.randn(4000, 3, 14, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shrunk = F.interpolate(x, size=(7, 7), mode="bilinear", align_corners=False, antialias=True)
    error = F.conv2d(shrunk, small) - F.conv2d(x, kernel)
    worse = [F.conv2d(shrunk, small * factor) - F.conv2d(x, kernel) for factor in (0.8, 1.2)]
    assert all(error.square().mean() < other.square().mean() for other in worse)


def test_another_patch_size_keeps_the_number_of_patches_unless_told_otherwise():
    changed, result = adapted(tiny(), patch_size=16)
    assert changed.patch_size == 16 and changed.patch_embed.img_size == (112, 112)
    assert torch.equal(changed.pos_embed, tiny().pos_embed)
    assert result.notes == ("patch size 14 -> 16 (kernels resized by the pseudo-inverse of bilinear resizing)",)
    changed, result = adapted(tiny(), patch_size=16, img_size=96)
    assert changed.patch_embed.patches_resolution == (6, 6) and len(result.notes) == 2


def test_one_channel_gives_the_tokens_of_a_grey_image():
    model = tiny(num_register_tokens=2)
    changed, result = adapted(model, in_chans=1)
    grey = images(2, 98, 98, channels=1)
    expected = all_tokens(model, grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(all_tokens(changed, grey), expected, rtol=0, atol=1e-5)
    assert result.notes == ("channels 3 -> 1 (kernels summed)",)
    assert result.config.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),) and len(result.config.std) == 1


@pytest.mark.parametrize("channels", [4, 6])
def test_more_channels_repeat_the_kernels_and_keep_the_size_of_tokens(channels):
    model = tiny()
    changed, result = adapted(model, in_chans=channels)
    kernel, new = model.patch_embed.proj.weight, changed.patch_embed.proj.weight
    assert torch.equal(new[:, 3], kernel[:, 0] * (3 / channels))
    assert len(result.config.mean) == channels and result.config.mean[3] == result.config.mean[0]
    if channels == 6:
        x = images(1, 98, 98)
        torch.testing.assert_close(all_tokens(changed, x.repeat(1, 2, 1, 1)), all_tokens(model, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "asked, reason",
    [
        ({"img_size": 100}, "images of 100x100 pixels are no whole number of patches of 14"),
        ({"img_size": (98, 0)}, "images of 98x0 pixels"),
        ({"img_size": (98, 98, 3)}, "images of 98x98x3 pixels"),
        ({"img_size": 98, "patch_size": 16}, "no whole number of patches of 16"),
        ({"patch_size": 0}, "a patch cannot be 0 pixels wide"),
        ({"in_chans": 0}, "cannot have 0 input channels"),
    ],
)
def test_what_cannot_be_is_refused(asked, reason):
    with pytest.raises(WeightsError) as refusal:
        resize_model(tiny().state_dict(), BackboneConfig.from_model(tiny()), **asked)
    assert reason in str(refusal.value)


def test_the_source_is_left_alone():
    state = tiny().state_dict()
    before = {key: value.clone() for key, value in state.items()}
    resize_model(state, BackboneConfig.from_model(tiny()), img_size=(42, 70), patch_size=7, in_chans=1)
    assert all(torch.equal(before[key], value) for key, value in state.items())
