"""Multinomial logistic regression for many C at once: the objective, and L-BFGS on all of them together.

Features are centred, which the free intercept absorbs, and turned into the axes of their covariance, which leaves
the penalty as it is. There the Hessian's diagonal is nearly the variance of each axis plus the penalty, so that L-BFGS
starts from a good guess for every C: ill-conditioned features cost few iterations more than round ones.

Every problem keeps its own step length, history and convergence; those that are done leave the batch. The line search
follows the slope: on a convex function a point where the slope along the direction is not yet positive lies lower than
the start, so function values, which rounding blurs near the minimum, are only asked where the step went too far.
Method: Liu and Nocedal 1989, "On the limited memory BFGS method for large scale optimization".
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2 import distributed

__all__ = ["Axes", "SoftmaxObjective", "minimise"]

_HISTORY = 10
_ARMIJO = 1e-4
_MAX_SHORTENINGS = 25
_BLOCK = 1 << 19
"""Scores of one block of rows: few enough to stay in the cache of a CPU core."""
_BLOCK_CUDA = 1 << 27


class _Evaluated(NamedTuple):
    """Value, gradient and the diagonal of a Hessian estimate at one point for each problem."""

    values: Tensor
    """[A]."""
    gradients: Tensor
    """[A, P]."""
    diagonals: Tensor
    """[A, P], positive: the first guess of the curvature along each parameter."""


class _Minimised(NamedTuple):
    """Solution of each of A problems."""

    points: Tensor
    """[A, P]."""
    values: Tensor
    """[A]."""
    gradient_norms: Tensor
    """[A], as `minimise` measures them."""
    n_iterations: Tensor
    """int64 [A]: accepted steps."""
    converged: Tensor
    """bool [A]: whether the gradient norm fell to the tolerance."""


def minimise(
    evaluate: Callable[[Tensor, Tensor], _Evaluated],
    start: Tensor,  # [A, P]
    *,
    tolerance: float,
    max_iterations: int,
    project: Callable[[Tensor], Tensor] = lambda points: points,
) -> _Minimised:
    """Minimise A problems of P parameters, each until its gradient norm is at most `tolerance`.

    `evaluate(which, points)` gets the numbers int64 [a] of the problems that still run and a point [a, P] for each.
    `project` is the orthogonal projection of [a, P] on the subspace that the minima and the start are known to lie in.
    A gradient g is measured by the curvature guess d: the root of sum g^2 / d, whose half square is about what the
    objective can still lose, whatever the scale of a parameter. A problem that can make no progress any more (rounding)
    stops with `converged` False.
    """
    n_problems = len(start)
    which = torch.arange(n_problems, device=start.device)
    result = _Minimised(
        points=start.clone(),
        values=start.new_zeros(n_problems),
        gradient_norms=start.new_zeros(n_problems),
        n_iterations=torch.zeros(n_problems, dtype=torch.int64, device=start.device),
        converged=torch.zeros(n_problems, dtype=torch.bool, device=start.device),
    )
    at = evaluate(which, start)
    run = _Run(which, start.clone(), at, project)
    while len(run.which):
        norms = (run.gradients.square() / run.diagonals).sum(dim=1).sqrt()
        converged = norms <= tolerance
        ended = converged | (run.n_iterations >= max_iterations) | (run.n_shortenings > _MAX_SHORTENINGS)
        if bool(ended.any()):
            done = run.which[ended]
            result.points[done], result.values[done] = run.points[ended], run.values[ended]
            result.gradient_norms[done], result.converged[done] = norms[ended], converged[ended]
            result.n_iterations[done] = run.n_iterations[ended]
            run.keep(~ended)
            continue
        trial_points = run.points + run.lengths.unsqueeze(1) * run.directions()
        run.judge(trial_points, evaluate(run.which, trial_points))
    return result


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
    def from_rows(cls, features: Tensor, dtype: torch.dtype) -> "Axes":  # [S, D]
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

    def __call__(self, which: Tensor, points: Tensor) -> _Evaluated:  # int64 [a], [a, P]
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
        return _Evaluated(values, gradients, curvature.view_as(points))


class _Run:
    """The state of the problems that still run; all tensors have one row for each."""

    def __init__(self, which: Tensor, points: Tensor, at: _Evaluated, project: Callable[[Tensor], Tensor]) -> None:
        self.which, self.points, self.project = which, points, project
        self.values, self.gradients, self.diagonals = at
        self.lengths = torch.ones_like(at.values)  # of the next trial step
        self.n_iterations, self.n_shortenings = torch.zeros_like(which), torch.zeros_like(which)
        self.history: list[tuple[Tensor, Tensor, Tensor]] = []  # steps [a, P], gradient changes [a, P], 1 / s.y [a]
        self._directions: Tensor | None = None

    def directions(self) -> Tensor:  # [a, P]
        """Descent directions from the current points; kept until a step is accepted."""
        if self._directions is None:
            self._directions = self._two_loops()
        return self._directions

    def judge(self, trial_points: Tensor, trial: _Evaluated) -> None:
        """Accept the trial step of each problem, or shorten it."""
        directions = self.directions()
        slopes, trial_slopes = (_dot(g, directions) for g in (self.gradients, trial.gradients))
        noise = 4 * torch.finfo(torch.float32).eps * self.values.abs()
        low_enough = trial.values <= self.values + _ARMIJO * self.lengths * slopes + noise
        # Both slopes small is what rounding leaves near the minimum; far from it this asks for a real decrease.
        accepted = trial.values.isfinite() & ((trial_slopes <= 0) | (low_enough & (trial_slopes <= 0.9 * -slopes)))

        steps = trial_points - self.points
        changes = trial.gradients - self.gradients
        curvatures = _dot(steps, changes)
        useful = accepted & (curvatures > 1e-12 * steps.norm(dim=1) * changes.norm(dim=1))
        # A problem that takes part with weight 0 keeps its older pairs, and all histories stay aligned.
        weights = torch.where(useful, 1 / curvatures, 0.0)
        self.history = [*self.history[-(_HISTORY - 1) :], (steps, changes, weights)]

        # Where the slope would vanish if it changed evenly; well inside, so that the search always ends.
        secant = -slopes / (trial_slopes - slopes)
        shortened = self.lengths * torch.where(trial.values.isfinite(), secant, 0.1).clamp(0.1, 0.9)
        self.lengths = torch.where(accepted, torch.ones_like(shortened), shortened)
        self.n_shortenings = torch.where(accepted, 0, self.n_shortenings + 1)
        self.n_iterations = self.n_iterations + accepted
        column = accepted.unsqueeze(1)
        self.points = torch.where(column, trial_points, self.points)
        self.values = torch.where(accepted, trial.values, self.values)
        self.gradients = torch.where(column, trial.gradients, self.gradients)
        self.diagonals = torch.where(column, trial.diagonals, self.diagonals)
        moved = self._two_loops()
        self._directions = torch.where(column, moved, directions)

    def keep(self, rows: Tensor) -> None:
        """Drop the problems that are not in the bool mask."""
        for name in ("which", "points", "values", "gradients", "diagonals", "lengths", "n_iterations", "n_shortenings"):
            setattr(self, name, getattr(self, name)[rows])
        self.history = [(s[rows], y[rows], w[rows]) for s, y, w in self.history]
        if self._directions is not None:
            self._directions = self._directions[rows]

    def _two_loops(self) -> Tensor:  # [a, P]
        q = self.gradients.clone()
        alphas = []
        for steps, changes, weights in reversed(self.history):
            alpha = weights * _dot(steps, q)
            q -= alpha.unsqueeze(1) * changes
            alphas.append(alpha)
        q = self.project(self.project(q) / self.diagonals)  # projected twice, so that it stays symmetric
        for (steps, changes, weights), alpha in zip(self.history, reversed(alphas), strict=True):
            beta = weights * _dot(changes, q)
            q += (alpha - beta).unsqueeze(1) * steps
        return -q


def _dot(a: Tensor, b: Tensor) -> Tensor:  # [a, P], [a, P] -> [a]
    return torch.linalg.vecdot(a, b)
