"""The flags of the release's linear-probe command."""

import argparse
from collections.abc import Sequence

from dinov2.eval.linear.grid import LEARNING_RATES
from dinov2.eval.log_regression.evaluation import METRICS
from dinov2.eval.setup import get_args_parser as get_setup_args_parser

__all__ = ["get_args_parser"]


def get_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """The flags of the release's linear-probe command, with its defaults."""
    parser = argparse.ArgumentParser(
        description=description, parents=[*parents, get_setup_args_parser(add_help=False)], add_help=add_help
    )
    add = parser.add_argument
    add("--train-dataset", default="ImageNet:split=TRAIN", help="labelled images to train on")
    add("--val-dataset", default="ImageNet:split=VAL", help="labelled images to score")
    add("--test-datasets", nargs="+", help="further labelled images to score")
    add("--epochs", type=int, default=10, help="number of epochs, each of --epoch-length iterations")
    add("--epoch-length", type=int, default=1250, help="iterations of an epoch")
    add("--batch-size", type=int, default=128, help="images of a step on each process")
    add("--num-workers", type=int, default=8, help="processes that load images")
    add("--save-checkpoint-frequency", type=int, default=20, help="epochs between checkpoints that are kept")
    add("--eval-period-iterations", type=int, default=1250, help="iterations between two evaluations")
    add("--learning-rates", nargs="+", type=float, default=list(LEARNING_RATES), help="rates for a batch of 256")
    add("--no-resume", action="store_true", help="start afresh where a checkpoint exists")
    add("--val-metric-type", default="mean_accuracy", choices=METRICS, help="what heads are chosen by")
    add(
        "--test-metric-types",
        nargs="+",
        choices=METRICS,
        help="metrics of the test sets; that of val for all if absent",
    )
    add("--classifier-fpath", help="file of a head to score without training")
    add("--val-class-mapping-fpath", help=".npy file with the training class of each class of the val set")
    add("--test-class-mapping-fpaths", nargs="+", default=[None], help="the same for each test set, or None")
    return parser
