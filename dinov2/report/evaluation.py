"""The page that compares models on one data set: figures with intervals, differences, classes, mistakes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dinov2.eval.figures import Bins, Comparison
from dinov2.eval.metrics import Estimate
from dinov2.eval.outcome import ClassRecall, Confused, Mistake
from dinov2.report.render import percent, render

__all__ = ["EvaluationRecord", "MethodRecord", "ModelRecord", "PairRecord", "PicturedMistake", "evaluation_page"]

_MOST_CLASSES = 24
_CALIBRATION = {"ece": "ECE", "log-loss": "log-loss", "brier": "Brier", "aurc": "AURC"}
_NO_PERCENT = ("log-loss", "brier")


@dataclass(frozen=True)
class ModelRecord:
    """One of the compared models."""

    name: str
    facts: dict[str, str]
    """Digest, size, image size, precision, time, as they are shown."""


@dataclass(frozen=True)
class PicturedMistake:
    """An image that a model has wrong."""

    mistake: Mistake
    jpeg: bytes | None
    """None where the image could not be read again."""
    title: str
    """Name of the image's file."""
    others: tuple[tuple[str, str], ...] = ()
    """(model, answer) of the other models."""


@dataclass(frozen=True)
class MethodRecord:
    """Results of one method on one model."""

    method: str
    """`k-NN`, `logistic regression`, `linear probe`, ..."""
    model: str
    setting: str
    """Such as `k=20`."""
    figures: dict[str, Estimate]
    """Top-1, top-5, mean per class, as fractions."""
    recalls: Sequence[ClassRecall] = ()
    confusion: Sequence[Sequence[int]] = ()
    """Empty where there are too many classes for a picture."""
    class_names: Sequence[str] = ()
    pairs: Sequence[Confused] = ()
    bins: Bins | None = None
    calibration: dict[str, Estimate] = field(default_factory=dict)
    """Calibration errors and areas as fractions, the log-loss in nats."""
    mistakes: Sequence[PicturedMistake] = ()


@dataclass(frozen=True)
class PairRecord:
    """Two models by one method."""

    method: str
    first: str
    second: str
    comparison: Comparison
    p_holm: float


@dataclass(frozen=True)
class EvaluationRecord:
    """Input data of the page."""

    title: str
    facts: Sequence[tuple[str, str]]
    """(name, value) for the head of the page."""
    models: Sequence[ModelRecord]
    methods: Sequence[MethodRecord]
    pairs: Sequence[PairRecord] = ()
    notes: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def color(self, model: str) -> int:
        """The number of a model in the page's palette."""
        return 1 + [one.name for one in self.models].index(model) % 5


_ByMethod = list[tuple[str, list[MethodRecord]]]


def evaluation_page(record: EvaluationRecord) -> str:
    """The page as text. Classes, confusions, calibration and mistakes are shown method by method, the last one open."""
    methods = _by_method(record.methods)
    recalled = _by_method([one for one in record.methods if one.recalls])
    calibrated = _by_method([one for one in record.methods if one.bins is not None])
    sections = {
        "figures": ("Figures", True),
        "differences": ("Differences between models", record.pairs),
        "classes": ("Classes", recalled),
        "confusions": ("Confusions", recalled),
        "calibration": ("Calibration", calibrated),
        "mistakes": ("Worst mistakes", recalled),
        "measured": ("How it was measured", True),
    }
    return render(
        "evaluation.html.jinja",
        heading=record.title,
        facts=record.facts,
        record=record,
        sections={anchor: title for anchor, (title, content) in sections.items() if content},
        methods=methods,
        n_methods=len(methods),
        recalled=recalled,
        calibrated=calibrated,
        scale=_scale(record.methods),
        figures=[_figure_rows(record, method, records) for method, records in methods],
        shown_classes=_shown_classes,
        calibration=_calibration,
    )


def _by_method(records: Sequence[MethodRecord]) -> _ByMethod:
    names = dict.fromkeys(one.method for one in records)
    return [(name, [one for one in records if one.method == name]) for name in names]


def _scale(records: Sequence[MethodRecord]) -> tuple[float, float] | None:
    """Ends of the scale of top-1 accuracies, near enough to show their differences."""
    shown = [one.figures["top-1"] for one in records if "top-1" in one.figures]
    if not shown:
        return None
    low, high = min(estimate.low for estimate in shown), max(estimate.high for estimate in shown)
    margin = max(0.02, 0.08 * (high - low))
    return max(0.0, low - margin), min(1.0, high + margin)


_FigureRow = tuple[str, list[Estimate | None], float | None]


def _figure_rows(
    record: EvaluationRecord, method: str, records: Sequence[MethodRecord]
) -> tuple[str, list[_FigureRow], list[str]]:
    """The method, (metric, estimate of each model, best value where there is a comparison), settings by model."""
    by_model = {one.model: one for one in records}
    rows: list[_FigureRow] = []
    for metric in dict.fromkeys(metric for one in records for metric in one.figures):
        values = [one.figures[metric].value for one in records if metric in one.figures]
        estimates = [
            by_model[model.name].figures.get(metric) if model.name in by_model else None for model in record.models
        ]
        rows.append((metric, estimates, max(values) if len(values) > 1 else None))
    return method, rows, [by_model[m.name].setting if m.name in by_model else "" for m in record.models]


def _shown_classes(records: Sequence[MethodRecord]) -> tuple[list[str], int]:
    """Classes whose recall is shown, of many those that the first model recalls least; and the number of all."""
    recalls = records[0].recalls
    if len(recalls) > _MOST_CLASSES:
        recalls = sorted(recalls, key=lambda recall: recall.hits / recall.n)[:_MOST_CLASSES]
    return [recall.name for recall in recalls], len(records[0].recalls)


class _Dot(NamedTuple):
    """A bin of a reliability diagram; its area grows with its images."""

    x: int
    y: int
    radius: int
    text: str


def _calibration(one: MethodRecord) -> tuple[list[_Dot], list[tuple[str, str, str]]]:
    """Dots of the reliability diagram, and (name, value, interval) of the summary figures."""
    assert one.bins is not None
    filled = [(n, sure, right) for n, sure, right in zip(*(part.tolist() for part in one.bins), strict=True) if n]
    most = max(n for n, _, _ in filled)
    dots = [
        _Dot(
            x=round(1000 * sure),
            y=round(1000 * (1 - right)),
            radius=round(8 + 26 * math.sqrt(n / most)),
            text=f"{n:,} images: {percent(sure)} % sure, {percent(right)} % right",
        )
        for n, sure, right in filled
    ]

    def text(name: str, value: float) -> str:
        return f"{value:.3f}" if name in _NO_PERCENT else f"{percent(value)} %"

    summary = [
        (label, text(name, estimate.value), f"{text(name, estimate.low)} to {text(name, estimate.high)}")
        for name, label in _CALIBRATION.items()
        if (estimate := one.calibration.get(name)) is not None
    ]
    return dots, summary
