"""Centering: a running mean of the teacher's scores is taken off before the softmax (arXiv 2104.14294, section 3.1).

The mean of a step is used from the next step on. It is kept pending until `apply_pending`, so that a step that is
thrown away (`keep` false) leaves no trace in the center.
"""

import torch
from torch import Tensor, nn

from dinov2.distributed import all_reduce_sum

__all__ = ["Center"]


class Center(nn.Module):
    """Holds the running mean `center` `[*leading ones, K]` and the mean of the last step, not yet applied.

    The mean over processes is that of their means, as in the public release; processes without rows do not count.
    """

    center: Tensor

    def __init__(self, out_dim: int, *, leading: tuple[int, ...] = (1,), momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(*leading, out_dim))
        self._pending: Tensor | None = None

    @torch.no_grad()
    def softmax(self, scores: Tensor, temperature: float) -> Tensor:
        """Scores `[..., K]` -> assignments `[..., K]`, float32; a pending mean is applied first."""
        self.apply_pending()
        return ((scores.float() - self.center.flatten()) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update(self, scores: Tensor) -> None:
        """Notes the mean over all rows of `[..., K]`, in every process, for the next `apply_pending`."""
        rows = scores.flatten(0, -2).float()
        counts = float(rows.shape[0] > 0)
        mean = rows.mean(dim=0) if counts else rows.new_zeros(rows.shape[1])
        total = all_reduce_sum(torch.cat([mean, mean.new_tensor([counts])]))
        # No process has a row: the center is unchanged.
        fallback = self.center.flatten()
        self._pending = torch.where(total[-1] > 0, total[:-1] / total[-1].clamp(min=1.0), fallback)

    @torch.no_grad()
    def apply_pending(self, keep: Tensor | None = None) -> None:
        """Moves the center towards the pending mean, unless `keep` (boolean, `[]`) is false; then forgets the mean."""
        if self._pending is None:
            return
        moved = self.center * self.momentum + self._pending.view_as(self.center) * (1 - self.momentum)
        self.center.copy_(moved if keep is None else torch.where(keep, moved, self.center))
        self._pending = None
