"""The DINO loss: the student's class tokens predict the teacher's assignments of other crops (arXiv 2104.14294)."""

import torch
from torch import Tensor

from dinov2.loss.cross_entropy import assignment_cross_entropy

__all__ = ["dino_loss"]


def dino_loss(
    scores: Tensor,  # [L, B, K] of the student, one entry a crop
    assignments: Tensor,  # [G, B, K] of the teacher
    student_temp: float = 0.1,
    *,
    skip_same_crop: bool = False,
) -> Tensor:  # []
    """The sum over pairs of student and teacher crops of the mean cross-entropy over the batch.

    `skip_same_crop` leaves out the pairs of a crop with itself (`L = G`, the same crops in both): there the class token
    could copy instead of agree. The teacher's crops are summed before the product with the student's log-probabilities,
    so that the cost does not grow with their number.
    """
    n_crops, batch, _ = scores.shape
    if skip_same_crop:
        others = 1 - torch.eye(n_crops, device=assignments.device)  # [L, G]
        targets = torch.tensordot(others, assignments.float(), dims=1)  # [L, B, K]
    else:
        targets = assignments.float().sum(dim=0).expand(n_crops, -1, -1)
    weights = scores.new_full((n_crops * batch,), 1.0 / batch, dtype=torch.float32)
    return assignment_cross_entropy(scores.flatten(0, 1), targets.flatten(0, 1), student_temp, weights)
