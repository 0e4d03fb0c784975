"""`neighbours` on what `embed` wrote: the nearest images, by the same model, with their pictures."""

import base64
import re
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from dinov2.apps.embed import embed
from dinov2.apps.neighbours import neighbours
from dinov2.encode.store import open_features
from dinov2.errors import ConfigError, DataError
from dinov2.pretrained import digest_of_files, load
from tests.apps.test_embed import small
from tests.runs import TABLE_FORMATS, pictures


@pytest.fixture
def model(here) -> Path:
    return small(here / "model.pth")


@pytest.fixture
def photos(here) -> Path:
    """16 images in two classes; 3 and 12 are the same picture."""
    folder = pictures(here / "photos", n=16, classes=2)
    shutil.copy(folder / "class1" / "003.png", folder / "class0" / "012.png")
    return folder


def nearest_by_hand(column: np.ndarray, row: int, k: int) -> list[int]:
    unit = normalize(torch.tensor(column), dim=1)
    similarities = unit @ unit[row]
    similarities[row] = -2
    return similarities.argsort(descending=True, stable=True)[:k].tolist()


@pytest.mark.parametrize("kind", TABLE_FORMATS)
@pytest.mark.parametrize("merge", ["always", "never"])
def test_stored_images_find_their_neighbours_in_every_format(here, photos, model, kind, merge):
    embed("photos", model=model, output=f"out.{kind}", part_rows=4, merge=merge)
    report = neighbours(f"out.{kind}", k=3, samples=5)
    stored = open_features(f"out.{kind}")
    paths, features = stored.read("path").tolist(), stored.read("cls")
    assert len(report.neighbours) == 5
    for query, hits in report.neighbours.items():
        assert [hit.path for hit in hits] == [paths[r] for r in nearest_by_hand(features, paths.index(query), 3)]
        assert all(hit.label == Path(hit.path).parent.name for hit in hits)
    page = (here / f"out.{kind}.neighbours.html").read_text()
    assert report.page == Path(f"out.{kind}.neighbours.html")
    assert page.count("<img") == 5 * 4 and "Green is the same class" in page


@pytest.mark.parametrize("column", ["cls", "mean", "layer1_cls", "layer1_mean"])
def test_an_image_goes_the_way_of_the_stored_ones(here, photos, model, column):
    embed("photos", model=model, output="out.npz", size=40, fit="aspect", mean=True, layers=[1], precision="fp32")
    shutil.copy(photos / "class0" / "004.png", here / "copy.png")
    report = neighbours("out.npz", queries=["copy.png"], k=2, column=column, output="p/page.html")
    first = report.neighbours["copy.png"][0]
    assert first.path == "class0/004.png" and first.similarity == pytest.approx(1, abs=1e-5)
    assert (here / "p" / "page.html").is_file()


def test_an_image_is_no_neighbour_of_itself(here, photos, model):
    embed("photos", model=model, output="out.npz")
    report = neighbours("out.npz", queries=["photos/class1/003.png", str(here / "photos/class0/000.png")], k=20)
    first, second = report.neighbours.values()
    assert first[0].path == "class0/012.png" and first[0].similarity == pytest.approx(1, abs=1e-5)
    assert "class1/003.png" not in [hit.path for hit in first]
    assert "class0/000.png" not in [hit.path for hit in second]
    assert len(first) == len(second) == 15


def test_near_duplicates_are_paired_and_grouped(here, photos, model):
    embed("photos", model=model, output="out.npz", precision="fp32")
    report = neighbours("out.npz", duplicates=1.0)
    assert [(a, b) for a, b, _ in report.pairs] == [("class0/012.png", "class1/003.png")]
    assert report.pairs[0][2] == pytest.approx(1, abs=1e-6)
    assert report.groups == [["class0/012.png", "class1/003.png"]]
    assert report.neighbours == {}
    page = (here / "out.npz.neighbours.html").read_text()
    assert "1 pairs with a cosine similarity of at least 1.0, in 1 groups." in page and page.count("<img") == 2


def test_pictures_of_a_data_set_without_files_come_from_the_data_set(here, model):
    embed("toy:n=6", model=model, output="out.npz")
    neighbours("out.npz", k=1, samples=2)
    page = (here / "out.npz.neighbours.html").read_text()
    sources = re.findall(r"base64,([^\"]+)", page)
    assert len(sources) == 4
    assert Image.open(BytesIO(base64.b64decode(sources[0]))).size == (32, 32)


def test_pictures_that_moved_are_found_where_one_says_and_missing_ones_are_no_error(here, photos, model):
    embed("photos", model=model, output="out.npz")
    photos.rename(here / "bilder")
    neighbours("out.npz", k=2, samples=2)
    page = here / "out.npz.neighbours.html"
    assert page.read_text().count("not found") == 6
    neighbours("out.npz", k=2, samples=2, images="bilder")
    assert page.read_text().count("<img") == 6


def test_queries_through_other_weights_are_refused(here, photos, model):
    embed("photos", model=model, output="out.npz")
    other = small(here / "other.pth", depth=4)
    with pytest.raises(ConfigError, match=r"are of other weights than .*other.pth \([0-9a-f]{12}, not [0-9a-f]{12}\)"):
        neighbours("out.npz", queries=["photos/class0/000.png"], model=str(other))
    model.rename(here / "moved.pth")
    assert neighbours("out.npz", queries=["photos/class0/000.png"], model="moved.pth", k=1).neighbours
    # Manifests had the digest of the weight file before that of the tensors.
    text = (here / "out.npz.json").read_text()
    before = text.replace(load("moved.pth").digest, digest_of_files([Path("moved.pth")]))
    assert before != text
    (here / "out.npz.json").write_text(before)
    assert neighbours("out.npz", queries=["photos/class0/000.png"], model="moved.pth", k=1).neighbours
    (here / "out.npz.json").unlink()
    with pytest.raises(ConfigError, match="has lost its manifest, which names its model; give --model"):
        neighbours("out.npz", queries=["photos/class0/000.png"])


@pytest.mark.parametrize(
    "options, error, reason",
    [
        ({"features": "no.npz"}, DataError, "there are no features no.npz"),
        ({"column": "mean"}, DataError, "has no column 'mean'; its columns are index, path"),
        ({"column": "height"}, ConfigError, "the column 'height' holds no vectors to compare; choose one of cls"),
        ({"k": 0}, ConfigError, "the number of neighbours is 0"),
        ({"samples": 0}, ConfigError, "the number of samples is 0"),
        ({"duplicates": 1.5}, ConfigError, "a cosine similarity of 1.5 does not exist"),
        ({"duplicates": float("nan")}, ConfigError, "a cosine similarity of nan does not exist"),
        ({"queries": ["no.png"]}, DataError, "there is no image file no.png"),
        ({"queries": ["model.pth"]}, DataError, "model.pth cannot be read as an image"),
        ({"queries": ["broken.png"]}, DataError, "broken.png cannot be read as an image"),
        ({"output": "out.npz"}, ConfigError, "the page out.npz is no .html file"),
        ({"output": "model.pth/a.html"}, ConfigError, "model.pth is a file"),
        ({"images": "nowhere"}, DataError, "there is no folder nowhere"),
        ({"device": "gpu"}, ConfigError, "no device is called 'gpu'"),
    ],
)
def test_wrong_input_is_refused(here, photos, model, options, error, reason):
    embed("photos", model=model, output="out.npz")
    (here / "broken.png").write_bytes(b"?")
    with pytest.raises(error, match=reason):
        neighbours(**{"features": "out.npz", **options})


def test_one_image_alone_has_no_neighbours(here, model):
    embed("toy:n=1", model=model, output="out.npz")
    with pytest.raises(DataError, match="out.npz holds one image alone"):
        neighbours("out.npz")
