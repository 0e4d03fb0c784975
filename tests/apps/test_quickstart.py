"""The quickstart end to end: a short one here, the whole toy set for the figure that training has to beat."""

import json
import re

import pytest

from dinov2.apps.evaluation.datasets import labelled
from dinov2.apps.evaluation.features import RawPixels
from dinov2.apps.evaluation.protocols import knn_of_backbone
from dinov2.apps.quickstart import quickstart
from dinov2.apps.train import training_config
from dinov2.errors import ConfigError
from dinov2.eval.setup import eval_transform_for
from tests.runs import SMALL, contents

TINY_SETS = [
    *(word for word in SMALL if not word.startswith("evaluation")),
    "train.dataset_path=toy:split=TRAIN:n=60",
    "evaluation.knn_train_dataset=toy:split=TRAIN:n=60",
    "evaluation.knn_val_dataset=toy:split=VAL:n=30",
    "evaluation.eval_period_iterations=4",
]


def test_a_short_one_writes_the_summary_and_a_page_that_needs_nothing_beside_it(here):
    said = []
    summary = quickstart(output_dir="run", overrides=TINY_SETS, say=said.append)
    assert json.loads((here / "run" / "summary.json").read_text()) == summary
    for key in ("raw_pixels", "untrained", "trained"):
        assert 0 <= summary[key] <= 100
    assert summary["seconds"] > 0 and summary["k"] == 20
    page = (here / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 3  # feature pictures over time and the gallery
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert [point["iteration"] for point in json.loads((here / "run" / "knn_curve.json").read_text())] == [3, 7, 11]
    assert any("12 = 3 epochs of 4 steps" in text for text in said)
    assert [path.name for path in here.iterdir()] == ["run"]


def test_called_again_it_measures_the_same_and_trains_no_more(here):
    first = quickstart(output_dir="run", overrides=TINY_SETS)
    weights = {name: data for name, data in contents(here).items() if "training_11" in name or "metrics" in name}
    second = quickstart(output_dir="run", overrides=TINY_SETS)
    figures = ("raw_pixels", "untrained", "trained")
    assert [first[key] for key in figures] == [second[key] for key in figures]
    assert {name: data for name, data in contents(here).items() if name in weights} == weights and weights


def test_a_misspelt_key_is_refused_before_any_work(here):
    with pytest.raises(ConfigError, match=r"the nearest is optim\.epochs"):
        quickstart(output_dir="run", overrides=["optim.epoch=3"])
    assert contents(here) == {}


def test_what_training_would_refuse_is_refused_before_anything_is_measured(here):
    said = []
    with pytest.raises(ConfigError, match="7 heads .* do not share evenly"):
        quickstart(output_dir="run", overrides=[*TINY_SETS, "student.num_heads=7"], say=said.append)
    assert said == [] and contents(here) == {}


@pytest.mark.slow
def test_raw_pixels_of_the_whole_toy_set_classify_badly():
    cfg = training_config(preset="toy")
    sets = [labelled(name) for name in (cfg.evaluation.knn_train_dataset, cfg.evaluation.knn_val_dataset)]
    assert len(sets[0]) >= 1000 and len(sets[1]) >= 500 and len(sets[1].class_names) == 10
    rows, _ = knn_of_backbone(
        RawPixels(), *sets, eval_transform_for(cfg), device="cpu", precision="fp32", nb_knn=[1, 5, 20]
    )
    assert max(row.value for row in rows if row.metric == "top-1") <= 35


@pytest.mark.slow
def test_the_preset_as_it_is_trains_a_few_steps_and_reports(here):
    """The quickstart's own model and data; a fiftieth of its steps."""
    summary = quickstart(output_dir="run", max_steps=40)
    assert summary["raw_pixels"] <= 35
    assert {"raw_pixels", "untrained", "trained", "seconds"} <= summary.keys()
    assert (here / "run" / "report.html").stat().st_size > 10_000
    assert json.loads((here / "run" / "summary.json").read_text())["trained"] == summary["trained"]
