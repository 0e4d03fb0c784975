"""Result rows from predictions, for every classifier alike.

All accuracies are in percent. Beside top-1 and top-5 a test set may ask for more (`dinov2.encode.scoring.Scoring`):

    real top-1, real top-5      any of the right labels of an image counts; images without one are left out (ReaL)
    error fog 3, ...            top-1 error of each corruption and severity (ImageNet-C)
    CE fog, ...                 the mean over five severities by AlexNet's, where that is known
    mCE, mean error             over the 15 corruptions, where all were scored

Intervals are those of `dinov2.eval.metrics`, the same for a figure whatever the classifier and the command. Corrupted
copies of one image err together, so that their means get no interval.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

from torch import Tensor

from dinov2.eval.classes import Answers, ClassPredictions
from dinov2.eval.metrics import (
    ALEXNET_ERRORS,
    best_ranks,
    bootstrap_interval,
    corruption_error,
    corruption_errors,
    errors_by_part,
    mean_interval,
    per_class_means,
    voted_ranks,
)
from dinov2.eval.outcome import EvaluationOutcome
from dinov2.eval.result import Result

__all__ = ["Provenance", "Ranks", "figures_from_ranks", "image_ranks", "rows_from_tries", "score_answers"]


class Provenance(TypedDict, total=False):
    """Fields of a result row that do not depend on the method."""

    dataset: str
    split: str
    model: Mapping[str, object]
    transform: Mapping[str, object]
    precision: str


class _Percentage(NamedTuple):
    """A figure in percent."""

    value: float
    n: int
    """Images."""
    ci: tuple[float, float] | None
    """95 % interval; None where images are not independent."""


class Ranks(NamedTuple):
    """Number of answers before the right one of each image, int64 [Q]; A where that got no vote."""

    target: Tensor
    best: Tensor
    """Of the best of several right answers (the target, where a set knows no others)."""


def image_ranks(probabilities: Tensor, targets: Tensor, label_sets: Tensor | None) -> Ranks:
    """Ranks from probabilities [q, A], right answers int64 [q] and, where there are some, sets of them int64 [q, L]."""
    target = voted_ranks(probabilities, targets)
    return Ranks(target, target if label_sets is None else best_ranks(probabilities, label_sets))


def figures_from_ranks(ranks: Ranks, answers: Answers, *, per_class: bool = False) -> dict[str, _Percentage]:
    """Every figure that needs no more than ranks, by its metric; with `per_class` the mean over classes too."""
    figures = {f"top-{k}": _share(ranks.target < min(k, len(answers))) for k in (1, 5)}
    known = answers.targets >= 0
    if per_class and bool(known.any()):
        hits, targets = (ranks.target == 0)[known], answers.targets[known]
        mean = float(per_class_means(hits, targets, n_classes=len(answers)).nanmean())
        figures["mean-per-class"] = _Percentage(
            100 * mean, len(hits), _percent(bootstrap_interval(hits, groups=targets))
        )
    if answers.label_sets is not None and bool((labelled := (answers.label_sets >= 0).any(dim=1)).any()):
        figures |= {f"real top-{k}": _share(ranks.best[labelled] < min(k, len(answers))) for k in (1, 5)}
    if answers.part_numbers is not None:
        figures |= _corruption_figures(ranks.target == 0, answers.part_numbers, answers.parts)
    return figures


def score_answers(
    task: ClassPredictions,
    probabilities: Tensor,  # [Q, A]
    *,
    method: str,
    settings: Mapping[str, object],
    notes: Sequence[str] = (),
    seed: int | None = None,
    seconds: float | None = None,
    provenance: Provenance | None = None,
) -> tuple[list[Result], EvaluationOutcome]:
    """Rows and outcome of a classifier's answers to the validation images of `task`, whose notes stand in every row."""
    answers = task.answers
    outcome = answers.outcome(probabilities)
    ranks = image_ranks(outcome.probabilities, outcome.targets, answers.label_sets)
    figures = figures_from_ranks(ranks, answers, per_class=True)
    rows = [
        Result(
            task=method,
            metric=metric,
            **figure._asdict(),
            settings={**settings, **task.class_counts()},
            notes=(*task.notes, *notes),
            seed=seed,
            seconds=seconds,
            **(provenance or {}),
        )
        for metric, figure in figures.items()
    ]
    return rows, outcome


def rows_from_tries(
    tries: Sequence[Mapping[str, _Percentage]],
    *,
    k: int,
    settings: Mapping[str, object],
    drawn: bool,
    notes: tuple[str, ...],
    seconds: float,
    provenance: Provenance,
) -> list[Result]:
    """Rows of k-NN: the mean over the tries, with the interval of the images for one and Student's for more.

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
        row = Result(
            task="knn",
            metric=metric,
            value=statistics.fmean(values),
            ci=ci,
            k=k,
            n=first.n,
            settings={**settings, **spread},
            notes=notes,
            seconds=seconds,
            **provenance,
        )
        rows.append(row)
    return rows


def _share(hits: Tensor) -> _Percentage:  # bool [n]
    return _Percentage(100 * int(hits.sum()) / len(hits), len(hits), _percent(bootstrap_interval(hits)))


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]


def _corruption_figures(
    hits: Tensor, part_numbers: Tensor, parts: tuple[tuple[str, int], ...]
) -> dict[str, _Percentage]:
    errors = errors_by_part(hits, part_numbers, parts)  # of every part, or it raises
    figures = {f"error {name} {level}": _share(~hits[part_numbers == i]) for i, (name, level) in enumerate(parts)}
    relative = {name: ce for name, values in errors.items() if (ce := corruption_error(name, values)) is not None}
    for name, ce in relative.items():
        n = sum(figure.n for metric, figure in figures.items() if metric.startswith(f"error {name} "))
        figures[f"CE {name}"] = _Percentage(100 * ce, n, None)
    if all(name in relative for name in ALEXNET_ERRORS):
        whole = corruption_errors(errors)
        figures["mCE"] = _Percentage(100 * whole.mce, len(hits), None)
        figures["mean error"] = _Percentage(100 * whole.mean_error, len(hits), None)
    return figures
