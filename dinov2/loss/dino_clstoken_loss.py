"""The DINO loss: the student's class tokens predict the teacher's assignments of other crops (arXiv 2104.14294)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2.loss.centering import Center
from dinov2.loss.cross_entropy import assignment_cross_entropy
from dinov2.loss.sinkhorn import sinkhorn_knopp

__all__ = ["DINOLoss", "dino_loss"]


def dino_loss(scores: Tensor, assignments: Tensor, student_temp: float = 0.1) -> Tensor:
    """Every student crop against every teacher crop: `[L, B, K]`, `[G, B, K]` -> `[]`.

    The sum over all pairs of crops of the mean cross-entropy over the batch. The teacher's crops are summed before
    the product with the student's log-probabilities, so the cost does not grow with their number.
    """
    n_crops, batch, _ = scores.shape
    summed = assignments.float().sum(dim=0).expand(n_crops, -1, -1)  # [L, B, K]
    weights = scores.new_full((n_crops * batch,), 1.0 / batch, dtype=torch.float32)
    return assignment_cross_entropy(scores.flatten(0, 1), summed.flatten(0, 1), student_temp, weights)


class DINOLoss(Center):
    """`dino_loss` and the two ways to turn teacher scores into assignments, under the release's names."""

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__(out_dim, leading=(1,), momentum=center_momentum)
        self.student_temp = student_temp

    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """Scores `[..., K]` -> assignments by centering; a pending center update is applied first."""
        return self.softmax(teacher_output, teacher_temp)

    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
        """Scores `[S, K]` -> assignments by Sinkhorn-Knopp over all processes."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def update_center(self, teacher_output: Tensor) -> None:
        """Notes this step's scores `[S, K]` for the center of the next."""
        self.update(teacher_output)

    def apply_center_update(self) -> None:
        """Applies what `update_center` noted."""
        self.apply_pending()

    def forward(
        self, student_output_list: Sequence[Tensor], teacher_out_softmaxed_centered_list: Sequence[Tensor]
    ) -> Tensor:
        """Lists of `[B, K]`, one a crop: student scores and teacher assignments -> `[]`, every pair counted."""
        return dino_loss(
            torch.stack(list(student_output_list)),
            torch.stack(list(teacher_out_softmaxed_centered_list)),
            self.student_temp,
        )
