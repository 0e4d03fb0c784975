"""Logistic regression on frozen features with the release's protocol: a grid of C, a choice, a final fit.

`evaluate_log_regression` goes from features to result rows, and `fit_path` fits one C or many. The solver is this
package's own; scikit-learn and cuML fit on request. `release.py` has the names of the public release.
"""

from dinov2.eval.log_regression.estimator import Fitted, fit_path
from dinov2.eval.log_regression.evaluate import C_GRID, DEFAULT_MAX_ITER, evaluate_log_regression
from dinov2.eval.log_regression.release import LogRegModule, get_args_parser, train_for_C

__all__ = [
    "C_GRID",
    "DEFAULT_MAX_ITER",
    "Fitted",
    "LogRegModule",
    "evaluate_log_regression",
    "fit_path",
    "get_args_parser",
    "train_for_C",
]
