import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinov2.encode.stream import Features
from dinov2.errors import DataError
from dinov2.report.pictures import (
    encode_png,
    image_strip,
    neighbour_gallery,
    patch_features,
    pca_strip,
    write_gallery,
    write_pca_strip,
)


class Patches(nn.Module):
    """Stands for a backbone: patch features are the mean colours of 4 x 4 squares, doubled by a direction."""

    def __init__(self, sign=1.0):
        super().__init__()
        self.sign = sign

    def get_intermediate_layers(self, x, n=1, reshape=False):
        assert not self.training
        return (torch.nn.functional.avg_pool2d(x, 4) * self.sign,)


IMAGES = [torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(i)).byte() for i in range(3)]


def to_float(image):
    return image.float() / 255


def opened(png):
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def test_a_png_holds_the_very_pixels():
    assert np.array_equal(opened(encode_png(IMAGES[0])), IMAGES[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("channels", "shown"), [(1, [7, 7, 7]), (2, [7, 7, 7]), (5, [7, 8, 9])])
def test_images_with_other_channels_are_shown_as_grey_or_by_their_first_three(channels, shown):
    image = torch.arange(7, 7 + channels, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 2, 2)
    assert opened(encode_png(image))[0, 0].tolist() == shown


def test_patch_features_keep_the_grid_and_the_training_flag():
    model = Patches().train()
    features = patch_features(model, IMAGES, to_float)
    assert features.shape == (3, 4, 4, 3)
    assert model.training
    assert torch.allclose(features[1, 2, 3], IMAGES[1][:, 8:12, 12:16].float().mean(dim=(1, 2)) / 255)


def test_a_strip_has_a_column_per_image_and_the_map_below():
    strip = opened(pca_strip(Patches(), IMAGES, to_float))
    cell, gap = 112, 8
    assert strip.shape == (2 * cell + gap, 3 * cell + 2 * gap, 4)
    assert np.array_equal(strip[3, 3, :3], IMAGES[0][:, 0, 0].numpy())
    assert strip[:, cell + 2, 3].max() == 0  # the gap is transparent
    # All pixels of one patch (28 of 112) have one colour.
    assert len(np.unique(strip[cell + gap : cell + gap + 28, :28, :3].reshape(-1, 3), axis=0)) == 1


def test_images_that_are_not_square_keep_their_shape():
    strip = opened(image_strip([torch.full((3, 8, 16), 9, dtype=torch.uint8)]))
    assert (strip[..., 3] > 0).sum() == 112 * 56


def test_no_images_are_an_error():
    with pytest.raises(DataError, match="no images to draw"):
        pca_strip(Patches(), [], to_float)


def test_colours_of_a_later_iteration_follow_those_before(tmp_path):
    for iteration, sign in ((0, 1.0), (10, -1.0)):
        write_pca_strip(tmp_path, iteration, Patches(sign), IMAGES, to_float)
    first, second = (opened((tmp_path / f"report_data/pca/step_{i}.png").read_bytes()).astype(int) for i in (0, 10))
    assert np.abs(first - second).max() <= 2
    assert (tmp_path / "report_data/pca/images.png").is_file()


def gallery(n_queries=4):
    train = Features(torch.eye(4), torch.tensor([0, 1, 0, 1]), ("cat", "dog"), indices=torch.tensor([0, 2, 4, 6]))
    val = Features(torch.eye(4) + 0.1, torch.tensor([0, 1, 1, 1]), ("cat", "dog"))
    return neighbour_gallery(
        train,
        val,
        train_image=lambda i: torch.full((3, 4, 4), i, dtype=torch.uint8),
        val_image=lambda i: torch.full((3, 4, 4), 100 + i, dtype=torch.uint8),
        n_queries=n_queries,
        k=2,
    )


def test_neighbours_are_the_nearest_with_their_images_and_classes():
    rows = gallery()
    assert [row.query.label for row in rows] == ["cat", "dog", "dog", "dog"]
    assert [row.neighbours[0].correct for row in rows] == [True, True, False, True]
    # Row 2 of the features is image 4 of the data set: one before it could not be read.
    assert opened(rows[2].neighbours[0].png)[0, 0, 0] == 4
    assert opened(rows[2].query.png)[0, 0, 0] == 102
    assert rows[0].neighbours[0].similarity > rows[0].neighbours[1].similarity


def test_queries_are_spread_over_the_whole_set():
    assert [opened(row.query.png)[0, 0, 0] for row in gallery(2)] == [100, 103]
    assert len(gallery(100)) == 4


def test_without_labels_nothing_is_right_or_wrong():
    features = Features(torch.eye(3))
    rows = neighbour_gallery(features, features, train_image=lambda i: IMAGES[i], val_image=lambda i: IMAGES[i], k=9)
    assert len(rows[0].neighbours) == 3
    assert rows[0].neighbours[0].label is None and rows[0].neighbours[0].correct is None


def test_the_gallery_is_written_as_pictures_and_a_list(tmp_path):
    path = write_gallery(tmp_path, gallery())
    rows = json.loads(path.read_text())
    assert len(rows) == 4 and len(rows[0]["neighbours"]) == 2
    assert (path.parent / rows[3]["neighbours"][1]["image"]).is_file()
    assert rows[0]["query"]["correct"] is None
