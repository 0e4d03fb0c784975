"""k-NN as a classifier whose answers can be compared with others: one outcome for each number of neighbours.

The figures are those of `dinov2.eval.knn`; here the scores of every image are kept, in place of few-shot draws.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dinov2.encode.stream import Features
from dinov2.errors import ConfigError
from dinov2.eval.classes import match_classes
from dinov2.eval.neighbours import neighbours_of_own_queries, soft_vote
from dinov2.eval.outcome import Evaluation, Outcome
from dinov2.eval.result import Result
from dinov2.eval.scoring import scored

__all__ = ["evaluate_knn_outcome"]


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

    Numbers above the number of training images are limited to it, with a note. Over several processes all call with all
    features; each searches for its share of `val`, and all get the same result. Raises as `evaluate_knn` does.
    """
    asked = (k, *nb_knn)
    if min(asked) < 1:
        raise ConfigError(f"numbers of neighbours must be 1 or more, got {sorted(set(asked))}")
    task = match_classes(train, val)
    available = len(task.train_features)
    ks = list(dict.fromkeys(min(one, available) for one in asked))
    notes: tuple[str, ...] = ()
    if max(asked) > available:
        notes = (f"more neighbours than the {available} training images were asked for: limited to {available}",)
    started = time.perf_counter()
    similarities, indices = neighbours_of_own_queries(
        task.val_features, task.train_features, k=max(ks), cosine=True, device=device
    )
    votes = soft_vote(
        similarities, task.train_classes[indices], n_classes=task.n_classes, ks=ks, temperature=temperature
    )
    seconds = time.perf_counter() - started
    rows: list[Result] = []
    outcomes: dict[str, Outcome] = {}
    for one in ks:
        # Weights are a share of all K neighbours; among the nearest `one` and the answers they are made to sum to 1.
        of_k, outcomes[f"k={one}"] = scored(
            task,
            task.answers.shares(votes[one]),
            method="knn",
            settings={"temperature": temperature, "n_train": available},
            notes=notes,
            k=one,
            seconds=seconds,
            **(provenance or {}),
        )
        rows += of_k
    return Evaluation(rows, outcomes)
