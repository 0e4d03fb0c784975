"""k-NN answers that can be compared: their figures are those of `evaluate_knn`."""

import pytest
import torch
from torch.testing import assert_close

from dinov2.encode.stream import Features
from dinov2.errors import ConfigError
from dinov2.eval.knn import evaluate_knn
from dinov2.eval.knn.evaluate import evaluate_knn_outcome
from tests.eval.knn_golden import TEST, TEST_LABELS, TRAIN, TRAIN_LABELS

NAMES = tuple(f"class {number}" for number in range(10))


def test_the_figures_are_those_of_the_k_nn_evaluation():
    train, val = Features(TRAIN, TRAIN_LABELS, NAMES), Features(TEST, TEST_LABELS, NAMES)
    found = evaluate_knn_outcome(train, val, k=20, nb_knn=(10, 20, 100))
    expected = {(row.k, row.metric): row.value for row in evaluate_knn(train, val, nb_knn=(10, 20, 100))}
    assert {(row.k, row.metric): row.value for row in found.rows if row.metric != "mean-per-class"} == pytest.approx(
        expected
    )
    assert list(dict.fromkeys(row.k for row in found.rows)) == [20, 10, 100]
    assert {(row.k, row.metric): row.ci for row in found.rows if row.metric != "mean-per-class"} == {
        (row.k, row.metric): row.ci for row in evaluate_knn(train, val, nb_knn=(10, 20, 100))
    }
    assert list(found.outcomes) == ["k=20"]
    best = found.outcomes["k=20"]
    assert_close(best.probabilities.sum(dim=1), torch.ones(len(TEST)))
    assert best.class_names == NAMES and best.indices.tolist() == list(range(len(TEST)))


def test_classes_are_named_by_the_training_set_and_unlabelled_images_are_left_out():
    train = Features(torch.eye(4), torch.tensor([7, 7, 9, 9]))
    val = Features(torch.eye(4)[:3], torch.tensor([7, -1, 9]), indices=torch.tensor([2, 5, 6]))
    outcome = evaluate_knn_outcome(train, val, k=1, nb_knn=(1,)).outcomes["k=1"]
    assert outcome.class_names == ("7", "9")
    assert outcome.indices.tolist() == [2, 6] and outcome.targets.tolist() == [0, 1]


def test_more_neighbours_than_images_are_limited_with_a_note():
    features = Features(torch.eye(3), torch.tensor([0, 1, 1]))
    found = evaluate_knn_outcome(features, features, k=20)
    assert list(found.outcomes) == ["k=3"]
    assert any("limited to the 3 training images" in note for note in found.rows[0].notes)
    with pytest.raises(ConfigError, match="write 1 or more"):
        evaluate_knn_outcome(features, features, k=0)
