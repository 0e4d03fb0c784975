import os
from pathlib import Path

import pytest

from dinov2.data.datasets import ListFile
from dinov2.errors import DataError
from tests.data.datasets.trees import write_image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate(["a.png", "my photo.png", "sub/c.png"]):
        write_image(tmp_path / "images" / name, colour=number)
    return tmp_path


def made(folder: Path, name: str, text: str) -> ListFile:
    (folder / name).write_text(text, encoding="utf-8")
    return ListFile(folder / name)


def test_a_text_list_gives_paths_relative_to_itself_in_its_order(images: Path) -> None:
    listing = made(images, "all.txt", "images/sub/c.png\n\nimages/my photo.png\nimages/a.png\n")
    assert [listing[i][0].getpixel((0, 0))[0] for i in range(3)] == [2, 1, 0]
    assert listing.class_names is None
    assert listing.get_targets() is None


def test_absolute_paths_are_taken_as_they_are(images: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert len(made(tmp_path / "elsewhere", "l.txt", f"{images / 'images' / 'a.png'}\n")) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "images/a.png 4\nimages/my photo.png 0\nimages/sub/c.png 4\n"),
        ("l.txt", "images/a.png\t4\nimages/my photo.png\t0\nimages/sub/c.png\t4\n"),
        ("l.csv", "path,label\nimages/a.png,4\nimages/my photo.png,0\nimages/sub/c.png,4\n"),
        ("l.csv", "id,label,path\n7,4,images/a.png\n8,0,images/my photo.png\n9,4,images/sub/c.png\n"),
        ("l.csv", 'images/a.png,4\n"images/my photo.png",0\nimages/sub/c.png,4\n'),
        ("l.csv", "\ufeffpath,label\r\nimages/a.png,4\r\nimages/my photo.png,0\r\nimages/sub/c.png,4\r\n"),
    ],
)
def test_class_numbers_are_kept_as_they_are(images: Path, name: str, text: str) -> None:
    listing = made(images, name, text)
    targets = listing.get_targets()
    assert targets is not None
    assert targets.tolist() == [4, 0, 4]
    assert listing.class_names == ["0", "1", "2", "3", "4"]
    assert os.path.basename(listing.path_of(1)) == "my photo.png"


def test_class_names_are_numbered_in_sorted_order(images: Path) -> None:
    listing = made(images, "l.csv", "path,label\nimages/a.png,zebra\nimages/my photo.png,ant\nimages/sub/c.png,zebra\n")
    assert listing.class_names == ["ant", "zebra"]
    assert [listing.get_target(i) for i in range(3)] == [1, 0, 1]


def test_a_csv_without_labels_has_none(images: Path) -> None:
    assert made(images, "l.csv", "path\nimages/a.png\n").get_targets() is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "\n\n", "names no image"),
        ("l.csv", "path,label\n", "names no image"),
        ("l.txt", "images/a.png 1\nimages/sub/c.png\n", "1 of the 2 images in .* have no label .*number 2"),
        ("l.txt", "images/gone.png\n", "files that do not exist, such as .*gone.png"),
        ("l.csv", "a,b,c\n", "3 columns and no header"),
        ("l.csv", "label,path\n4\n", "has no path"),
        ("l.txt", "images/a.png 99999999999\n", "no class number"),
        ("l.csv", "a" * 200_000 + "\n", "l.csv is no table of paths"),
        ("l.csv", "JFIF\0\1", "l.csv is no text; give a list"),
        ("l.txt", "JFIF\0\1", "l.txt is no text; give a list"),
    ],
)
def test_a_list_that_makes_no_sense_says_why(images: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(images, name, text)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt cannot be read"):
        ListFile(tmp_path / "gone.txt")


def test_one_missing_image_is_left_to_the_reading(images: Path) -> None:
    listing = made(images, "l.txt", "images/gone.png\nimages/a.png\n")
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        listing[0]
    assert listing[1][0].size == (8, 6)


def test_the_fingerprint_follows_order_labels_and_sizes(images: Path) -> None:
    texts = ["images/a.png\nimages/sub/c.png\n", "images/sub/c.png\nimages/a.png\n"]
    texts += ["images/a.png 0\nimages/sub/c.png 1\n", "images/a.png 1\nimages/sub/c.png 0\n"]
    prints = [made(images, "l.txt", text).fingerprint() for text in texts]
    write_image(images / "images" / "a.png", size=(60, 60), colour=3)
    prints.append(made(images, "l.txt", texts[0]).fingerprint())
    assert len(set(prints)) == 5
    assert made(images, "again.txt", texts[0]).fingerprint() == prints[-1]
