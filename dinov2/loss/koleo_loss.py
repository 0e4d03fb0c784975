"""KoLeo: spreads the features of a batch by pushing each away from its nearest neighbour (arXiv 1806.03198)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["KoLeoLoss", "koleo_loss"]


def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """`- mean_i log(|z_i - z_nearest(i)| + eps)` of the normalised rows of `[S, D]` -> `[]`, in float32.

    Zero for fewer than two rows, which have no neighbour. float32, because in half precision `eps` vanishes and two
    equal rows would cost infinitely much.
    """
    if features.shape[0] < 2:
        return features.float().sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):
        z = F.normalize(features.float(), dim=-1, eps=eps)
        distances = F.pairwise_distance(z, z[_nearest(z)], p=2, eps=eps)
        return -torch.log(distances + eps).mean()


@torch.no_grad()
def _nearest(z: Tensor) -> Tensor:
    similarity = z @ z.T
    similarity.fill_diagonal_(-1.0)
    return similarity.argmax(dim=1)


class KoLeoLoss(nn.Module):
    """`koleo_loss` under the name of the public release."""

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Features `[S, D]` -> `[]`."""
        return koleo_loss(student_output, eps)

    def pairwise_NNs_inner(self, x: Tensor) -> Tensor:
        """Index `[S]` of the nearest other row, for normalised rows `[S, D]`."""
        return _nearest(x)
