"""Logistic regression and the linear probe on any model, by both protocols."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dinov2.apps.evaluation.context import EvalConfig
from dinov2.apps.evaluation.datasets import labelled
from dinov2.apps.evaluation.features import feature_extractor
from dinov2.apps.evaluation.linear import _AugmentedImages, augmented_batches, linear
from dinov2.apps.evaluation.protocols import log_regression, token_columns
from dinov2.errors import ConfigError, DataError, WeightsError
from dinov2.eval.linear import LinearSettings
from dinov2.pretrained import load
from tests.runs import contents, pictures

SETS = {"train_dataset": "toy:split=TRAIN:n=60", "val_dataset": "toy:split=VAL:n=30"}
QUICK = LinearSettings(learning_rates=(0.01, 0.1), n_iterations=4, batch_size=16)


@pytest.fixture
def subject(run):
    return feature_extractor(load(run, device="cpu", precision="fp32"))


# Logistic regression.


def test_logistic_regression_writes_the_curve_it_chose_from(run, here):
    report = log_regression(EvalConfig(model=run, **SETS, output_dir="out"), Cs=[0.1, 1.0])
    document = json.loads((here / "out" / "results_eval_log_regression.json").read_text())
    assert [row["value"] for row in document["rows"]] == [row.value for row in report.rows]
    row = document["rows"][0]
    assert [point["C"] for point in row["settings"]["curve"]] == [0.1, 1.0]
    assert row["dataset"] == SETS["val_dataset"] and row["model"]["sha256"] == load(run).digest
    assert report.value("top-1") == report.rows[0].value


def test_logistic_regression_reads_features_that_k_nn_left_behind(run, monkeypatch):
    inputs = EvalConfig(model=run, **SETS, cache_dir="kept")
    log_regression(inputs, Cs=[1.0])
    monkeypatch.setattr(
        "dinov2.apps.evaluation.features.extract_features", lambda *a, **k: pytest.fail("decoded again")
    )
    report = log_regression(inputs, Cs=[1.0])
    linear(inputs, settings=QUICK)
    assert report.rows[0].value >= 0


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"Cs": [0.0]}, r"C must be positive, got \[0.0\]"),
        ({"Cs": []}, r"C must be positive, got \[\]"),
        ({"max_iter": 0}, "the number of iterations is 0"),
        ({"dtype": "int8"}, "features are fitted in float32 or float64, not in 'int8'"),
        ({"finetune_dataset": "toy:n=20", "select_on": "val"}, "either on the finetune set or on the validation set"),
    ],
)
def test_wrong_settings_of_logistic_regression_are_refused_before_the_work(run, here, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        log_regression(EvalConfig(model=run, **SETS), **settings)
    assert contents(here) == {}


# The linear probe.


def test_both_protocols_write_their_grid_and_say_what_they_left_out(run, here):
    inputs = EvalConfig(model=run, **SETS, output_dir="out")
    short = linear(inputs, settings=QUICK)
    assert any("images were not augmented" in note for note in short.rows[0].notes)
    full = linear(inputs, protocol="release", settings=QUICK)
    assert not any("images were not augmented" in note for note in full.rows[0].notes)
    for report in (short, full):
        settings = report.rows[0].settings
        assert settings["selected_on"] == "10 of 60 training images" and settings["n_train"] == 50
        assert len(settings["grid"]) == 8
        assert [row.metric for row in report.rows] == ["top-1", "top-5", "mean-per-class"]
        assert {row.dataset for row in report.rows} == {SETS["val_dataset"]} and report.rows[0].n == 30
    document = json.loads((here / "out" / "results_eval_linear.json").read_text())
    assert document["rows"][0]["settings"]["head"] == full.rows[0].settings["head"]


def test_choosing_on_the_scored_images_is_noted(run):
    report = linear(EvalConfig(model=run, **SETS), protocol="release", settings=QUICK, select_on="val")
    settings = report.rows[0].settings
    assert settings["selected_on"] == "reported set"
    assert any("which flatters the figure" in note for note in report.rows[0].notes)
    assert report.rows[0].value == pytest.approx(max(head["selection"] for head in settings["grid"]))


def test_further_sets_are_scored_by_the_chosen_classifier(run):
    tests = ["toy:split=VAL:n=20", "toy:split=VAL:n=40"]
    for protocol in ("short", "release"):
        report = linear(EvalConfig(model=run, **SETS), protocol=protocol, settings=QUICK, test_datasets=tests)
        assert [(row.dataset, row.n) for row in report.rows if row.metric == "top-1"] == [
            (SETS["val_dataset"], 30), (tests[0], 20), (tests[1], 40),
        ]  # fmt: skip


def test_the_release_s_protocol_reads_no_training_image_that_it_does_not_need(run, monkeypatch):
    """Features by the evaluation transform are those of the held-out and the scored images, not of the whole set."""
    extracted = []
    from dinov2.apps.evaluation import features

    original = features.extract_features

    def counted(columns, dataset, **options):
        extracted.append(len(dataset))
        return original(columns, dataset, **options)

    monkeypatch.setattr(features, "extract_features", counted)
    linear(EvalConfig(model=run, **SETS, use_cache=False), protocol="release", settings=QUICK)
    assert sorted(extracted) == [10, 30]


def test_a_training_that_was_stopped_continues_in_its_folder(run, here):
    inputs = EvalConfig(model=run, **SETS, output_dir="out")
    linear(inputs, protocol="release", settings=QUICK)
    again = linear(inputs, protocol="release", settings=QUICK)
    assert any("continued from iteration 4" in note for note in again.rows[0].notes)
    afresh = linear(inputs, protocol="release", settings=QUICK, resume=False)
    assert not any("continued" in note for note in afresh.rows[0].notes)
    assert [row.value for row in afresh.rows] == [row.value for row in again.rows]
    with pytest.raises(ConfigError, match="holds a linear probe that differs in"):
        linear(
            inputs, protocol="release", settings=LinearSettings(learning_rates=(0.5,), n_iterations=4, batch_size=16)
        )


def test_augmented_batches_are_a_function_of_the_sample_number(subject):
    images, rows = labelled("toy:n=30"), torch.arange(10, 30)
    classes = torch.as_tensor(images.get_targets())[rows]
    dataset = _AugmentedImages(images, rows, classes, subject, seed=0)
    torch.manual_seed(1)
    image, label = dataset[17]
    torch.manual_seed(2)
    assert torch.equal(dataset[17][0], image) and image.shape == (3, 32, 32)
    assert not torch.equal(dataset[17 + len(rows)][0], image)  # another epoch, another crop
    epoch = [dataset[number][1] for number in range(len(rows))]
    assert sorted(epoch) == sorted(classes.tolist())  # each image once an epoch
    assert label in range(10)

    batches = augmented_batches(images, rows, classes, subject, batch_size=8)
    whole = list(islice(batches(0), 3))
    resumed = next(iter(batches(2)))
    assert_close(resumed, whole[2])
    expected = subject.columns(torch.stack([dataset[number][0] for number in range(8)]))
    assert_close(whole[0][0], expected.clone())
    assert token_columns(subject)[0].width == whole[0][0].shape[1]


def test_an_unreadable_training_image_is_replaced(subject, here):
    pictures(here / "set", n=6, classes=2)
    (here / "set" / "class0" / "cut.png").write_bytes(b"\x89PNG no image")
    images = labelled("set")
    rows = torch.arange(7)
    dataset = _AugmentedImages(images, rows, torch.as_tensor(images.get_targets()), subject, seed=0)
    assert all(dataset[number][0].shape == (3, 32, 32) for number in range(14))
    for file in (here / "set").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="10 images in a row could not be read"):
        dataset[0]


# A classifier that is there already.


def test_a_head_file_is_scored_without_training(run, here):
    width = 2 * load(run).embed_dim
    torch.save({"weight": torch.randn(10, width), "bias": torch.zeros(10)}, here / "head.pth")
    report = linear(EvalConfig(model=run, **SETS), classifier="head.pth", test_datasets=["toy:split=VAL:n=20"])
    assert report.rows[0].settings["classifier"] == "head.pth"
    assert [row.n for row in report.rows if row.metric == "top-1"] == [30, 20]
    alone = linear(EvalConfig(model=run, val_dataset=SETS["val_dataset"]), classifier="head.pth")
    assert alone.rows[0].value == report.rows[0].value


@pytest.mark.parametrize(
    "inputs, settings, error, reason",
    [
        ({"val_dataset": "toy"}, {}, WeightsError, "a backbone without a classifier; give a --train-dataset to train"),
        ({}, {}, ConfigError, "no images to score were named; give --val-dataset"),
        (SETS, {"protocol": "quick"}, ConfigError, "no protocol of the linear probe is called 'quick'"),
        (SETS, {"test_class_mappings": ["m.npy"]}, ConfigError, "1 class mappings were given for 0 test sets"),
        (SETS, {"class_mapping": "m.npy"}, DataError, "the class mapping m.npy cannot be read"),
        (SETS, {"classifier": "nowhere.pth"}, WeightsError, "there is no weight file nowhere.pth"),
    ],
)
def test_wrong_requests_are_refused(run, here, inputs, settings, error, reason):
    with pytest.raises(error, match=reason):
        linear(EvalConfig(model=run, **inputs), **settings)
    assert contents(here) == {}


# Bad images and labels, in one sentence each.


def features_of(monkeypatch, change):
    """Every extraction is changed on its way."""
    from dinov2.apps.evaluation import features

    original = features.extract_features
    monkeypatch.setattr(features, "extract_features", lambda *a, **k: change(original(*a, **k)))


def test_a_class_that_training_lacks_counts_as_an_error_with_a_note(run, here):
    pictures(here / "train", n=40, classes=2)
    pictures(here / "val", n=9, classes=3)
    for report in (
        log_regression(EvalConfig(model=run, train_dataset="train", val_dataset="val"), Cs=[1.0]),
        linear(EvalConfig(model=run, train_dataset="train", val_dataset="val"), settings=QUICK),
    ):
        notes = " ".join(report.rows[0].notes)
        assert "3 validation images are of classes without training images and count as errors" in notes
        assert report.rows[0].n == 9 and report.rows[0].value <= 100 * 6 / 9


def test_a_test_set_of_another_image_size_goes_through_the_same_transform(run, here):
    pictures(here / "train", n=24, classes=2)
    pictures(here / "val", n=8, classes=2, size=70)
    report = log_regression(EvalConfig(model=run, train_dataset="train", val_dataset="val"), Cs=[1.0])
    assert (report.rows[0].n, report.rows[0].transform["crop"]) == (8, 32) and report.unreadable == []


def test_a_list_with_some_labels_missing_is_refused(run, here):
    pictures(here / "photos", n=30, classes=3)
    lines = [f"photos/class{i % 3}/{i:03}.png,{'' if i % 10 == 0 else f'class{i % 3}'}" for i in range(30)]
    (here / "list.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    with pytest.raises(DataError, match="3 of the 30 images in .*list.csv have no label"):
        log_regression(EvalConfig(model=run, train_dataset="list.csv", val_dataset="photos"), Cs=[1.0])


def test_broken_features_are_refused(run, monkeypatch):
    def broken(found):
        found.features[0, 0] = np.nan
        return found

    features_of(monkeypatch, broken)
    with pytest.raises(DataError, match=r"NaN or infinite features for 1 of 60 images of toy.*try --precision fp32"):
        log_regression(EvalConfig(model=run, **SETS, use_cache=False), Cs=[1.0])
