import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinov2.analysis.pca import fit_pca
from dinov2.encode.stream import Features
from dinov2.errors import DataError
from dinov2.report.pictures import write_gallery, write_pca_strip


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


def opened(file):
    with Image.open(file) as image:
        return np.asarray(image)


def drawn(folder, images=IMAGES, model=None):
    """The images and the maps of one strip, uint8 [H, W, 4] each."""
    path = write_pca_strip(folder, 0, Patches() if model is None else model, images, to_float)
    return opened(path.with_name("images.png")), opened(path)


@pytest.mark.parametrize(("channels", "shown"), [(1, [7, 7, 7]), (2, [7, 7, 7]), (3, [7, 8, 9]), (5, [7, 8, 9])])
def test_images_with_other_channels_are_shown_as_grey_or_by_their_first_three(tmp_path, channels, shown):
    image = torch.arange(7, 7 + channels, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 8, 8)
    assert drawn(tmp_path, [image])[0][0, 0].tolist() == [*shown, 255]


def test_a_strip_has_a_column_per_image_and_keeps_the_training_flag(tmp_path):
    model = Patches().train()
    images, maps = drawn(tmp_path, model=model)
    cell, gap = 112, 8
    assert model.training and images.shape == maps.shape == (cell, 3 * cell + 2 * gap, 4)
    assert np.array_equal(images[3, 3, :3], IMAGES[0][:, 0, 0].numpy())
    assert max(images[:, cell + 2, 3].max(), maps[:, cell + 2, 3].max()) == 0  # the gap is transparent
    # All pixels of one patch (28 of 112) have one colour, which is that of its features.
    assert len(np.unique(maps[:28, :28, :3].reshape(-1, 3), axis=0)) == 1
    patches = torch.stack([torch.nn.functional.avg_pool2d(to_float(image), 4) for image in IMAGES])
    patches = patches.permute(0, 2, 3, 1)  # [B, h, w, 3]
    colour = fit_pca(patches.flatten(0, 2)).to_rgb(patches[1, 2, 3]) * 255
    assert maps[2 * 28 + 5, cell + gap + 3 * 28 + 5, :3] == pytest.approx(colour.numpy(), abs=1)


def test_images_that_are_not_square_keep_their_shape(tmp_path):
    images, _ = drawn(tmp_path, [torch.full((3, 8, 16), 9, dtype=torch.uint8)])
    assert (images[..., 3] > 0).sum() == 112 * 56


def test_no_images_are_an_error(tmp_path):
    with pytest.raises(DataError, match="no images to draw"):
        drawn(tmp_path, [])


def test_colours_of_a_later_iteration_follow_those_before(tmp_path):
    for iteration, sign in ((0, 1.0), (10, -1.0)):
        write_pca_strip(tmp_path, iteration, Patches(sign), IMAGES, to_float)
    first, second = (opened(tmp_path / f"report_data/pca/step_{i}.png").astype(int) for i in (0, 10))
    assert np.abs(first - second).max() <= 2
    assert (tmp_path / "report_data/pca/images.png").is_file()


def gallery(folder, n_queries=4):
    train = Features(torch.eye(4), torch.tensor([0, 1, 0, 1]), ("cat", "dog"), indices=torch.tensor([0, 2, 4, 6]))
    val = Features(torch.eye(4) + 0.1, torch.tensor([0, 1, 1, 1]), ("cat", "dog"))
    path = write_gallery(
        folder,
        train,
        val,
        train_image=lambda i: torch.full((3, 4, 4), i, dtype=torch.uint8),
        val_image=lambda i: torch.full((3, 4, 4), 100 + i, dtype=torch.uint8),
        n_queries=n_queries,
        k=2,
    )
    return json.loads(path.read_text())


def value(folder, picture):
    return opened(folder / "report_data" / picture["image"])[0, 0, 0]


def test_neighbours_are_the_nearest_with_their_images_and_classes(tmp_path):
    rows = gallery(tmp_path)
    assert [row["query"]["label"] for row in rows] == ["cat", "dog", "dog", "dog"]
    assert [row["neighbours"][0]["correct"] for row in rows] == [True, True, False, True]
    assert rows[0]["query"]["correct"] is None and len(rows[0]["neighbours"]) == 2
    # Row 2 of the features is image 4 of the data set: one before it could not be read.
    assert value(tmp_path, rows[2]["neighbours"][0]) == 4
    assert value(tmp_path, rows[2]["query"]) == 102
    assert rows[0]["neighbours"][0]["similarity"] > rows[0]["neighbours"][1]["similarity"]


def test_queries_are_spread_over_the_whole_set(tmp_path):
    assert [value(tmp_path, row["query"]) for row in gallery(tmp_path, 2)] == [100, 103]
    assert len(gallery(tmp_path, 100)) == 4


def test_without_labels_nothing_is_right_or_wrong(tmp_path):
    features, images = Features(torch.eye(3)), IMAGES.__getitem__
    path = write_gallery(tmp_path, features, features, train_image=images, val_image=images, k=9)
    row = json.loads(path.read_text())[0]
    assert len(row["neighbours"]) == 3
    assert row["neighbours"][0]["label"] is None and row["neighbours"][0]["correct"] is None
