"""The methods of `dinov2 eval all`: what each reads, and how it goes from features to an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

from dinov2.apps.evaluation.linear import columns_of
from dinov2.apps.evaluation.subjects import PARTS, Subject
from dinov2.checkpoints.locate import ShowProgress
from dinov2.encode.stream import Features
from dinov2.eval.knn.evaluate import evaluate_knn_outcome
from dinov2.eval.linear import evaluate_linear
from dinov2.eval.log_regression import evaluate_log_regression
from dinov2.eval.outcome import Evaluation
from dinov2.eval.scoring import Provenance

__all__ = ["METHODS", "OWN_CLASSIFIER", "Method"]

_Run = Callable[[Features, Features, Subject, Provenance, ShowProgress], Evaluation]
"""(training features, validation features, subject, provenance) -> evaluation."""


@dataclass(frozen=True)
class Method:
    """One way to classify by frozen features."""

    key: str
    """Its name on the command line."""
    name: str
    """Its name in the report."""
    run: _Run
    parts: tuple[str, ...] = ("cls",)
    """Parts of the columns that it reads; those that a model does not have are left out."""

    def parts_of(self, subject: Subject) -> tuple[str, ...]:
        """The parts that it reads of this subject."""
        return tuple(part for part in self.parts if part in subject.parts)


def _knn(
    train: Features, val: Features, subject: Subject, provenance: Provenance, progress: ShowProgress
) -> Evaluation:
    return evaluate_knn_outcome(train, val, device=subject.device, provenance=provenance)


def _log_regression(
    train: Features, val: Features, subject: Subject, provenance: Provenance, progress: ShowProgress
) -> Evaluation:
    return evaluate_log_regression(train, val, device=subject.device, provenance=provenance)


def _linear(
    train: Features, val: Features, subject: Subject, provenance: Provenance, progress: ShowProgress
) -> Evaluation:
    columns, _ = columns_of(subject)
    return evaluate_linear(
        train,
        val,
        columns=columns,
        preset="short",
        device=subject.device,
        provenance=provenance,
        on_step=progress(f"{subject.name}: linear classifiers"),
    )


def _nothing(
    train: Features, val: Features, subject: Subject, provenance: Provenance, progress: ShowProgress
) -> Evaluation:
    raise AssertionError("the classifier of a model is scored where the model is at hand")


OWN_CLASSIFIER = Method("head", "own classifier", _nothing)
"""The classifier that a model brings along, where it knows the classes of the images; nothing is trained."""

METHODS = (
    Method("knn", "k-NN", _knn),
    Method("log-regression", "logistic regression", _log_regression),
    OWN_CLASSIFIER,
    Method("linear", "linear probe", _linear, parts=PARTS),
)
"""In the order in which they run and are shown."""
