"""Answers of a classifier to every test image: the common result of k-NN, logistic regression and linear probe.

Figures, confidence intervals, confusions, calibration and the worst mistakes all follow from it, so that each of them
is written once and holds for every classifier.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2.eval.figures import SampleRecords, sample_records
from dinov2.eval.result import Result

__all__ = [
    "ClassRecall",
    "Confused",
    "Evaluation",
    "EvaluationOutcome",
    "Mistake",
    "class_recalls",
    "confused_pairs",
    "confusion",
    "worst_mistakes",
]


@dataclass(frozen=True)
class EvaluationOutcome:
    """Probabilities and truth of every scored image, in the order of the data set."""

    probabilities: Tensor
    """float32 [S, C]; a row sums to 1, or to 0 where nothing was voted for."""
    targets: Tensor
    """int64 [S]; -1 is a class without training images, which no answer can hit."""
    class_names: tuple[str, ...]
    """Name of class 0 .. C - 1 (its number where the data set knows no names)."""
    indices: Tensor
    """int64 [S]: position of each image in the test data set, for its picture."""

    def __len__(self) -> int:
        return self.targets.shape[0]

    def records(self) -> SampleRecords:
        """Hits, ranks, confidences and losses of each image."""
        return sample_records(self.probabilities, self.targets, indices=self.indices)


@dataclass(frozen=True)
class Evaluation:
    """The rows of one evaluation and, for each setting that was evaluated, what it said."""

    rows: list[Result]
    outcomes: Mapping[str, EvaluationOutcome] = field(default_factory=dict)
    """By setting, such as `k=20` or `C=0.1`; the first is the one that a comparison of models uses."""


class ClassRecall(NamedTuple):
    """Number of right images of a class."""

    name: str
    n: int
    hits: int


class Confused(NamedTuple):
    """Images of one class that were taken for another."""

    true: str
    predicted: str
    n: int
    share: float
    """Of the images of the true class."""


class Mistake(NamedTuple):
    """An image that is wrong."""

    row: int
    image: int
    """Position in the data set."""
    true: str
    """"" for a class without training images."""
    predicted: str
    confidence: float
    own: float
    """Probability of the true class."""


def class_recalls(outcome: EvaluationOutcome) -> list[ClassRecall]:
    """Recall of the classes that have images, in the order of the classes."""
    hit = outcome.records().hits()
    known = outcome.targets >= 0
    n_classes = len(outcome.class_names)
    counts = torch.bincount(outcome.targets[known], minlength=n_classes).tolist()
    right = torch.bincount(outcome.targets[known], weights=hit[known].double(), minlength=n_classes).tolist()
    return [
        ClassRecall(name, n, round(hit_count))
        for name, n, hit_count in zip(outcome.class_names, counts, right, strict=True)
        if n
    ]


def confusion(outcome: EvaluationOutcome) -> Tensor:  # int64 [C, C]
    """Images of class i (row) that were taken for class j (column); those of unknown classes are left out."""
    n_classes = len(outcome.class_names)
    known = (outcome.targets >= 0) & (outcome.probabilities.amax(dim=1) > 0)
    predicted = outcome.probabilities[known].argmax(dim=1)
    return torch.bincount(outcome.targets[known] * n_classes + predicted, minlength=n_classes**2).view(
        n_classes, n_classes
    )


def confused_pairs(outcome: EvaluationOutcome, *, most: int = 12) -> list[Confused]:
    """The pairs of classes that account for most mistakes, most frequent first."""
    known = (outcome.targets >= 0) & (outcome.probabilities.amax(dim=1) > 0)
    true, predicted = outcome.targets[known], outcome.probabilities[known].argmax(dim=1)
    wrong = true != predicted
    if not bool(wrong.any()):
        return []
    n_classes = len(outcome.class_names)
    # Pairs that occur, not the whole matrix: of thousands of classes it would not fit into memory.
    pairs, counts = (true[wrong] * n_classes + predicted[wrong]).unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:most]
    totals = torch.bincount(outcome.targets[outcome.targets >= 0], minlength=n_classes).tolist()
    names = outcome.class_names
    return [
        Confused(names[pair // n_classes], names[pair % n_classes], n, n / totals[pair // n_classes])
        for pair, n in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]


def worst_mistakes(outcome: EvaluationOutcome, *, most: int = 24) -> list[Mistake]:
    """The mistakes that the classifier was surest of; ties keep the order of the images."""
    confidence, predicted = outcome.probabilities.max(dim=1)
    wrong = (~outcome.records().hits() & (confidence > 0)).nonzero().squeeze(1)
    chosen = wrong[confidence[wrong].argsort(descending=True, stable=True)[:most]]
    found = []
    for row in chosen.tolist():
        target = int(outcome.targets[row])
        found.append(
            Mistake(
                row=row,
                image=int(outcome.indices[row]),
                true=outcome.class_names[target] if target >= 0 else "",
                predicted=outcome.class_names[int(predicted[row])],
                confidence=float(confidence[row]),
                own=float(outcome.probabilities[row, target]) if target >= 0 else 0.0,
            )
        )
    return found
