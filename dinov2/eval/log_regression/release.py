"""Names of the public release that make sense without its loaders and process groups."""

from typing import Any

import torch
from torch import Tensor, nn

from dinov2.eval.log_regression.estimator import LogisticRegression
from dinov2.eval.log_regression.evaluation import DEFAULT_MAX_ITER

__all__ = ["LogRegModule", "train_for_C"]


class LogRegModule(nn.Module):
    """The estimator for one C as a module: samples [B, D] and targets to `{"preds", "target"}` once it is fitted."""

    def __init__(
        self,
        C: float,
        max_iter: int = DEFAULT_MAX_ITER,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.estimator = LogisticRegression(C, max_iter=max_iter, dtype=dtype, device=device)

    def fit(self, train_features: Tensor, train_labels: Tensor) -> None:
        """Fit to features [S, D] and labels [S]. Raises as `fit_path` does."""
        self.estimator.fit(train_features, train_labels)

    def forward(self, samples: Tensor, targets: Any) -> dict[str, Any]:
        """Probabilities [B, K] and the targets as they were given."""
        return {"preds": self.estimator.predict_proba(samples), "target": targets}


def train_for_C(
    *,
    C: float,
    max_iter: int,
    train_features: Tensor,  # [S, D]
    train_labels: Tensor,  # [S]
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> LogRegModule:
    """Fit for one C. Raises as `fit_path` does."""
    module = LogRegModule(C, max_iter=max_iter, dtype=dtype, device=device)
    module.fit(train_features, train_labels)
    return module
