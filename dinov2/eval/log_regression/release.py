"""Names of the public release's logistic regression: its module for one C, and the flags of its command."""

import argparse
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2.eval.log_regression.estimator import fit_path
from dinov2.eval.log_regression.evaluate import DEFAULT_MAX_ITER
from dinov2.eval.selection import SELECTION_METRICS
from dinov2.eval.setup import evaluation_parser

__all__ = ["LogRegModule", "get_args_parser", "train_for_C"]


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
        self.C, self.max_iter, self.dtype, self.device = C, max_iter, dtype, torch.device(device)

    def fit(self, train_features: Tensor, train_labels: Tensor) -> None:
        """Fit to features [S, D] and labels [S], which may be any numbers.

        Warns where `max_iter` came first. Raises as `fit_path` does.
        """
        self.classes, classes = torch.as_tensor(train_labels).unique(return_inverse=True)
        (self.fitted,) = fit_path(
            torch.as_tensor(train_features).to(self.device),
            classes,
            n_classes=len(self.classes),
            Cs=[self.C],
            max_iter=self.max_iter,
            dtype=self.dtype,
        )
        if not self.fitted.converged:
            warnings.warn(
                f"the fit for C = {self.C:g} stopped after {self.fitted.n_iterations} iterations short of its "
                "tolerance; raise max_iter",
                stacklevel=2,
            )

    def forward(self, samples: Tensor, targets: object) -> dict[str, object]:
        """Probabilities [B, K] of the classes in ascending order, and the targets as they were given."""
        return {"preds": self.fitted.scores(samples.to(self.device)).softmax(dim=1), "target": targets}


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


def get_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The flags of the release's logistic-regression command, with its defaults."""
    parser = evaluation_parser(description, parents, add_help, train="to fit on", val="to score")
    parser.add_argument("--finetune-dataset-str", help="labelled images to choose C on; they join the final fit")
    parser.add_argument(
        "--finetune-on-val", action="store_true", help="choose C on the images that are scored, which flatters"
    )
    parser.add_argument("--metric-type", default="mean_accuracy", choices=SELECTION_METRICS, help="what C is chosen by")
    parser.add_argument("--train-features-device", default="cpu", help="device that the fits run on")
    parser.add_argument(
        "--train-dtype", default="float64", choices=["float32", "float64"], help="number format of the products"
    )
    parser.add_argument("--max-train-iters", type=int, default=DEFAULT_MAX_ITER, help="iterations of a fit at most")
    return parser
