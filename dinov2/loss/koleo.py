"""KoLeo: spreads the features of a batch by pushing each away from its nearest neighbour (arXiv 1806.03198)."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["koleo_loss", "nearest_rows"]


def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """`- mean_i log(|z_i - z_nearest(i)| + eps)` of the normalised rows of `[S, D]` -> `[]`, in float32.

    Zero for fewer than two rows, which have no neighbour. float32, because in half precision `eps` vanishes and two
    equal rows would cost infinitely much.
    """
    if features.shape[0] < 2:
        return features.float().sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):
        z = F.normalize(features.float(), dim=-1, eps=eps)
        distances = F.pairwise_distance(z, z[nearest_rows(z)], p=2, eps=eps)
        return -torch.log(distances + eps).mean()


@torch.no_grad()
def nearest_rows(z: Tensor) -> Tensor:
    """Index `[S]` of the nearest other row, for normalised rows `[S, D]`."""
    similarity = z @ z.T
    similarity.fill_diagonal_(-1.0)
    return similarity.argmax(dim=1)
