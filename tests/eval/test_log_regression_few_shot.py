"""Few images of each class: the draws, the choice of C inside the support, and the two classifiers."""

import pytest
import torch
from torch.testing import assert_close

from dinov2.encode.stream import Features
from dinov2.errors import ConfigError, DataError
from dinov2.eval.classes import few_shot_rows
from dinov2.eval.log_regression import LogisticRegression, LogRegModule, evaluate_few_shot, train_for_C
from dinov2.eval.log_regression.few_shot import class_mean_scores, cross_validated_C


def sets(n=120, n_val=60, n_classes=3, distance=1.5):
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(n + n_val) % n_classes
    rows = distance * torch.randn(n_classes, 5, generator=generator)[classes]
    rows = rows + torch.randn(n + n_val, 5, generator=generator)
    return Features(rows[:n], classes[:n]), Features(rows[n:], classes[n:])


def test_every_try_is_the_fit_on_its_own_support():
    train, val = sets()
    evaluation = evaluate_few_shot(train, val, shots=(4,), n_tries=3)
    by_mean, by_logistic = (row for row in evaluation.rows if row.metric == "top-1")
    for seed in range(3):
        support = few_shot_rows(train.labels, n_per_class=4, seed=seed)
        assert by_mean.settings["supports"][seed] == support.tolist()
        X, y = train.features[support], train.labels[support]
        scores = class_mean_scores(X, y, val.features, n_classes=3)
        hits = (scores.argmax(1) == val.labels).double().mean().item()
        assert by_mean.settings["tries"][seed] == pytest.approx(100 * hits)
        C = cross_validated_C(X, y, n_classes=3, Cs=(0.01, 1.0, 100.0))
        assert C in (0.01, 1.0, 100.0)
        model = LogisticRegression(by_logistic.settings["C"][seed]).fit(X, y)
        assert by_logistic.settings["tries"][seed] == pytest.approx(100 * model.score(val.features, val.labels))
    assert by_mean.value == pytest.approx(sum(by_mean.settings["tries"]) / 3)
    assert by_mean.ci[0] <= by_mean.value <= by_mean.ci[1]
    assert list(evaluation.outcomes) == ["class-mean 4 shots", "logistic 4 shots"]


def test_the_class_mean_is_the_nearest_by_angle():
    support = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    scores = class_mean_scores(support, torch.tensor([0, 0, 1]), torch.tensor([[5.0, 5.0], [1.0, 0.0]]), n_classes=2)
    assert_close(scores, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))


def test_c_is_the_best_of_scikit_learns_cross_validation():
    model_selection = pytest.importorskip("sklearn.model_selection")
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, _ = sets(45, distance=0.6)
    X, y = train.features, train.labels
    Cs = (1e-3, 0.03, 1.0, 30.0)
    folds = model_selection.PredefinedSplit((torch.arange(45) // 3 % 5).numpy())  # labels go round 0, 1, 2
    accuracies = [
        model_selection.cross_val_score(
            linear_model.LogisticRegression(C=C, max_iter=1000, tol=1e-8), X.numpy(), y.numpy(), cv=folds
        ).mean()
        for C in Cs
    ]
    assert cross_validated_C(X, y, n_classes=3, Cs=Cs) == Cs[max(range(4), key=lambda i: round(accuracies[i], 6))]


def test_one_image_of_each_class_takes_c_as_it_is():
    row = evaluate_few_shot(*sets(), shots=(1,), n_tries=2, methods=("logistic",)).rows[0]
    assert row.settings["C"] == [1.0, 1.0]
    assert "one image of each class leaves nothing to choose C on: it is 1" in row.notes


def test_classes_with_too_few_images_fail_unless_allowed():
    train, val = sets(9, 30)
    with pytest.raises(DataError, match="a class has 3 training images, and 5 of each were asked for"):
        evaluate_few_shot(train, val, shots=(2, 5))
    row = evaluate_few_shot(train, val, shots=(5,), methods=("class-mean",), allow_fewer=True).rows[0]
    assert "classes with fewer than 5 training images brought what they have" in row.notes
    assert row.settings["std"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": (0,)}, "write 1 or more"),
        ({"n_tries": 0}, "0 tries"),
        ({"methods": ("svm",)}, "no few-shot method is called 'svm'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_few_shot(*sets(), **settings)


def test_the_releases_fit_for_one_c_gives_a_module():
    train, val = sets()
    module = train_for_C(C=0.3, max_iter=100, train_features=train.features, train_labels=train.labels)
    assert isinstance(module, LogRegModule)
    found = module(val.features, val.labels)
    expected = LogisticRegression(0.3, dtype=torch.float64).fit(train.features, train.labels)
    assert torch.equal(found["preds"], expected.predict_proba(val.features))
    assert torch.equal(found["target"], val.labels)
