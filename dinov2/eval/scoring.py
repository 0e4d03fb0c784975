"""Predictions matched with the classes of a test set, and scored: result rows for every classifier alike.

Data sets number their classes on their own, and a validation folder may lack some of them. Classes are matched by
identifier where both sets know theirs, else by name; numbers are only trusted where one of the sets knows neither.

All accuracies are in percent. Beside top-1 and top-5 a test set may ask for more (`Scoring` of its features):

    real top-1, real top-5      any of the right labels of an image counts; images without one are left out (ReaL)
    error fog 3, ...            top-1 error of each corruption and severity (ImageNet-C)
    CE fog, ...                 the mean over five severities by AlexNet's, where that is known
    mCE, mean error             over the 15 corruptions, where all were scored

Intervals are those of `dinov2.eval.metrics`, the same for a figure whatever the classifier and the command. Corrupted
copies of one image err together, so that their means get no interval.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from dinov2.encode.stream import Features, Scoring
from dinov2.errors import DataError
from dinov2.eval.metrics import (
    ALEXNET_ERRORS,
    best_ranks,
    bootstrap_interval,
    corruption_error,
    corruption_errors,
    errors_by_part,
    mean_interval,
    per_class_means,
    renumber_labels,
    voted_ranks,
)
from dinov2.eval.outcome import EvaluationOutcome
from dinov2.eval.result import Result

__all__ = [
    "Answers",
    "ClassPredictions",
    "Provenance",
    "Ranks",
    "class_numbers",
    "few_shot_rows",
    "figures_from_ranks",
    "image_ranks",
    "match_classes",
    "rows_from_tries",
    "score_answers",
]


@dataclass(frozen=True)
class Answers:
    """Possible answers and the right ones of each scored image: numbers 0 .. A - 1, -1 for none."""

    names: tuple[str, ...]
    """[A]: their numbers where the data set knows no names."""
    targets: Tensor
    """int64 [Q]: the right one; -1 for a class that nothing was trained on."""
    images: Tensor
    """int64 [Q]: position of each image in the validation set."""
    among: Tensor | None = None
    """int64 [A]: the classes that are answers, where these are not 0 .. C - 1."""
    label_sets: Tensor | None = None
    """int64 [Q, L], padded with -1: all right ones of each image; A is one that nothing was trained on."""
    parts: tuple[tuple[str, int], ...] = ()
    """(corruption, severity) of each part."""
    part_numbers: Tensor | None = None
    """int64 [Q]: the part that each image belongs to."""

    def __len__(self) -> int:
        return len(self.names)

    def columns(self, scores: Tensor) -> Tensor:  # [..., C] -> [..., A]
        """Of the scores of all classes those of the answers."""
        return scores if self.among is None else scores[..., self.among.to(scores.device)]

    def shares(self, votes: Tensor) -> Tensor:  # [q, C] -> [q, A]
        """Votes for classes as probabilities of the answers; zeros where nothing was voted for that may be answered."""
        columns = self.columns(votes)
        sums = columns.sum(dim=1, keepdim=True)
        return torch.where(sums > 0, columns / sums, 0.0)

    def outcome(self, probabilities: Tensor) -> EvaluationOutcome:  # [Q, A]
        """Predictions of a classifier, with the targets."""
        return EvaluationOutcome(probabilities.float().cpu(), self.targets, self.names, self.images)


@dataclass(frozen=True)
class ClassPredictions:
    """Two sets of features with classes 0 .. C - 1 (of a validation class that nothing was trained on: -1)."""

    train_features: Tensor
    train_classes: Tensor
    val_features: Tensor
    val_classes: Tensor
    n_classes: int
    answers: Answers
    notes: tuple[str, ...]

    def class_counts(self) -> dict[str, int]:
        """Settings of every row: classes that were learned, and classes that may be answered."""
        return {"n_classes": self.n_classes, "n_answers": len(self.answers)}


class _KnowsClasses(Protocol):
    """Source of class names; `Features` and data sets are."""

    @property
    def class_ids(self) -> tuple[str, ...] | None: ...

    @property
    def class_names(self) -> tuple[str, ...] | None: ...


def class_numbers(train: _KnowsClasses, val: _KnowsClasses) -> Tensor | None:  # int64 [C_val]
    """The training label of each class of `val`, -1 for none; None where labels mean the same, or nothing tells."""
    for known, own in ((train.class_ids, val.class_ids), (train.class_names, val.class_names)):
        if known is not None and own is not None:
            numbers = {name: number for number, name in enumerate(known)}
            return None if known == own else torch.tensor([numbers.get(name, -1) for name in own])
    return None


def match_classes(train: Features, val: Features) -> ClassPredictions:
    """Bring both sets to one numbering, and the truth of `val` to that of the answers that its `scoring` allows.

    Images without a label are left out, and validation images of a class that the training set lacks stay in as
    errors, each with a note. Raises `DataError` when a set has no label at all, the two share no class, or the rules of
    scoring do not fit the images.
    """
    notes: list[str] = []
    train_rows, train_labels = _labelled(train, "training", notes)
    val_rows, val_labels = _labelled(val, "validation", notes)
    classes, train_classes = train_labels.unique(return_inverse=True)
    mapping = None if val.scoring is None else val.scoring.class_mapping
    if val.scoring is not None:
        _check(val.scoring, val)
    numbering = _Numbering(classes, class_numbers(train, val) if mapping is None else mapping.to(torch.int64))

    val_classes = numbering.class_of(val_labels)
    n_unknown = int((val_classes < 0).sum())
    if n_unknown == len(val_classes):
        raise DataError(
            "the training and the validation images have no class in common; check that both data sets use the same "
            "class folders"
        )
    if n_unknown:
        notes.append(f"{n_unknown} validation images are of classes without training images and count as errors")
    answers = _answers(train, val, val_rows, val_classes, numbering, notes)
    if len(answers) < 5:
        notes.append(f"there are only {len(answers)} classes, so top-5 is top-{len(answers)}")
    return ClassPredictions(
        train_features=_taken(train, train_rows),
        train_classes=train_classes,
        val_features=_taken(val, val_rows),
        val_classes=val_classes,
        n_classes=len(classes),
        answers=answers,
        notes=tuple(notes),
    )


def few_shot_rows(labels: Tensor, *, n_per_class: int, seed: int) -> Tensor:  # int64 [S] -> int64 [R]
    """Rows of `n_per_class` images of each class, classes in ascending order; all of a class that has fewer.

    The draw is the release's: one permutation per class from torch's generator with that seed.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().squeeze(1)
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:n_per_class]])
    return torch.cat(chosen)


@dataclass(frozen=True)
class _Numbering:
    """Map from labels of the validation set to classes 0 .. C - 1."""

    classes: Tensor
    """int64 [C], ascending: the training labels."""
    numbers: Tensor | None
    """int64 [C_val]: the training label of each class; None where labels mean the same."""

    def class_of(self, labels: Tensor) -> Tensor:  # int64, any shape; -1 where nothing was trained on
        labels = labels if self.numbers is None else renumber_labels(labels, self.numbers)
        position = torch.searchsorted(self.classes, labels).clamp_max(len(self.classes) - 1)
        return torch.where((labels >= 0) & (self.classes[position] == labels), position, -1)


def _answers(
    train: Features, val: Features, rows: Tensor, val_classes: Tensor, numbering: _Numbering, notes: list[str]
) -> Answers:
    """Classes as answers: all of them, or where its `scoring` says so those of the validation set."""
    scoring = Scoring() if val.scoring is None else val.scoring
    n_classes = len(numbering.classes)
    names = tuple(train.class_names[label] if train.class_names else str(label) for label in numbering.classes.tolist())
    among, place = None, torch.arange(n_classes)  # `place` is the answer that each class is
    if scoring.own_classes or scoring.class_mapping is not None:
        names, own = _own_classes(val, scoring, numbering)
        if not torch.equal(own, place):
            among, place = own, torch.full_like(place, -1)
            place[among] = torch.arange(len(among))
        if len(own) < n_classes:
            notes.append(
                f"answers are chosen among the {len(own)} classes of the validation set, not among all {n_classes}"
            )
    label_sets = None
    if scoring.label_sets is not None:
        given = scoring.label_sets[rows]
        label_sets = renumber_labels(numbering.class_of(given), place)
        label_sets = torch.where((given >= 0) & (label_sets < 0), len(names), label_sets)
    return Answers(
        names=names,
        targets=renumber_labels(val_classes, place),
        images=rows if val.indices is None else val.indices[rows],
        among=among,
        label_sets=label_sets,
        parts=scoring.parts,
        part_numbers=None if scoring.part_numbers is None else scoring.part_numbers[rows],
    )


def _own_classes(val: Features, scoring: Scoring, numbering: _Numbering) -> tuple[tuple[str, ...], Tensor]:
    """Names and classes of the answers, in the order in which the validation set counts its classes."""
    assert val.labels is not None  # the caller has looked
    known = val.class_ids or val.class_names or ()
    n_own = (len(known) or int(val.labels.max()) + 1) if numbering.numbers is None else len(numbering.numbers)
    own = numbering.class_of(torch.arange(n_own))
    if scoring.class_mapping is not None and bool((own < 0).any()):
        raise DataError(
            "the class mapping names classes that nothing was trained on; it holds, for each class of the test set, "
            "the label of that class in the training set"
        )
    labels = (own >= 0).nonzero().squeeze(1)
    among = own[labels]
    if len(among.unique()) < len(among):
        raise DataError(
            "two classes of the validation set are the same class of the training set, so that they could not be told "
            "apart; give each its own"
        )
    return tuple(val.class_names[label] if val.class_names else str(label) for label in labels.tolist()), among


def _check(scoring: Scoring, val: Features) -> None:
    """Raises `DataError` for rules that are those of other images or classes."""
    assert val.labels is not None  # the caller has looked
    for rows, which in ((scoring.label_sets, "label sets"), (scoring.part_numbers, "part numbers")):
        if rows is not None and len(rows) != len(val):
            raise DataError(f"there are {len(rows)} {which} for {len(val)} images; give one row for each image")
    if scoring.label_sets is not None and scoring.label_sets.ndim != 2:
        raise DataError(f"the label sets are {list(scoring.label_sets.shape)}; give [S, A], padded with -1")
    mapping = scoring.class_mapping
    if mapping is None:
        return
    if mapping.ndim != 1 or mapping.is_floating_point():
        raise DataError(f"a class mapping is a list of labels, got {mapping.dtype} {list(mapping.shape)}")
    if int(val.labels.max()) >= len(mapping):
        raise DataError(
            f"the class mapping has {len(mapping)} entries, but the test images have a label {int(val.labels.max())}; "
            "it needs one entry for each class of the test set"
        )
    if val.class_names is not None and len(val.class_names) != len(mapping):
        raise DataError(
            f"the class mapping has {len(mapping)} entries for a test set of {len(val.class_names)} classes; it needs "
            "one entry for each"
        )


def _labelled(features: Features, which: str, notes: list[str]) -> tuple[Tensor, Tensor]:
    """Rows that have a label, and their labels, int64 [R] each."""
    if features.labels is None or not bool((features.labels >= 0).any()):
        raise DataError(
            f"the {which} images have no labels, and scores need them; "
            "give a data set with class folders or a label column"
        )
    rows = (features.labels >= 0).nonzero().squeeze(1)
    if n_without := len(features) - len(rows):
        notes.append(f"{n_without} {which} images without a label were left out")
    return rows, features.labels[rows]


def _taken(features: Features, rows: Tensor) -> Tensor:
    """The features of the rows; all of them without a copy."""
    return features.features if len(rows) == len(features) else features.features[rows]


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
