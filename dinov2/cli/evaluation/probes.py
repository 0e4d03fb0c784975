"""`dinov2 eval log-regression` and `dinov2 eval linear`."""

import argparse
from typing import TYPE_CHECKING

from dinov2.cli.common import ExtractionProgress, add_command, positive, say
from dinov2.cli.evaluation.options import add_inputs, inputs_of, plan_only, say_unreadable

if TYPE_CHECKING:
    from dinov2.features.results import Result

__all__ = ["add_to"]


def add_to(tasks: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the tasks."""
    for name in ("log-regression", "logistic"):
        _add_log_regression(tasks, name)
    _add_linear(tasks)


def _add_log_regression(tasks: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    parser = add_command(
        tasks,
        name,
        _log_regression,
        help="classify images by logistic regression" + ("" if name == "log-regression" else " (another name)"),
        example=f"dinov2 eval {name} --model dinov2_vits14 --train-dataset photos/train --val-dataset photos/val",
        description="Fit a multinomial logistic regression on class tokens: the strength of the penalty is chosen on a "
        "tenth of the training images, then all of them are fitted.",
    )
    add_inputs(parser, task="log_regression")
    parser.add_argument(
        "--C",
        dest="Cs",
        nargs="+",
        type=float,
        metavar="C",
        help="inverse strengths of the penalty to choose from (default: 45 from 1e-6 to 1e5)",
    )
    parser.add_argument(
        "--finetune-dataset",
        metavar="D",
        help="labelled images to choose C on; they join the training images at the end",
    )
    parser.add_argument(
        "--select-on",
        choices=["split", "random-split", "val"],
        default="split",
        help="where C is chosen: a tenth of each training class, a tenth of all as the release does, or, flattering, "
        "the scored images themselves (default: split)",
    )
    parser.add_argument(
        "--metric-type",
        default="mean_accuracy",
        choices=["mean_accuracy", "mean_per_class_accuracy"],
        help="what C is chosen by (default: mean_accuracy)",
    )
    parser.add_argument("--max-train-iters", type=positive, metavar="N", help="iterations of a fit (default: 1000)")
    parser.add_argument(
        "--train-dtype", choices=["float32", "float64"], default="float32", help="number format (default: float32)"
    )
    parser.add_argument(
        "--backend",
        choices=["torch", "sklearn", "cuml"],
        default="torch",
        help="whose solver fits: this package's, or that of a library that you installed (default: torch)",
    )


def _add_linear(tasks: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        tasks,
        "linear",
        _linear,
        help="train linear classifiers, or score a released one",
        example="dinov2 eval linear --model dinov2_vits14_lc --val-dataset ImageNet:split=VAL:root=ROOT",
        description="Train a grid of linear classifiers on class tokens and mean patches of the last blocks and choose "
        "one on held-out training images; or, without training images, score the classifier that the model has.",
    )
    add_inputs(parser, task="linear")
    parser.add_argument(
        "--protocol",
        choices=["short", "release"],
        default="short",
        help="short: features computed once, 2,000 steps of 256 images, few rates; release: that of the papers, images "
        "augmented and encoded anew for each of 12,500 steps of 1,024, 13 rates, work for a GPU (default: short)",
    )
    parser.add_argument("--iterations", type=positive, metavar="N", help="steps in place of the protocol's")
    parser.add_argument("--step-size", type=positive, metavar="N", help="images of a step in place of the protocol's")
    parser.add_argument(
        "--learning-rates", nargs="+", type=float, metavar="R", help="rates for 256 images in place of the protocol's"
    )
    parser.add_argument(
        "--select-on",
        choices=["split", "val"],
        default="split",
        help="where the classifier is chosen: training images that are held out, or, as the release does and "
        "flattering, the scored images themselves (default: split)",
    )
    parser.add_argument(
        "--metric-type",
        default="mean_accuracy",
        choices=["mean_accuracy", "mean_per_class_accuracy"],
        help="what the classifier is chosen by (default: mean_accuracy)",
    )
    parser.add_argument(
        "--classifier-fpath",
        metavar="HEAD",
        help="score this classifier and train nothing: a file, an address, or a release's name",
    )
    parser.add_argument("--test-datasets", nargs="+", default=[], metavar="D", help="further labelled images to score")
    parser.add_argument(
        "--val-class-mapping-fpath",
        metavar="FILE",
        help=".npy file with the training class of each class of --val-dataset",
    )
    parser.add_argument(
        "--test-class-mapping-fpaths", nargs="+", default=[], metavar="FILE", help="the same for each test set, or None"
    )
    parser.add_argument("--no-resume", action="store_true", help="train afresh where a checkpoint exists")


def _linear(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from dinov2.apps.evaluation.linear import linear
    from dinov2.distributed import is_main_process
    from dinov2.eval.linear import PRESETS

    if plan_only(arguments, task="linear", parts=None):
        return 0
    changes = {
        "n_iterations": arguments.iterations,
        "batch_size": arguments.step_size,
        "learning_rates": tuple(arguments.learning_rates) if arguments.learning_rates else None,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    with ExtractionProgress() as progress:
        report = linear(
            inputs_of(arguments, progress=progress),
            protocol=arguments.protocol,
            settings=replace(PRESETS[arguments.protocol], **given),
            select_on=arguments.select_on,
            metric=arguments.metric_type,
            classifier=arguments.classifier_fpath,
            test_datasets=arguments.test_datasets,
            class_mapping=arguments.val_class_mapping_fpath,
            test_class_mappings=arguments.test_class_mapping_fpaths,
            resume=not arguments.no_resume,
        )
    if is_main_process():
        settings = report.rows[0].settings
        if "grid" in settings:
            say(f"{settings['head']}, chosen on {settings['selected_on']} among {len(settings['grid'])}")
        _say_rows(report.rows, of_several=bool(arguments.test_datasets))
        say_unreadable(report.unreadable)
        say(f"results are in {report.output_dir}")
    return 0


def _log_regression(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.probes import log_regression
    from dinov2.distributed import is_main_process
    from dinov2.eval.log_regression import C_GRID, DEFAULT_MAX_ITER

    if plan_only(arguments, task="log-regression"):
        return 0
    with ExtractionProgress() as progress:
        report = log_regression(
            inputs_of(arguments, progress=progress),
            finetune_dataset=arguments.finetune_dataset,
            select_on=arguments.select_on,
            metric=arguments.metric_type,
            Cs=arguments.Cs or C_GRID,
            max_iter=arguments.max_train_iters or DEFAULT_MAX_ITER,
            dtype=arguments.train_dtype,
            backend=arguments.backend,
        )
    if is_main_process():
        settings = report.rows[0].settings
        say(f"C = {settings['C']:.4g}, chosen on {settings['selected_on']}")
        _say_rows(report.rows)
        say_unreadable(report.unreadable)
        say(f"results are in {report.output_dir}")
    return 0


def _say_rows(rows: "list[Result]", *, of_several: bool = False) -> None:
    """Figures with their intervals, `of_several` data sets below their names, then the notes that they share."""
    dataset = ""
    for row in rows:
        if of_several and row.dataset != dataset:
            say(f"{row.dataset}:")
            dataset = row.dataset
        interval = "" if row.ci is None else f" ({row.ci[0]:.2f} to {row.ci[1]:.2f})"
        say(f"{row.metric:14} {row.value:6.2f} %{interval}")
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        say(f"note: {note}")
