"""The built-in table of ImageNet's classes against two independent lists, and what it is used for."""

import subprocess
import sys
from pathlib import Path

import pytest
from torchvision.models import ResNet50_Weights

from dinov2.data.datasets import ImageNet
from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES, ImageNetClass, name_classes
from dinov2.errors import DataError
from tests.data.datasets.trees import NAMES, WNIDS, imagenet_tree, write_image

# torchvision called these two like another class each, until it told them apart.
ONCE_NAMED_ALIKE = {134: "crane", 639: "maillot"}


def test_there_are_a_thousand_classes_in_the_order_of_their_wnids() -> None:
    wnids, names = [row.wnid for row in IMAGENET_CLASSES], [row.name for row in IMAGENET_CLASSES]
    assert len(wnids) == len(set(wnids)) == len(set(names)) == 1000
    assert wnids == sorted(wnids)
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdecimal() for wnid in wnids)
    assert all(name == name.strip() and name for name in names)


def test_the_ends_are_those_that_the_release_documents() -> None:
    assert IMAGENET_CLASSES[0] == ImageNetClass("n01440764", "tench")
    assert IMAGENET_CLASSES[999] == ImageNetClass("n15075141", "toilet tissue")


def test_names_are_those_of_torchvisions_weights_class_by_class() -> None:
    theirs = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    different = {
        index: (row.name, name)
        for index, (row, name) in enumerate(zip(IMAGENET_CLASSES, theirs, strict=True))
        if name not in (row.name, ONCE_NAMED_ALIKE.get(index))
    }
    assert different == {}


@pytest.mark.real_data
def test_wnids_and_names_agree_with_the_file_names_of_a_sample_of_every_class(vision_data: Path) -> None:
    stems = sorted(path.stem for path in (vision_data / "imagenet_samples" / "samples").glob("n*.jpg"))
    assert [stem.partition("_")[0] for stem in stems] == [row.wnid for row in IMAGENET_CLASSES]
    different = {
        index
        for index, (row, stem) in enumerate(zip(IMAGENET_CLASSES, stems, strict=True))
        if stem.partition("_")[2].replace("_", " ") != row.name
    }
    assert different == set(ONCE_NAMED_ALIKE)  # the files say crane and maillot twice


def test_importing_the_module_reads_no_file() -> None:
    code = (
        "import dinov2.data.datasets.imagenet_classes as m\n"
        "assert m._read.cache_info().currsize == 0\n"
        "assert m.IMAGENET_CLASSES is m.IMAGENET_CLASSES and m._read.cache_info().currsize == 1\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_missing_labels_txt_is_served_from_the_table(tmp_path: Path) -> None:
    root = imagenet_tree(tmp_path / "imagenet", labels_txt=False)
    train = ImageNet(split=ImageNet.Split.TRAIN, root=root, extra=tmp_path)
    train.dump_extra()
    assert train.class_names == list(NAMES)
    assert train.get_class_name(5) == "toilet tissue"


def test_a_wnid_outside_the_table_stands_for_itself(tmp_path: Path) -> None:
    assert name_classes(str(tmp_path), ["n01440764", "n00000001"]) == ["tench", "n00000001"]


def test_a_labels_txt_that_is_there_is_the_only_source_of_names(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("n01440764,Schleie\n")
    assert name_classes(str(tmp_path), ["n01440764", "n01443537"]) == ["Schleie", "n01443537"]


def flat_val(root: Path, labels: str) -> ImageNet:
    for number in (1, 2):
        write_image(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    (root / "val.txt").write_text(labels)
    return ImageNet(split=ImageNet.Split.VAL, root=root)


@pytest.mark.parametrize(
    "labels",
    [
        "ILSVRC2012_val_00000001.JPEG 999\nILSVRC2012_val_00000002.JPEG 1\n",
        f"ILSVRC2012_val_00000001.JPEG {WNIDS[2]}\nILSVRC2012_val_00000002.JPEG {WNIDS[1]}\n",
    ],
    ids=["numbers", "wnids"],
)
def test_flat_validation_images_alone_are_numbered_by_the_table(tmp_path: Path, labels: str) -> None:
    val = flat_val(tmp_path, labels)
    assert [val.get_target(i) for i in range(2)] == [999, 1]
    assert [val.get_class_name(i) for i in range(2)] == ["toilet tissue", "goldfish"]


def test_flat_validation_images_of_other_classes_number_their_own(tmp_path: Path) -> None:
    val = flat_val(tmp_path, "ILSVRC2012_val_00000001.JPEG n00000002\nILSVRC2012_val_00000002.JPEG n00000001\n")
    assert [val.get_target(i) for i in range(2)] == [1, 0]
    assert val.class_names == ["n00000001", "n00000002"]


def test_a_class_number_beyond_the_table_is_refused(tmp_path: Path) -> None:
    val = flat_val(tmp_path, "ILSVRC2012_val_00000001.JPEG 1000\nILSVRC2012_val_00000002.JPEG 1\n")
    with pytest.raises(DataError, match="names the class 1000, which is none of the 1000 known ones"):
        len(val)
