"""Names of the public release that make sense without its loaders and process groups."""

from typing import Any

import torch
from torch import Tensor, nn

from dinov2.eval.log_regression.estimator import LogisticRegression

__all__ = ["LogRegModule", "train_for_C"]


class LogRegModule(nn.Module):
    """A fitted estimator as a module: samples [B, D] and targets to `{"preds", "target"}`."""

    def __init__(self, estimator: LogisticRegression) -> None:
        super().__init__()
        self.estimator = estimator

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
    estimator = LogisticRegression(C, max_iter=max_iter, dtype=dtype, device=device)
    return LogRegModule(estimator.fit(train_features, train_labels))
