"""A linear classifier that exists already, such as a released one, on features that it reads: nothing is trained."""

from typing import Any

import torch

from dinov2.encode.stream import Features
from dinov2.encode.tokens import require_finite
from dinov2.errors import DataError
from dinov2.eval.classes import class_numbers, match_classes
from dinov2.eval.outcome import Evaluation
from dinov2.eval.scoring import scored
from dinov2.models.heads import LinearHead

__all__ = ["evaluate_head"]

_ROWS_AT_ONCE = 8192


def evaluate_head(
    head: LinearHead,
    val: Features,
    *,
    class_ids: tuple[str, ...] | None = None,
    class_names: tuple[str, ...] | None = None,
    **fields: Any,
) -> Evaluation:
    """Accuracies, in percent, of a given head on features [S, W] of its kind (`classifier_input`).

    The classes of the head are 0 .. K - 1; with `class_ids` or `class_names` those of `val` are matched by them.
    `fields` are further fields of the rows. Raises `DataError` when features or labels do not fit the head.
    """
    n_classes, width = head.weight.shape
    if val.features.ndim != 2 or val.features.shape[1] != width:
        raise DataError(
            f"the head reads {width} features, but the images have {list(val.features.shape[1:])}; extract those of "
            f"{head.layers} layers and the mean patch of the backbone that the head was trained on"
        )
    if class_names is None and val.class_names is not None and len(val.class_names) == n_classes:
        class_names = val.class_names  # the set has all classes of the head, so that its numbers are the head's
    # Stands for the training set in the matching of classes: one row of each class.
    known = Features(torch.zeros(n_classes, 1), torch.arange(n_classes), class_names, class_ids=class_ids)
    mapped = val.scoring is not None and val.scoring.class_mapping is not None
    if (
        not mapped
        and class_numbers(known, val) is None
        and val.labels is not None
        and int(val.labels.max()) >= n_classes
    ):
        raise DataError(
            f"there is a label {int(val.labels.max())}, but the head has {n_classes} classes; give a class mapping, or "
            "class names"
        )
    task = match_classes(known, val)
    require_finite(task.val_features, of="validation images")
    with torch.no_grad():
        parts = task.val_features.split(_ROWS_AT_ONCE)
        logits = torch.cat([head(part.to(head.weight)).float().cpu() for part in parts])
    rows, outcome = scored(
        task,
        task.answers.columns(logits).softmax(dim=1),
        method="linear",
        settings={"head": "given", "layers": head.layers},
        **fields,
    )
    return Evaluation(rows, {f"given head, {head.layers} layers": outcome})
