"""L-BFGS on many smooth, strongly convex problems at once: one product with the data serves all of them.

Every problem keeps its own step length, history and convergence; those that are done leave the batch. The line search
follows the slope: on a convex function a point where the slope along the direction is not yet positive lies lower than
the start, so function values, which rounding blurs near the minimum, are only asked where the step went too far.
Method: Liu and Nocedal 1989, "On the limited memory BFGS method for large scale optimization".
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Evaluated", "Minimised", "minimise"]

_HISTORY = 10
_ARMIJO = 1e-4
_MAX_SHORTENINGS = 25


class Evaluated(NamedTuple):
    """Value, gradient and the diagonal of a Hessian estimate at one point for each problem."""

    values: Tensor
    """[A]."""
    gradients: Tensor
    """[A, P]."""
    diagonals: Tensor
    """[A, P], positive: the first guess of the curvature along each parameter."""


class Minimised(NamedTuple):
    """Where each of A problems ended."""

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
    evaluate: Callable[[Tensor, Tensor], Evaluated],
    start: Tensor,  # [A, P]
    *,
    tolerance: float,
    max_iterations: int,
    project: Callable[[Tensor], Tensor] = lambda points: points,
) -> Minimised:
    """Minimise A problems of P parameters, each until its gradient norm is at most `tolerance`.

    `evaluate(which, points)` gets the numbers int64 [a] of the problems that still run and a point [a, P] for each.
    `project` is the orthogonal projection of [a, P] on the subspace that the minima and the start are known to lie in.
    A gradient g is measured by the curvature guess d: the root of sum g^2 / d, whose half square is about what the
    objective can still lose, whatever the scale of a parameter. A problem that can make no progress any more (rounding)
    stops with `converged` False.
    """
    n_problems = len(start)
    which = torch.arange(n_problems, device=start.device)
    result = Minimised(
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


class _Run:
    """The state of the problems that still run; all tensors have one row for each."""

    def __init__(self, which: Tensor, points: Tensor, at: Evaluated, project: Callable[[Tensor], Tensor]) -> None:
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

    def judge(self, trial_points: Tensor, trial: Evaluated) -> None:
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
