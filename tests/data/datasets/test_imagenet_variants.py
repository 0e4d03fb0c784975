"""The test sets of ImageNet's classifiers on small trees in the layout of their archives."""

import json
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.data import make_dataset
from dinov2.data.datasets.base import Subset
from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES, infer_class_ids
from dinov2.data.datasets.imagenet_variants import (
    CORRUPTIONS,
    SEVERITIES,
    ImageNetA,
    ImageNetC,
    ImageNetR,
    ImageNetReaL,
    ImageNetSketch,
    ImageNetV2,
    _TestSet,
)
from dinov2.encode.stream import Scoring
from dinov2.errors import DataError
from dinov2.eval.metrics import real_accuracy, restrict_scores, top_k_accuracy
from tests.data.datasets.trees import WNIDS, imagenet_tree, write_image

STINGRAY, HEN = "n01498041", "n01514859"  # classes 6 and 8
WNID_SETS = [(ImageNetA, "imagenet-a"), (ImageNetR, "imagenet-r"), (ImageNetSketch, "sketch")]


def wnid_tree(root: Path) -> Path:
    """Two images of the hen and one of the stingray, as archives of wnid folders unpack."""
    write_image(root / HEN / "0.000116_digital clock _ digital clock_0.865662.jpg", colour=1)
    write_image(root / HEN / "art_0.jpg", colour=2)
    write_image(root / STINGRAY / "sketch_3.JPEG", colour=3)
    (root / "README.txt").write_text("about the archive")
    return root


# Folders of wnids


@pytest.mark.parametrize(("kind", "folder"), WNID_SETS, ids=lambda value: getattr(value, "__name__", value))
def test_the_folder_of_the_archive_and_the_one_around_it_are_the_same_set(
    tmp_path: Path, kind: type[_TestSet], folder: str
) -> None:
    inside = wnid_tree(tmp_path / folder)
    sets = [make_dataset(f"{kind.__name__}:{root}") for root in (f"root={inside}", f"root={tmp_path}", str(inside))]
    assert all(isinstance(dataset, kind) and len(dataset) == 3 for dataset in sets)
    assert len({dataset.fingerprint() for dataset in sets}) == 1
    assert [image.size for image, _ in sets[0]] == [(8, 6)] * 3


@pytest.mark.parametrize("kind", [ImageNetA, ImageNetR])
def test_a_set_of_some_classes_counts_them_and_maps_each_to_its_official_number(
    tmp_path: Path, kind: type[_TestSet]
) -> None:
    dataset = kind(wnid_tree(tmp_path))
    assert dataset.class_ids == [STINGRAY, HEN]
    assert dataset.class_names == ["stingray", "hen"]
    assert dataset.class_mapping.tolist() == [6, 8]
    assert dataset.get_targets().tolist() == [0, 1, 1] == [dataset.get_target(index) for index in range(3)]


def test_a_set_of_all_classes_keeps_the_official_numbers_whichever_folders_are_there(tmp_path: Path) -> None:
    dataset = ImageNetSketch(wnid_tree(tmp_path))
    assert dataset.get_targets().tolist() == [6, 8, 8]
    assert dataset.class_names == [row.name for row in IMAGENET_CLASSES]
    assert np.array_equal(dataset.class_mapping, np.arange(1000))


def test_a_complete_a_has_two_hundred_classes_and_an_incomplete_one_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for row in IMAGENET_CLASSES[::5]:
        write_image(tmp_path / row.wnid / "0.jpg", size=(1, 1))
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        dataset = ImageNetA(tmp_path)
    assert dataset.class_mapping.tolist() == list(range(0, 1000, 5))
    assert "holds 200 of 7500 images and 200 of 200 classes" in caplog.text


def test_the_scores_of_all_classes_are_restricted_to_those_of_the_set(tmp_path: Path) -> None:
    dataset = ImageNetA(wnid_tree(tmp_path))
    scores = torch.zeros(3, 1000)
    scores[:, 0] = 9.0  # tench, which is not among the classes
    scores[0, 6] = scores[1, 8] = scores[2, 6] = 1.0
    restricted = restrict_scores(scores, torch.from_numpy(dataset.class_mapping))
    assert top_k_accuracy(restricted, torch.from_numpy(dataset.get_targets())) == pytest.approx(2 / 3)


def test_the_mapping_can_be_saved_as_the_release_reads_it(tmp_path: Path) -> None:
    np.save(tmp_path / "mapping.npy", ImageNetR(wnid_tree(tmp_path / "imagenet-r")).class_mapping)
    loaded = np.load(tmp_path / "mapping.npy")
    assert loaded.ndim == 1 and loaded.dtype == np.int64 and loaded.tolist() == [6, 8]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["cat/0.jpg"], r"the folder cat in .* names no class of ImageNet-1k; ImageNetA expects imagenet-a/<wnid>/"),
        (["0.jpg"], r"0\.jpg in .* lies in no class folder; ImageNetA expects"),
        ([], r"no image was found in .*; ImageNetA expects imagenet-a/<wnid>/\*\.jpg, as imagenet-a\.tar unpacks"),
        ([f"{row.wnid}/0.jpg" for row in IMAGENET_CLASSES[:201]], "holds 201 classes and ImageNetA has 200"),
    ],
)
def test_a_layout_that_is_another_is_refused_with_the_expected_one(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"never decoded")
    with pytest.raises(DataError, match=message):
        ImageNetA(tmp_path)


# V2


def v2_tree(root: Path) -> Path:
    """One image in each of the folders 0 to 11; its grey level is the class."""
    for number in range(12):
        write_image(root / str(number) / f"{number:040x}.png", colour=10 * number)
    return root


def test_the_folders_of_v2_are_numbers_and_not_ranks_of_their_names(tmp_path: Path) -> None:
    dataset = ImageNetV2(v2_tree(tmp_path / "imagenetv2-matched-frequency-format-val"))
    assert dataset.get_targets().tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]  # the order of the paths
    for image, target in dataset:
        assert image.getpixel((0, 0))[0] == 10 * target
    assert dataset.class_names[10] == IMAGENET_CLASSES[10].name


def test_the_variants_of_v2_lie_side_by_side(tmp_path: Path) -> None:
    v2_tree(tmp_path / "imagenetv2-matched-frequency-format-val")
    write_image(tmp_path / "imagenetv2-threshold0.7-format-val" / "999" / "x.jpeg")
    assert len(make_dataset(f"ImageNetV2:root={tmp_path}")) == 12
    assert len(make_dataset(f"ImageNetV2:root={tmp_path}:variant=matched-frequency")) == 12
    other = make_dataset(f"ImageNetV2:root={tmp_path}:variant=Threshold-0.7")
    assert other.get_targets().tolist() == [999]
    with pytest.raises(DataError, match="is not the variant matched-frequency of ImageNetV2"):
        ImageNetV2(tmp_path / "imagenetv2-threshold0.7-format-val")


@pytest.mark.parametrize("folder", ["1000", "n01440764", "-1", "²"])
def test_a_folder_of_v2_that_is_no_class_number_is_refused(tmp_path: Path, folder: str) -> None:
    write_image(tmp_path / folder / "x.jpeg")
    with pytest.raises(DataError, match=rf"the folder {re.escape(folder)} in .* expects imagenetv2-<variant>-format"):
        ImageNetV2(tmp_path)


# C


def c_tree(root: Path, *, groups: bool = False, severities: tuple[int, ...] = SEVERITIES) -> Path:
    """Two images a part, of the hen and the stingray; the grey level tells corruption and severity."""
    for place, (name, group) in enumerate(CORRUPTIONS.items()):
        for severity in severities:
            part = root / (f"{group}/{name}" if groups else name) / str(severity)
            for number, wnid in enumerate((HEN, STINGRAY), start=1):
                write_image(part / wnid / f"ILSVRC2012_val_{number:08d}.png", colour=10 * place + severity)
    return root


@pytest.mark.parametrize("groups", [False, True], ids=["one folder", "a folder an archive"])
def test_one_part_of_c_is_found_however_the_archives_were_unpacked(tmp_path: Path, groups: bool) -> None:
    c_tree(tmp_path, groups=groups)
    dataset = make_dataset(f"ImageNetC:root={tmp_path}:corruption=fog:severity=3")
    assert isinstance(dataset, ImageNetC)
    assert dataset.parts == [("fog", 3)]
    assert dataset.get_targets().tolist() == [6, 8]
    assert dataset[0][0].getpixel((0, 0))[0] == 10 * list(CORRUPTIONS).index("fog") + 3


def test_all_of_c_knows_the_part_of_every_image(tmp_path: Path) -> None:
    c_tree(tmp_path)
    dataset = ImageNetC(tmp_path)
    assert len(dataset) == 150
    assert dataset.parts[:6] == [*(("gaussian_noise", level) for level in SEVERITIES), ("shot_noise", 1)]
    for index in (0, 77, 149):
        name, severity = dataset.parts[dataset.part_numbers[index]]
        assert dataset[index][0].getpixel((0, 0))[0] == 10 * list(CORRUPTIONS).index(name) + severity
        assert Path(dataset.path_of(index)).parts[-4:-2] == (name, str(severity))
    assert np.bincount(dataset.part_numbers).tolist() == [2] * 75
    assert dataset.get_targets().tolist() == [6, 8] * 75


def test_severities_and_corruptions_of_c_can_be_chosen_apart(tmp_path: Path) -> None:
    c_tree(tmp_path)
    assert make_dataset(f"ImageNetC:root={tmp_path}:severity=5").parts == [(name, 5) for name in CORRUPTIONS]
    all_levels = make_dataset(f"ImageNetC:root={tmp_path}:corruption=Snow:severity=all")
    assert all_levels.parts == [("snow", level) for level in SEVERITIES]
    one, other = (ImageNetC(tmp_path, corruption="snow", severity=level) for level in (1, 2))
    assert one.fingerprint() != other.fingerprint()


def test_a_corruption_that_was_not_unpacked_is_named(tmp_path: Path) -> None:
    c_tree(tmp_path, severities=(1,))
    for image in (tmp_path / "fog").rglob("*.png"):
        image.unlink()
    (tmp_path / "snow").rename(tmp_path / "other")
    with pytest.raises(DataError, match=r"lacks 1 of 15 corruptions \(snow\); .* one corruption alone is corruption="):
        ImageNetC(tmp_path)
    with pytest.raises(DataError, match="there is no severity 2 in .*shot_noise; expected is <corruption>/<severity>/"):
        ImageNetC(tmp_path, corruption="shot_noise", severity=2)
    with pytest.raises(DataError, match="no image was found"):
        ImageNetC(tmp_path, corruption="fog", severity=1)
    write_image(tmp_path / "fog" / "1" / "x.png")
    with pytest.raises(DataError, match=r"x\.png in .* lies in no folder of an ImageNet-1k class"):
        ImageNetC(tmp_path, corruption="fog", severity=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ImageNetC:root=.:corruption=fogg", "the corruption 'fogg' in .* the nearest is 'fog'; known are all, gauss"),
        ("ImageNetC:root=.:severity=6", "the severity '6' in .* known are all, 1, 2, 3, 4, 5"),
        ("ImageNetV2:root=.:variant=matched", "the nearest is 'matched-frequency'; known are matched-frequency, thr"),
        ("ImageNetA:split=VAL:root=.", "the key 'split' .* unknown to ImageNetA; accepted keys are root"),
        ("ImageNetReaL:root=.:labels=/no/such.json", "there is no /no/such.json"),
        ("ImageNetR", "lacks root; write ImageNetR:root=PATH"),
    ],
)
def test_what_is_wrong_with_a_string_is_said(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_dataset(text)


# ReaL


def real_file(path: Path) -> Path:
    """Labels of four images: tench; none; goldfish or toilet tissue; hen."""
    path.write_text(json.dumps([[0], [], [1, 999], [8]]))
    return path


def test_real_labels_follow_the_numbers_in_the_names_of_the_images(tmp_path: Path) -> None:
    imagenet_tree(tmp_path)  # images 1 to 3 of tench, goldfish, toilet tissue
    real_file(tmp_path / "real.json")
    dataset = make_dataset(f"ImageNetReaL:root={tmp_path}")
    assert isinstance(dataset, ImageNetReaL)
    assert dataset.get_targets().tolist() == [0, 1, 999]
    assert dataset.label_sets.tolist() == [[0, -1], [-1, -1], [1, 999]]
    assert dataset.label_sets.dtype == np.int64
    assert [dataset.class_ids[target] for _, target in dataset] == list(WNIDS)
    scores = torch.zeros(3, 1000)
    scores[0, 5] = scores[1, 1] = scores[2, 1] = 1.0  # the second is not scored, the third says goldfish
    assert real_accuracy(scores, torch.from_numpy(dataset.label_sets)) == 0.5


def test_a_subset_and_a_flat_folder_have_the_labels_of_their_images(tmp_path: Path) -> None:
    imagenet_tree(tmp_path)
    labels = real_file(tmp_path / "elsewhere.json")
    for image in list((tmp_path / "val").rglob("*.JPEG")):
        image.rename(tmp_path / "val" / image.name)
    for wnid in WNIDS:
        (tmp_path / "val" / wnid).rmdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").unlink()
    (tmp_path / "val.txt").write_text("".join(f"ILSVRC2012_val_{n:08d}.JPEG {WNIDS[n - 1]}\n" for n in (1, 2, 3)))
    dataset = make_dataset(f"ImageNetReaL:root={tmp_path}:labels={labels}")
    assert dataset.get_targets().tolist() == [1, 999]
    assert dataset.label_sets.tolist() == [[-1, -1], [1, 999]]


def test_labels_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    imagenet_tree(tmp_path)
    real_file(tmp_path / "real.json")
    before = ImageNetReaL(tmp_path).fingerprint()
    (tmp_path / "real.json").write_text("[[0], [1], [2]]")
    assert ImageNetReaL(tmp_path).fingerprint() != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"there is no real\.json in .*; put the file of ReaL's authors there, or give labels=FILE"),
        ("[[0], [1]]", "has labels of 2 images and none of image 3"),
        ("[[0], [1], [1000]]", "is no list of lists of class numbers from 0 to 999"),
        ('{"a": [1]}', "is no list of lists"),
        ("[[0], [1]", "is no JSON"),
    ],
)
def test_a_file_that_is_not_reals_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    imagenet_tree(tmp_path)
    if text is not None:
        (tmp_path / "real.json").write_text(text)
    with pytest.raises(DataError, match=message):
        ImageNetReaL(tmp_path)


def test_images_of_other_classes_have_no_real_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "val" / "n00000001" / "ILSVRC2012_val_00000001.JPEG")
    real_file(tmp_path / "real.json")
    with pytest.raises(DataError, match="n00000001 in .* is no class of ImageNet-1k"):
        ImageNetReaL(tmp_path)


# All of them


def test_every_set_travels_to_a_worker_and_takes_transforms(tmp_path: Path) -> None:
    v2_tree(tmp_path / "imagenetv2-matched-frequency-format-val")
    real_file(imagenet_tree(tmp_path) / "real.json")
    c_tree(tmp_path, severities=(2,))
    for _, folder in WNID_SETS:
        wnid_tree(tmp_path / folder)
    for text in ("ImageNetA", "ImageNetR", "ImageNetSketch", "ImageNetV2", "ImageNetC:severity=2", "ImageNetReaL"):
        name, _, rest = text.partition(":")
        dataset = make_dataset(f"{name}:root={tmp_path}:{rest}" if rest else f"{name}:root={tmp_path}")
        copy = pickle.loads(pickle.dumps(dataset))
        assert copy.fingerprint() == dataset.fingerprint()
        assert copy.path_of(len(copy) - 1) == dataset.path_of(len(dataset) - 1)
        assert len(dataset.class_names or ()) == len(dataset.class_mapping) == len(dataset.class_ids)
        changed = make_dataset(
            f"{name}:root={tmp_path}:{rest}" if rest else f"{name}:root={tmp_path}",
            transform=lambda image: image.size,
            target_transform=lambda target: -target,
        )
        assert changed[0] == ((8, 6), -dataset[0][1])


# What features carry along of them.


@pytest.mark.parametrize("column", ["wnid", "name"])
def test_folders_named_by_identifiers_or_names_know_their_identifiers(tmp_path: Path, column: str) -> None:
    for number in (8, 6):
        write_image(tmp_path / getattr(IMAGENET_CLASSES[number], column) / "0.jpg")
    write_image(tmp_path / "zzz" / "0.jpg")
    dataset = make_dataset(str(tmp_path))
    assert sorted(infer_class_ids(dataset)) == [STINGRAY, HEN, "zzz"]
    assert infer_class_ids(Subset(dataset, np.array([2]))) == infer_class_ids(dataset)


def test_sets_that_know_their_identifiers_are_asked_and_other_names_tell_nothing(tmp_path: Path) -> None:
    assert infer_class_ids(ImageNetV2(v2_tree(tmp_path / "v2")))[8] == HEN
    imagenet_tree(tmp_path / "imagenet")
    assert infer_class_ids(make_dataset(f"ImageNet:split=VAL:root={tmp_path / 'imagenet'}")) == list(WNIDS)
    for name in ("cat", "dog"):
        write_image(tmp_path / "pets" / name / "0.jpg")
    assert infer_class_ids(make_dataset(str(tmp_path / "pets"))) is None

    class Ambiguous:
        class_names = ("crane", "crane", "hen")

    assert infer_class_ids(Ambiguous()) is None


def test_features_carry_the_rules_of_their_set_for_the_images_that_could_be_read(tmp_path: Path) -> None:
    root = imagenet_tree(tmp_path)
    (root / "real.json").write_text(json.dumps([[index % 3, 7] for index in range(50_000)]))
    dataset = ImageNetReaL(root)
    images = torch.tensor([2, 0])
    scoring = Scoring.of(dataset, images)
    assert scoring.own_classes and scoring.part_numbers is None
    assert torch.equal(scoring.label_sets, torch.from_numpy(dataset.label_sets)[images])
    part = Scoring.of(Subset(dataset, np.array([1, 2])), torch.tensor([1]))
    assert torch.equal(part.label_sets, torch.from_numpy(dataset.label_sets)[[2]])
    assert torch.equal(scoring.take(torch.tensor([1])).label_sets, torch.from_numpy(dataset.label_sets)[[0]])
    assert Scoring.of(make_dataset("toy:n=4"), torch.arange(4)) is None
