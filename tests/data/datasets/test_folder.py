import logging
import os
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.datasets.files import Folder, find_image_files, glob_images
from dinov2.errors import DataError
from tests.data.datasets.trees import class_tree, write_image


def test_labels_are_the_first_level_of_folders_whatever_lies_below(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "deep" / "er" / "a.png")
    write_image(tmp_path / "cat" / "b.JPG")
    write_image(tmp_path / "cat-like" / "c.webp")
    write_image(tmp_path / "ant" / "d.bmp")
    folder = Folder(tmp_path)
    assert folder.class_names == ["ant", "cat", "cat-like"]
    assert [os.path.relpath(folder.path_of(i), tmp_path).replace(os.sep, "/") for i in range(4)] == [
        "ant/d.bmp",
        "cat/b.JPG",
        "cat/deep/er/a.png",
        "cat-like/c.webp",
    ]
    targets = folder.get_targets()
    assert targets is not None
    assert targets.dtype == np.int64
    assert targets.tolist() == [0, 1, 1, 2] == [folder.get_target(i) for i in range(4)]


def test_a_folder_of_three_images_needs_no_classes(tmp_path: Path) -> None:
    for number in range(3):
        write_image(tmp_path / f"{number}.png", colour=number)
    folder = Folder(tmp_path)
    assert len(folder) == 3
    assert folder.class_names is None
    assert folder.get_targets() is None
    assert [(image.getpixel((0, 0)), target) for image, target in folder] == [((i, i, i), None) for i in range(3)]


def test_one_image_outside_the_class_folders_takes_the_labels_away(tmp_path: Path) -> None:
    class_tree(tmp_path, {"a": 1, "b": 1})
    write_image(tmp_path / "stray.png")
    assert Folder(tmp_path).class_names is None


def test_an_empty_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no image was found in .* \(1 other and 0 hidden files\)"):
        Folder(tmp_path)


@pytest.mark.parametrize(("name", "what"), [("missing", "does not exist"), ("a.png", "is a file")])
def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path, name: str, what: str) -> None:
    write_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=what):
        Folder(tmp_path / name)


def test_hidden_and_foreign_files_are_counted_and_passed_over(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / ".b.png")
    write_image(tmp_path / ".thumbnails" / "c.png")
    (tmp_path / "readme.md").write_text("text")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    folder = Folder(tmp_path)
    assert len(folder) == 1
    assert folder.skipped == {"hidden": 2, "other": 3}


def test_files_passed_over_are_said_with_their_endings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "dinov2")
    write_image(tmp_path / "a.png")
    for name in ("1.HEIC", "2.heic", "b/film.mp4", "README", "odd.\udce9", "slide.czi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jpg")
    words = "2 .heic, 2 without an ending, 1 .czi, 1 .jpg that are no regular files, 1 .mp4"
    for _ in range(2):
        assert find_image_files(tmp_path) == [str(tmp_path / "a.png")]
        Folder(tmp_path)
    glob_images(f"{tmp_path}/**")
    glob_images(f"{tmp_path}/*.png")
    assert [words in message for message in caplog.messages] == [True, False]
    assert f"{tmp_path}: 7 files are passed over ({words})" in caplog.messages[0]
    assert f"{tmp_path}/**: 7 files are passed over" in caplog.messages[1]
    (tmp_path / "a.png").unlink()
    for refused in (Folder, find_image_files):
        with pytest.raises(DataError, match="2 .heic"):
            refused(tmp_path)  # type: ignore[operator]


def test_linked_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    class_tree(tmp_path / "store", {"x": 2})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store" / "x", target_is_directory=True)
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data", target_is_directory=True)
    assert len(Folder(tmp_path / "data")) == 2


def test_a_folder_with_splits_as_classes_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_tree(tmp_path, {"train": 1, "val": 1})
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        Folder(tmp_path)
    assert "look like splits" in caplog.text


def test_one_file_in_twenty_is_corrupt_and_each_is_named(tmp_path: Path) -> None:
    class_tree(tmp_path, {"a": 40})
    bad = {"a/3.png", "a/17.png"}
    (tmp_path / "a" / "3.png").write_bytes(b"no image at all")
    whole = (tmp_path / "a" / "17.png").read_bytes()
    (tmp_path / "a" / "17.png").write_bytes(whole[: len(whole) // 2])
    folder = Folder(tmp_path)
    assert len(folder) == 40
    for index in range(40):
        name = os.path.relpath(folder.path_of(index), tmp_path).replace(os.sep, "/")
        if name in bad:
            with pytest.raises(DataError, match=re.escape(folder.path_of(index))):
                folder[index]
        else:
            assert folder[index][0].size == (8, 6)


def test_a_deleted_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    class_tree(tmp_path, {"a": 2})
    folder = Folder(tmp_path)
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        folder[1]


def test_the_fingerprint_follows_names_and_sizes_but_not_the_place(tmp_path: Path) -> None:
    one, two = (class_tree(tmp_path / name, {"a": 2, "b": 1}) for name in ("one", "two"))
    before = Folder(one).fingerprint()
    assert before == Folder(two).fingerprint()
    write_image(two / "b" / "0.png", size=(50, 50), colour=9)
    resized = Folder(two).fingerprint()
    (two / "b" / "0.png").rename(two / "b" / "z.png")
    assert len({before, resized, Folder(two).fingerprint()}) == 3


def test_transforms_reach_image_and_target(tmp_path: Path) -> None:
    class_tree(tmp_path, {"a": 1, "b": 1})
    folder = Folder(tmp_path, transform=lambda image: image.size, target_transform=lambda target: -target)
    assert folder[1] == ((8, 6), -1)
    assert folder[-1] == folder[1]
    with pytest.raises(IndexError, match="image 2 was asked of a data set of 2"):
        folder[2]


@pytest.mark.slow
def test_a_hundred_thousand_hard_links_are_listed_in_little_memory(tmp_path: Path) -> None:
    original = write_image(tmp_path / "original.png")
    for number in range(100):
        (tmp_path / "data" / f"class{number:02d}").mkdir(parents=True)
    for number in range(100_000):
        # A file takes 65,000 links at most on common file systems.
        if number % 50_000 == 0:
            original = write_image(tmp_path / f"original{number}.png")
        os.link(original, tmp_path / "data" / f"class{number % 100:02d}" / f"image_{number:06d}.png")
    tracemalloc.start()
    folder = Folder(tmp_path / "data")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(folder) == 100_000
    assert len(folder.class_names or []) == 100
    assert folder[99_999][1] == 99
    assert kept < 10_000_000
