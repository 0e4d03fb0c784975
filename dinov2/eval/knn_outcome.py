"""k-NN as a classifier whose answers can be compared with others: one outcome for each number of neighbours.

The figures are those of `dinov2.eval.knn`; here the scores of every image are kept, in place of few-shot draws.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2.errors import ConfigError
from dinov2.eval.classes import match_classes
from dinov2.eval.comparison import records_of
from dinov2.eval.neighbours import nearest_neighbours, soft_vote
from dinov2.eval.outcome import Evaluation, Outcome
from dinov2.features.extract import Features
from dinov2.features.metrics import bootstrap_interval, per_class_means
from dinov2.features.results import Result

__all__ = ["evaluate_knn_outcome", "scored_rows"]


def evaluate_knn_outcome(
    train: Features,
    val: Features,
    *,
    k: int = 20,
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Classify `val` by its nearest neighbours in `train` for each number of `nb_knn` and for `k`, which comes first.

    Numbers above the number of training images are limited to it, with a note. Raises as `evaluate_knn` does.
    """
    if min(k, *nb_knn) < 1:
        raise ConfigError(f"numbers of neighbours must be 1 or more, got {sorted({k, *nb_knn})}")
    task = match_classes(train, val)
    available = len(task.train_features)
    ks = list(dict.fromkeys(min(one, available) for one in (k, *nb_knn)))
    notes = [*task.notes]
    if max(k, *nb_knn) > available:
        notes.append(f"more neighbours than the {available} training images were asked for: limited to {available}")
    started = time.perf_counter()
    similarities, indices = nearest_neighbours(
        task.val_features, task.train_features, k=max(ks), cosine=True, device=device
    )
    votes = soft_vote(
        similarities, task.train_classes[indices], n_classes=task.n_classes, ks=ks, temperature=temperature
    )
    seconds = time.perf_counter() - started
    names, scored = _class_names(train), _scored_images(val)
    rows: list[Result] = []
    outcomes: dict[str, Outcome] = {}
    for one in ks:
        # Weights are a share of all K neighbours; among the nearest `one` alone they sum to 1.
        scores = votes[one]
        outcome = Outcome(scores / scores.sum(dim=1, keepdim=True), task.val_classes, names, scored)
        outcomes[f"k={one}"] = outcome
        settings = {"temperature": temperature, "n_classes": task.n_classes, "n_train": available}
        fields = {**(provenance or {}), "k": one, "settings": settings, "seconds": seconds, "notes": tuple(notes)}
        rows += scored_rows(outcome, task="knn", **fields)
    return Evaluation(rows, outcomes)


def scored_rows(outcome: Outcome, *, task: str, **fields: Any) -> list[Result]:
    """Top-1, top-5 and the mean over classes of one outcome, in percent, with bootstrap intervals."""
    records = records_of(outcome)
    known = records.targets >= 0
    values: dict[str, tuple[Tensor, Tensor | None]] = {f"top-{k}": (records.hits(k=k), None) for k in (1, 5)}
    values["mean-per-class"] = (records.hits()[known], records.targets[known])
    rows = []
    for metric, (hit, groups) in values.items():
        if not len(hit):
            continue
        mean = hit.double().mean()
        if groups is not None:
            mean = per_class_means(hit, groups, n_classes=records.n_classes).nanmean()
        low, high = bootstrap_interval(hit, groups=groups)
        ci = (100 * low, 100 * high)
        rows.append(Result(task=task, metric=metric, value=100 * float(mean), ci=ci, n=len(hit), **fields))
    return rows


def _class_names(train: Features) -> tuple[str, ...]:
    """Names of the classes 0 .. C - 1 of `match_classes`: those of the labels that the training set has, ascending."""
    assert train.labels is not None  # `match_classes` has seen to it
    present = [label for label in train.labels.unique().tolist() if label >= 0]
    return tuple(train.class_names[label] if train.class_names else str(label) for label in present)


def _scored_images(val: Features) -> Tensor:  # int64 [S]
    assert val.labels is not None
    positions = torch.arange(len(val)) if val.indices is None else val.indices
    return positions[val.labels >= 0]
