"""`eval --features`: what `embed` wrote gives the figures of the model, without the model and without the images."""

import csv

import numpy as np
import pytest

from dinov2.apps.embed import embed
from dinov2.apps.evaluation.context import EvalConfig
from dinov2.apps.evaluation.linear import linear
from dinov2.apps.evaluation.plan import evaluation_plan
from dinov2.apps.evaluation.protocols import knn, log_regression
from dinov2.errors import ConfigError, DataError
from dinov2.eval.knn.evaluate import KnnSettings
from dinov2.eval.linear import LinearSettings
from tests.apps.test_embed import small
from tests.runs import TABLE_FORMATS, pictures

QUICK = LinearSettings(learning_rates=(0.01, 0.1), n_iterations=4, batch_size=16)


@pytest.fixture
def photos(here):
    """Two folders of images in classes, and a model."""
    small(here / "m.pth")
    pictures(here / "train", n=30, classes=3)
    pictures(here / "val", n=12, classes=3)
    return here


def embedded(*names: str, **options) -> list[str]:
    suffix = options.pop("suffix", "npz")
    for name in names:
        embed(name, model="m.pth", output=f"{name}.{suffix}", precision="fp32", device="cpu", **options)
    return [f"{name}.{suffix}" for name in names]


def plain(**options) -> EvalConfig:
    return EvalConfig(device="cpu", precision="fp32", **options)


def figures(report) -> list[tuple]:
    return [(row.metric, row.k, row.value, row.ci, row.n) for row in report.rows]


@pytest.mark.parametrize("suffix", TABLE_FORMATS)
def test_two_files_give_the_figures_of_the_model_on_the_two_sets(photos, suffix):
    of_model = knn(plain(model="m.pth", train_dataset="train", val_dataset="val"), settings=KnnSettings(nb_knn=[3]))
    files = embedded("train", "val", suffix=suffix)
    (photos / "m.pth").unlink()
    report = knn(plain(features=files), settings=KnnSettings(nb_knn=[3]))
    assert figures(report) == figures(of_model)
    row, other = report.rows[0], of_model.rows[0]
    assert row.model["sha256"] == other.model["sha256"] and row.model["features"] == files[0]
    assert row.transform == other.transform and row.precision == "float32"


def test_one_file_is_split_as_its_folder_is(photos):
    of_model = knn(plain(model="m.pth", dataset="train"), settings=KnnSettings(nb_knn=[3]))
    report = knn(plain(features=embedded("train", merge="never")), settings=KnnSettings(nb_knn=[3]))
    assert figures(report) == figures(of_model)
    assert report.rows[0].settings["split"] == of_model.rows[0].settings["split"]


def test_logistic_regression_and_the_linear_probe_take_features(photos):
    sets = {"train_dataset": "train", "val_dataset": "val"}
    files = embedded("train", "val", mean=True, layers=[0, 1])  # of three blocks, of which a probe reads all
    inputs, of_model = plain(features=files), plain(model="m.pth", **sets)
    assert figures(log_regression(inputs, Cs=[1.0])) == figures(log_regression(of_model, Cs=[1.0]))
    ours, models = linear(inputs, settings=QUICK), linear(of_model, settings=QUICK)
    assert [row.settings["head"] for row in ours.rows] == [row.settings["head"] for row in models.rows]
    assert ours.value() == pytest.approx(models.value())


def test_labels_may_come_from_a_data_set_of_the_same_images(photos):
    paths = sorted((photos / "train").rglob("*.png"))
    embed([str(path) for path in paths], model="m.pth", output="flat.npz")
    with pytest.raises(DataError, match=r"flat.npz have no labels; name the labelled data set of the same images"):
        knn(plain(features=["flat.npz"]))
    for name in ("train", "list:labels.csv"):
        with open("labels.csv", "w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *((path, path.parent.name) for path in paths)])
        report = knn(plain(features=["flat.npz"], dataset=name), settings=KnnSettings(nb_knn=[3]))
        assert report.rows[0].n == 6
    with pytest.raises(DataError, match=r"val has no label for .*train/class0/000.png, of the features in flat.npz"):
        knn(plain(features=["flat.npz"], dataset="val"))


def test_what_needs_a_model_or_images_is_refused(photos):
    files = embedded("train", "val")
    for wrong in (
        lambda: knn(plain(features=files), settings=KnnSettings(nb_knn=[3]), baselines=True),
        lambda: linear(plain(features=files), protocol="release"),
        lambda: linear(plain(features=files), settings=QUICK, test_datasets=["val"]),
    ):
        with pytest.raises(ConfigError, match="name --model"):
            wrong()
    with pytest.raises(ConfigError, match="a model and features were named"):
        knn(plain(model="m.pth", features=files))
    with pytest.raises(ConfigError, match="no model was named; .*or --features that"):
        knn(plain())
    with pytest.raises(ConfigError, match="3 files of features were named"):
        knn(plain(features=[*files, "x.npz"]))
    small(photos / "m.pth", depth=4)
    embed("val", model="m.pth", output="other.npz")
    with pytest.raises(ConfigError, match="train.npz and other.npz hold features of two models"):
        knn(plain(features=["train.npz", "other.npz"]))
    with np.load("train.npz") as kept:
        np.savez("nan.npz", **{**kept, "cls": kept["cls"] * np.inf})
    with pytest.raises(DataError, match="NaN or infinite"):
        knn(plain(features=["nan.npz"]))


def test_a_dry_run_counts_rows(photos):
    lines = evaluation_plan(plain(features=embedded("train", "val")), task="knn")
    assert lines[0] == "30 rows of features to learn from and 12 to score on are there"
