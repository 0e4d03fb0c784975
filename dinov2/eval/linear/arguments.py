"""The flags of the release's linear-probe command."""

import argparse
from collections.abc import Sequence

from dinov2.eval.linear.grid import LEARNING_RATES
from dinov2.eval.log_regression.evaluation import METRICS
from dinov2.eval.setup import evaluation_parser

__all__ = ["get_args_parser"]


def get_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The flags of the release's linear-probe command, with its defaults."""
    parser = evaluation_parser(description, parents, add_help, train="to train on", val="to score")
    add = parser.add_argument
    add("--test-datasets", nargs="+", help="further labelled images to score")
    add("--epochs", type=int, default=10, help="number of epochs, each of --epoch-length iterations")
    add("--epoch-length", type=int, default=1250, help="iterations of an epoch")
    add("--batch-size", type=int, default=128, help="images of a step on each process")
    add("--num-workers", type=int, default=8, help="processes that load images")
    add("--save-checkpoint-frequency", type=int, default=20, help="accepted; the newest is kept")
    add("--eval-period-iterations", type=int, default=1250, help="iterations between two evaluations")
    add("--learning-rates", nargs="+", type=float, default=list(LEARNING_RATES), help="rates for a batch of 256")
    add("--no-resume", action="store_true", help="start afresh where a checkpoint exists")
    add("--val-metric-type", default="mean_accuracy", choices=METRICS, help="what heads are chosen by")
    add(
        "--test-metric-types",
        nargs="+",
        choices=METRICS,
        help="accepted, one for each test set; every figure is reported of every set",
    )
    add("--classifier-fpath", help="file of a head to score without training")
    add("--val-class-mapping-fpath", help=".npy file with the training class of each class of the val set")
    add("--test-class-mapping-fpaths", nargs="+", default=[None], help="the same for each test set, or None")
    return parser
