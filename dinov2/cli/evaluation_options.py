"""Shared by the tasks of `dinov2 eval`: groups of options, `--dry-run` and the run itself, and the lines of figures.

A task adds the groups that it needs, so that an option reads the same in all of them.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

from dinov2.cli.common import ExtractionProgress, add_compute_options, add_image_options, positive, say

if TYPE_CHECKING:
    from dinov2.apps.evaluation.context import EvalConfig
    from dinov2.eval.result import Result

__all__ = [
    "add_encoding",
    "add_labelled_sets",
    "add_model",
    "add_places",
    "run_task",
    "say_figures",
    "say_where",
]

_MODEL_HELP = (
    "a release's name, a run's folder (its newest teacher), a weight file or its address, a Hugging Face folder or id, "
    "or a model of another library: timm:NAME, hf:ID, module:function"
)

_Report = TypeVar("_Report")


def add_model(parser: argparse.ArgumentParser, *, several: bool = False, features: bool = False) -> None:
    """`--model`, which with `several` may be given again and again and becomes `models`; or `--features`."""
    group = parser.add_argument_group("what is evaluated")
    if several:
        group.add_argument(
            "--model",
            dest="models",
            action="append",
            required=True,
            metavar="MODEL",
            help=f"{_MODEL_HELP}; once for each model",
        )
    else:
        group.add_argument("--model", required=not features, metavar="MODEL", help=_MODEL_HELP)
    if features:
        group.add_argument(
            "--features",
            nargs="+",
            default=(),
            metavar="FILE",
            help="what `dinov2 embed` wrote, in place of --model: one file or folder, which is split, or two, to learn "
            "from and to score on; labels are theirs, or those of the data sets named beside them",
        )
    group.add_argument(
        "--config-file", metavar="FILE", help="configuration of the weights, for files that do not carry their own"
    )


def add_labelled_sets(parser: argparse.ArgumentParser) -> None:
    """Images to learn from and to score on: two sets, or one that is split."""
    group = parser.add_argument_group("labelled images")
    group.add_argument(
        "--train-dataset",
        metavar="D",
        help="labelled images to learn from: a folder of class folders, list:FILE, toy:split=TRAIN, ...",
    )
    group.add_argument("--val-dataset", metavar="D", help="labelled images to score on")
    group.add_argument(
        "--dataset",
        metavar="D",
        help="one labelled set instead of two: a fifth of each class, chosen by the names of the images, is scored",
    )


def add_encoding(parser: argparse.ArgumentParser) -> None:
    """Options of feature extraction: image size, batch, device, precision."""
    group = parser.add_argument_group("how images go through the model")
    group.add_argument(
        "--resolution", type=positive, metavar="PIXELS", help="side of the crop that the model sees (default: its own)"
    )
    group.add_argument(
        "--resize",
        type=positive,
        metavar="PIXELS",
        help="shorter side before the crop (default: 256/224 of the crop; images that have its size stay as they are)",
    )
    group.add_argument(
        "--threads",
        type=positive,
        default=0,
        metavar="N",
        help="threads on the CPU (default: one or all, whichever is faster at the start)",
    )
    group.add_argument("--num-workers", type=int, default=0, metavar="N", help="loader processes (default: 0)")
    add_image_options(group)
    add_compute_options(group, batch_size=256)


def add_places(parser: argparse.ArgumentParser, *, task: str) -> None:
    """Options of output: results, features, and `--dry-run`."""
    group = parser.add_argument_group("results and features")
    group.add_argument(
        "--output-dir",
        metavar="OUT",
        help=f"where results_eval_{task.replace('-', '_')}.json is written (default: a new runs/<date>-{task})",
    )
    group.add_argument(
        "--cache-dir", metavar="DIR", help="where features are kept and found again (default: $DINOV2_CACHE/features)"
    )
    group.add_argument("--no-cache", action="store_true", help="keep no features on the disk, and look for none")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done and how long the model takes on 64 synthetic images, and stop",
    )


def run_task(
    arguments: argparse.Namespace,
    plan: "Callable[[EvalConfig], Sequence[str]]",
    evaluate: "Callable[[EvalConfig], _Report]",
) -> "_Report | None":
    """The report of an evaluation; None where `--dry-run` shows the plan, or another process speaks."""
    if arguments.dry_run:
        for line in plan(_config(arguments)):
            say(line)
        return None
    from dinov2.distributed import is_main_process

    with ExtractionProgress() as progress:
        report = evaluate(replace(_config(arguments), progress=progress))
    return report if is_main_process() else None


def say_figures(figures: "Sequence[tuple[str, Result]]") -> None:
    """Rows, each behind a head, in columns, with their intervals."""
    if not figures:
        return
    head_width = max(len(head) for head, _ in figures)
    metric_width = max(len(row.metric) for _, row in figures)
    for head, row in figures:
        interval = "" if row.ci is None else f" ({row.ci[0]:.2f} to {row.ci[1]:.2f})"
        name = f"{head:{head_width}} " if head_width else ""
        say(f"{name}{row.metric:{metric_width}} {row.value:6.2f} %{interval}")


def say_where(rows: "Sequence[Result]", unreadable: Sequence[tuple[str, str]], *places: str) -> None:
    """Lines behind the figures: notes that rows share, images that were left out, places of files."""
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        say(f"note: {note}")
    if len(unreadable) == 1:
        say(f"1 image could not be read and was left out: {unreadable[0][1]}")
    elif unreadable:
        say(f"{len(unreadable)} images could not be read and were left out, the first: {unreadable[0][1]}")
    for place in places:
        say(place)


def _config(arguments: argparse.Namespace) -> "EvalConfig":
    """The arguments of a command line as `EvalConfig`; of several models the first."""
    from dinov2.apps.evaluation.context import EvalConfig

    names = {field.name for field in fields(EvalConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if "models" in arguments:
        given["model"] = arguments.models[0]
    elif arguments.model is None:
        if not arguments.features:
            arguments.parser.error("the following arguments are required: --model, or --features")
        given["model"] = ""
    return EvalConfig(**{**given, "use_cache": not arguments.no_cache, "say": say})
