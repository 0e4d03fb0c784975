"""The flags of the release's logistic-regression command."""

import argparse
from collections.abc import Sequence

from dinov2.eval.log_regression.evaluation import DEFAULT_MAX_ITER, METRICS
from dinov2.eval.setup import evaluation_parser

__all__ = ["get_args_parser"]


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
    parser.add_argument("--metric-type", default="mean_accuracy", choices=METRICS, help="what C is chosen by")
    parser.add_argument("--train-features-device", default="cpu", help="device that the fits run on")
    parser.add_argument(
        "--train-dtype", default="float64", choices=["float32", "float64"], help="number format of the products"
    )
    parser.add_argument("--max-train-iters", type=int, default=DEFAULT_MAX_ITER, help="iterations of a fit at most")
    return parser
