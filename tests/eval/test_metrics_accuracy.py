"""Accuracies against the reference's golden figures, torchmetrics and scikit-learn."""

import json
import math
from pathlib import Path

import pytest
import torch

from dinov2.errors import DataError
from dinov2.eval.metrics import (
    best_ranks,
    mean_per_class_accuracy,
    per_class_means,
    real_accuracy,
    renumber_labels,
    restrict_scores,
    target_ranks,
    top_k_accuracy,
    voted_ranks,
)
from tests.golden.recipe import values

sklearn_metrics = pytest.importorskip("sklearn.metrics")
torchmetrics = pytest.importorskip("torchmetrics.classification")

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text())
RESULTS = GOLDEN["results"]


def per_class_accuracy(scores, targets, *, k=1):
    hits = target_ranks(scores, targets) < min(k, scores.shape[1])
    return per_class_means(hits, targets, n_classes=scores.shape[1])


@pytest.fixture(scope="module")
def logits():
    target = torch.tensor(GOLDEN["target"])
    i = torch.arange(40)
    favoured = (target + (i % 3 == 0)) % 8
    return 3 * torch.from_numpy(values("metrics.logits", (40, 8))) + 1.5 * torch.nn.functional.one_hot(favoured, 8)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_accuracies_equal_the_reference_on_balanced_targets(logits, k):
    target = torch.tensor(GOLDEN["target"])
    assert top_k_accuracy(logits, target, k=k) == pytest.approx(RESULTS["mean_accuracy"][f"top-{k}"], abs=1e-6)
    assert mean_per_class_accuracy(logits, target, k=k) == pytest.approx(
        RESULTS["mean_per_class_accuracy"][f"top-{k}"], abs=1e-6
    )
    assert per_class_accuracy(logits, target, k=k).tolist() == pytest.approx(
        RESULTS["per_class_accuracy"][f"top-{k}"], abs=1e-6
    )


@pytest.mark.parametrize("k", [1, 5])
def test_dividing_by_all_classes_equals_the_library_that_the_reference_pins(logits, k):
    target = torch.tensor(GOLDEN["target_unbalanced"])
    assert mean_per_class_accuracy(logits, target, k=k, over="all") == pytest.approx(
        RESULTS["mean_per_class_accuracy_unbalanced"][f"top-{k}"], abs=1e-6
    )
    assert per_class_accuracy(logits, target, k=k).nan_to_num().tolist() == pytest.approx(
        RESULTS["per_class_accuracy_unbalanced"][f"top-{k}"], abs=1e-6
    )


def test_the_mean_over_classes_that_have_samples_is_the_recall_of_those(logits):
    target = torch.tensor(GOLDEN["target_unbalanced"])
    recalls = RESULTS["per_class_accuracy_unbalanced"]["top-1"]
    present = [recalls[c] for c in sorted(set(GOLDEN["target_unbalanced"]))]
    assert mean_per_class_accuracy(logits, target) == pytest.approx(sum(present) / len(present), abs=1e-6)
    # A recent version of the library agrees for top-5 alone.
    assert mean_per_class_accuracy(logits, target, k=5) == pytest.approx(
        GOLDEN["differs_with_torchmetrics_1.9.0"]["mean_per_class_accuracy_unbalanced.top-5"], abs=1e-6
    )


def test_classes_without_samples_have_no_recall(logits):
    recalls = per_class_accuracy(logits, torch.tensor(GOLDEN["target_unbalanced"]))
    assert recalls.isnan().tolist() == [c not in set(GOLDEN["target_unbalanced"]) for c in range(8)]


@pytest.mark.parametrize("k", [1, 5])
def test_real_accuracy_equals_the_reference_and_leaves_its_labels_alone(logits, k):
    sets = GOLDEN["real_targets"]
    padded = torch.full(GOLDEN["padded_shape"], -1)
    for row, labels in enumerate(sets):
        padded[row, : len(labels)] = torch.tensor(labels, dtype=torch.int64)
    copy = padded.clone()
    assert real_accuracy(logits, padded, k=k) == pytest.approx(RESULTS["imagenet_real_accuracy"][f"top-{k}"], abs=1e-6)
    assert torch.equal(padded, copy)


def test_real_accuracy_without_any_label_is_an_error():
    with pytest.raises(DataError, match="no image has a label"):
        real_accuracy(torch.zeros(2, 3), torch.full((2, 4), -1))


def test_of_equal_scores_the_lower_class_stands_first():
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert [target_ranks(scores, torch.tensor([c])).item() for c in range(4)] == [2, 0, 1, 3]


def test_scores_that_are_not_finite_never_hit():
    scores = torch.tensor([[math.nan, math.nan], [math.nan, 1.0]])
    assert target_ranks(scores, torch.tensor([0, 1])).tolist() == [2, 1]


def test_top_5_of_three_classes_is_top_3():
    assert top_k_accuracy(torch.rand(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), k=5) == 1.0


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), "targets run from 0 to 3, but there are 3 classes"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "targets run from -1"),
        (torch.zeros(2, 3), torch.tensor([0]), r"must be \[S, C\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "no samples"),
    ],
)
def test_targets_that_do_not_fit_the_scores_are_refused(scores, targets, message):
    with pytest.raises(DataError, match=message):
        top_k_accuracy(scores, targets)


# Against the libraries, on sizes that nothing divides


def draw(n: int, n_classes: int, *, seed: int = 0, absent: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [n, n_classes] that know something of their targets [n]; the absent classes have no target."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.tensor([c for c in range(n_classes) if c not in absent])
    targets = present[torch.randint(len(present), (n,), generator=generator)]
    scores = torch.randn(n, n_classes, generator=generator)
    return scores + 1.5 * torch.nn.functional.one_hot(targets, n_classes), targets


@pytest.mark.parametrize(("n", "n_classes"), [(101, 7), (53, 11), (97, 6)])
@pytest.mark.parametrize("k", [1, 5])
def test_accuracies_equal_torchmetrics_and_scikit_learn(n: int, n_classes: int, k: int) -> None:
    scores, targets = draw(n, n_classes)
    assert len(targets.unique()) == n_classes  # the libraries disagree otherwise
    theirs = {
        average: torchmetrics.MulticlassAccuracy(n_classes, top_k=k, average=average)(scores, targets)
        for average in ("micro", "macro", "none")
    }
    assert top_k_accuracy(scores, targets, k=k) == pytest.approx(theirs["micro"].item(), abs=1e-6)
    assert mean_per_class_accuracy(scores, targets, k=k) == pytest.approx(theirs["macro"].item(), abs=1e-6)
    assert per_class_accuracy(scores, targets, k=k).tolist() == pytest.approx(theirs["none"].tolist(), abs=1e-6)
    assert top_k_accuracy(scores, targets, k=k) == pytest.approx(
        sklearn_metrics.top_k_accuracy_score(targets, scores, k=k, labels=range(n_classes))
    )


def test_both_means_over_classes_equal_scikit_learn_when_classes_lack_samples() -> None:
    scores, targets = draw(83, 9, absent=(2, 8))
    predictions = scores.argmax(dim=1)
    assert set(predictions.tolist()) - set(targets.tolist())  # some answers are classes without samples
    present = targets.unique().tolist()
    recalls = sklearn_metrics.recall_score(targets, predictions, labels=present, average="macro")
    assert mean_per_class_accuracy(scores, targets) == pytest.approx(recalls)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert mean_per_class_accuracy(scores, targets) == pytest.approx(
            sklearn_metrics.balanced_accuracy_score(targets, predictions)
        )
    over_all = sklearn_metrics.recall_score(targets, predictions, labels=range(9), average="macro", zero_division=0)
    assert mean_per_class_accuracy(scores, targets, over="all") == pytest.approx(over_all)


def test_real_accuracy_of_single_labels_is_top_1_of_the_labelled_images() -> None:
    scores, targets = draw(41, 7)
    sets = targets.unsqueeze(1).clone()
    sets[::3] = -1
    labelled = sets[:, 0] >= 0
    theirs = torchmetrics.MulticlassAccuracy(7, average="micro", ignore_index=-1)(scores, sets[:, 0])
    assert real_accuracy(scores, sets) == pytest.approx(theirs.item(), abs=1e-6)
    assert real_accuracy(scores, sets) == pytest.approx(top_k_accuracy(scores[labelled], targets[labelled]))


def test_real_accuracy_counts_an_image_once_however_many_of_its_labels_are_hit() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.0], [0.9, 0.0, 0.0, 0.1], [0.0, 0.0, 0.0, 1.0]])
    sets = torch.tensor([[1, 2], [1, 2], [-1, -1]])
    assert real_accuracy(scores, sets) == 0.5
    assert real_accuracy(scores, sets, k=2) == 0.5


def test_samples_of_unknown_classes_are_in_no_class_mean() -> None:
    means = per_class_means(torch.tensor([1.0, 0.0, 1.0, 5.0]), torch.tensor([0, 0, 2, -1]), n_classes=3)
    assert means.nan_to_num(-9).tolist() == [0.5, -9, 1.0]


# Parts of the classes


def test_restricted_scores_are_those_of_the_test_sets_own_classes() -> None:
    scores, targets = draw(60, 10)
    mapping = torch.tensor([7, 0, 4])
    of_interest = torch.isin(targets, mapping)
    own_targets = torch.tensor([mapping.tolist().index(t) for t in targets[of_interest].tolist()])
    restricted = restrict_scores(scores[of_interest], mapping)
    by_hand = [
        max(mapping.tolist(), key=lambda c: row[c].item()) == target
        for row, target in zip(scores[of_interest], targets[of_interest].tolist(), strict=True)
    ]
    assert top_k_accuracy(restricted, own_targets) == pytest.approx(sum(by_hand) / len(by_hand))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([0, 10], "runs from 0 to 10, but there are 10 classes"),
        ([-1, 2], "runs from -1"),
        ([3, 3], "names a class twice"),
        ([], "a list of class numbers"),
        ([0.5], "a list of class numbers, got torch.float32"),
    ],
)
def test_a_class_mapping_that_does_not_fit_is_refused(mapping: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        restrict_scores(torch.zeros(2, 10), torch.tensor(mapping))


def test_label_sets_follow_the_classes_to_another_numbering() -> None:
    # A classifier of the classes 2 and 0 of four, in this order.
    numbers = torch.tensor([1, -1, 0, -1])
    sets = torch.tensor([[0, 2], [1, -1], [3, 2]])
    assert renumber_labels(sets, numbers).tolist() == [[1, 0], [-1, -1], [-1, 0]]
    with pytest.raises(DataError, match="there is a label 4, but the new numbering has 4 classes"):
        renumber_labels(torch.tensor([4]), numbers)


def test_a_class_without_a_vote_and_one_that_is_no_answer_come_last() -> None:
    votes = torch.tensor([[0.0, 0.6, 0.4], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]])
    assert voted_ranks(votes, torch.tensor([2, 1, -1])).tolist() == [1, 3, 3]
    assert voted_ranks(votes, torch.tensor([0, 2, 0])).tolist() == [3, 0, 2]


def test_the_best_of_several_labels_ranks_an_image() -> None:
    votes = torch.tensor([[0.1, 0.6, 0.3]] * 4)
    label_sets = torch.tensor([[0, 2], [2, 1], [-1, -1], [3, 0]])  # 3 is right and no class of these
    assert best_ranks(votes, label_sets).tolist() == [1, 0, 3, 2]
