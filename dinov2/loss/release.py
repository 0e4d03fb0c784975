"""The loss classes of the public release, for code that calls them; training composes the functions themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2.loss.centering import Center
from dinov2.loss.cross_entropy import log_softmax_cross_entropy
from dinov2.loss.dino import dino_loss
from dinov2.loss.ibot import ibot_patch_loss
from dinov2.loss.koleo import koleo_loss, nearest_rows
from dinov2.loss.sinkhorn import sinkhorn_knopp

__all__ = ["DINOLoss", "KoLeoLoss", "iBOTPatchLoss"]


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

    reduce_center_update = update_center

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


class iBOTPatchLoss(Center):
    """`ibot_patch_loss` and the two ways to turn teacher scores into assignments, under the release's names."""

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__(patch_out_dim, leading=(1, 1), momentum=center_momentum)
        self.student_temp = student_temp

    def softmax_center_teacher(self, teacher_patch_tokens: Tensor, teacher_temp: float) -> Tensor:
        """Scores `[..., K]` -> assignments by centering; a pending center update is applied first."""
        return self.softmax(teacher_patch_tokens, teacher_temp)

    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
    ) -> Tensor:
        """Scores `[M, K]` -> assignments by Sinkhorn-Knopp; each process may hold another number of patches.

        `n_masked_patches_tensor` is accepted for the release's sake: rows are counted here.
        """
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def update_center(self, teacher_patch_tokens: Tensor) -> None:
        """Notes this step's scores `[..., K]` for the center of the next."""
        self.update(teacher_patch_tokens)

    reduce_center_update = update_center

    def apply_center_update(self) -> None:
        """Applies what `update_center` noted."""
        self.apply_pending()

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor) -> Tensor:
        """The dense form: `[B, N, K]` scores and assignments, masks `[B, N]` -> `[]`."""
        masks = student_masks_flat.float()
        loss = log_softmax_cross_entropy(student_patch_tokens, teacher_patch_tokens, self.student_temp)  # [B, N]
        return ((loss * masks).sum(dim=-1) / masks.sum(dim=-1).clamp(min=1.0)).mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,  # [>= M, K], padding rows last
        teacher_patch_tokens_masked: Tensor,  # [>= M, K]
        student_masks_flat: Tensor,  # [G*B, N]
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,  # [M]
    ) -> Tensor:
        """The loss of masked patches alone -> `[]`; weights are derived from the masks when not given."""
        if masks_weight is None:
            counts = student_masks_flat.sum(dim=-1, keepdim=True).clamp(min=1.0)
            masks_weight = (1.0 / counts).expand_as(student_masks_flat)[student_masks_flat]
        kept = masks_weight.shape[0] if n_masked_patches is None else n_masked_patches
        return ibot_patch_loss(
            student_patch_tokens_masked[:kept],
            teacher_patch_tokens_masked[:kept],
            masks_weight[:kept],
            student_masks_flat.shape[0],
            self.student_temp,
        )


class KoLeoLoss(nn.Module):
    """`koleo_loss` under the name of the public release."""

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Features `[S, D]` -> `[]`."""
        return koleo_loss(student_output, eps)

    def pairwise_NNs_inner(self, x: Tensor) -> Tensor:
        """Index `[S]` of the nearest other row, for normalised rows `[S, D]`."""
        return nearest_rows(x)
