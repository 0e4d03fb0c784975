"""`dinov2 eval`: the family of evaluations."""

import argparse

from dinov2.cli.evaluation import everything, knn, probes, retrieval

__all__ = ["add_to"]

_TASKS = (knn, probes, retrieval, everything)


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `eval` and its tasks."""
    family = commands.add_parser(
        "eval",
        help="measure the features of a trained model",
        description="Measure the features of a trained model.",
        epilog="example:\n  dinov2 eval knn --model runs/photos --train-dataset photos/train --val-dataset photos/val",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = family.add_subparsers(dest="task", metavar="TASK", required=True)
    for task in _TASKS:
        task.add_to(tasks)
