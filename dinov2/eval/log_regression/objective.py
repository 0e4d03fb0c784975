"""The objective of multinomial logistic regression for many C at once, in coordinates in which it is easy.

Features are centred, which the free intercept absorbs, and turned into the axes of their covariance, which leaves
the penalty as it is. There the Hessian's diagonal is nearly the variance of each axis plus the penalty, so that L-BFGS
starts from a good guess for every C: ill-conditioned features cost few iterations more than round ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.eval.log_regression.solver import Evaluated

__all__ = ["Axes", "SoftmaxObjective"]

_BLOCK = 1 << 19
"""Scores of one block of rows: few enough to stay in the cache of a CPU core."""
_BLOCK_CUDA = 1 << 27


class Axes(NamedTuple):
    """Centred features turned into the axes of their covariance, those without any variance left out."""

    rows: Tensor
    """[S, R + 1] in the working type; the last column is `unit` throughout, for the intercept."""
    mean: Tensor
    """float64 [D]."""
    turn: Tensor
    """float64 [D, R]: columns are axes."""
    variances: Tensor
    """float64 [R]."""
    unit: float
    """Standard deviation of a typical axis: with it as the intercept's input nothing depends on the features' scale."""

    @classmethod
    def of(cls, features: Tensor, dtype: torch.dtype) -> "Axes":  # [S, D]
        """The axes of a feature matrix; the sums are in float64 whatever the working type."""
        wide = torch.float32 if features.device.type == "mps" else torch.float64
        n_rows, width = features.shape
        mean = torch.zeros(width, dtype=wide, device=features.device)
        covariance = torch.zeros(width, width, dtype=wide, device=features.device)
        blocks = features.split(max(1, (1 << 24) // width))
        for block in blocks:
            mean += block.to(wide).sum(dim=0) / n_rows
        for block in blocks:
            centred = block.to(wide) - mean
            covariance.addmm_(centred.T, centred, alpha=1 / n_rows)
        variances, turn = torch.linalg.eigh(covariance)
        real = variances > width * torch.finfo(wide).eps * variances[-1].clamp_min(torch.finfo(wide).tiny)
        variances, turn = variances[real], turn[:, real].contiguous()
        unit = float(variances.mean().sqrt()) if len(variances) else 1.0
        rows = torch.full((n_rows, turn.shape[1] + 1), unit, dtype=dtype, device=features.device)
        start = 0
        for block in blocks:
            rows[start : start + len(block), :-1] = (block.to(wide) - mean) @ turn
            start += len(block)
        return cls(rows, mean, turn, variances, unit)

    def to_features(self, theta: Tensor) -> tuple[Tensor, Tensor]:  # [A, K, R + 1] -> [A, K, D], [A, K]
        """Weights and intercepts for the features as they were."""
        weights = theta[..., :-1] @ self.turn.T
        return weights, theta[..., -1] * self.unit - weights @ self.mean

    def from_features(self, weights: Tensor, intercepts: Tensor) -> Tensor:  # -> [A, K, R + 1]
        """The same in these axes; parts along axes without variance are dropped."""
        weights, intercepts = weights.to(self.turn), intercepts.to(self.turn)
        centred = (intercepts + weights @ self.mean) / self.unit
        return torch.cat([weights @ self.turn, centred.unsqueeze(-1)], dim=-1)


class SoftmaxObjective:
    """`mean loss + |W|^2 / (2 C S)` of A problems that differ in C; points are [A, K * (R + 1)].

    Over several processes each computes its own share of the rows; sums travel, so all see the same values.
    """

    def __init__(self, axes: Axes, classes: Tensor, *, n_classes: int, penalties: Tensor) -> None:
        rank, world_size = distributed.get_global_rank(), distributed.get_global_size()
        n_rows = len(axes.rows)
        own = slice(n_rows * rank // world_size, n_rows * (rank + 1) // world_size)
        self.n_rows, self.n_classes = n_rows, n_classes
        self.rows, self.classes = axes.rows[own], classes[own]
        self.variances = torch.cat([axes.variances, axes.variances.new_tensor([axes.unit**2])])  # [R + 1]
        self.penalties = penalties  # [A]: 1 / (C S)
        self.block = _BLOCK_CUDA if axes.rows.is_cuda else _BLOCK

    def project(self, points: Tensor) -> Tensor:  # [a, P] -> [a, P]
        """Without what all classes share: a softmax does not see it, and the penalty drives it to zero."""
        theta = points.view(len(points), self.n_classes, -1)
        return (theta - theta.mean(dim=1, keepdim=True)).view_as(points)

    def __call__(self, which: Tensor, points: Tensor) -> Evaluated:  # int64 [a], [a, P]
        """Values, gradients and curvature guesses of the problems `which`."""
        n_problems, n_classes = len(points), self.n_classes
        theta = points.view(n_problems, n_classes, -1)
        flat = theta.reshape(n_problems * n_classes, -1).to(self.rows.dtype)
        losses = points.new_zeros(n_problems)
        gradients = torch.zeros_like(points).view(n_problems * n_classes, -1)
        spreads = points.new_zeros(n_problems, n_classes)
        size = max(16, self.block // (n_problems * n_classes))
        for start in range(0, len(self.rows), size):
            rows, classes = self.rows[start : start + size], self.classes[start : start + size]
            scores = (rows @ flat.T).view(len(rows), n_problems, n_classes)
            target = classes.view(-1, 1, 1).expand(-1, n_problems, 1)
            own_scores = scores.gather(2, target).squeeze(2)  # [s, a]
            highest = scores.amax(dim=2)
            probabilities = torch.softmax(scores, dim=2)
            # The largest probability is one over the sum of the exponentials.
            losses += (highest - own_scores - probabilities.amax(dim=2).log()).sum(dim=0)
            spreads += (probabilities * (1 - probabilities)).sum(dim=0)
            probabilities.scatter_add_(2, target, probabilities.new_full((1, 1, 1), -1.0).expand_as(target))
            gradients += probabilities.view(len(rows), -1).T @ rows
        sums = torch.cat([losses.unsqueeze(1), spreads, gradients.view_as(points)], dim=1)  # [a, 1 + K + P]
        sums = distributed.all_reduce_sum(sums) / self.n_rows
        losses, spreads, gradients = sums[:, 0], sums[:, 1 : 1 + n_classes], sums[:, 1 + n_classes :]

        penalties = self.penalties[which]
        weights = theta[..., :-1]
        values = losses + 0.5 * penalties * weights.square().sum(dim=(1, 2))
        penalised = torch.ones_like(self.variances)
        penalised[-1] = 0
        gradients = gradients + (penalties.view(-1, 1, 1) * penalised * theta).view_as(points)
        curvature = penalties.view(-1, 1, 1) * penalised + spreads.clamp_min(1e-9).unsqueeze(2) * self.variances
        return Evaluated(values, gradients, curvature.view_as(points))
