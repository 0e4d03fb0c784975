"""What a classifier said about every test image: the common result of k-NN, logistic regression and linear probe.

Figures, confidence intervals, confusions, calibration and the worst mistakes all follow from it, so that each of them
is written once and holds for every classifier.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dinov2.eval.result import Result

__all__ = ["Evaluation", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """Probabilities and truth of every scored image, in the order of the data set."""

    probabilities: Tensor
    """float32 [S, C]; a row sums to 1, or to 0 where nothing was voted for."""
    targets: Tensor
    """int64 [S]; -1 is a class without training images, which no answer can hit."""
    class_names: tuple[str, ...]
    """Name of class 0 .. C - 1 (its number where the data set knows no names)."""
    indices: Tensor
    """int64 [S]: position of each image in the test data set, for its picture."""

    def __len__(self) -> int:
        return self.targets.shape[0]


@dataclass(frozen=True)
class Evaluation:
    """The rows of one evaluation and, for each setting that was evaluated, what it said."""

    rows: list[Result]
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """By setting, such as `k=20` or `C=0.1`; the first is the one that a comparison of models uses."""
