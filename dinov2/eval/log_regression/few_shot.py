"""Classification from a few images of each class: nearest class mean, and logistic regression.

Several supports are drawn, and the figure is their mean with Student's interval, because which images were drawn
matters more than which are scored. All of the validation set is scored each time. C is chosen by cross-validation
inside the support: nothing else is looked at.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2.encode.stream import Features
from dinov2.errors import ConfigError, DataError
from dinov2.eval.classes import Classification, few_shot_rows
from dinov2.eval.log_regression.estimator import fit_path
from dinov2.eval.log_regression.evaluation import C_GRID
from dinov2.eval.log_regression.held_out import require_trainable, selection_accuracy
from dinov2.eval.outcome import Evaluation, Outcome
from dinov2.eval.result import Result
from dinov2.eval.scoring import class_counts, figures_of_ranks, image_ranks, rows_of_tries

__all__ = ["FewShotMethod", "class_mean_scores", "cross_validated_C", "evaluate_few_shot"]

FewShotMethod = Literal["class-mean", "logistic"]

_DECADES = C_GRID[::4]
_TEMPERATURE = 0.07  # that of k-NN, so that probabilities of the two can be compared


class _Answer(NamedTuple):
    probabilities: Tensor  # [Q, A]
    C: float | None


def evaluate_few_shot(
    train: Features,
    val: Features,
    *,
    shots: Sequence[int] = (1, 2, 5, 10),
    n_tries: int = 5,
    methods: Sequence[FewShotMethod] = ("class-mean", "logistic"),
    Cs: Sequence[float] = _DECADES,
    allow_fewer: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Accuracies, in percent, of classifying `val` from `shots` images of each class of `train`.

    Supports are the release's draws with the seeds 0 .. n_tries - 1 (`few_shot_rows`); their image numbers are in the
    settings. With a single image of each class nothing can be validated, and C is 1. Outcomes are those of seed 0.

    Raises:
        DataError: a class has fewer images than shots (unless `allow_fewer`), or as `evaluate_log_regression`.
        ConfigError: no shots, no tries, or an unknown method.
    """
    if not shots or min(shots) < 1 or n_tries < 1:
        raise ConfigError(f"{n_tries} tries of {list(shots)} images a class were asked for; write 1 or more of both")
    answer: dict[str, Callable[[Tensor, Tensor, Classification], _Answer]]
    answer = {"class-mean": _by_class_mean, "logistic": lambda X, y, task: _by_logistic(X, y, task, Cs)}
    if unknown := [method for method in methods if method not in answer]:
        raise ConfigError(f"no few-shot method is called {unknown[0]!r}; choose among {', '.join(answer)}")
    task = require_trainable(train, val)
    fewest = int(torch.bincount(task.train_classes).min())
    if fewest < max(shots) and not allow_fewer:
        raise DataError(
            f"a class has {fewest} training images, and {max(shots)} of each were asked for; ask for fewer, or allow "
            "classes to bring what they have"
        )
    assert train.labels is not None
    positions = torch.arange(len(train)) if train.indices is None else train.indices
    positions = positions[train.labels >= 0]

    rows: list[Result] = []
    outcomes: dict[str, Outcome] = {}
    for n in shots:
        supports = [few_shot_rows(task.train_classes, n_per_class=n, seed=seed) for seed in range(n_tries)]
        for method in methods:
            started = time.perf_counter()
            figures, chosen = [], []
            for support in supports:
                found = answer[method](task.train_features[support], task.train_classes[support], task)
                outcomes.setdefault(f"{method} {n} shots", task.answers.outcome(found.probabilities))
                ranks = image_ranks(found.probabilities, task.answers.targets, task.answers.label_sets)
                figures.append(figures_of_ranks(ranks, task.answers))
                chosen.append(found.C)
            settings = {
                "method": method,
                "shots": n,
                "C": chosen if method == "logistic" else None,
                "supports": [positions[support].tolist() for support in supports],
                **class_counts(task),
            }
            notes = list(task.notes)
            if fewest < n:
                notes.append(f"classes with fewer than {n} training images brought what they have")
            if method == "logistic" and n == 1:
                notes.append("one image of each class leaves nothing to choose C on: it is 1")
            rows += rows_of_tries(
                figures,
                method="few-shot",
                settings=settings,
                drawn=True,
                seconds=time.perf_counter() - started,
                notes=tuple(notes),
                **(provenance or {}),
            )
    return Evaluation(rows, outcomes)


def class_mean_scores(support: Tensor, classes: Tensor, queries: Tensor, *, n_classes: int) -> Tensor:  # -> [Q, K]
    """Cosine similarity of queries [Q, D] to the mean of each class's normalised support features [R, D]."""
    sums = torch.zeros(n_classes, support.shape[1]).index_add_(0, classes, normalize(support.float(), dim=1))
    return normalize(queries.float(), dim=1) @ normalize(sums, dim=1).T


def cross_validated_C(support: Tensor, classes: Tensor, *, n_classes: int, Cs: Sequence[float]) -> float:
    """The C with the best accuracy over at most five folds of the support, the smallest of equals; 1 for single images.

    The images of each class go round the folds in turn, so that no fold lacks a class that has enough of them.
    """
    order = classes.argsort(stable=True)
    counts = torch.bincount(classes, minlength=n_classes)
    n_folds = min(5, int(counts.min()))
    if n_folds < 2:
        return 1.0
    starts = counts.cumsum(0) - counts
    folds = torch.empty_like(classes)
    folds[order] = (torch.arange(len(classes)) - starts[classes[order]]) % n_folds
    grid = sorted(Cs)
    right = [0.0] * len(grid)
    for fold in range(n_folds):
        held_out = folds == fold
        fits = fit_path(support[~held_out], classes[~held_out], n_classes=n_classes, Cs=grid)
        for i, fit in enumerate(fits):
            share = selection_accuracy(fit.scores(support[held_out]), classes[held_out], metric="mean_accuracy")
            right[i] += share * int(held_out.sum())
    return grid[max(range(len(grid)), key=lambda i: round(right[i]))]


def _by_class_mean(support: Tensor, classes: Tensor, task: Classification) -> _Answer:
    scores = class_mean_scores(support, classes, task.val_features, n_classes=task.n_classes)
    return _Answer((task.answers.columns(scores) / _TEMPERATURE).softmax(dim=1), None)


def _by_logistic(support: Tensor, classes: Tensor, task: Classification, Cs: Sequence[float]) -> _Answer:
    C = cross_validated_C(support, classes, n_classes=task.n_classes, Cs=Cs)
    (fit,) = fit_path(support, classes, n_classes=task.n_classes, Cs=[C])
    return _Answer(task.answers.columns(fit.scores(task.val_features)).softmax(dim=1), C)
