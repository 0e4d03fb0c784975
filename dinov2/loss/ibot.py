"""The iBOT loss: the student predicts the teacher's assignments of the patches hidden from it (arXiv 2111.07832)."""

from torch import Tensor

from dinov2.loss.cross_entropy import assignment_cross_entropy

__all__ = ["ibot_patch_loss"]


def ibot_patch_loss(
    scores: Tensor,  # [M, K] of the student, masked patches only
    assignments: Tensor,  # [M, K] of the teacher
    mask_weights: Tensor,  # [M] one over the number of masked patches in the same crop
    n_crops: int,  # G*B, masked or not
    student_temp: float = 0.1,
) -> Tensor:  # []
    """Cross-entropy averaged within each crop, then over all crops; zero when no patch is masked."""
    return assignment_cross_entropy(scores, assignments, student_temp, mask_weights.float() / n_crops)
