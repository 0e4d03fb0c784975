"""From answers to figures, for every classifier alike: rows of results, and the outcome that reports compare.

All accuracies are in percent. Beside top-1 and top-5 a test set may ask for more (`dinov2.features.metrics.Scoring`):

    real top-1, real top-5      any of the right labels of an image counts; images without one are left out (ReaL)
    error fog 3, ...            top-1 error of each corruption and severity (ImageNet-C)
    CE fog, ...                 the mean over five severities by AlexNet's, where that is known
    mCE, mean error             over the 15 corruptions, where all were scored

Corrupted copies of one image err together, so that their means get no interval.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dinov2.eval.classes import Answers, Classification
from dinov2.eval.comparison import records_of
from dinov2.eval.outcome import Outcome
from dinov2.eval.result import Result
from dinov2.features.metrics import (
    ALEXNET_ERRORS,
    best_ranks,
    bootstrap_interval,
    corruption_errors,
    errors_by_part,
    mean_interval,
    normalised_error,
    per_class_means,
    voted_ranks,
    wilson_interval,
)

__all__ = ["Percentage", "Ranks", "class_counts", "figures_of_ranks", "image_ranks", "rows_of_tries", "scored"]


class Percentage(NamedTuple):
    """A figure in percent."""

    value: float
    n: int
    """Images."""
    ci: tuple[float, float] | None
    """95 % interval of a share of independent images (Wilson); None where it is no such share."""


class Ranks(NamedTuple):
    """How many answers stand before the right one of each image, int64 [Q]; A where that got no vote."""

    of_target: Tensor
    of_best: Tensor
    """Of the best of several right answers (the target, where a set knows no others)."""


def image_ranks(probabilities: Tensor, targets: Tensor, label_sets: Tensor | None) -> Ranks:
    """Ranks from probabilities [q, A], right answers int64 [q] and, where there are some, sets of them int64 [q, L]."""
    of_target = voted_ranks(probabilities, targets)
    return Ranks(of_target, of_target if label_sets is None else best_ranks(probabilities, label_sets))


def figures_of_ranks(ranks: Ranks, answers: Answers) -> dict[str, Percentage]:
    """Every figure that needs no more than ranks, by its metric."""
    figures = {f"top-{k}": _share(ranks.of_target < min(k, len(answers))) for k in (1, 5)}
    if answers.label_sets is not None and bool((has_some := (answers.label_sets >= 0).any(dim=1)).any()):
        hits = {k: ranks.of_best[has_some] < min(k, len(answers)) for k in (1, 5)}
        figures |= {f"real top-{k}": _share(hit) for k, hit in hits.items()}
    if answers.part_numbers is not None:
        figures |= _corruption_figures(ranks.of_target == 0, answers.part_numbers, answers.parts)
    return figures


def scored(
    task: Classification,
    probabilities: Tensor,  # [Q, A]
    *,
    method: str,
    settings: Mapping[str, Any],
    notes: tuple[str, ...] = (),
    **fields: Any,
) -> tuple[list[Result], Outcome]:
    """Rows and outcome of a classifier's answers to the validation images of `task`; `fields` are those of the rows.

    Top-1, top-5 and the mean over classes have bootstrap intervals, and notes of the task stand in every row.
    """
    answers = task.answers
    outcome = answers.outcome(probabilities)
    records = records_of(outcome)
    of_best = records.ranks if answers.label_sets is None else best_ranks(outcome.probabilities, answers.label_sets)
    figures = figures_of_ranks(Ranks(records.ranks, of_best), answers)
    accuracies = {f"top-{k}": figures.pop(f"top-{k}")._replace(ci=_resampled(records.hits(k=k))) for k in (1, 5)}
    known = records.targets >= 0
    if bool(known.any()):
        hits, targets = records.hits()[known], records.targets[known]
        mean = float(per_class_means(hits, targets, n_classes=len(answers)).nanmean())
        accuracies["mean-per-class"] = Percentage(100 * mean, len(hits), _resampled(hits, groups=targets))
    common = {**fields, "settings": {**settings, **class_counts(task)}, "notes": (*task.notes, *notes)}
    rows = [
        Result(task=method, metric=metric, **figure._asdict(), **common)
        for metric, figure in {**accuracies, **figures}.items()
    ]
    return rows, outcome


def rows_of_tries(
    tries: Sequence[Mapping[str, Percentage]], *, method: str, settings: Mapping[str, Any], drawn: bool, **fields: Any
) -> list[Result]:
    """A row for each metric: the mean over the tries, with the interval of the images for one and Student's for more.

    The spread over draws is larger than that of the images. `drawn` tries are listed in the settings.
    """
    rows = []
    for metric, first in tries[0].items():
        values = [figures[metric].value for figures in tries]
        ci = first.ci
        if len(values) > 1:
            low, high = mean_interval(values)
            ci = (max(low, 0.0), high if first.ci is None else min(high, 100.0))  # CE may exceed 100 %
        spread = {"tries": values, "std": statistics.stdev(values) if len(values) > 1 else None} if drawn else {}
        value = statistics.fmean(values)
        settings_of_row = {**settings, **spread}
        rows.append(
            Result(task=method, metric=metric, value=value, ci=ci, n=first.n, settings=settings_of_row, **fields)
        )
    return rows


def class_counts(task: Classification) -> dict[str, int]:
    """What every row says of its classes: how many were learned, and how many of them may be answered."""
    return {"n_classes": task.n_classes, "n_answers": len(task.answers)}


def _share(hits: Tensor) -> Percentage:  # bool [n]
    n_hits, n = int(hits.sum()), len(hits)
    low, high = wilson_interval(n_hits, n)
    return Percentage(100 * n_hits / n, n, (100 * low, 100 * high))


def _resampled(hits: Tensor, *, groups: Tensor | None = None) -> tuple[float, float]:
    low, high = bootstrap_interval(hits, groups=groups)
    return 100 * low, 100 * high


def _corruption_figures(
    hits: Tensor, part_numbers: Tensor, parts: tuple[tuple[str, int], ...]
) -> dict[str, Percentage]:
    errors = errors_by_part(hits, part_numbers, parts)  # of every part, or it raises
    figures = {f"error {name} {level}": _share(~hits[part_numbers == i]) for i, (name, level) in enumerate(parts)}
    for name, values in errors.items():
        relative = normalised_error(name, values)
        if relative is not None:
            n = sum(figure.n for metric, figure in figures.items() if metric.startswith(f"error {name} "))
            figures[f"CE {name}"] = Percentage(100 * relative, n, None)
    if all(f"CE {name}" in figures for name in ALEXNET_ERRORS):
        whole = corruption_errors(errors)
        figures["mCE"] = Percentage(100 * whole.mce, len(hits), None)
        figures["mean error"] = Percentage(100 * whole.mean_error, len(hits), None)
    return figures
