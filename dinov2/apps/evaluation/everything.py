"""All methods that fit, for one model or several: one JSON document and one page that compares them."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from dinov2.analysis.health import feature_health
from dinov2.apps.evaluation.cost import Cost, measured_cost
from dinov2.apps.evaluation.datasets import EvaluationSets
from dinov2.apps.evaluation.features import Extraction
from dinov2.apps.evaluation.methods import METHODS, OWN_CLASSIFIER, Method
from dinov2.apps.evaluation.released_head import head_parts, knows_classes_of, score_head
from dinov2.apps.evaluation.session import Inputs, Session, session
from dinov2.apps.evaluation.subjects import Subject, called, subject_of
from dinov2.checkpoints.locate import locate_checkpoint
from dinov2.distributed import is_main_process
from dinov2.encode.external_models import is_external_model
from dinov2.errors import ConfigError
from dinov2.eval.figures import Comparison, SampleRecords, classification_figures, compare
from dinov2.eval.intervals import Estimate, holm
from dinov2.eval.outcome import Evaluation, Outcome, class_recalls
from dinov2.eval.result import SCHEMA, Result, environment, now
from dinov2.eval.retrieval import evaluate_retrieval, truth_by_class
from dinov2.whole_files import write_json

__all__ = [
    "ACCURACIES",
    "CALIBRATION",
    "RESULTS_FILE",
    "RETRIEVAL",
    "Measured",
    "Pair",
    "Study",
    "document",
    "everything",
]

RESULTS_FILE = "results_eval_all.json"

ACCURACIES = ("top-1", "top-5", "mean-per-class")
"""Figures in percent."""

CALIBRATION = ("ece", "ece-equal-mass", "log-loss", "brier", "aurc")
"""Figures of the probabilities; fractions, the log-loss in nats."""

RETRIEVAL = "retrieval"
"""Its name among the methods; it gives no answers to compare, only figures."""

_MOST_QUERIES = 2000
_CURVE_RESAMPLES = 300  # a calibration error takes a pass over the images for each


@dataclass(frozen=True)
class Measured:
    """One method on one model."""

    model: str
    method: Method
    subject: Subject
    evaluation: Evaluation
    cost: Cost
    """Of the method, features not counted."""
    records: SampleRecords
    """What it said of each image, with the setting that the model is compared with."""
    figures: dict[str, Estimate]
    """Accuracies and calibration with that setting."""

    @property
    def setting(self) -> str:
        """The setting that the model is compared with."""
        return next(iter(self.evaluation.outcomes))

    @property
    def outcome(self) -> Outcome:
        """What it said with that setting."""
        return self.evaluation.outcomes[self.setting]


@dataclass(frozen=True)
class Pair:
    """Two models by one method."""

    method: Method
    first: str
    second: str
    comparison: Comparison
    p_holm: float
    """McNemar's p, corrected for all comparisons of the study."""


@dataclass(frozen=True)
class Study:
    """Everything that was measured."""

    sets: EvaluationSets
    measured: list[Measured]
    pairs: list[Pair]
    extractions: dict[str, dict[str, Extraction]]
    """By model, then by data set."""
    unreadable: dict[str, list[tuple[str, str]]]
    """By model: (path, reason) of every image that was left out."""
    retrieval: dict[str, list[Result]]
    """By model: scored images that look for the others of their class; empty where it was not asked for."""
    health: dict[str, dict[str, float]]
    """By model: label-free measures of the class tokens of the scored images."""
    folder: Path


def everything(
    models: Sequence[str | os.PathLike[str]],
    inputs: Inputs,
    *,
    methods: Sequence[str] = (),
) -> Study:
    """Measures every model with every method (all, unless some are named) and writes `results_eval_all.json`.

    Models are taken one after the other, so that the memory is that of the largest. Raises `ConfigError` for a model
    that is named twice or an unknown method, and what `session` raises, before features are extracted.
    """
    chosen = _methods(methods)
    _look_for(models, inputs)
    measured: list[Measured] = []
    extractions: dict[str, dict[str, Extraction]] = {}
    unreadable: dict[str, list[tuple[str, str]]] = {}
    health: dict[str, dict[str, float]] = {}
    retrieval: dict[str, list[Result]] = {}
    sets: EvaluationSets | None = None
    for number, model in enumerate(models):
        own = replace(inputs, model=model)
        with session(own, task="all", sets=sets) as opened:
            if number == 0:
                inputs = replace(inputs, output_dir=opened.folder)
            sets = opened.sets
            name = _distinct(called(opened.loaded), list(extractions), number)
            subject = subject_of(opened.loaded, name=name)
            measured += _measure(opened, subject, chosen)
            retrieval[name] = _retrieve(opened, subject) if not methods or RETRIEVAL in methods else []
            if name not in {one.model for one in measured}:
                raise ConfigError(f"{name} brings no classifier for these classes; name another method besides head")
            health[name] = feature_health(opened.features(subject)[1].features)
            extractions[name] = dict(opened.bank.extractions)
            unreadable[name] = opened.unreadable(subject)
            folder = opened.folder
            opened.bank.forget()
    assert sets is not None
    study = Study(sets, measured, _pairs(measured), extractions, unreadable, retrieval, health, folder)
    if is_main_process():
        write_json(folder / RESULTS_FILE, document(study))
    return study


def document(study: Study) -> dict[str, Any]:
    """The study as plain values: one entry for each model and method, comparisons, and all rows."""
    return {
        "schema": SCHEMA,
        "date": now(),
        "train_dataset": study.sets.train.name,
        "val_dataset": study.sets.val.name,
        "split": study.sets.split,
        "evaluations": [_entry(study, one) for one in study.measured],
        "comparisons": [
            {
                "task": pair.method.key,
                "metric": "top-1",
                "first": pair.first,
                "second": pair.second,
                "n": pair.comparison.n,
                "difference": 100 * pair.comparison.difference.value,
                "ci": [100 * pair.comparison.difference.low, 100 * pair.comparison.difference.high],
                "only_first": pair.comparison.only_first,
                "only_second": pair.comparison.only_second,
                "p_value": pair.comparison.p_value,
                "p_holm": pair.p_holm,
            }
            for pair in study.pairs
        ],
        "retrieval": {
            name: {row.metric: {"value": row.value, "ci": row.ci, "n": row.n} for row in rows}
            for name, rows in study.retrieval.items()
        },
        "health": study.health,
        "unreadable": study.unreadable,
        "rows": [
            asdict(row)
            for rows in (*(one.evaluation.rows for one in study.measured), *study.retrieval.values())
            for row in rows
        ],
        "versions": environment(),
    }


def _entry(study: Study, one: Measured) -> dict[str, Any]:
    rows = one.evaluation.rows
    first = rows[0]
    outcome = one.outcome
    return {
        "schema": SCHEMA,
        "task": one.method.key,
        "dataset": first.dataset,
        "split": first.split,
        "n": len(outcome),
        "metrics": {
            name: {"value": 100 * one.figures[name].value, "ci": [100 * bound for bound in one.figures[name][1:]]}
            for name in ACCURACIES
            if name in one.figures
        }
        # What the test set asks for besides, such as the accuracy by several right labels.
        | {
            row.metric: {"value": row.value, "ci": row.ci}
            for row in rows
            if row.k == first.k and row.metric not in ACCURACIES
        },
        "selection": {
            "set": first.settings.get("selected_on"),
            "grid": first.settings.get("curve") if one.method.key == "log-regression" else first.settings.get("grid"),
            "winner": one.setting,
        },
        "setting": one.setting,
        "settings": dict(first.settings),
        "model": {"name": one.model, "digest": one.subject.described.get("sha256"), "config": one.subject.described},
        "transform": one.subject.transform.describe(),
        "precision": one.subject.precision,
        "seeds": sorted({row.seed for row in rows if row.seed is not None}),
        "timing": {
            "seconds": one.cost.seconds,
            "peak_memory_bytes": one.cost.peak_bytes,
            "features": {name: asdict(taken) for name, taken in study.extractions[one.model].items()},
        },
        "calibration": {name: {"value": one.figures[name].value, "ci": one.figures[name][1:]} for name in CALIBRATION},
        "classes": [{"name": name, "n": n, "hits": hit} for name, n, hit in class_recalls(outcome)],
        "notes": list(first.notes),
        "hardware": {"device": one.subject.device.type, "accelerator": first.versions.get("accelerator")},
        "versions": dict(first.versions),
    }


def _measure(opened: Session, subject: Subject, methods: Sequence[Method]) -> list[Measured]:
    found = []
    # Asked for together, so that of a set too large for all parts the images are decoded once nevertheless.
    opened.features(subject, parts=[part for part in subject.parts if any(part in one.parts for one in methods)])
    for method in methods:
        if method.key == OWN_CLASSIFIER.key and not _has_fitting_head(opened, subject):
            continue
        train, val = opened.features(subject, parts=method.parts_of(subject))
        with measured_cost(subject.device) as cost:
            if method.key == OWN_CLASSIFIER.key:
                evaluation = _by_own_classifier(opened, subject)
            else:
                evaluation = method.run(train, val, subject, opened.provenance(subject), opened.inputs.progress)
        # Of the other settings the rows are enough: a matrix of probabilities for each would fill the memory.
        setting, outcome = next(iter(evaluation.outcomes.items()))
        evaluation = Evaluation(evaluation.rows, {setting: outcome})
        records = outcome.records()
        figures = classification_figures(records, n_curve_resamples=_CURVE_RESAMPLES)
        found.append(Measured(subject.name, method, subject, evaluation, cost, records, figures))
        if is_main_process():
            top1, low, high = figures["top-1"]
            opened.inputs.say(
                f"{subject.name}: {method.name} {found[-1].setting}: top-1 {100 * top1:.2f} % "
                f"({100 * low:.2f} to {100 * high:.2f}), {cost.seconds:.1f} s"
            )
    return found


def _retrieve(opened: Session, subject: Subject) -> list[Result]:
    """Scored images, at most some thousands of them evenly chosen, look for the others of their class."""
    val = opened.features(subject)[1]
    assert val.labels is not None
    n_queries = min(len(val), _MOST_QUERIES)
    chosen = torch.arange(n_queries) * len(val) // n_queries
    truth = truth_by_class(val.labels[chosen], val.labels, same_image=chosen)
    if not any(len(one.positives) for one in truth):
        if is_main_process():
            opened.inputs.say(f"{subject.name}: no retrieval, because no two of the scored images share a class")
        return []
    provenance = {**opened.provenance(subject), "split": "the others of the same set"}
    rows = evaluate_retrieval(
        val.features[chosen], val.features, truth, ks=(1, 5), device=subject.device, provenance=provenance
    )
    if is_main_process():
        opened.inputs.say(f"{subject.name}: retrieval among the scored images: mAP {rows[0].value:.2f} %")
    return rows


def _has_fitting_head(opened: Session, subject: Subject) -> bool:
    """Whether the model brings a classifier that knows the classes of the scored images."""
    head = opened.loaded.head
    return head is not None and knows_classes_of(head, opened.features(subject)[1])


def _by_own_classifier(opened: Session, subject: Subject) -> Evaluation:
    head = opened.loaded.head
    assert head is not None
    val = opened.features(subject, parts=head_parts(head, subject))[1]
    return score_head(head, val, provenance=opened.provenance(subject))


def _pairs(measured: Sequence[Measured]) -> list[Pair]:
    found: list[tuple[Method, str, str, Comparison]] = []
    for method in dict.fromkeys(one.method for one in measured):
        for first, second in combinations([one for one in measured if one.method == method], 2):
            found.append((method, first.model, second.model, compare(first.records, second.records)))
    corrected = holm([comparison.p_value for *_, comparison in found])
    return [Pair(*one, p_holm) for one, p_holm in zip(found, corrected, strict=True)]


def _methods(names: Sequence[str]) -> list[Method]:
    known = [*(method.key for method in METHODS), RETRIEVAL]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"no method is called {unknown[0]!r}; choose from {', '.join(known)}")
    if list(names) == [RETRIEVAL]:
        raise ConfigError("retrieval alone compares no answers; name another method besides, or use eval retrieval")
    return [method for method in METHODS if not names or method.key in names]


def _look_for(models: Sequence[str | os.PathLike[str]], inputs: Inputs) -> None:
    """Finds, and where necessary fetches, every model, so that a wrong name of the last is known before the first."""
    if not models:
        raise ConfigError("no model was named; give --model once for each model")
    texts = [str(model) for model in models]
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise ConfigError(f"the model {twice[0]} was named twice; name each model once")
    for model in models:
        if not is_external_model(str(model)) or Path(model).exists():
            locate_checkpoint(model, progress=inputs.progress)


def _distinct(name: str, taken: Sequence[str], number: int) -> str:
    return f"{name} ({number + 1})" if name in taken else name
