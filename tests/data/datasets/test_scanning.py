import logging
import os
import pickle
import tarfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from dinov2.data.datasets import scanning
from dinov2.data.datasets.scanning import PathTable, _cache_file, scan_folder
from dinov2.data.loaders import make_dataset
from tests.data.datasets.trees import WNIDS, imagenet_tree, settle, write_image


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 30 images that counts as big, and that nobody has touched for an hour."""
    monkeypatch.setattr(scanning, "_CACHE_FROM", 10)
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    for number in range(30):
        write_image(tmp_path / "data" / f"c{number % 3}" / f"{number}.png")
    settle(tmp_path / "data")
    return tmp_path / "data"


def listed(root: Path) -> tuple[list[str], int]:
    """Paths of the images, and how many folders had to be listed for them."""
    with patch.object(os, "scandir", wraps=os.scandir) as scandir:
        return list(scan_folder(root).paths), scandir.call_count


def test_the_second_scan_of_a_big_folder_comes_from_the_cache(many: Path) -> None:
    first, folders = listed(many)
    again, folders_again = listed(many)
    assert first == again
    assert (folders, folders_again) == (4, 0)


def test_the_cache_lies_outside_the_data(many: Path, tmp_path: Path) -> None:
    before = sorted(many.rglob("*"))
    scan_folder(many)
    assert sorted(many.rglob("*")) == before
    assert _cache_file(many).is_file()
    assert _cache_file(many).is_relative_to(tmp_path / "cache" / "scans")


@pytest.mark.parametrize("change", ["add", "delete", "rename", "new folder"])
def test_any_change_of_the_folder_makes_it_be_listed_again(many: Path, change: str) -> None:
    before, _ = listed(many)
    match change:
        case "add":
            write_image(many / "c1" / "new.png")
        case "delete":
            (many / "c1" / "1.png").unlink()
        case "rename":
            (many / "c1" / "1.png").rename(many / "c1" / "one.png")
        case "new folder":
            write_image(many / "c9" / "new.png")
    after, folders = listed(many)
    assert folders > 0
    assert after != before
    assert sorted(after) == sorted(str(p.relative_to(many).as_posix()) for p in many.rglob("*.png"))


def test_a_folder_that_is_being_written_is_not_cached(many: Path) -> None:
    write_image(many / "c0" / "now.png")
    scan_folder(many)
    assert not _cache_file(many).exists()


def test_a_small_folder_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    write_image(tmp_path / "data" / "a.png")
    settle(tmp_path / "data")
    scan_folder(tmp_path / "data")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_damaged_cache_is_ignored_and_replaced(many: Path, content: bytes) -> None:
    first, _ = listed(many)
    _cache_file(many).write_bytes(content)
    again, folders = listed(many)
    assert again == first
    assert folders == 4
    assert listed(many)[1] == 0


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (many.parent / "file").write_text("in the way")
    monkeypatch.setenv("DINOV2_CACHE", str(many.parent / "file"))
    assert len(listed(many)[0]) == 30


def test_sizes_survive_the_cache(many: Path) -> None:
    first, again = scan_folder(many), scan_folder(many)
    expected = [os.path.getsize(many / path) for path in first.paths]
    assert first.sizes.tolist() == again.sizes.tolist() == expected


def test_a_path_table_gives_back_every_name_and_pickles() -> None:
    names = ["a.png", "", "ä/ö.png", "日本.jpg", "with\nnewline.png", os.fsdecode(b"\xff\xfe.png")]
    table = pickle.loads(pickle.dumps(PathTable(names)))
    assert list(table) == names
    assert len(PathTable([])) == 0
    with pytest.raises(IndexError, match="path 6"):
        table[6]
    with pytest.raises(ValueError, match="belong together"):
        PathTable.from_arrays(table.arrays[0], np.array([0, 3]))


def warnings_of(text: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings about files passed over while the data set `text` is made."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        len(make_dataset(text))
    return [message for message in caplog.messages if "because images end in" in message]


def test_every_layout_says_which_files_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = imagenet_tree(tmp_path / "imagenet")
    write_image(tmp_path / "imagenet-a" / WNIDS[0] / "1.jpg")
    write_image(tmp_path / "fog" / "3" / WNIDS[0] / "1.jpg")
    for place in (root / "train", tmp_path / "imagenet-a", tmp_path / "fog" / "3"):
        for name in ("1.heic", "2.HEIC", "README.md"):
            (place / name).write_bytes(b"")
    for text, place in (
        (f"ImageNet:split=TRAIN:root={root}", root / "train"),
        (f"ImageNetA:root={tmp_path}", tmp_path / "imagenet-a"),
        (f"ImageNetC:root={tmp_path}:corruption=fog:severity=3", tmp_path),
    ):
        (message,) = warnings_of(text, caplog)
        assert message.startswith(f"{place}: 3 files are passed over (2 .heic, 1 .md), because images end in .jpg")
    with tarfile.open(tmp_path / "n1.tar", "w") as tar:
        tar.add(root / "train" / "README.md", "notes.txt")
        tar.add(tmp_path / "fog" / "3" / WNIDS[0] / "1.jpg", "1.jpg")
    assert f"{tmp_path}: 1 file is passed over (1 .txt)" in warnings_of(f"ImageNet22k:root={tmp_path}", caplog)[0]


def test_a_list_says_which_of_its_files_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b"):
        write_image(tmp_path / f"{name}.png").rename(tmp_path / name)
    (tmp_path / "c.heic").write_bytes(b"")
    (tmp_path / "l.csv").write_text("path\na.png\nb\nc.heic\ngone.png\n")
    (message,) = warnings_of(str(tmp_path / "l.csv"), caplog)
    assert f"{tmp_path / 'l.csv'}: 2 files are unlikely to be read (1 .heic, 1 .png that do not exist)" in message
    assert len(make_dataset(str(tmp_path / "l.csv"))) == 4  # the rows stay those of the list
    (tmp_path / "whole.csv").write_text("path\na.png\nb\n")
    assert warnings_of(str(tmp_path / "whole.csv"), caplog) == []
