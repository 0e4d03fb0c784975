"""Logistic regression on frozen features with the release's protocol: a grid of C, a choice, a final fit.

`evaluate_log_regression` goes from features to result rows; `LogisticRegression` is the estimator for one C and
`fit_path` for many. The solver is this package's own; scikit-learn and cuML fit on request.
"""

from dinov2.eval.log_regression.arguments import get_args_parser
from dinov2.eval.log_regression.estimator import Fitted, LogisticRegression, fit_path
from dinov2.eval.log_regression.evaluation import C_GRID, DEFAULT_MAX_ITER, evaluate_log_regression
from dinov2.eval.log_regression.few_shot import evaluate_few_shot
from dinov2.eval.log_regression.release import LogRegModule, train_for_C

__all__ = [
    "C_GRID",
    "DEFAULT_MAX_ITER",
    "Fitted",
    "LogRegModule",
    "LogisticRegression",
    "evaluate_few_shot",
    "evaluate_log_regression",
    "fit_path",
    "get_args_parser",
    "train_for_C",
]
