"""What the page of an evaluation is told, in plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dinov2.eval.figures import Bins, Comparison
from dinov2.eval.intervals import Estimate
from dinov2.eval.outcome import ClassRecall, Confused, Mistake
from dinov2.report.neighbour_page import ShotRow

__all__ = [
    "EvaluationRecord",
    "MethodRecord",
    "ModelRecord",
    "PairRecord",
    "PicturedMistake",
    "QueryGroup",
    "RetrievalRecord",
]


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
    """Where the image comes from."""
    others: tuple[tuple[str, str], ...] = ()
    """(model, what it says) of the other models."""


@dataclass(frozen=True)
class MethodRecord:
    """What one method said of one model."""

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
    seconds: float | None = None


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
    """Everything on the page."""

    title: str
    facts: Sequence[tuple[str, str]]
    """(name, value) for the head of the page."""
    models: Sequence[ModelRecord]
    methods: Sequence[MethodRecord]
    pairs: Sequence[PairRecord] = ()
    notes: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def method_names(self) -> list[str]:
        """The methods in the order of the page."""
        return list(dict.fromkeys(one.method for one in self.methods))

    def of(self, method: str) -> list[MethodRecord]:
        """One method, model by model."""
        return [one for one in self.methods if one.method == method]

    def color(self, model: str) -> int:
        """The number of a model in the theme's palette."""
        names = [one.name for one in self.models]
        return 1 + names.index(model) % 5


@dataclass(frozen=True)
class QueryGroup:
    """Some queries and what they found."""

    heading: str
    lead: str
    rows: Sequence[ShotRow]


@dataclass(frozen=True)
class RetrievalRecord:
    """Everything on the page of a retrieval."""

    title: str
    facts: Sequence[tuple[str, str]]
    """(name, value) for the head of the page."""
    figures: Mapping[str, Mapping[str, Estimate]]
    """By protocol ("" where there is one only), then by metric, as fractions; NaN for bounds that are not known."""
    precisions: Sequence[float]
    """Average precision of the queries that were looked at."""
    groups: Sequence[QueryGroup]
    measured: Mapping[str, str]
    notes: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
