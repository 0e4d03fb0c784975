"""What is known of each scored image, in a few numbers: every figure and its interval follow from these.

Rows of scores are as wide as there are classes; a record is not, so records are what processes exchange and what is
kept beside a result. They carry the position of their image, so that an image that a sampler gave to two processes, as
padding samplers do, counts once.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.features.metrics.accuracy import voted_ranks
from dinov2.features.metrics.calibration import brier_scores, negative_log_likelihoods

__all__ = ["SampleRecords", "gather_records", "sample_records"]


@dataclass(frozen=True)
class SampleRecords:
    """One row an image; all tensors are [S]."""

    indices: Tensor
    """int64: position of the image in its data set."""
    targets: Tensor
    """int64; -1 is a class that the classifier does not know."""
    predictions: Tensor
    """int64: the class with the largest probability, the lowest of several; -1 where nothing was voted for."""
    confidences: Tensor
    """That probability, in the precision it came in: in another one it may cross the edge of a bin."""
    ranks: Tensor
    """int64: classes that stand before the target, 0 for a hit; C where the target has no probability at all."""
    log_losses: Tensor
    """float64: -ln of the target's probability."""
    brier: Tensor
    """float64: squared distance of the probabilities to the right answer."""
    n_classes: int
    """C."""

    def __len__(self) -> int:
        return self.indices.shape[0]

    def hits(self, *, k: int = 1) -> Tensor:  # -> bool [S]
        """Whether the target is among the k best classes; k is limited to the number of classes."""
        return self.ranks < min(k, self.n_classes)

    def take(self, rows: Tensor) -> "SampleRecords":
        """The records of the given rows (int64 [R]), in that order."""
        return SampleRecords(**{name: getattr(self, name)[rows] for name in _TENSORS}, n_classes=self.n_classes)


_TENSORS = tuple(field.name for field in fields(SampleRecords) if field.name != "n_classes")


def sample_records(
    probabilities: Tensor,  # [S, C]
    targets: Tensor,  # int64 [S]
    *,
    indices: Tensor | None = None,  # int64 [S]; 0, 1, 2, ... unless given
) -> SampleRecords:
    """The records of some images, on the CPU, from class probabilities.

    A row of zeros is an image that nothing was voted for: it hits nothing, whatever its target. Raises DataError when
    shapes or targets do not fit.
    """
    log_losses, brier = negative_log_likelihoods(probabilities, targets), brier_scores(probabilities, targets)
    confidences, predictions = probabilities.max(dim=1)
    return SampleRecords(
        indices=(torch.arange(len(targets)) if indices is None else indices).cpu(),
        targets=targets.cpu(),
        predictions=torch.where(confidences > 0, predictions, -1).cpu(),
        confidences=confidences.cpu(),
        ranks=voted_ranks(probabilities, targets).cpu(),
        log_losses=log_losses.cpu(),
        brier=brier.cpu(),
        n_classes=probabilities.shape[1],
    )


def gather_records(records: SampleRecords) -> SampleRecords:
    """The records of all processes in the order of their images, each image once; all processes must call.

    One process gets its own records sorted. A process may bring none.
    """
    gathered = {name: distributed.all_gather_rows(getattr(records, name)) for name in _TENSORS}
    everything = SampleRecords(**gathered, n_classes=records.n_classes)
    order = everything.indices.argsort(stable=True)
    numbers = everything.indices[order]
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[1:] = numbers[1:] != numbers[:-1]
    return everything.take(order[first])
