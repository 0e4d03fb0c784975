"""Extraction and k-NN over two gloo processes give what one process gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from dinov2.encode.stream import Features, Scoring, extract_features
from dinov2.errors import DataError
from dinov2.eval.knn import KnnModule, evaluate_knn
from dinov2.eval.knn.evaluate import evaluate_knn_outcome
from tests.eval.knn_golden import TEST, TEST_LABELS, TRAIN, TRAIN_LABELS
from tests.eval.two_processes import on_two_processes

SIZES = (57, 1)  # one image is a share of none and one of one


class Rows:
    """The golden training features as a data set of images [1, 4, 4], four of them broken."""

    class_names = None
    broken = (0, 3, 170, 299)

    def __len__(self):
        return 300

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError(f"broken {index}")
        return TRAIN[index].view(1, 4, 4), int(TRAIN_LABELS[index])


class Broken(Rows):
    """Readable in the second half alone, so that the first process has not a single row."""

    broken = range(150)


def flatten(images):
    return images.flatten(1)


def accuracies(train):
    rows = evaluate_knn(train, Features(TEST, TEST_LABELS), nb_knn=(10, 20), n_per_class_list=(-1, 5), n_tries=2)
    return [(row.k, row.metric, row.value) for row in rows]


def answers(n: int, scoring: Scoring | None = None) -> dict[str, Any]:
    """k-NN answers to the first n test images; n is odd, so that the processes have unequal shares."""
    labels = TEST_LABELS[:n] if scoring is None else TEST_LABELS[:n] % 5
    found = evaluate_knn_outcome(
        Features(TRAIN, TRAIN_LABELS), Features(TEST[:n], labels, scoring=scoring), k=7, nb_knn=(7, 20)
    )
    rows = [(row.k, row.metric, row.value, row.ci) for row in found.rows]
    return {"rows": rows, "probabilities": [one.probabilities for one in found.outcomes.values()]}


RULES = Scoring(
    class_mapping=torch.tensor([4, 3, 2, 1, 0]),
    label_sets=torch.stack([TEST_LABELS[:57] % 5, (TEST_LABELS[:57] + 1) % 5], dim=1),
    parts=(("fog", 1), ("fog", 2)),
    part_numbers=torch.arange(57) % 2,
)


def ruled(nb_knn=(20,), **options: Any) -> list[tuple[Any, ...]]:
    """All figures of a test set with every rule there is."""
    val = Features(TEST[:57], TEST_LABELS[:57] % 5, scoring=RULES)
    rows = evaluate_knn(Features(TRAIN, TRAIN_LABELS), val, nb_knn=nb_knn, **options)
    return [(row.k, row.metric, row.value, row.ci) for row in rows]


def work(rank: int, folder: Path) -> dict[str, Any]:
    extracted = extract_features(flatten, Rows(), batch_size=64)
    own = slice(0, 25) if rank == 0 else slice(25, 60)
    module = KnnModule(TRAIN, TRAIN_LABELS, [10, 20], 0.07, "cpu", num_classes=10)
    # 9 rows over 2 processes are fewer than k for each of them.
    small = KnnModule(TRAIN[:9], TRAIN_LABELS[:9], [7], 0.07, "cpu", num_classes=10)
    return {
        "features": extracted.features,
        "labels": extracted.labels,
        "indices": extracted.indices,
        "unreadable": extracted.unreadable,
        "half": extract_features(flatten, Broken(), batch_size=64).features,
        "accuracies": accuracies(extracted),
        "scores": module(TEST[own]),
        "nothing": module(TEST[:5] if rank else TEST[:0]),
        "small": small(TEST[own]),
        "answers": [answers(n) for n in SIZES],
        "restricted": answers(57, RULES),
        "ruled": ruled(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_processes(work, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
def test_every_process_has_all_rows_in_order_without_padding(ranks):
    alone = extract_features(flatten, Rows())
    for got in ranks:
        assert torch.equal(got["features"], alone.features)
        assert torch.equal(got["labels"], alone.labels)
        assert torch.equal(got["indices"], alone.indices)
        assert got["unreadable"] == alone.unreadable
        assert torch.equal(got["half"], TRAIN[150:])


@pytest.mark.slow
def test_accuracies_are_those_of_one_process_in_both(ranks):
    expected = accuracies(extract_features(flatten, Rows()))
    assert ranks[0]["accuracies"] == ranks[1]["accuracies"]
    for (k, metric, value), (expected_k, expected_metric, expected_value) in zip(
        ranks[0]["accuracies"], expected, strict=True
    ):
        assert (k, metric) == (expected_k, expected_metric)
        assert value == pytest.approx(expected_value, abs=1e-6)


@pytest.mark.slow
def test_sharing_out_the_training_features_changes_no_score(ranks):
    expected = KnnModule(TRAIN, TRAIN_LABELS, [10, 20], 0.07, "cpu", num_classes=10)(TEST)
    for k in (10, 20):
        scores = torch.cat([got["scores"][k] for got in ranks])
        assert_close(scores, expected[k], atol=1e-6, rtol=0)
        assert ranks[0]["nothing"][k].shape == (0, 10)
        assert_close(ranks[1]["nothing"][k], expected[k][:5], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_parts_smaller_than_k_work(ranks):
    expected = KnnModule(TRAIN[:9], TRAIN_LABELS[:9], [7], 0.07, "cpu", num_classes=10)(TEST)[7]
    assert_close(torch.cat([got["small"][7] for got in ranks]), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_answers_are_those_of_one_process_whatever_the_shares(ranks):
    for got in ranks:
        for size, found in zip(SIZES, got["answers"], strict=True):
            alone = answers(size)
            assert found["rows"] == alone["rows"]
            for one, other in zip(found["probabilities"], alone["probabilities"], strict=True):
                assert torch.equal(one, other)


@pytest.mark.slow
def test_rules_of_scoring_hold_in_every_share(ranks):
    expected, figures = answers(57, RULES), ruled()
    assert {"real top-1", "error fog 1", "error fog 2"} < {metric for _, metric, _, _ in figures}
    for got in ranks:
        assert got["ruled"] == figures and got["restricted"]["rows"] == expected["rows"]
        assert torch.equal(got["restricted"]["probabilities"][0], expected["probabilities"][0])
