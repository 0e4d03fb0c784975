"""k-NN evaluation as a function: figures, baselines, and checks that come before the work."""

import json

import numpy as np
import pytest
import torch

from dinov2.apps.evaluation import features
from dinov2.apps.evaluation.context import EvalConfig
from dinov2.apps.evaluation.datasets import labelled
from dinov2.apps.evaluation.features import RawPixels
from dinov2.apps.evaluation.protocols import knn, knn_of_backbone
from dinov2.checkpoints.files import save_teacher
from dinov2.data.eval_transform import EvalTransform
from dinov2.errors import ConfigError, DataError, WeightsError
from dinov2.eval.knn.evaluate import KnnSettings
from dinov2.models.config import BackboneConfig
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.pretrained import load
from tests.golden.recipe import fill
from tests.runs import contents, pictures

VOTE = ("nb_knn", "n_tries", "temperature", "n_per_class_list")
SETS = {"train_dataset": "toy:split=TRAIN:n=40", "val_dataset": "toy:split=VAL:n=20"}


def test_figures_are_returned_and_written_with_their_provenance(run, here):
    report = knn(EvalConfig(model=run, **SETS, output_dir="out"), KnnSettings(nb_knn=[3, 5]), baselines=True)
    assert [(row.k, row.metric) for row in report.rows] == [(3, "top-1"), (3, "top-5"), (5, "top-1"), (5, "top-5")]
    assert report.best_top1() == max(report.rows[0].value, report.rows[2].value)
    assert set(report.baselines) == {"untrained", "raw_pixels"}
    assert report.best_top1("raw_pixels") == max(report.baselines["raw_pixels"][i].value for i in (0, 2))
    written = json.loads((here / "out" / "results_eval_knn.json").read_text())
    assert [row["value"] for row in written["rows"]] == [row.value for row in report.rows]
    assert len(written["baselines"]) == 8
    row = written["rows"][0]
    assert row["dataset"] == SETS["val_dataset"] and row["n"] == 20
    assert row["model"]["sha256"] == load(run).digest
    assert row["transform"]["crop"] == 32
    assert str(here) not in json.dumps(written) and str(run) not in json.dumps(written)  # no path of this machine


def test_raw_pixels_are_those_of_the_transform():
    """A k-NN of the images themselves, computed here a second time."""
    train, val = labelled(SETS["train_dataset"]), labelled(SETS["val_dataset"])
    transform = EvalTransform(crop_size=32)
    rows, unreadable = knn_of_backbone(RawPixels(), train, val, transform, device="cpu", precision="fp32", nb_knn=[1])
    assert unreadable == []

    def flat(images):
        pixels = torch.stack([transform(images.get_image(i)).flatten() for i in range(len(images))]).double()
        return pixels / pixels.norm(dim=1, keepdim=True)

    nearest = (flat(val) @ flat(train).T).argmax(dim=1)
    hits = np.array([train.get_target(int(i)) for i in nearest]) == np.array(val.get_targets())
    assert rows[0].metric == "top-1" and rows[0].value == pytest.approx(100 * hits.mean())


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_any_number_of_channels_and_their_baselines(here, channels):
    for i in range(12):
        folder = here / "images" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (24, 30, channels), dtype=np.uint8)
        np.save(folder / f"{i}.npy", pixels)
    model = fill(
        DinoVisionTransformer(
            img_size=16, patch_size=8, in_chans=channels, embed_dim=64, depth=1, num_heads=1, block_chunks=0
        )
    )
    teacher = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    save_teacher(
        here / "t.pth", teacher, BackboneConfig.from_model(model, mean=[0.5] * channels, std=[0.25] * channels)
    )
    sets = {"train_dataset": "images", "val_dataset": "images"}
    report = knn(EvalConfig(model="t.pth", **sets), KnnSettings(nb_knn=[1]), baselines=True)
    assert report.unreadable == []
    for rows in (report.rows, *report.baselines.values()):
        assert rows[0].value == 100.0  # each image is its own nearest neighbour


def test_unreadable_images_are_returned(run, here):
    pictures(here / "set", n=10, classes=2)
    (here / "set" / "class1" / "cut.png").write_bytes(b"\x89PNG no image")
    report = knn(EvalConfig(model=run, train_dataset="set", val_dataset="set"), KnnSettings(nb_knn=[3]))
    assert [path.rpartition("/")[2] for path, _ in report.unreadable] == ["cut.png", "cut.png"]
    assert report.rows[0].n == 10


@pytest.mark.parametrize(
    "arguments, error, reason",
    [
        ({"nb_knn": []}, ConfigError, "a number of neighbours is 0; write 1 or more"),
        ({"nb_knn": [3, 0]}, ConfigError, "a number of neighbours is 0; write 1 or more"),
        ({"n_tries": 0}, ConfigError, "the number of tries is 0"),
        ({"batch_size": 0}, ConfigError, "the batch is 0"),
        ({"num_workers": -1}, ConfigError, "the number of workers is -1"),
        ({"temperature": 0.0}, ConfigError, "the temperature is 0.0"),
        ({"temperature": float("inf")}, ConfigError, "the temperature is inf"),
        ({"n_per_class_list": [1, 0]}, ConfigError, "0 images per class were asked for"),
        ({"device": "tpu"}, ConfigError, "no device is called 'tpu'"),
        ({"output_dir": "file"}, ConfigError, "the output folder file is a file"),
        ({"config_file": "nowhere.yaml"}, ConfigError, "'nowhere.yaml'"),
        ({"overrides": ["student.dept=3"]}, ConfigError, "the nearest is student.depth"),
        ({"model": "nowhere.pth"}, WeightsError, "there is no weight file nowhere.pth"),
        ({"val_dataset": "flat"}, DataError, "flat has no labels"),
    ],
)
def test_whatever_is_wrong_is_said_before_features_are_extracted(run, here, monkeypatch, arguments, error, reason):
    monkeypatch.setattr(features, "extract_features", lambda *a, **k: pytest.fail("work was done"))
    pictures(here / "flat")
    (here / "file").write_text("mine")
    before = contents(here)
    settings = {name: value for name, value in arguments.items() if name in VOTE}
    rest = {name: value for name, value in arguments.items() if name not in VOTE}
    with pytest.raises(error) as refusal:
        knn(EvalConfig(**{"model": run, **SETS, **rest}), KnnSettings(**settings))
    assert reason in str(refusal.value)
    assert contents(here) == before


def test_data_sets_without_labels_are_refused_with_the_way_out(here):
    pictures(here / "flat")
    with pytest.raises(DataError, match="sort the images into one folder a class, or give a list:FILE with a label"):
        labelled("flat")
    pictures(here / "set", classes=2)
    assert labelled("set").class_names == ["class0", "class1"]
