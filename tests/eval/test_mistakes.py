"""Where a classifier errs, counted by hand."""

import torch

from dinov2.eval.outcome import EvaluationOutcome, class_recalls, confused_pairs, confusion, worst_mistakes

ANSWERS = EvaluationOutcome(
    probabilities=torch.tensor(
        [
            [0.8, 0.1, 0.1],  # ant, right
            [0.3, 0.6, 0.1],  # ant taken for bee
            [0.1, 0.9, 0.0],  # ant taken for bee
            [0.7, 0.2, 0.1],  # bee taken for ant
            [0.2, 0.3, 0.5],  # unknown
            [0.0, 0.0, 0.0],  # bee, nobody voted
        ]
    ),
    targets=torch.tensor([0, 0, 0, 1, -1, 1]),
    class_names=("ant", "bee", "cat"),
    indices=torch.tensor([10, 11, 12, 13, 14, 15]),
)


def test_recalls_are_of_the_classes_that_have_images():
    assert class_recalls(ANSWERS) == [("ant", 3, 1), ("bee", 2, 0)]


def test_confusions_are_counted_by_true_and_predicted_class():
    assert confusion(ANSWERS).tolist() == [[1, 2, 0], [1, 0, 0], [0, 0, 0]]
    assert confused_pairs(ANSWERS) == [("ant", "bee", 2, 2 / 3), ("bee", "ant", 1, 1 / 2)]
    assert len(confused_pairs(ANSWERS, most=1)) == 1


def test_the_worst_mistakes_are_those_that_were_sure():
    worst = worst_mistakes(ANSWERS)
    assert [(one.image, one.true, one.predicted) for one in worst] == [
        (12, "ant", "bee"), (13, "bee", "ant"), (11, "ant", "bee"), (14, "", "cat"),
    ]  # fmt: skip
    assert worst[0].confidence == torch.tensor(0.9).item() and worst[0].own == torch.tensor(0.1).item()


def test_a_faultless_classifier_has_no_mistakes():
    perfect = EvaluationOutcome(torch.eye(3), torch.arange(3), ("ant", "bee", "cat"), torch.arange(3))
    assert worst_mistakes(perfect) == [] and confused_pairs(perfect) == []
