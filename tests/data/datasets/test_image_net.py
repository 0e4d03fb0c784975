import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.datasets import ImageNet
from dinov2.errors import DataError
from tests.data.datasets.trees import NAMES, WNIDS, imagenet_tree, write_image

TRAIN, VAL, TEST = ImageNet.Split


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return imagenet_tree(tmp_path / "imagenet")


def test_the_published_snippet_writes_the_metadata_of_all_three_splits(tree: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    for split in ImageNet.Split:
        dataset = ImageNet(split=split, root=str(tree), extra=str(extra))
        dataset.dump_extra()
    assert sorted(os.listdir(extra)) == [
        "class-ids-TRAIN.npy",
        "class-ids-VAL.npy",
        "class-names-TRAIN.npy",
        "class-names-VAL.npy",
        "entries-TEST.npy",
        "entries-TRAIN.npy",
        "entries-VAL.npy",
    ]
    lengths = {split.name: len(ImageNet(split=split, root=str(tree), extra=str(extra))) for split in ImageNet.Split}
    assert lengths == {"TRAIN": 6, "VAL": 3, "TEST": 4}


def test_the_files_have_the_published_columns(tree: Path, tmp_path: Path) -> None:
    for split in ImageNet.Split:
        ImageNet(split=split, root=tree, extra=tmp_path).dump_extra()
    train, val, test = (np.load(tmp_path / f"entries-{split.name}.npy") for split in ImageNet.Split)
    columns = [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "<U9"), ("class_name", "<U13")]
    assert train.dtype == val.dtype == np.dtype(columns)
    assert test.dtype == np.dtype([*columns[:2], ("class_id", "<U0"), ("class_name", "<U0")])
    # Sorted as strings, so that 10026 comes before 3.
    assert train.tolist() == [
        (10026, 0, WNIDS[0], NAMES[0]),
        (3, 0, WNIDS[0], NAMES[0]),
        (1, 1, WNIDS[1], NAMES[1]),
        (2, 1, WNIDS[1], NAMES[1]),
        (7, 1, WNIDS[1], NAMES[1]),
        (12, 2, WNIDS[2], NAMES[2]),
    ]
    assert test.tolist() == [(number, 2**32 - 1, "", "") for number in (1, 2, 3, 4)]
    assert np.load(tmp_path / "class-ids-TRAIN.npy").tolist() == list(WNIDS)
    assert np.load(tmp_path / "class-names-VAL.npy").tolist() == list(NAMES)


@pytest.mark.parametrize("with_extra", [True, False], ids=["metadata", "folders"])
def test_samples_and_names_are_the_same_with_and_without_metadata(tree: Path, tmp_path: Path, with_extra: bool) -> None:
    extra = tmp_path / "extra"
    ImageNet(split=TRAIN, root=tree, extra=extra).dump_extra()
    train = ImageNet(split=TRAIN, root=tree, extra=extra if with_extra else None)
    assert train.path_of(0) == str(tree / "train" / WNIDS[0] / f"{WNIDS[0]}_10026.JPEG")
    targets = train.get_targets()
    assert targets is not None
    assert targets.tolist() == [0, 0, 1, 1, 1, 2] == [train.get_target(i) for i in range(6)]
    assert (train.get_class_id(5), train.get_class_name(5)) == (WNIDS[2], NAMES[2])
    assert (train.find_class_id(1), train.find_class_name(1)) == (WNIDS[1], NAMES[1])
    assert train.class_names == list(NAMES)
    assert train.get_image_data(1) == (tree / "train" / WNIDS[0] / f"{WNIDS[0]}_3.JPEG").read_bytes()
    image, target = train[5]
    assert (image.mode, image.size, target) == ("RGB", (8, 6), 2)


def test_the_fingerprint_does_not_depend_on_where_the_list_comes_from(tree: Path, tmp_path: Path) -> None:
    ImageNet(split=TRAIN, root=tree, extra=tmp_path).dump_extra()
    dumped = ImageNet(split=TRAIN, root=tree, extra=tmp_path).fingerprint()
    assert dumped == ImageNet(split=TRAIN, root=tree).fingerprint()
    assert dumped != ImageNet(split=VAL, root=tree).fingerprint()


def test_test_images_have_no_labels(tree: Path, tmp_path: Path) -> None:
    ImageNet(split=TEST, root=tree, extra=tmp_path).dump_extra()
    for extra in (tmp_path, None):
        test = ImageNet(split=TEST, root=tree, extra=extra)
        assert test.get_targets() is None
        assert (test.get_target(0), test.get_class_id(0), test.class_names) == (None, None, None)
        assert test[3][1] is None
        assert test.path_of(3) == str(tree / "test" / "ILSVRC2012_test_00000004.JPEG")
        with pytest.raises(DataError, match="have no classes"):
            test.find_class_id(0)


def test_without_test_images_the_complete_list_is_written_as_the_release_does(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for image in (tree / "test").iterdir():
        image.unlink()
    (tree / "test").rmdir()
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        ImageNet(split=TEST, root=tree, extra=tmp_path).dump_extra()
    assert "has no test folder" in caplog.text
    rows = np.load(tmp_path / "entries-TEST.npy")
    assert (len(rows), rows["actual_index"][0], rows["actual_index"][-1]) == (100_000, 1, 100_000)


def test_an_unexpected_number_of_images_is_said_and_not_refused(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dinov2"):
        assert len(ImageNet(split=VAL, root=tree)) == 3
    assert "holds 3 of 50000 images" in caplog.text


def test_both_splits_of_a_subset_number_their_classes_alike(tree: Path) -> None:
    (tree / "val" / WNIDS[0] / "ILSVRC2012_val_00000001.JPEG").unlink()
    (tree / "val" / WNIDS[0]).rmdir()
    assert ImageNet(split=VAL, root=tree).get_targets().tolist() == [1, 2]  # type: ignore[union-attr]


def test_labels_txt_is_optional_and_names_may_contain_commas(tmp_path: Path) -> None:
    bare = imagenet_tree(tmp_path / "bare", labels_txt=False)
    assert ImageNet(split=TRAIN, root=bare).class_names == list(NAMES)  # of the built-in table
    named = imagenet_tree(tmp_path / "named")
    (named / "labels.txt").write_text(f'{WNIDS[0]},"tench, Tinca tinca"\n{WNIDS[1]},gold, fish\n{WNIDS[2]},paper\n')
    assert ImageNet(split=TRAIN, root=named).class_names == ["tench, Tinca tinca", "gold, fish", "paper"]
    (named / "labels.txt").write_text(
        f'"{WNIDS[0]}","great white ""shark"", man-eater"\n{WNIDS[1]},""\n{WNIDS[2]},6" nail\n'
    )
    assert ImageNet(split=TRAIN, root=named).class_names == ['great white "shark", man-eater', "", '6" nail']


LISTS = {
    "LOC_val_solution.csv": (
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000002,{b} 1 2 3 4\n"
        "ILSVRC2012_val_00000001,{c} 5 6 7 8 {c} 1 2 3 4\n"
    ),
    "imagenet_2012_validation_synset_labels.txt": "{c}\n{b}\n",
    "val.txt": "ILSVRC2012_val_00000001.JPEG 2\nILSVRC2012_val_00000002.JPEG 1\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_flat_validation_images_take_their_labels_from_a_list(tree: Path, tmp_path: Path, name: str) -> None:
    for image in list((tree / "val").rglob("*.JPEG")):
        image.unlink()
    for folder in list((tree / "val").iterdir()):
        folder.rmdir()
    for number in (1, 2):
        write_image(tree / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", colour=number)
    with pytest.raises(DataError, match=r"no list of their labels was found; put one of .*val\.txt"):
        len(ImageNet(split=VAL, root=tree))
    (tree / name).write_text(LISTS[name].format(b=WNIDS[1], c=WNIDS[2]))
    ImageNet(split=VAL, root=tree, extra=tmp_path).dump_extra()
    for extra in (None, tmp_path):
        val = ImageNet(split=VAL, root=tree, extra=extra)
        assert [val.get_class_id(i) for i in range(2)] == [WNIDS[2], WNIDS[1]]
        assert [val[i][1] for i in range(2)] == [2, 1]
        assert val.path_of(1) == str(tree / "val" / "ILSVRC2012_val_00000002.JPEG")


def test_a_list_of_bare_numbers_is_refused_because_their_order_is_unknown(tree: Path) -> None:
    for wnid in WNIDS:
        for image in (tree / "val" / wnid).iterdir():
            image.rename(tree / "val" / image.name)
        (tree / "val" / wnid).rmdir()
    (tree / "val.txt").write_text("490\n361\n171\n")
    with pytest.raises(DataError, match="'490' in .* is no validation label"):
        len(ImageNet(split=VAL, root=tree))


def test_a_file_with_another_name_is_refused_with_the_way_out(tree: Path) -> None:
    write_image(tree / "train" / WNIDS[0] / "holiday.jpg")
    with pytest.raises(DataError, match=r"holiday\.jpg is not named as .* write folder:PATH"):
        len(ImageNet(split=TRAIN, root=tree))


def test_a_split_knows_the_published_paths_and_lengths() -> None:
    assert [split.length for split in ImageNet.Split] == [1_281_167, 50_000, 100_000]
    assert TRAIN.get_dirname("n01440764") == "train/n01440764"
    assert TRAIN.get_image_relpath(3, "n01440764") == "train/n01440764/n01440764_3.JPEG"
    assert VAL.get_image_relpath(5, "n01440764") == "val/n01440764/ILSVRC2012_val_00000005.JPEG"
    assert TEST.get_image_relpath(7) == "test/ILSVRC2012_test_00000007.JPEG"
    for split, class_id in ((TRAIN, "n01440764"), (VAL, "n01440764"), (TEST, "")):
        assert split.parse_image_relpath(split.get_image_relpath(9, class_id or None)) == (class_id, 9)


def test_a_missing_root_is_named_and_metadata_of_another_kind_is_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        len(ImageNet(split=TRAIN, root=tmp_path / "nowhere"))
    np.save(tmp_path / "entries-TRAIN.npy", np.arange(3))
    with pytest.raises(DataError, match="holds no ImageNet entries"):
        len(ImageNet(split=TRAIN, root=tree, extra=tmp_path))
    with pytest.raises(DataError, match="give extra=FOLDER"):
        ImageNet(split=TRAIN, root=tree).dump_extra()


def test_the_memory_map_stays_at_home_when_a_worker_gets_the_set(tree: Path, tmp_path: Path) -> None:
    ImageNet(split=TRAIN, root=tree, extra=tmp_path).dump_extra()
    train = ImageNet(split=TRAIN, root=tree, extra=tmp_path)
    assert len(train) == 6
    sent = pickle.dumps(train)
    assert b"goldfish" not in sent.replace(b"\0", b"")
    assert pickle.loads(sent)[5][1] == 2
