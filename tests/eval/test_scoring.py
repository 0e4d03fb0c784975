"""Test sets with rules of their own, by every classifier: own classes, several right labels, corruptions."""

import statistics

import pytest
import torch
from torch.testing import assert_close

from dinov2.encode.stream import Features, Scoring
from dinov2.errors import DataError
from dinov2.eval.knn import evaluate_knn
from dinov2.eval.knn.evaluate import evaluate_knn_outcome
from dinov2.eval.linear import LinearSettings, evaluate_linear
from dinov2.eval.log_regression import evaluate_log_regression, fit_path
from dinov2.eval.metrics import ALEXNET_ERRORS, real_accuracy, restrict_scores, top_k_accuracy
from dinov2.eval.scoring import match_classes
from tests.eval.knn_golden import TEST, TEST_LABELS, TRAIN, TRAIN_LABELS, knn_votes

IDS = tuple(f"n{number:08}" for number in range(10))
NAMES = tuple(f"class {number}" for number in range(10))
OWN = torch.tensor([7, 2, 4])  # the training label of each class of the small set

TRAINING = Features(TRAIN, TRAIN_LABELS, NAMES, class_ids=IDS)

QUICK = LinearSettings(learning_rates=(0.1,), n_last_blocks=(1,), n_iterations=20, batch_size=50)

CLASSIFIERS = {
    "knn": lambda train, val: evaluate_knn(train, val, nb_knn=(20,)),
    "knn outcome": lambda train, val: evaluate_knn_outcome(train, val, k=20, nb_knn=(20,)).rows,
    "logistic": lambda train, val: evaluate_log_regression(train, val, Cs=(1.0,)).rows,
    "linear": lambda train, val: evaluate_linear(train, val, settings=QUICK).rows,
}


def of_three_classes(scoring: Scoring | None) -> Features:
    """The test images of the classes 7, 2 and 4, counted in that order and named otherwise."""
    rows = torch.isin(TEST_LABELS, OWN).nonzero().squeeze(1)
    labels = (TEST_LABELS[rows].unsqueeze(1) == OWN).int().argmax(dim=1)
    ids = tuple(IDS[number] for number in OWN.tolist())
    return Features(TEST[rows], labels, ("g", "b", "d"), indices=rows, class_ids=ids, scoring=scoring)


def figures(rows) -> dict[str, float]:
    return {row.metric: row.value for row in rows}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_set_of_some_classes_is_answered_among_them_and_says_so(name: str) -> None:
    found = {own: CLASSIFIERS[name](TRAINING, of_three_classes(Scoring(own_classes=own))) for own in (True, False)}
    restricted, free = found[True], found[False]
    # Every image that was right among ten is right among three.
    assert figures(restricted)["top-1"] >= figures(free)["top-1"]
    assert (restricted[0].settings["n_classes"], restricted[0].settings["n_answers"]) == (10, 3)
    assert (free[0].settings["n_classes"], free[0].settings["n_answers"]) == (10, 10)
    assert "answers are chosen among the 3 classes of the validation set, not among all 10" in restricted[0].notes
    assert not any("answers are chosen" in note for note in free[0].notes)
    assert "there are only 3 classes, so top-5 is top-3" in restricted[0].notes


def test_restricted_k_nn_is_the_vote_of_all_images_for_the_set_s_classes_alone() -> None:
    val = of_three_classes(Scoring(own_classes=True))
    votes = knn_votes(TRAIN, TRAIN_LABELS, val.features, ks=[20])[20]
    own = restrict_scores(votes, OWN)
    expected = 100 * ((own.argmax(dim=1) == val.labels) & (own.amax(dim=1) > 0)).double().mean().item()
    free = 100 * top_k_accuracy(votes, OWN[val.labels])
    assert expected > free  # else the test could not fail
    for evaluate in (CLASSIFIERS["knn"], CLASSIFIERS["knn outcome"]):
        assert figures(evaluate(TRAINING, val))["top-1"] == pytest.approx(expected)
    outcome = evaluate_knn_outcome(TRAINING, val, k=20, nb_knn=(20,)).outcomes["k=20"]
    assert outcome.class_names == ("g", "b", "d")
    assert_close(outcome.probabilities, own / own.sum(dim=1, keepdim=True).clamp_min(1e-30), rtol=1e-5, atol=1e-6)


def test_restricted_logistic_regression_is_the_softmax_of_the_set_s_scores_alone() -> None:
    val = of_three_classes(Scoring(own_classes=True))
    (outcome,) = evaluate_log_regression(TRAINING, val, Cs=(1.0,)).outcomes.values()
    (fit,) = fit_path(TRAIN, TRAIN_LABELS, n_classes=10, Cs=[1.0])
    expected = restrict_scores(fit.scores(val.features), OWN).softmax(dim=1)
    assert_close(outcome.probabilities, expected.float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(outcome.targets, val.labels) and torch.equal(outcome.indices, val.indices)


def test_an_image_without_a_vote_for_the_set_s_classes_is_an_error() -> None:
    train = Features(torch.eye(3), torch.tensor([0, 1, 2]))
    scoring = Scoring(class_mapping=torch.tensor([1, 2]))
    val = Features(torch.eye(3)[[0, 1]], torch.tensor([0, 0]), scoring=scoring)
    rows = evaluate_knn(train, val, nb_knn=(1,))
    assert figures(rows) == {"top-1": 50.0, "top-5": 50.0}  # the nearest of the first image is of a class outside
    assert figures(evaluate_knn_outcome(train, val, k=1, nb_knn=(1,)).rows)["top-1"] == 50.0


def test_classes_of_the_set_that_nothing_was_trained_on_are_no_answers_and_errors() -> None:
    train = Features(torch.eye(4), torch.arange(4), class_ids=("a", "b", "c", "d"))
    val = Features(
        torch.eye(4)[[1, 3, 0]], torch.tensor([1, 2, 0]), class_ids=("z", "b", "d"), scoring=Scoring(own_classes=True)
    )
    task = match_classes(train, val)
    assert task.answers.among.tolist() == [1, 3] and task.answers.names == ("1", "2")
    assert task.val_classes.tolist() == [1, 3, -1] and task.answers.targets.tolist() == [0, 1, -1]
    assert any("1 validation images are of classes without training images" in note for note in task.notes)


def test_a_set_of_all_classes_in_the_same_order_restricts_nothing() -> None:
    val = Features(TEST, TEST_LABELS, NAMES, class_ids=IDS, scoring=Scoring(own_classes=True))
    task = match_classes(TRAINING, val)
    assert task.answers.among is None and task.answers.names == NAMES and task.notes == ()


# Which class is which.


def test_identifiers_tell_before_names_and_names_before_numbers() -> None:
    features, labels = torch.eye(2), torch.tensor([0, 1])
    train = Features(features, labels, ("crane", "crane"), class_ids=("n2", "n1"))
    by_id = Features(features, labels, ("crane", "crane"), class_ids=("n1", "n2"))
    assert match_classes(train, by_id).val_classes.tolist() == [1, 0]
    names = Features(features, labels, ("ant", "bee"))
    swapped = Features(features, labels, ("bee", "ant"), class_ids=("n1", "n2"))
    assert match_classes(names, swapped).val_classes.tolist() == [1, 0]  # one set alone knows identifiers
    assert match_classes(Features(features, labels), swapped).val_classes.tolist() == [0, 1]


# Several right labels.


def reassessed() -> Features:
    """Test images with up to two right labels; the first twelve have none, and some one that nothing was trained on."""
    second = (TEST_LABELS + 3) % 10
    label_sets = torch.stack([TEST_LABELS, second], dim=1)
    label_sets[:12] = -1
    label_sets[12:20, 1] = -1
    label_sets[20:25] = torch.tensor([10, -1])
    return Features(
        TEST, TEST_LABELS, (*NAMES, "unknown"), class_ids=(*IDS, "n99"), scoring=Scoring(False, None, label_sets)
    )


@pytest.mark.parametrize("name", ["knn", "knn outcome", "logistic"])
def test_any_right_label_counts_and_images_without_one_are_left_out(name: str) -> None:
    val = reassessed()
    rows = CLASSIFIERS[name](TRAINING, val)
    found = figures(rows)
    if name == "logistic":
        (fit,) = fit_path(TRAIN, TRAIN_LABELS, n_classes=10, Cs=[1.0])
        scores = fit.scores(TEST)
    else:
        scores = knn_votes(TRAIN, TRAIN_LABELS, TEST, ks=[20])[20]
    # A class beyond the last that is never answered stands for the one that nothing was trained on.
    scores = torch.cat([scores, torch.full((len(TEST), 1), -1e9)], dim=1)
    assert found["real top-1"] == pytest.approx(100 * real_accuracy(scores, val.scoring.label_sets), abs=1e-4)
    assert found["real top-1"] != pytest.approx(found["top-1"])
    (real,) = (row for row in rows if row.metric == "real top-1")
    assert real.n == len(TEST) - 12 and real.ci[0] < real.value < real.ci[1]
    assert found["real top-5"] >= found["real top-1"]


def test_label_sets_follow_their_classes_to_another_numbering() -> None:
    val = reassessed()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    moved = Features(
        TEST,
        order.argsort()[TEST_LABELS],
        class_ids=tuple(val.class_ids[number] for number in order.tolist()),
        scoring=Scoring(
            label_sets=torch.where(val.scoring.label_sets < 0, -1, order.argsort()[val.scoring.label_sets])
        ),
    )
    assert figures(CLASSIFIERS["knn"](TRAINING, moved)) == figures(CLASSIFIERS["knn"](TRAINING, val))


# Corruptions.


def corrupted(parts: tuple[tuple[str, int], ...]) -> Features:
    """Every test image once a part, the more noise the later."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.linspace(0.05, 0.4, len(parts)).view(-1, 1, 1)
    images = (TEST + noise * torch.randn(len(parts), *TEST.shape, generator=generator)).flatten(0, 1)
    numbers = torch.arange(len(parts)).repeat_interleave(len(TEST))
    return Features(images, TEST_LABELS.repeat(len(parts)), scoring=Scoring(parts=parts, part_numbers=numbers))


def test_errors_of_all_corruptions_give_their_mean_by_alexnet_s() -> None:
    parts = tuple((name, severity) for name in ALEXNET_ERRORS for severity in range(1, 6))
    val = corrupted(parts)
    scores = knn_votes(TRAIN, TRAIN_LABELS, val.features, ks=[20])[20]
    wrong = (scores.argmax(dim=1) != val.labels).double().view(15, 5, len(TEST))
    by_corruption = dict(zip(ALEXNET_ERRORS, wrong.mean(dim=(1, 2)).tolist(), strict=True))
    expected = statistics.fmean(error / ALEXNET_ERRORS[name] for name, error in by_corruption.items())
    for name in ("knn", "knn outcome"):
        found = figures(CLASSIFIERS[name](TRAINING, val))
        assert found["mCE"] == pytest.approx(100 * expected)
        assert found["mean error"] == pytest.approx(100 * float(wrong.mean())) == pytest.approx(100 - found["top-1"])
        assert found["error fog 4"] == pytest.approx(100 * float(wrong[list(ALEXNET_ERRORS).index("fog"), 3].mean()))
        assert found["CE snow"] == pytest.approx(100 * by_corruption["snow"] / ALEXNET_ERRORS["snow"])
        assert sum(metric.startswith("error ") for metric in found) == 75


def test_what_has_no_counterpart_of_alexnet_s_is_an_error_rate_alone() -> None:
    one_severity, extra = (("fog", 3),), tuple(("spatter", severity) for severity in range(1, 6))
    found = figures(CLASSIFIERS["logistic"](TRAINING, corrupted((*one_severity, *extra))))
    assert {metric for metric in found if metric.startswith(("error", "CE", "mCE"))} == {
        "error fog 3", *(f"error spatter {severity}" for severity in range(1, 6))
    }  # fmt: skip


def test_a_part_without_an_image_is_no_error_rate_of_zero() -> None:
    val = corrupted((("fog", 1), ("fog", 2)))
    with pytest.raises(DataError, match="no image of fog at severity 2 was scored"):
        evaluate_knn(TRAINING, val.take(torch.arange(len(TEST))), nb_knn=(20,))


# Rules that do not fit.


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        (Scoring(class_mapping=torch.tensor([0, 1, 11])), "names classes that nothing was trained on"),
        (Scoring(class_mapping=torch.tensor([0, 1])), "has 2 entries, but the test images have a label 2"),
        (Scoring(class_mapping=torch.tensor([0, 1, 2, 3])), "has 4 entries for a test set of 3 classes"),
        (Scoring(class_mapping=torch.tensor([0, 1, 1])), "two classes of the validation set are the same class"),
        (Scoring(class_mapping=torch.tensor([0.0, 1.0, 2.0])), r"a list of labels, got torch.float32 \[3\]"),
        (Scoring(label_sets=torch.zeros(4, 1, dtype=torch.int64)), "4 label sets for .* one row for each image"),
        (Scoring(part_numbers=torch.zeros(4, dtype=torch.int64)), "4 part numbers for"),
    ],
)
def test_rules_of_other_images_or_classes_are_refused(scoring: Scoring, message: str) -> None:
    with pytest.raises(DataError, match=message):
        match_classes(TRAINING, of_three_classes(scoring))
