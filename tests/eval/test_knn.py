import json

import pytest
import torch
from torch.testing import assert_close

from dinov2.encode.stream import Features
from dinov2.errors import ConfigError, DataError
from dinov2.eval.knn import KnnModule, evaluate_knn, get_args_parser
from dinov2.eval.knn.release import write_knn_results
from dinov2.eval.result import read_results
from dinov2.eval.scoring import few_shot_rows, match_classes
from tests.eval.knn_golden import FIGURES, TENSORS, TEST, TEST_LABELS, TRAIN, TRAIN_LABELS, knn_votes

FEW_SHOT = [
    (int(name.split()[0]), int(seed))
    for name, tries in FIGURES["per_class"].items()
    if name != "full"
    for seed in tries
]


def figures(rows):
    return {(row.settings["n_per_class"], row.k, row.metric): row.value for row in rows}


def test_the_module_equals_the_reference():
    module = KnnModule(TRAIN, TRAIN_LABELS, [10, 20], 0.07, "cpu", num_classes=10)
    similarities, labels = module.compute_neighbors(TEST)
    assert_close(similarities, TENSORS["similarities"], atol=1e-5, rtol=0)
    assert torch.equal(labels, TENSORS["neighbour_labels"])
    probabilities = module(TEST)
    for k in (10, 20):
        assert_close(probabilities[k], TENSORS[f"probabilities.k{k}"], atol=1e-5, rtol=0)


def test_accuracies_of_the_full_set_equal_the_reference():
    rows = evaluate_knn(Features(TRAIN, TRAIN_LABELS), Features(TEST, TEST_LABELS), nb_knn=(10, 20))
    expected = {
        ("all", k, metric): 100 * FIGURES["full"][f"full.k{k}"][metric]
        for k in (10, 20)
        for metric in ("top-1", "top-5")
    }
    assert figures(rows) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("n_per_class", "seed"), FEW_SHOT)
def test_few_shot_draws_and_scores_equal_the_reference(n_per_class, seed):
    expected = FIGURES["per_class"][f"{n_per_class} per class"][str(seed)]
    rows = few_shot_rows(TRAIN_LABELS, n_per_class=n_per_class, seed=seed)
    assert rows.tolist() == expected["indices"]
    scores = knn_votes(TRAIN[rows], TRAIN_LABELS[rows], TEST, ks=expected["nb_knn"])
    for k in expected["nb_knn"]:
        mean, std, norm = expected[f"k{k}_probability_stats"]
        values = scores[k].double()
        found = [values.mean().item(), values.std(correction=0).item(), values.norm().item()]
        assert found == pytest.approx([mean, std, norm], rel=1e-5)
        # The reference leaves it to the sorting routine which classes without a vote fill the five best.
        five_best = scores[k].topk(5, dim=1).indices
        top_5 = (five_best == TEST_LABELS.unsqueeze(1)).any(dim=1).float().mean().item()
        assert top_5 == pytest.approx(expected[f"k{k}"]["top-5"], abs=1e-6)


def test_few_shot_top_1_is_the_mean_of_the_references_tries_with_their_spread():
    rows = evaluate_knn(
        Features(TRAIN, TRAIN_LABELS),
        Features(TEST, TEST_LABELS),
        nb_knn=(10, 20),
        n_per_class_list=(-1, 5, 12),
        n_tries=2,
    )
    found = figures(rows)
    assert {(n, k) for n, k, _ in found} == {("all", 10), ("all", 20), (5, 5), (12, 10), (12, 12)}
    for row in rows:
        if row.metric == "top-1" and row.settings["n_per_class"] != "all":
            tries = FIGURES["per_class"][f"{row.settings['n_per_class']} per class"]
            expected = [100 * tries[seed][f"k{row.k}"]["top-1"] for seed in ("0", "1")]
            assert row.settings["tries"] == pytest.approx(expected, abs=1e-4)
            assert row.value == pytest.approx(sum(expected) / 2, abs=1e-4)
            assert row.settings["std"] == pytest.approx(abs(expected[0] - expected[1]) / 2**0.5, abs=1e-4)


def test_a_class_without_a_vote_is_not_among_the_five_best():
    # One neighbour votes for one class: top-5 cannot exceed top-1.
    rows = evaluate_knn(Features(TRAIN, TRAIN_LABELS), Features(TEST, TEST_LABELS), nb_knn=(1,))
    assert rows[0].value == rows[1].value > 0


def test_drawing_few_shots_leaves_the_global_random_numbers_alone():
    state = torch.get_rng_state()
    few_shot_rows(TRAIN_LABELS, n_per_class=3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_features_need_not_be_normalised():
    scale = 1 + torch.arange(300).unsqueeze(1) % 5
    plain, scaled = (
        figures(evaluate_knn(Features(x, TRAIN_LABELS), Features(TEST, TEST_LABELS), nb_knn=(10,)))
        for x in (TRAIN, TRAIN * scale)
    )
    assert plain == scaled


def test_k_above_the_number_of_training_images_is_limited_with_a_note():
    rows = evaluate_knn(Features(TRAIN[:30], TRAIN_LABELS[:30]), Features(TEST, TEST_LABELS))
    assert sorted({row.k for row in rows}) == [10, 20, 30]
    assert "k = 100, 200 limited to the 30 training images" in rows[0].notes


def test_classes_with_too_few_images_are_noted():
    keep = torch.cat([(TRAIN_LABELS != 3).nonzero().squeeze(1), (TRAIN_LABELS == 3).nonzero().squeeze(1)[:2]])
    train = Features(TRAIN, TRAIN_LABELS).take(keep)
    rows = evaluate_knn(train, Features(TEST, TEST_LABELS), nb_knn=(5,), n_per_class_list=(5,))
    assert "1 classes have fewer than 5 training images" in rows[0].notes


@pytest.mark.parametrize("relabel", [lambda y: y + 7, lambda y: y * 100, lambda y: 9 - y])
def test_labels_may_be_any_numbers(relabel):
    def run(labels, test_labels):
        return figures(evaluate_knn(Features(TRAIN, labels), Features(TEST, test_labels), nb_knn=(10,)))

    assert run(relabel(TRAIN_LABELS), relabel(TEST_LABELS)) == run(TRAIN_LABELS, TEST_LABELS)


def test_classes_are_matched_by_name_when_a_folder_is_missing():
    letters = tuple("abcdefghij")
    train = Features(TRAIN, TRAIN_LABELS, class_names=letters)
    kept = TEST_LABELS >= 4  # a validation set without the folders a to d numbers e as 0
    val = Features(TEST[kept], TEST_LABELS[kept] - 4, class_names=letters[4:])
    expected = evaluate_knn(train, Features(TEST[kept], TEST_LABELS[kept]), nb_knn=(10,))
    assert figures(evaluate_knn(train, val, nb_knn=(10,))) == figures(expected)


def test_validation_images_of_unknown_classes_are_errors_and_noted():
    known = TRAIN_LABELS < 8
    train = Features(TRAIN[known], TRAIN_LABELS[known])
    val_known = TEST_LABELS < 8
    alone = evaluate_knn(train, Features(TEST[val_known], TEST_LABELS[val_known]), nb_knn=(10,))
    rows = evaluate_knn(train, Features(TEST, TEST_LABELS), nb_knn=(10,))
    assert rows[0].value == pytest.approx(alone[0].value * val_known.float().mean().item())
    assert "12 validation images are of classes without training images and count as errors" in rows[0].notes


def test_sets_that_share_no_class_are_refused():
    with pytest.raises(DataError, match="no class in common"):
        evaluate_knn(
            Features(TRAIN, TRAIN_LABELS, class_names=tuple("abcdefghij")),
            Features(TEST, TEST_LABELS, class_names=tuple("klmnopqrst")),
        )


def test_unlabelled_sets_are_refused_with_the_way_out():
    with pytest.raises(DataError, match="validation images have no labels.*class folders"):
        evaluate_knn(Features(TRAIN, TRAIN_LABELS), Features(TEST))
    with pytest.raises(DataError, match="training images have no labels"):
        evaluate_knn(Features(TRAIN), Features(TEST, TEST_LABELS))


def test_single_images_without_a_label_are_left_out_and_noted():
    labels = TEST_LABELS.clone()
    labels[:20] = -1
    rows = evaluate_knn(Features(TRAIN, TRAIN_LABELS), Features(TEST, labels), nb_knn=(10,))
    assert rows[0].n == 40
    assert "20 validation images without a label were left out" in rows[0].notes


def test_top_5_of_three_classes_is_noted():
    task = match_classes(Features(torch.rand(6, 2), torch.arange(6) % 3), Features(torch.rand(3, 2), torch.arange(3)))
    assert task.notes == ("there are only 3 classes, so top-5 is top-3",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nb_knn": (0,)}, "neighbours is 0; write 1 or more"),
        ({"nb_knn": ()}, "1 or more"),
        ({"n_per_class_list": (0,)}, "0 images"),
        ({"n_per_class_list": (5,), "n_tries": 0}, "tries is 0; write 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_knn(Features(TRAIN, TRAIN_LABELS), Features(TEST, TEST_LABELS), **arguments)


def test_rows_say_where_they_come_from():
    row = evaluate_knn(
        Features(TRAIN, TRAIN_LABELS),
        Features(TEST, TEST_LABELS),
        nb_knn=(10,),
        provenance={"dataset": "golden", "split": "VAL", "model": {"digest": "ab"}, "precision": "bfloat16"},
    )[0]
    assert (row.dataset, row.split, row.model, row.precision) == ("golden", "VAL", {"digest": "ab"}, "bfloat16")
    assert (row.task, row.metric, row.unit, row.k, row.n) == ("knn", "top-1", "percent", 10, 60)
    assert row.ci[0] < row.value < row.ci[1]
    assert row.settings["temperature"] == 0.07
    assert row.seconds >= 0 and "torch" in row.versions


def test_the_results_file_is_one_json_document_with_the_releases_keys(tmp_path):
    rows = evaluate_knn(
        Features(TRAIN, TRAIN_LABELS), Features(TEST, TEST_LABELS), nb_knn=(10,), n_per_class_list=(-1, 5)
    )
    path = write_knn_results(tmp_path, rows)
    assert path.name == "results_eval_knn.json"
    document = json.loads(path.read_text())
    assert document["('full', 10) Top 1"] == pytest.approx(70.0)
    assert {"('full', 10) Top 5", "('5 per class', 5) Top 1"} <= set(document)
    assert [row.value for row in read_results(path)] == [row.value for row in rows]
    write_knn_results(tmp_path, rows)  # a second run replaces the document
    assert json.loads(path.read_text())["schema"] == 1


def test_the_releases_flags_and_defaults_are_understood():
    command = (
        "--config-file c.yaml --pretrained-weights w.pth --output-dir out --nb_knn 5 7 "
        "--train-dataset ImageNet:split=TRAIN:root=r:extra=e --opts student.arch=vit_small"
    )
    args = get_args_parser().parse_args(command.split())
    assert (args.config_file, args.pretrained_weights, args.output_dir) == ("c.yaml", "w.pth", "out")
    assert (args.nb_knn, args.opts) == ([5, 7], ["student.arch=vit_small"])
    defaults = get_args_parser().parse_args([])
    assert (defaults.nb_knn, defaults.temperature, defaults.batch_size) == ([10, 20, 100, 200], 0.07, 256)
    assert (defaults.n_per_class_list, defaults.n_tries, defaults.gather_on_cpu) == ([-1], 1, False)
