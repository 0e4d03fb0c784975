"""The same fit by scikit-learn or cuML, for comparison; both are optional."""

from typing import Any, Literal

import torch
from torch import Tensor

from dinov2.errors import MissingDependency

__all__ = ["fit_with_library"]


def fit_with_library(
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
        import warnings

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
