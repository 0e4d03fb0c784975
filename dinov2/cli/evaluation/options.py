"""What all tasks of `dinov2 eval` are asked: model, images, image size, where features and results are kept."""

import argparse
from typing import TYPE_CHECKING, Any

from dinov2.cli.common import add_compute_options, positive, say

if TYPE_CHECKING:
    from dinov2.apps.evaluation.session import Inputs

__all__ = ["MODEL_HELP", "add_inputs", "inputs_of", "plan_only", "say_unreadable"]

MODEL_HELP = (
    "a release's name, a run's folder (its newest teacher), a weight file or its address, a Hugging Face folder or id, "
    "or a model of another library: timm:NAME, hf:ID, module:function"
)


def add_inputs(parser: argparse.ArgumentParser, *, task: str, model: bool = True) -> None:
    """The options that become `Inputs`, `--dry-run` among them."""
    if model:
        parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--train-dataset",
        metavar="D",
        help="labelled images to learn from: a folder of class folders, list:FILE, toy:split=TRAIN, ...",
    )
    parser.add_argument("--val-dataset", metavar="D", help="labelled images to score on")
    parser.add_argument(
        "--dataset",
        metavar="D",
        help="one labelled set instead of two: a fifth of each class, chosen by the names of the images, is scored",
    )
    parser.add_argument(
        "--output-dir",
        metavar="OUT",
        help=f"where results_eval_{task}.json is written (default: a new runs/<date>-{task.replace('_', '-')})",
    )
    parser.add_argument(
        "--config-file", metavar="FILE", help="configuration of the weights, for files that do not carry their own"
    )
    parser.add_argument(
        "--resolution", type=positive, metavar="PIXELS", help="side of the crop that the model sees (default: its own)"
    )
    parser.add_argument(
        "--resize",
        type=positive,
        metavar="PIXELS",
        help="shorter side before the crop (default: 256/224 of the crop; images that have its size stay as they are)",
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="where features are kept and found again (default: $DINOV2_CACHE/features)"
    )
    parser.add_argument("--no-cache", action="store_true", help="keep no features on the disk, and look for none")
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="loader processes (default: 0)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done and how long the model takes on 64 synthetic images, and stop",
    )
    add_compute_options(parser, batch_size=256)


def inputs_of(arguments: argparse.Namespace, **rest: Any) -> "Inputs":
    """The arguments of a command line as `Inputs`."""
    from dinov2.apps.evaluation.session import Inputs

    named = (
        *("model", "train_dataset", "val_dataset", "dataset", "output_dir", "config_file", "resolution", "resize"),
        *("cache_dir", "batch_size", "num_workers", "device", "precision"),
    )
    given = {name: getattr(arguments, name) for name in named if hasattr(arguments, name)}
    return Inputs(**{**given, "use_cache": not arguments.no_cache, "say": say, **rest})


def plan_only(arguments: argparse.Namespace, *, task: str, parts: tuple[str, ...] | None = ("cls",)) -> bool:
    """Whether only the plan was asked for, which is then said."""
    if not arguments.dry_run:
        return False
    from dinov2.apps.evaluation.plan import evaluation_plan

    for line in evaluation_plan(inputs_of(arguments), task=task, parts=parts):
        say(line)
    return True


def say_unreadable(unreadable: list[tuple[str, str]]) -> None:
    """How many images were left out, with the reason of the first."""
    if unreadable:
        say(f"{len(unreadable)} images could not be read and were left out, the first: {unreadable[0][1]}")
