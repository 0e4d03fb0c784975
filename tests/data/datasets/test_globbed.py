"""Image files by pattern and one by one."""

import pickle

import pytest

from dinov2.data.datasets.files import ImageFiles, glob_images
from dinov2.data.loaders import make_dataset
from dinov2.errors import DataError
from tests.runs import pictures


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "photos", n=6, classes=2)
    pictures(tmp_path / "photos" / "class0-b", n=1)
    (tmp_path / "photos" / "class0" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / "class0" / "folder.jpg").mkdir()
    return tmp_path / "photos"


def names(dataset):
    return [dataset.path_of(index) for index in range(len(dataset))]


def test_a_pattern_finds_images_at_any_depth_in_the_order_of_a_folder(photos):
    expected = names(make_dataset(str(photos)))
    assert names(glob_images("photos/**/*")) == names(make_dataset("photos/**/*")) == expected
    assert names(make_dataset("glob:photos/**/*.png")) == expected == names(make_dataset(f"{photos}/**"))
    assert [name[-7:] for name in names(glob_images("photos/class?/00[12].png"))] == ["002.png", "001.png"]


def test_an_existing_path_wins_over_the_pattern(photos):
    (photos / "a[b]").mkdir()
    pictures(photos / "a[b]", n=2)
    assert len(make_dataset("photos/a[b]")) == 2


def test_files_keep_the_order_in_which_they_are_named_and_have_no_labels(photos):
    files = ImageFiles(["photos/class1/001.png", "photos/class0/000.png", "photos/class1/001.png"])
    assert [name[-7:] for name in names(files)] == ["001.png", "000.png", "001.png"]
    assert files.get_targets() is None and files[1][1] is None and files[1][0].size == (24, 24)
    assert names(pickle.loads(pickle.dumps(files))) == names(files)


def test_the_fingerprint_is_that_of_names_and_sizes(photos):
    before = glob_images("photos/class1/*").fingerprint()
    assert glob_images("photos/class1/*.png").fingerprint() == before
    (photos / "class1" / "001.png").write_bytes(b"other")
    assert glob_images("photos/class1/*").fingerprint() != before


def test_what_matches_nothing_or_does_not_exist_is_refused(photos):
    with pytest.raises(DataError, match=r"no image matches photos/\*\.jpeg; small and capital letters differ"):
        make_dataset("photos/*.jpeg")
    with pytest.raises(DataError, match=r"there is no image file no\.png"):
        ImageFiles(["photos/class0/000.png", "no.png"])
    with pytest.raises(DataError, match="no image was named"):
        ImageFiles([])
