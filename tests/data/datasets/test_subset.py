"""Subsets by lists of names, as the published few-shot lists of ImageNet are written."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from dinov2.data import make_dataset
from dinov2.data.datasets import ImageNet
from dinov2.data.datasets.base import Subset
from dinov2.data.datasets.files import Folder
from dinov2.data.datasets.listing import rows_by_name
from dinov2.errors import DataError
from tests.data.datasets.trees import class_tree, imagenet_tree


def write_list(path: Path, *names: str) -> Path:
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def test_a_published_list_of_bare_names_chooses_images_of_imagenet(tmp_path: Path) -> None:
    whole = ImageNet(split=ImageNet.Split.TRAIN, root=imagenet_tree(tmp_path))
    names = write_list(tmp_path / "1percent.txt", "n15075141_12.JPEG", "n01440764_10026.JPEG", "n01443537_7.JPEG")
    dataset = make_dataset(f"ImageNet:split=TRAIN:root={tmp_path}:subset={names}")
    assert isinstance(dataset, Subset)
    # In the order of the data set, with the classes of the whole.
    chosen = ["n01440764_10026.JPEG", "n01443537_7.JPEG", "n15075141_12.JPEG"]
    assert [Path(dataset.path_of(index)).name for index in range(3)] == chosen
    targets = dataset.get_targets()
    assert targets is not None
    assert targets.tolist() == [0, 1, 2] == [target for _, target in dataset]
    assert dataset.class_names == whole.class_names
    assert dataset[0][0].getpixel((0, 0)) == (10026 % 256,) * 3
    assert dataset.get_image_data(2) == whole.get_image_data(5)
    assert dataset.get_tensor(1).shape == (3, 6, 8)


def test_names_may_carry_folders_and_transforms_apply_once(tmp_path: Path) -> None:
    imagenet_tree(tmp_path)
    names = write_list(tmp_path / "l.txt", "./n01443537/n01443537_1.JPEG", "train/n01443537/n01443537_2.JPEG")
    dataset = make_dataset(
        f"ImageNet:split=TRAIN:root={tmp_path}:subset={names}",
        transform=lambda image: image.size[0],
        target_transform=lambda target: target + 10,
    )
    assert list(dataset) == [(8, 11), (8, 11)]


def test_a_subset_has_a_fingerprint_of_its_own_and_can_be_pickled(tmp_path: Path) -> None:
    folder = Folder(class_tree(tmp_path, {"a": 3, "b": 2}))
    subset, other = Subset(folder, np.array([4, 1])), Subset(folder, np.array([1, 4]))
    assert len({folder.fingerprint(), subset.fingerprint(), other.fingerprint()}) == 3
    copy = pickle.loads(pickle.dumps(subset))
    assert copy.fingerprint() == subset.fingerprint()
    assert [target for _, target in copy] == [1, 0]


def test_a_set_without_labels_has_subsets_without_labels(tmp_path: Path) -> None:
    subset = Subset(Folder(class_tree(tmp_path, {"a": 3}) / "a"), np.array([2]))
    assert subset.get_targets() is None and subset.get_target(0) is None and subset.class_names is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "names no image"),
        (["a/0.png", "a/9.png", "c/1.png"], "2 of the 3 images .* are not in the data set, the first is a/9.png"),
        (["0.png"], "0.png in the list .* is the name of several images; write more of its path"),
        (["a/1.png", "a/0.png", "a/1.png"], "names 1 images twice"),
    ],
)
def test_a_list_that_fits_no_images_or_several_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    folder = Folder(class_tree(tmp_path / "images", {"a": 2, "b": 2}))
    with pytest.raises(DataError, match=message):
        rows_by_name(folder, write_list(tmp_path / "l.txt", *names))


@pytest.mark.parametrize("rows", [[], [4], [-1]])
def test_rows_outside_the_set_are_refused(tmp_path: Path, rows: list[int]) -> None:
    folder = Folder(class_tree(tmp_path, {"a": 4}))
    with pytest.raises(DataError, match="at least one image and numbers from 0 to 3"):
        Subset(folder, np.array(rows, dtype=np.int64))
