"""Protocol of a training method: a loss of a batch, the trained parts, a teacher that follows.

The loop, its checkpoints and its exports use only this interface; `train/setup.py` builds the objective.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from dinov2.data.crops.collate import CropBatch
from dinov2.engine.schedules import Hyper

__all__ = ["HealthProbe", "LossTerms", "Objective"]


class LossTerms(NamedTuple):
    """The loss of a batch; every value is a scalar tensor."""

    total: Tensor
    """Loss that is minimised."""
    logged: dict[str, Tensor]
    """Its terms by the names of `training_metrics.json`, detached; only those that are on."""

    def named(self) -> dict[str, Tensor]:
        """All values by name, detached."""
        return {"total": self.total.detach(), **self.logged}


class HealthProbe(NamedTuple):
    """Outputs of a method on one batch, for measures without labels."""

    cls: Tensor
    """Class tokens of the teacher `[G*B, D]`, after the final norm."""
    patches: Tensor
    """Patch tokens of the teacher `[G*B, h, w, D]`, after the final norm."""
    patches_before_norm: Tensor
    """The same before the final norm."""
    cls_assignments: Tensor | None
    """Of the teacher `[G*B, K]`; None for a method, or a term that is off, without prototypes."""
    patch_assignments: Tensor | None
    """Of the teacher for masked patches `[M, K]`; None likewise."""


class Objective(nn.Module, ABC):
    """A self-supervised method: batch in, loss terms out; goes neither backward nor to disk.

    State dicts of `teacher` are what is exported; its `backbone` is what evaluations and users load.
    """

    teacher: nn.ModuleDict

    @abstractmethod
    def forward(self, batch: CropBatch, hyper: Hyper) -> LossTerms:
        """All loss terms of a batch at the hyper-parameters of its step."""

    @abstractmethod
    def trained_parts(self) -> dict[str, nn.Module]:
        """The modules that are optimised, by name; each is clipped on its own."""

    @abstractmethod
    def update_teacher(self, momentum: float, *, finite: Tensor | None = None) -> None:
        """Let the teacher follow after a step; leave it alone when the step was not `finite` (boolean `[]`)."""

    @abstractmethod
    def probe(self, batch: CropBatch, hyper: Hyper) -> HealthProbe:
        """Outputs for health figures; changes nothing and draws no random numbers."""
