import json
import math
from pathlib import Path

import pytest
import torch

from dinov2.errors import DataError
from dinov2.features.metrics import (
    bootstrap_interval,
    mean_interval,
    mean_per_class_accuracy,
    per_class_accuracy,
    real_accuracy,
    target_ranks,
    top_k_accuracy,
    wilson_interval,
)
from tests.golden.recipe import values

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text())
RESULTS = GOLDEN["results"]


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


def test_wilson_interval_equals_a_published_example_and_stays_inside():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20)[0] == 0.0
    assert wilson_interval(20, 20)[1] == 1.0


def test_bootstrap_and_wilson_intervals_agree_on_many_samples():
    hits = torch.arange(2000) % 4 == 0
    assert bootstrap_interval(hits, n_resamples=4000) == pytest.approx(wilson_interval(500, 2000), abs=2e-3)


def test_bootstrap_of_a_group_resamples_inside_it_only():
    # Within each group all values are equal, so the mean of group means cannot move.
    values_, groups = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 1])
    assert bootstrap_interval(values_, groups=groups, n_resamples=50) == (0.5, 0.5)
    low, high = bootstrap_interval(values_, n_resamples=500)
    assert low < 0.5 and high > 0.75


def test_the_interval_of_five_repetitions_uses_students_t():
    # mean 3, standard deviation sqrt(2.5), t = 2.7764
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)


def test_student_t_goes_on_smoothly_beyond_its_table():
    widths = [mean_interval([0.0, 1.0] * (n // 2))[1] * 1.0 for n in (20, 22)]
    assert widths[0] > widths[1] > 0.5
