"""Features for all evaluations: images are decoded once, entries cannot go stale, sets are split by names alone."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dinov2.apps.evaluation.context import EvalConfig
from dinov2.apps.evaluation.datasets import LabelledDataset, labelled, open_sets, split_rows
from dinov2.apps.evaluation.features import (
    FeatureCache,
    cache_for,
    feature_extractor,
    raw_pixels,
    untrained_extractor,
    with_size,
)
from dinov2.apps.evaluation.protocols import knn
from dinov2.data.datasets.files import Folder
from dinov2.data.datasets.toy import Toy
from dinov2.encode.tokens import backbone_tokens
from dinov2.errors import ConfigError, DataError
from dinov2.eval.knn.evaluate import KnnSettings
from dinov2.pretrained import load
from tests.runs import pictures

SETS = {"train_dataset": "toy:split=TRAIN:n=40", "val_dataset": "toy:split=VAL:n=20"}


@pytest.fixture
def decoded(monkeypatch, tmp_path):
    """Numbers of the images that were decoded, as they are; no other test has kept their features."""
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    seen = []
    for kind in (Toy, Folder):
        original = kind.get_image

        def get_image(self, index, original=original):
            seen.append(index)
            return original(self, index)

        monkeypatch.setattr(kind, "get_image", get_image)
    return seen


@pytest.fixture
def loaded(run):
    return load(run, device="cpu", precision="fp32")


def toy(split: str = "TRAIN", n: int = 20) -> LabelledDataset:
    name = f"toy:split={split}:n={n}"
    return LabelledDataset(name, labelled(name))


# Once.


def test_two_evaluations_in_two_commands_decode_each_image_once(run, decoded):
    inputs = EvalConfig(model=run, **SETS, cache_dir="kept")
    first = knn(inputs, KnnSettings(nb_knn=[3]))
    assert len(decoded) == 60
    again = knn(inputs, KnnSettings(nb_knn=[5]))
    assert len(decoded) == 60
    assert knn(inputs, KnnSettings(nb_knn=[3])).rows[0].value == first.rows[0].value != again.rows[0].k


def test_evaluations_of_other_kinds_in_one_process_share_a_pass_even_without_a_cache(loaded, decoded):
    bank, subject = FeatureCache(None), feature_extractor(loaded)
    bank.features(subject, toy())
    bank.features(subject, toy(), parts=("earlier", "cls", "mean"))
    assert len(decoded) == 20


def test_without_a_cache_nothing_is_written(run, here, decoded):
    inputs = EvalConfig(model=run, **SETS, output_dir="out", use_cache=False)
    knn(inputs, KnnSettings(nb_knn=[3]))
    knn(inputs, KnnSettings(nb_knn=[3]))
    assert len(decoded) == 120
    assert [path.name for path in here.iterdir()] == ["out"]


def test_the_default_place_is_the_cache_of_downloads(monkeypatch, here):
    monkeypatch.setenv("DINOV2_CACHE", str(here / "mine"))
    assert cache_for(None) == here / "mine" / "features"
    assert cache_for("~/kept").name == "kept" and "~" not in str(cache_for("~/kept"))
    assert cache_for("kept", use=False) is None
    (here / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file; .*this was the --cache-dir, and --no-cache keeps nothing"):
        cache_for("file")


# What the columns are.


def test_columns_are_class_tokens_of_the_last_blocks_and_the_mean_of_the_patches(loaded):
    images = toy()
    found = FeatureCache(None).features(feature_extractor(loaded), images, parts=("mean", "cls", "earlier"))
    pixels = torch.stack([loaded.transform(images.images.get_image(i)) for i in range(20)])
    depth = loaded.n_blocks
    with torch.inference_mode():
        tokens = backbone_tokens(loaded.backbone, pixels, list(range(depth)))
    expected = [tokens.layers[block].cls for block in range(max(0, depth - 4), depth)]
    expected.append(tokens.patches.flatten(1, 2).mean(dim=1))
    assert_close(found.features, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == [i % 10 for i in range(20)]


def test_of_large_sets_only_what_is_asked_for_is_kept(loaded, monkeypatch, here):
    monkeypatch.setattr("dinov2.apps.evaluation.features._ALL_PARTS_BYTES", 0)
    bank, subject = FeatureCache(here / "kept"), feature_extractor(loaded)
    cls = bank.features(subject, toy())
    assert len(list((here / "kept").iterdir())) == 1
    both = bank.features(subject, toy(), parts=("cls", "mean"))
    assert_close(both.features[:, : loaded.embed_dim], cls.features)


def test_another_library_s_model_without_layers_has_fewer_parts(here, monkeypatch):
    (here / "mine.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    patch_size = 8\n"
        "    def forward(self, x):\n"
        "        return x.mean(dim=(2, 3))\n"
        "def build():\n"
        "    return Model()\n"
    )
    monkeypatch.syspath_prepend(here)
    subject = feature_extractor(load("mine:build", device="cpu"))
    assert subject.parts == {"cls": 3}
    with pytest.raises(ConfigError, match="shows no patch tokens; evaluate it by k-NN or logistic regression"):
        FeatureCache(None).features(subject, toy(), parts=("cls", "mean"))


# Entries cannot go stale.


def entries(bank: FeatureCache) -> int:
    return len(list(bank.cache.iterdir()))


def test_another_model_transform_or_precision_gets_entries_of_its_own(loaded, here):
    bank = FeatureCache(here / "kept")
    subject = feature_extractor(loaded)
    bank.features(subject, toy())
    a_model = entries(bank)
    others = (
        replace(subject, precision="bfloat16"),
        replace(subject, transform=subject.transform.with_(crop_size=16)),
        untrained_extractor(loaded),
    )
    for number, other in enumerate(others, start=1):
        bank.features(other, toy())
        assert entries(bank) == (number + 1) * a_model
    bank.features(raw_pixels(loaded), toy())
    assert entries(bank) == 4 * a_model + 1


@pytest.mark.parametrize("change", ["another picture of the same size", "renamed", "another class", "one more"])
def test_changed_images_are_read_again(loaded, here, decoded, change):
    pictures(here / "set", n=12, classes=3)
    subject = feature_extractor(loaded)
    FeatureCache(here / "kept").features(subject, LabelledDataset("set", labelled("set")))
    decoded.clear()
    FeatureCache(here / "kept").features(subject, LabelledDataset("set", labelled("set")))
    assert decoded == []
    file = here / "set" / "class0" / "000.png"
    match change:
        case "another picture of the same size":
            size = file.stat().st_size
            data = bytearray(file.read_bytes())
            data[-20] ^= 1
            file.write_bytes(data)
            assert file.stat().st_size == size
            os.utime(file, ns=(1, 2))
        case "renamed":
            file.rename(file.with_name("zzz.png"))
        case "another class":
            file.rename(here / "set" / "class1" / "000.png")
        case "one more":
            shutil.copy(file, file.with_name("copy.png"))
    FeatureCache(here / "kept").features(subject, LabelledDataset("set", labelled("set")))
    assert len(decoded) == (13 if change == "one more" else 12)


def test_changed_code_of_a_model_of_one_s_own_is_noticed(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    identities = []
    for number in (1, 2):
        (here / f"mine{number}.py").write_text(
            "import torch\n"
            "class Model(torch.nn.Module):\n"
            "    patch_size = 8\n"
            "    def forward(self, x):\n"
            f"        return x.mean(dim=(2, 3)) ** {number}\n"
            "def build():\n"
            "    return Model()\n"
        )
        subject = feature_extractor(load(f"mine{number}:build", device="cpu"))
        identities.append({key: value for key, value in subject.identity.items() if key != "name"})
    assert identities[0]["weights"] == identities[1]["weights"]
    assert identities[0]["probe"] != identities[1]["probe"]


def test_a_full_disk_costs_no_features(loaded, here, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dinov2.apps.evaluation.features.save_features", full)
    found = FeatureCache(here / "kept").features(feature_extractor(loaded), toy())
    assert len(found) == 20
    assert "No space left on device" in caplog.text


def test_features_that_are_not_finite_are_refused_and_not_kept(loaded, here):
    subject = replace(
        feature_extractor(loaded), columns=lambda images: torch.full((len(images), 1), torch.nan), parts={"cls": 1}
    )
    bank = FeatureCache(here / "kept")
    with pytest.raises(DataError, match=r"NaN or infinite features for 20 of 20 images of toy.*try --precision fp32"):
        bank.features(subject, toy())
    assert not (here / "kept").exists()


# Sizes.


def test_a_resolution_has_to_be_a_multiple_of_the_patch(loaded):
    patch = loaded.patch_size
    with pytest.raises(ConfigError, match=f"a resolution of {3 * patch + 1} pixels .* use {3 * patch} or {4 * patch}"):
        with_size(loaded, resolution=3 * patch + 1)
    with pytest.raises(ConfigError, match=f"use a --resize of {4 * patch} or more"):
        with_size(loaded, resolution=4 * patch, resize=4 * patch - 1)
    assert with_size(loaded, resolution=4 * patch, resize=5 * patch).transform.describe()["resize"] == 5 * patch


# One set, split.


def test_one_set_is_split_within_each_class_by_names_alone(here):
    pictures(here / "a" / "set", n=50, classes=3)
    shutil.copytree(here / "a" / "set", here / "elsewhere")
    train, val = split_rows(labelled("a/set"))
    again = split_rows(labelled("elsewhere"))
    assert torch.equal(train, again[0]) and torch.equal(val, again[1])
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(50))
    labels = torch.as_tensor(labelled("a/set").get_targets())
    assert labels[val].bincount().tolist() == [round(0.2 * n) for n in labels.bincount().tolist()]


def test_the_side_of_an_image_does_not_depend_on_other_classes(here):
    pictures(here / "set", n=20, classes=2)

    def scored() -> set[str]:
        images = labelled("set")
        paths = [os.path.relpath(images.path_of(i), here / "set") for i in split_rows(images)[1].tolist()]
        return {path for path in paths if path.startswith("class1")}

    before = scored()
    shutil.rmtree(here / "set" / "class0")
    pictures(here / "set" / "class2", n=5)
    assert scored() == before


def test_a_split_set_is_extracted_once_and_recorded(run, decoded):
    report = knn(EvalConfig(model=run, dataset="toy:split=TRAIN:n=50"), KnnSettings(nb_knn=[3]))
    assert len(decoded) == 50
    row = report.rows[0]
    assert (row.n, row.split) == (10, "held out")
    assert row.settings["split"] == {
        "rule": "by SHA-256 of class and name, within each class", "val_share": 0.2, "n_train": 40, "n_val": 10,
    }  # fmt: skip
    alone = knn(EvalConfig(model=run, train_dataset="toy:split=TRAIN:n=50"), KnnSettings(nb_knn=[3]))
    assert alone.rows[0].value == row.value


@pytest.mark.parametrize(
    "names, reason",
    [
        ((None, None, None), "no labelled images were named; give --train-dataset and --val-dataset, or one --dataset"),
        ((None, "toy", None), "no labelled images were named"),
        (("toy", None, "toy"), "one data set to be split and others besides were named"),
        (("one", None, None), "all labelled images of one are of the one class 'class0'; an evaluation needs two"),
        (("set", "other", None), "set and other have no class in common; check that both use the same class folders"),
        (("single", None, None), "single has one image a class, which leaves none to score on; give --val-dataset"),
    ],
)
def test_sets_that_cannot_be_evaluated_are_refused(here, names, reason):
    pictures(here / "one", n=4, classes=1)
    pictures(here / "set", n=4, classes=2)
    pictures(here / "single", n=2, classes=2)
    pictures(here / "other" / "cat", n=2)
    pictures(here / "other" / "dog", n=2)
    with pytest.raises((ConfigError, DataError)) as refusal:
        open_sets(*names)
    assert reason in str(refusal.value)
