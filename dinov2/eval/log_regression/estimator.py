"""Multinomial logistic regression with an L2 penalty, for one C or for a whole grid of them.

The objective is scikit-learn's, and so is the meaning of C: `|W|^2 / 2 + C * sum of losses`, the intercept free, and
for two classes one weight vector instead of two. A grid is fitted several C at once, where one product with the
features serves them all, and each group starts from the solution of the one before.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dinov2.encode.tokens import require_finite
from dinov2.errors import ConfigError, DataError, MissingDependency
from dinov2.eval.log_regression.solver import Axes, SoftmaxObjective, minimise

__all__ = ["Fitted", "SolverBackend", "fit_path"]

SolverBackend = Literal["torch", "sklearn", "cuml"]
"""Whose solver fits: this package's, or that of an optional library."""

# Columns of one product. On a CPU core 40 to 80 are fastest: with 10 classes 4 or 8 of the 45 C at a time take 0.65 of
# the time of all at once and 0.6 of that of one at a time, with 100 classes one at a time is best, because a start from
# the neighbour saves more iterations than a wider product saves time. A GPU has room for more beside each other.
_COLUMNS, _COLUMNS_CUDA = 64, 4096
_STATE_BYTES = 2 << 30
_VECTORS = 32  # float64 vectors of the size of the weights that the solver keeps for each C


class Fitted(NamedTuple):
    """The solution for one C."""

    C: float
    weights: Tensor
    """float64 [K, D], on the CPU, one row for each class, also for two."""
    intercepts: Tensor
    """float64 [K]."""
    n_iterations: int
    converged: bool
    gradient: float
    """Norm of the gradient of the mean objective, as `tol` of `fit_path` measures it; NaN if unknown."""

    def scores(self, features: Tensor) -> Tensor:  # [S, D] -> [S, K]
        """Scores before the softmax, on the features' device, in their type."""
        return features @ self.weights.to(features).T + self.intercepts.to(features)


def fit_path(
    features: Tensor,  # [S, D]
    classes: Tensor,  # int64 [S], 0 .. K - 1
    *,
    n_classes: int,
    Cs: Sequence[float],
    tol: float = 1e-4,
    max_iter: int = 1000,
    dtype: torch.dtype = torch.float32,
    at_once: int | None = None,
    start: Fitted | None = None,
    backend: SolverBackend = "torch",
) -> list[Fitted]:
    """One solution for each of `Cs`, in their order; computed on the features' device.

    Args:
        tol: norm of the gradient of the mean objective that ends a fit. It is measured by the curvature, so that half
            its square is about what the mean loss could still fall (nats), whatever the scale of the features. For
            the libraries it is their own `tol`.
        dtype: number format of the products with the features; sums and weights are float64 either way.
        at_once: C that are fitted together; None chooses by the number of classes and the memory that it takes.
        start: a solution to start from, such as one of another C or of part of the features.

    Raises:
        DataError: fewer than two classes, a feature is not finite, or a library lacks images of a class.
        ConfigError: a C that is not positive.
        MissingDependency: `backend` names a library that is not installed.
    """
    _check(features, classes, n_classes, Cs)
    if backend != "torch":
        if (n_present := len(classes.unique())) < n_classes:
            raise DataError(
                f"{backend} fits the classes that it sees, which are {n_present} of {n_classes}; let the torch backend "
                "fit, or hold out images of every class alike"
            )
        solutions = [
            _fit_with_library(backend, features, classes, C=C, tol=tol, max_iter=max_iter, dtype=dtype) for C in Cs
        ]
        return [Fitted(C, *one, gradient=float("nan")) for C, one in zip(Cs, solutions, strict=True)]

    axes = Axes.from_rows(features, dtype)
    width = axes.rows.shape[1]
    if at_once is None:
        columns = _COLUMNS_CUDA if features.is_cuda else _COLUMNS
        at_once = max(1, min(columns // n_classes, _STATE_BYTES // (_VECTORS * 8 * n_classes * width)))
    origin = torch.zeros(n_classes, width, dtype=axes.mean.dtype, device=features.device)
    if start is not None:
        origin = axes.from_features(start.weights, start.intercepts)
        origin = origin - origin.mean(dim=0)
    # One weight vector for two classes is penalised half as much as two opposite halves of it.
    factor = 2.0 if n_classes == 2 else 1.0
    ascending = sorted(range(len(Cs)), key=Cs.__getitem__)
    fits: dict[int, Fitted] = {}
    for first in range(0, len(Cs), at_once):
        group = ascending[first : first + at_once]
        penalties = torch.tensor([factor / (Cs[i] * len(features)) for i in group]).to(axes.mean)
        objective = SoftmaxObjective(axes, classes.to(features.device), n_classes=n_classes, penalties=penalties)
        solution = minimise(
            objective,
            origin.flatten().repeat(len(group), 1),
            tolerance=tol,
            max_iterations=max_iter,
            project=objective.project,
        )
        theta = solution.points.view(len(group), n_classes, width)
        origin = theta[-1]
        weights, intercepts = (part.cpu().double() for part in axes.to_features(theta))
        # Adding a constant to all intercepts changes nothing; as in scikit-learn they sum to zero.
        intercepts = intercepts - intercepts.mean(dim=1, keepdim=True)
        for row, i in enumerate(group):
            fits[i] = Fitted(
                C=float(Cs[i]),
                weights=weights[row],
                intercepts=intercepts[row],
                n_iterations=int(solution.n_iterations[row]),
                converged=bool(solution.converged[row]),
                gradient=float(solution.gradient_norms[row]),
            )
    return [fits[i] for i in range(len(Cs))]


def _check(features: Tensor, classes: Tensor, n_classes: int, Cs: Sequence[float]) -> None:
    if features.ndim != 2 or classes.shape != features.shape[:1]:
        raise DataError(
            f"features must be [S, D] and classes [S], got {list(features.shape)} and {list(classes.shape)}; "
            "give one row of features for each label"
        )
    if n_classes < 2:
        raise DataError(
            "all training images are of one class, and a classifier needs two; give images of another class"
        )
    require_finite(features)
    if not Cs or min(Cs) <= 0:
        raise ConfigError(f"C must be positive, got {list(Cs)}; write values such as 0.1 1 10")


def _fit_with_library(
    library: Literal["sklearn", "cuml"],
    features: Tensor,  # [S, D]
    classes: Tensor,  # int64 [S], 0 .. K - 1, all present
    *,
    C: float,
    tol: float,
    max_iter: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, int, bool]:
    """Weights float64 [K, D], intercepts [K], iterations, and whether it converged; `tol` is the library's own.

    Raises `MissingDependency` when it is not installed.
    """
    estimator = _estimator(library, C=C, tol=tol, max_iter=max_iter)
    if library == "cuml":
        estimator.fit(features.to(dtype).cpu().numpy(), classes.to(dtype).cpu().numpy())
    else:
        with warnings.catch_warnings():  # that it stopped early is returned
            warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")
            estimator.fit(features.to(dtype).cpu().numpy(), classes.cpu().numpy())
    weights, intercepts = (torch.as_tensor(part).double() for part in (estimator.coef_, estimator.intercept_))
    if len(weights) == 1:  # two classes share one vector: halves of opposite sign give the same probabilities
        weights, intercepts = (torch.cat([-part, part]) / 2 for part in (weights, intercepts))
    n_iterations = int(max(getattr(estimator, "n_iter_", [0])))
    return weights, intercepts, n_iterations, n_iterations < max_iter


def _estimator(library: Literal["sklearn", "cuml"], *, C: float, tol: float, max_iter: int) -> Any:
    purpose = "this backend of logistic regression"
    if library == "cuml":
        try:
            from cuml.linear_model import LogisticRegression as OfCuml
        except ImportError as error:
            raise MissingDependency("cuml-cu12", purpose) from error
        return OfCuml(penalty="l2", C=C, tol=tol, max_iter=max_iter, linesearch_max_iter=50, output_type="numpy")
    try:
        from sklearn.linear_model import LogisticRegression as OfSklearn
    except ImportError as error:
        raise MissingDependency("scikit-learn", purpose) from error
    return OfSklearn(C=C, tol=tol, max_iter=max_iter)
