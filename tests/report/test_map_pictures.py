import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from dinov2.analysis.patch_maps import Matches
from dinov2.analysis.pca import fit_foreground_pca
from dinov2.report.map_pictures import (
    Cell,
    colour_map,
    display_size,
    marked,
    matches_picture,
    overlay,
    palette_colours,
    pca_picture,
    sheet,
    write_gif,
)


def pixels(image):
    return np.asarray(image).astype(int)


def test_the_palette_gets_lighter_from_end_to_end():
    weights = torch.tensor([0.2126, 0.7152, 0.0722])
    lightness = (palette_colours().float() / 255) ** 2.2 @ weights
    assert bool((lightness.diff() >= -1e-4).all()) and lightness[0] < 0.01 and lightness[-1] > 0.9


def test_values_between_the_limits_become_colours_in_order_and_others_are_clipped():
    picture = pixels(colour_map(torch.tensor([[-9.0, 0.0, 0.5, 1.0, 9.0]]), 0.0, 1.0))[0]
    palette = palette_colours().tolist()
    assert picture.tolist() == [palette[0], palette[0], palette[128], palette[255], palette[255]]


def test_a_map_without_range_or_with_nan_is_dark_and_no_error():
    picture = pixels(colour_map(torch.tensor([[2.0, torch.nan]]), 2.0, 2.0))
    assert picture[0].tolist() == 2 * [palette_colours()[0].tolist()]


@pytest.mark.parametrize("size, shown", [((3000, 2000), (800, 533)), ((500, 400), (500, 400)), ((32, 32), (320, 320))])
def test_pictures_are_shown_neither_tiny_nor_huge(size, shown):
    assert display_size(*size) == shown


def test_very_long_pictures_stay_bounded():
    assert display_size(10, 1000) == (16, 1600) and min(display_size(1, 5000)) >= 1


def test_an_overlay_keeps_squares_and_its_share_of_the_image():
    image, colours = Image.new("RGB", (40, 20), (100, 100, 100)), Image.new("RGB", (4, 2), (200, 0, 0))
    colours.putpixel((3, 1), (0, 200, 0))
    found = pixels(overlay(image, colours, opacity=0.5))
    assert found[0, 0].tolist() == [150, 50, 50]
    assert found[10, 30].tolist() == [50, 150, 50] and found[9, 30].tolist() == [150, 50, 50]


def test_a_mark_frames_its_patch_and_leaves_the_inside():
    image = Image.new("RGB", (60, 40), (90, 90, 90))
    changed = (pixels(marked(image, (1, 2), (4, 6))) != 90).any(axis=2)
    assert not changed[13:17, 23:27].any()  # inside of the patch at rows 10 to 19, columns 20 to 29
    assert changed[10:20, 19:21].any() and not changed[:, :15].any() and not changed[25:].any()


def test_patches_thinner_than_a_pixel_can_be_marked():
    image = Image.new("RGB", (30, 20), (90, 90, 90))
    assert (pixels(marked(image, (50, 99), (100, 100))) != 90).any()


def test_background_is_the_faded_image():
    patches = torch.zeros(6, 6, 4) + 0.01 * torch.randn(6, 6, 4)
    patches[2:4, 2:4] += 3
    found = pixels(pca_picture(Image.new("RGB", (60, 60), (0, 0, 0)), patches, fit_foreground_pca([patches])))
    assert found[0, 0].tolist() == [191, 191, 191]
    assert found[25, 25].tolist() != [191, 191, 191]


def test_lines_run_between_the_centres_of_matched_patches():
    first, second = Image.new("RGB", (40, 40)), Image.new("RGB", (40, 20))
    matches = Matches(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [0, 3]]), torch.tensor([0.9, 0.1]))
    found = pixels(matches_picture(first, second, matches, ((2, 2), (2, 4)), most=1))
    assert found.shape == (40, 40 + 14 + 40, 3)
    assert found[10, 30].sum() > 100  # centre of (0, 1) of the first
    assert found[10 + 5, 40 + 14 + 5].sum() > 100  # centre of (0, 0) of the second, which is centred in height
    assert found[30, 30].sum() == 0  # the second pair is not among the one that is drawn


def test_a_sheet_has_room_for_every_picture_and_its_words():
    cells = [Cell(Image.new("RGB", (100, 50), (255, 0, 0)), "a caption " * 9, ("0", "1")) for _ in range(3)]
    found = sheet(cells, columns=2)
    red = (pixels(found) == [255, 0, 0]).all(axis=2)
    assert red.sum() == 3 * 100 * 50
    assert found.width == 2 * 100 + 3 * 14
    assert (pixels(found)[14 + 50 : 14 + 50 + 60, 14:114].sum(axis=2) < 300).any()  # ink


def test_a_moving_picture_has_every_frame_in_one_size_and_one_palette(tmp_path):
    frames = [Image.new("RGB", (30, 20), (60 * i, 0, 0)) for i in range(4)] + [Image.new("RGB", (15, 10), (0, 200, 0))]
    write_gif(tmp_path / "a.gif", frames, milliseconds=50)
    with Image.open(tmp_path / "a.gif") as file:
        assert file.info["loop"] == 0 and file.info["duration"] == 50
        found = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
    assert [frame.size for frame in found] == [(30, 20)] * 5
    assert [frame.getpixel((3, 3))[0] for frame in found] == pytest.approx([0, 60, 120, 180, 0], abs=8)
