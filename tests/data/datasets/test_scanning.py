import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.datasets import scanning
from dinov2.data.datasets.scanning import PathTable, cache_file, scan_folder
from tests.data.datasets.trees import settle, write_image


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 30 images that counts as big, and that nobody has touched for an hour."""
    monkeypatch.setattr(scanning, "_CACHE_FROM", 10)
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    for number in range(30):
        write_image(tmp_path / "data" / f"c{number % 3}" / f"{number}.png")
    settle(tmp_path / "data")
    return tmp_path / "data"


class Counter:
    """Counts the folders that are really listed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, found: int) -> None:
        self.calls += 1


def listed(root: Path) -> tuple[list[str], int]:
    """Paths found, and how many folders had to be listed for it."""
    counter = Counter()
    return list(scan_folder(root, progress=counter).paths), counter.calls


def test_the_second_scan_of_a_big_folder_comes_from_the_cache(many: Path) -> None:
    first, folders = listed(many)
    again, folders_again = listed(many)
    assert first == again
    assert (folders, folders_again) == (4, 0)


def test_the_cache_lies_outside_the_data(many: Path, tmp_path: Path) -> None:
    before = sorted(many.rglob("*"))
    scan_folder(many)
    assert sorted(many.rglob("*")) == before
    assert cache_file(many).is_file()
    assert cache_file(many).is_relative_to(tmp_path / "cache" / "scans")


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
    assert not cache_file(many).exists()


def test_a_small_folder_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    write_image(tmp_path / "data" / "a.png")
    settle(tmp_path / "data")
    scan_folder(tmp_path / "data")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_damaged_cache_is_ignored_and_replaced(many: Path, content: bytes) -> None:
    first, _ = listed(many)
    cache_file(many).write_bytes(content)
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
