"""Test sets of ImageNet's classifiers by every method, from the data set's name to the rows that were written."""

import json
from pathlib import Path

import pytest

from dinov2.apps.evaluation.comparison import compare_models
from dinov2.apps.evaluation.context import EvalConfig
from dinov2.apps.evaluation.datasets import open_sets
from dinov2.apps.evaluation.linear import linear
from dinov2.apps.evaluation.protocols import knn, log_regression
from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES
from dinov2.eval.knn.evaluate import KnnSettings
from dinov2.eval.linear import LinearSettings
from tests.data.datasets.trees import write_image
from tests.runs import pictures

NUMBERS = (8, 6, 1, 4)
QUICK = LinearSettings(learning_rates=(0.1,), n_last_blocks=(1,), n_iterations=4, batch_size=16)
NOTE = "answers are chosen among the 2 classes of the validation set, not among all 4"

METHODS = {
    "knn": lambda inputs: knn(inputs, KnnSettings(nb_knn=[5])).rows,
    "logistic": lambda inputs: log_regression(inputs, Cs=[1.0]).rows,
    "linear": lambda inputs: linear(inputs, settings=QUICK).rows,
    "linear, release": lambda inputs: linear(inputs, settings=QUICK, protocol="release").rows,
    "linear, chosen as in the release": lambda inputs: linear(inputs, settings=QUICK, select_on="val").rows,
    "all": lambda inputs: [
        row for one in compare_models([inputs.model], inputs, methods=["knn"]).results for row in one.rows
    ],
}


def train_folder(here: Path, *, named: str) -> str:
    for number in NUMBERS:
        pictures(here / "train" / getattr(IMAGENET_CLASSES[number], named), n=8)
    return "train"


@pytest.fixture
def of_a(here: Path) -> dict[str, str]:
    """ImageNet-A with two of the four classes, each counted otherwise than in the training set."""
    for number in NUMBERS[:2]:
        pictures(here / "imagenet-a" / IMAGENET_CLASSES[number].wnid, n=3)
    return {"train_dataset": train_folder(here, named="name"), "val_dataset": "ImageNetA:root=imagenet-a"}


@pytest.mark.parametrize("name", METHODS)
def test_imagenet_a_is_answered_among_its_own_classes_by_every_method(run, of_a, name: str) -> None:
    rows = METHODS[name](EvalConfig(model=run, **of_a, output_dir="out"))
    for row in rows:
        assert NOTE in row.notes and row.settings["n_answers"] == 2 and row.settings["n_classes"] == 4
    assert {row.dataset for row in rows} == {of_a["val_dataset"]} and rows[0].n == 6


def test_results_name_data_sets_as_they_were_typed(run, here, of_a) -> None:
    log_regression(EvalConfig(model=run, **of_a, output_dir="out"), Cs=[1.0])
    compare_models([run], EvalConfig(model=run, **of_a, output_dir="out"), methods=["log-regression"])
    for name in ("results_eval_log_regression.json", "results_eval_all.json"):
        text = (here / "out" / name).read_text()
        assert of_a["val_dataset"] in text and str(here) not in text


def test_kept_features_hold_no_rules_and_are_scored_by_today_s(run, here, of_a) -> None:
    inputs = EvalConfig(model=run, **of_a, cache_dir="kept")
    first = knn(inputs, KnnSettings(nb_knn=[5])).rows
    manifests = list((here / "kept").rglob("_manifest.json"))
    assert manifests
    assert all({"class_ids", "scoring"}.isdisjoint(json.loads(file.read_text())) for file in manifests)
    again = knn(inputs, KnnSettings(nb_knn=[5])).rows
    assert [(row.metric, row.value, row.notes) for row in again] == [
        (row.metric, row.value, row.notes) for row in first
    ]


def test_sets_of_identifiers_and_of_names_have_classes_in_common(here, of_a) -> None:
    pictures(here / "wnids" / IMAGENET_CLASSES[8].wnid, n=2)
    pictures(here / "wnids" / IMAGENET_CLASSES[1].wnid, n=2)
    sets = open_sets("train", "wnids")
    assert set(sets.train.class_ids) > set(sets.val.class_ids)


def test_reassessed_labels_and_corruptions_have_their_own_figures(run, here) -> None:
    train = train_folder(here, named="wnid")
    for index, number in enumerate(NUMBERS, start=1):
        wnid = IMAGENET_CLASSES[number].wnid
        write_image(here / "imagenet" / "val" / wnid / f"ILSVRC2012_val_{index:08d}.JPEG", colour=40 * index)
        for severity in range(1, 6):
            file = f"ILSVRC2012_val_{index:08d}.JPEG"
            write_image(here / "c" / "fog" / str(severity) / wnid / file, colour=8 * severity * index)
    label_sets = [list(NUMBERS), [], [NUMBERS[2], 999], [999]]
    (here / "imagenet" / "real.json").write_text(json.dumps(label_sets + [[]] * 49_996))
    for name in ("knn", "logistic"):
        rows = METHODS[name](EvalConfig(model=run, train_dataset=train, val_dataset="ImageNetReaL:root=imagenet"))
        real = next(row for row in rows if row.metric == "real top-1")
        assert real.n == 3 and 100 / 3 - 1e-6 <= real.value <= 200 / 3 + 1e-6  # the first is right whatever is said
        rows = METHODS[name](EvalConfig(model=run, train_dataset=train, val_dataset="ImageNetC:root=c:corruption=fog"))
        figures = {row.metric: row.value for row in rows}
        errors = [figures[f"error fog {severity}"] for severity in range(1, 6)]
        assert sum(errors) / 5 == pytest.approx(100 - figures["top-1"])
        assert figures["CE fog"] == pytest.approx(sum(errors) / 5 / 0.819324) and "mCE" not in figures
