"""Released models by name, with files of the right names and shapes in place of the downloads."""

from pathlib import Path

import pytest
import torch

from dinov2.apps.evaluation.comparison import compare_models
from dinov2.apps.evaluation.context import EvalConfig
from dinov2.apps.evaluation.linear import linear
from dinov2.data.datasets.imagenet_classes import IMAGENET_CLASSES
from dinov2.models.releases import RELEASES, backbone_config
from tests.runs import pictures


@pytest.fixture
def released(tmp_path_factory, monkeypatch):
    """Names of the files that were asked for. The heads say class 3 (one block) or 5 (four) of everything."""
    folder, asked = tmp_path_factory.mktemp("released"), []

    def download(url: str, **options: object) -> Path:
        (row,) = (row for row in RELEASES if row.url == url)
        path = folder / Path(row.filename).name
        asked.append(path.name)
        if path.exists():
            return path
        if row.kind == "backbone":
            torch.save(backbone_config(row).build().state_dict(), path)
        else:
            bias = torch.zeros(1000)
            bias[3 if row.layers == 1 else 5] = 1.0
            torch.save({"weight": torch.zeros(1000, 384 * (1 + row.layers)), "bias": bias}, path)
        return path

    monkeypatch.setattr("dinov2.checkpoints.locate.download", download)
    return asked


@pytest.fixture
def images(here):
    for number in (3, 5):
        pictures(here / "val" / IMAGENET_CLASSES[number].wnid, n=2 if number == 3 else 6)
    return "val"


def small(**arguments) -> EvalConfig:
    return EvalConfig(**arguments, resolution=28, use_cache=False, precision="fp32", device="cpu")


def test_a_released_classifier_is_scored_by_its_name(released, images):
    report = linear(small(model="dinov2_vits14_lc", val_dataset=images))
    assert (report.rows[0].value, report.rows[0].n) == (75.0, 8)  # six of eight show class 5
    assert report.rows[0].settings["classifier"] == "dinov2_vits14_lc" and report.rows[0].settings["layers"] == 4
    assert report.rows[0].transform["crop"] == 28


def test_a_released_head_is_named_by_its_file(released, images):
    report = linear(small(model="dinov2_vits14", val_dataset=images), classifier="dinov2_vits14_linear_head")
    assert report.rows[0].value == 25.0 and report.rows[0].settings["layers"] == 1
    assert len(report.rows[0].settings["classifier_sha256"]) == 64


def test_everything_scores_a_released_classifier_besides_the_probes(released, images):
    study = compare_models(["dinov2_vits14_lc"], small(model="", dataset=images), methods=["knn", "head"])
    own = study.results[1]
    assert own.protocol.name == "own classifier" and len(own.outcome.class_names) == 1000
    assert own.figures["top-1"].value == pytest.approx(0.5)  # of each class one image is scored
