"""The page of an evaluation, from plain values."""

import re

import pytest
import torch

from dinov2.eval.figures import Comparison, confidence_bins
from dinov2.eval.metrics import Estimate
from dinov2.eval.outcome import ClassRecall, Confused, Mistake
from dinov2.report.evaluation import (
    EvaluationRecord,
    MethodRecord,
    ModelRecord,
    PairRecord,
    PicturedMistake,
    evaluation_page,
)

MISTAKE = PicturedMistake(Mistake(0, 7, "cat", "dog", 0.9, 0.1), None, "photos/<x>.jpg")


def method(model: str, **changes) -> MethodRecord:
    values = {
        "method": "k-NN",
        "model": model,
        "setting": "k=20",
        "figures": {"top-1": Estimate(0.75, 0.5, 0.9)},
        "recalls": [ClassRecall("cat", 4, 3), ClassRecall("dog", 4, 3)],
        "confusion": [[3, 1], [1, 3]],
        "class_names": ["cat", "dog"],
        "pairs": [Confused("cat", "dog", 1, 0.25)],
        "bins": confidence_bins(torch.tensor([0.9, 0.2]), torch.tensor([True, False])),
        "calibration": {"ece": Estimate(0.1, 0.05, 0.2), "log-loss": Estimate(0.5, 0.4, 0.6)},
        "mistakes": [MISTAKE],
    }
    return MethodRecord(**{**values, **changes})


def record(*models: str, methods: list[MethodRecord] | None = None, **changes) -> EvaluationRecord:
    return EvaluationRecord(
        title="models on <photos>",
        facts=[("images scored", "8")],
        models=[ModelRecord(name, {"precision": "float32"}) for name in models],
        methods=methods if methods is not None else [method(name) for name in models],
        **changes,
    )


def test_one_model_needs_neither_a_legend_nor_differences():
    page = evaluation_page(record("mine"))
    assert 'class="legend"' not in page and "Differences" not in page
    assert "models on &lt;photos&gt;" in page and "photos/&lt;x&gt;.jpg" in page and "<photos>" not in page


def test_the_best_of_a_row_is_bold_where_there_is_something_to_compare():
    better = method("other", figures={"top-1": Estimate(0.8, 0.6, 0.95)})
    page = evaluation_page(record("mine", "other", methods=[method("mine"), better]))
    table = re.search(r'<table class="figures">.*?</table>', page, re.DOTALL)[0]
    assert "<b>80.00</b>" in table and "<b>75.00</b>" not in table
    assert "<b>" not in re.search(r'<table class="figures">.*?</table>', evaluation_page(record("mine")), re.DOTALL)[0]


@pytest.mark.parametrize(
    "low, high, kind", [(0.01, 0.09, "number better"), (-0.09, -0.01, "number worse"), (-0.01, 0.05, "number ")]
)
def test_a_difference_is_coloured_when_its_interval_leaves_out_zero(low, high, kind):
    found = Comparison(8, Estimate((low + high) / 2, low, high), 1, 2, 0.03)
    page = evaluation_page(record("mine", "other", pairs=[PairRecord("k-NN", "mine", "other", found, 0.06)]))
    assert f'<td class="{kind}">' in page and "2 / 1" in page and "0.0600" in page


def test_a_model_without_mistakes_has_no_pictures():
    page = evaluation_page(record("mine", methods=[method("mine", mistakes=[], pairs=[], confusion=())]))
    assert "mine makes no mistake on these images" in page and "no mistake between two known classes" in page


def test_empty_bins_have_no_dot():
    assert evaluation_page(record("mine")).count("<circle") == 2


def test_of_many_classes_the_pairs_take_the_place_of_the_matrix():
    page = evaluation_page(record("mine", methods=[method("mine", confusion=(), class_names=())]))
    assert 'class="card confusion"' not in page and "taken for" in page
