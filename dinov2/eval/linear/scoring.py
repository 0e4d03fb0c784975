"""Logits of one head on one test set: figures, and the outcome that reports and comparisons use.

A test set may number its own classes. `class_mapping` then says which training label each of them is, and scores are
those among its classes alone, as the papers score ImageNet-A and R.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2.errors import DataError
from dinov2.eval.classes import match_classes
from dinov2.eval.knn_outcome import scored_rows
from dinov2.eval.log_regression.held_out import classifier_outcome, real_rows, require_finite
from dinov2.eval.outcome import Evaluation, Outcome
from dinov2.features.extract import Features
from dinov2.features.results import Result
from dinov2.models.linear_head import LinearHead

__all__ = ["Scored", "TestSet", "evaluate_head", "scored"]


@dataclass(frozen=True)
class TestSet:
    """Labelled features to score a head on."""

    __test__ = False  # pytest: this is no test

    name: str
    features: Features
    class_mapping: Tensor | None = None
    """int64 [C_test]: the training label of each class of this set."""
    label_sets: Tensor | None = None
    """int64 [S, A], padded with -1: several acceptable training labels of each image."""


class Scored(NamedTuple):
    """Rows and outcome of one set."""

    rows: list[Result]
    outcome: Outcome


def scored(logits: Tensor, train: Features, test: TestSet, *, task: str = "linear", **fields: Any) -> Scored:
    """Figures of logits [S, K] for the images of `test`, K being the ascending labels of `train`.

    Raises `DataError` when the mapping or the label sets do not fit.
    """
    assert train.labels is not None  # the caller has matched classes already
    labels = train.labels[train.labels >= 0].unique()
    rows: list[Result] = []
    notes = fields.pop("notes", ())
    if test.class_mapping is None:
        matched = match_classes(train, test.features)
        assert test.features.labels is not None
        probabilities = logits[test.features.labels >= 0].softmax(dim=1)
        outcome = classifier_outcome(probabilities, matched, train, test.features)
        notes = (*notes, *matched.notes)
    else:
        outcome = _restricted(logits, labels, test)
    rows += scored_rows(outcome, task=task, notes=notes, **fields)
    if test.label_sets is not None:
        rows += real_rows(logits, labels, test.label_sets, task=task, notes=notes, **fields)
    return Scored(rows, outcome)


def evaluate_head(
    head: LinearHead,
    val: Features,
    *,
    class_names: tuple[str, ...] | None = None,
    class_mapping: Tensor | None = None,
    label_sets: Tensor | None = None,
    **fields: Any,
) -> Evaluation:
    """A given head, such as a released one, on features that it reads (`classifier_input`), without any training.

    The classes of the head are 0 .. K - 1; with `class_names` those of `val` are matched by name. `fields` are further
    fields of the rows. Raises `DataError` when features or labels do not fit the head.
    """
    n_classes, width = head.weight.shape
    if val.features.ndim != 2 or val.features.shape[1] != width:
        raise DataError(
            f"the head reads {width} features, but the images have {list(val.features.shape[1:])}; extract those of "
            f"{head.layers} layers and the mean patch of the backbone that the head was trained on"
        )
    if class_mapping is None and class_names is None and val.labels is not None and int(val.labels.max()) >= n_classes:
        raise DataError(
            f"there is a label {int(val.labels.max())}, but the head has {n_classes} classes; give a class mapping, or "
            "class names"
        )
    require_finite(val.features, which="validation")
    # Stands for the training set in the matching of classes: one row of each class.
    known = Features(torch.zeros(n_classes, 1), torch.arange(n_classes), class_names or _shared_names(val, n_classes))
    with torch.no_grad():
        parts = val.features.split(8192)
        logits = torch.cat([head(part.to(head.weight)).float().cpu() for part in parts])
    test = TestSet("", val, class_mapping=class_mapping, label_sets=label_sets)
    settings = {"head": "given", "layers": head.layers, "n_classes": n_classes}
    found = scored(logits, known, test, settings=settings, **fields)
    return Evaluation(found.rows, {f"given head, {head.layers} layers": found.outcome})


def _shared_names(val: Features, n_classes: int) -> tuple[str, ...] | None:
    """The set's own names where it has all classes of the head, so that its numbers are those of the head."""
    return val.class_names if val.class_names is not None and len(val.class_names) == n_classes else None


def _restricted(logits: Tensor, labels: Tensor, test: TestSet) -> Outcome:
    """Softmax among the classes of the test set alone."""
    mapping, targets = test.class_mapping, test.features.labels
    assert mapping is not None
    if targets is None or not bool((targets >= 0).any()):
        raise DataError("the test images have no labels; give a data set with class folders or a label column")
    mapping = mapping.to(torch.int64)
    position = torch.searchsorted(labels, mapping).clamp_max(len(labels) - 1)
    if mapping.ndim != 1 or not bool((labels[position] == mapping).all()):
        raise DataError(
            "the class mapping names classes that nothing was trained on; it holds, for each class of the test set, "
            "the label of that class in the training set"
        )
    if int(targets.max()) >= len(mapping):
        raise DataError(
            f"the class mapping has {len(mapping)} entries, but the test images have a label {int(targets.max())}; "
            "it needs one entry for each class of the test set"
        )
    has_label = targets >= 0
    names = test.features.class_names or tuple(str(number) for number in range(len(mapping)))
    indices = torch.arange(len(targets)) if test.features.indices is None else test.features.indices
    probabilities = logits[has_label][:, position].softmax(dim=1)
    return Outcome(probabilities.float(), targets[has_label], names[: len(mapping)], indices[has_label])
