"""All methods on several models: one document, one page, tests of the differences."""

import json
import re

import pytest
import torch

from dinov2.apps.evaluation.comparison import RESULTS_FILE, compare_models, measure_cost
from dinov2.apps.evaluation.context import EvalConfig
from dinov2.apps.evaluation.page import write_evaluation_page
from dinov2.data.datasets.toy import Toy
from dinov2.errors import ConfigError, WeightsError
from dinov2.eval.linear import PRESETS, LinearSettings
from dinov2.eval.result import read_results
from tests.runs import pictures

SETS = {"train_dataset": "toy:split=TRAIN:n=60", "val_dataset": "toy:split=VAL:n=30"}
QUICK = ("knn", "log-regression", "retrieval")


@pytest.fixture
def models(run):
    return [run, run / "eval" / "training_4" / "teacher_checkpoint.pth"]


@pytest.fixture
def study(run, models):
    return compare_models(models, EvalConfig(model=run, **SETS, output_dir="out"), methods=QUICK)


def test_one_document_holds_every_model_method_and_comparison(study, here, run):
    document = json.loads((here / "out" / RESULTS_FILE).read_text())
    measured = [(entry["model"]["name"], entry["task"]) for entry in document["evaluations"]]
    newest, older = f"{run.name}/training_11", f"{run.name}/training_4"
    assert measured == [(newest, "knn"), (newest, "log-regression"), (older, "knn"), (older, "log-regression")]
    entry = document["evaluations"][1]
    assert {
        *("schema", "task", "dataset", "split", "n", "metrics", "selection", "model", "transform", "precision"),
        *("seeds", "timing", "hardware", "versions"),
    } <= set(entry)
    assert entry["selection"]["set"] == "10 of 60 training images" and len(entry["selection"]["grid"]) == 45
    assert entry["n"] == 30 and set(entry["metrics"]) == {"top-1", "top-5", "mean-per-class"}
    low, high = entry["metrics"]["top-1"]["ci"]
    assert low <= entry["metrics"]["top-1"]["value"] <= high
    assert sum(one["n"] for one in entry["classes"]) == 30
    assert 100 * sum(one["hits"] for one in entry["classes"]) / 30 == pytest.approx(entry["metrics"]["top-1"]["value"])
    assert entry["timing"]["features"][SETS["train_dataset"]]["images"] == 60
    assert [(one["task"], one["first"], one["second"]) for one in document["comparisons"]] == [
        ("knn", newest, older), ("log-regression", newest, older),
    ]  # fmt: skip
    assert document["health"][newest]["rank_me"] > 1
    assert set(document["retrieval"][newest]) == {"mAP", "recall@1", "mP@1", "recall@5", "mP@5", "GAP"}
    assert str(here) not in json.dumps(document) and str(run) not in json.dumps(document)


def test_the_rows_of_all_methods_can_be_read_like_those_of_one(study, here):
    rows = read_results(here / "out" / RESULTS_FILE)
    assert {row.task for row in rows} == {"knn", "logistic", "retrieval"}
    assert {row.k for row in rows if row.task == "knn"} == {20, 10, 60}  # at most all training images


def test_a_difference_is_that_of_the_two_figures(study):
    for pair in study.pairs:
        first, second = (
            next(one for one in study.results if (one.model, one.protocol) == (name, pair.protocol))
            for name in (pair.first, pair.second)
        )
        difference = second.figures["top-1"].value - first.figures["top-1"].value
        assert pair.comparison.difference.value == pytest.approx(difference)
        assert pair.p_holm >= pair.comparison.p_value


def test_the_memory_of_a_method_is_its_own_and_not_that_of_the_one_before():
    _, seconds, large = measure_cost(torch.device("cpu"), lambda: torch.ones(64 * 2**20).sum())
    _, _, small = measure_cost(torch.device("cpu"), lambda: torch.ones(2**10).sum())
    if large is None:
        pytest.skip("this system does not tell how much memory a process takes")
    assert large - small > 200 * 2**20
    assert seconds > 0


def test_images_of_large_sets_are_decoded_once_for_all_methods(run, here, monkeypatch):
    monkeypatch.setattr("dinov2.apps.evaluation.features._ALL_PARTS_BYTES", 0)
    quick = {**PRESETS, "short": LinearSettings(n_iterations=5, batch_size=16)}
    monkeypatch.setattr("dinov2.eval.linear.evaluate.PRESETS", quick)
    decoded = []
    original = Toy.get_image

    def get_image(self, index):
        decoded.append(index)
        return original(self, index)

    monkeypatch.setattr(Toy, "get_image", get_image)
    inputs = EvalConfig(model=run, dataset="toy:split=TRAIN:n=70", use_cache=False)
    compare_models([run], inputs, methods=["knn", "log-regression", "linear"])
    assert len(decoded) == 70


def test_the_page_is_complete_in_itself_and_escapes_what_is_not_ours(run, here):
    for name in ("<i>cat", "dog & co"):
        pictures(here / "set" / name, n=12)
    study = compare_models([run], EvalConfig(model=run, dataset="set", output_dir="out"), methods=["knn"])
    page = write_evaluation_page(study).read_text(encoding="utf-8")
    assert "<i>cat" not in page and "&lt;i&gt;cat" in page and "dog &amp; co" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "@import" not in page
    assert "How it was measured" in page and "Differences" not in page  # one model has nobody to differ from
    assert page.count("data:image/jpeg;base64") == len([one for one in study.results[0].records.hits() if not one])


def test_the_page_of_several_models_shows_each_of_them_everywhere(study, run):
    page = write_evaluation_page(study).read_text(encoding="utf-8")
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL))
    assert list(sections) == ["figures", "differences", "classes", "confusions", "calibration", "mistakes", "measured"]
    for section in sections.values():
        assert f"{run.name}/training_11" in section and f"{run.name}/training_4" in section
    assert sections["figures"].count('class="point"') == 4


def test_of_many_classes_the_page_shows_the_hardest_and_the_results_all(run, here):
    for number in range(45):
        pictures(here / "set" / f"class{number:02}", n=5)
    study = compare_models([run], EvalConfig(model=run, dataset="set", output_dir="out"), methods=["knn"])
    page = write_evaluation_page(study).read_text(encoding="utf-8")
    assert "24 classes of 45" in page and "taken for" in page
    assert len(json.loads((here / "out" / RESULTS_FILE).read_text())["evaluations"][0]["classes"]) == 45


def test_a_classifier_that_a_model_brings_is_measured_where_it_knows_the_classes(run, here, monkeypatch):
    from dinov2.apps.evaluation import context as contexts
    from dinov2.models.heads import LinearHead

    original = contexts.load

    def load_with_head(*arguments, **options):
        loaded = original(*arguments, **options)
        loaded.head = LinearHead(loaded.embed_dim, num_classes=10).eval()
        return loaded

    monkeypatch.setattr(contexts, "load", load_with_head)
    study = compare_models([run], EvalConfig(model=run, **SETS), methods=["knn", "head"])
    assert [one.protocol.name for one in study.results] == ["k-NN", "own classifier"]
    assert "own classifier" in write_evaluation_page(study).read_text(encoding="utf-8")
    pictures(here / "set", n=20, classes=2)  # two classes are not ten
    study = compare_models([run], EvalConfig(model=run, dataset="set"), methods=["knn", "head"])
    assert [one.protocol.name for one in study.results] == ["k-NN"]


def test_retrieval_that_cannot_be_is_said(run):
    said = []
    sets = {**SETS, "val_dataset": "toy:split=VAL:n=10"}  # one image of each of ten classes
    study = compare_models([run], EvalConfig(model=run, **sets, say=said.append), methods=["knn", "retrieval"])
    assert list(study.retrieval.values()) == [[]]
    assert any("no retrieval, because no two of the scored images share a class" in line for line in said)


@pytest.mark.parametrize(
    "change, error, reason",
    [
        ({"models": []}, ConfigError, "no model was named; give --model once for each model"),
        ({"models": ["RUN", "RUN"]}, ConfigError, "was named twice; name each model once"),
        ({"models": ["RUN", "nowhere.pth"]}, WeightsError, "there is no weight file nowhere.pth"),
        ({"methods": ["retrieval"]}, ConfigError, "retrieval alone compares no answers; name another method besides"),
        (
            {"methods": ["svm"]},
            ConfigError,
            "no method is called 'svm'; choose from knn, log-regression, head, ",
        ),
    ],
)
def test_wrong_requests_are_refused_before_any_work(run, here, monkeypatch, change, error, reason):
    monkeypatch.setattr(
        "dinov2.apps.evaluation.features.extract_features", lambda *a, **k: pytest.fail("work was done")
    )
    models = [run if model == "RUN" else model for model in change.get("models", ["RUN"])]
    with pytest.raises(error, match=reason):
        compare_models(models, EvalConfig(model=run, **SETS), methods=change.get("methods", ()))
    assert list(here.iterdir()) == []
