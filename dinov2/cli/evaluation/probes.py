"""`dinov2 eval log-regression` and `dinov2 eval linear`."""

import argparse
from collections.abc import Callable
from itertools import groupby

from dinov2.cli.common import add_command, positive, say
from dinov2.cli.evaluation import options

__all__ = ["add_to"]


def add_to(tasks: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the tasks."""
    for name in ("log-regression", "logistic"):
        parser = add_command(
            tasks,
            name,
            _log_regression,
            help="classify images by logistic regression" + ("" if name == "log-regression" else " (another name)"),
            example=f"dinov2 eval {name} --model dinov2_vits14 --train-dataset photos/train --val-dataset photos/val",
            description="Fit a multinomial logistic regression on class tokens: the strength of the penalty is chosen "
            "on a\ntenth of the training images, then all of them are fitted.",
        )
        _add_groups(parser, _add_log_regression, task="log-regression")
    parser = add_command(
        tasks,
        "linear",
        _linear,
        help="train linear classifiers, or score a released one",
        example="dinov2 eval linear --model dinov2_vits14_lc --val-dataset ImageNet:split=VAL:root=ROOT",
        description="Train a grid of linear classifiers on class tokens and mean patches of the last blocks and choose "
        "one\non held-out training images; or, without training images, score the classifier that the model has.",
    )
    _add_groups(parser, _add_linear, task="linear")


def _add_groups(
    parser: argparse.ArgumentParser, add_method: "Callable[[argparse._ArgumentGroup], None]", *, task: str
) -> None:
    options.add_model(parser, features=True)
    options.add_labelled_sets(parser)
    add_method(options.method_options(parser))
    options.add_encoding(parser)
    options.add_places(parser, task=task)


def _add_log_regression(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--C",
        dest="Cs",
        nargs="+",
        type=float,
        metavar="C",
        help="inverse strengths of the penalty to choose from (default: 45 from 1e-6 to 1e5)",
    )
    group.add_argument(
        "--finetune-dataset",
        metavar="D",
        help="labelled images to choose C on; they join the training images at the end",
    )
    group.add_argument(
        "--select-on",
        choices=["split", "random-split", "val"],
        default="split",
        help="where C is chosen: a tenth of each training class, a tenth of all as the release does, or, flattering, "
        "the scored images themselves (default: split)",
    )
    _add_metric_type(group, chosen="C")
    group.add_argument("--max-train-iters", type=positive, metavar="N", help="iterations of a fit (default: 1000)")
    group.add_argument(
        "--train-dtype", choices=["float32", "float64"], default="float32", help="number format (default: float32)"
    )
    group.add_argument(
        "--backend",
        choices=["torch", "sklearn", "cuml"],
        default="torch",
        help="whose solver fits: this package's, or that of a library that you installed (default: torch)",
    )


def _add_linear(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--protocol",
        choices=["short", "release"],
        default="short",
        help="short: features computed once, 2,000 steps of 256 images, few rates; release: that of the papers, images "
        "augmented and encoded anew for each of 12,500 steps of 1,024, 13 rates, work for a GPU (default: short)",
    )
    group.add_argument("--iterations", type=positive, metavar="N", help="steps in place of the protocol's")
    group.add_argument("--step-size", type=positive, metavar="N", help="images of a step in place of the protocol's")
    group.add_argument(
        "--learning-rates", nargs="+", type=float, metavar="R", help="rates for 256 images in place of the protocol's"
    )
    group.add_argument(
        "--select-on",
        choices=["split", "val"],
        default="split",
        help="where the classifier is chosen: training images that are held out, or, as the release does and "
        "flattering, the scored images themselves (default: split)",
    )
    _add_metric_type(group, chosen="the classifier")
    group.add_argument(
        "--classifier-fpath",
        metavar="HEAD",
        help="score this classifier and train nothing: a file, an address, or a release's name",
    )
    group.add_argument("--test-datasets", nargs="+", default=[], metavar="D", help="further labelled images to score")
    group.add_argument(
        "--val-class-mapping-fpath",
        metavar="FILE",
        help=".npy file with the training class of each class of --val-dataset",
    )
    group.add_argument(
        "--test-class-mapping-fpaths", nargs="+", default=[], metavar="FILE", help="the same for each test set, or None"
    )
    group.add_argument("--no-resume", action="store_true", help="train afresh where a checkpoint exists")


def _add_metric_type(group: "argparse._ArgumentGroup", *, chosen: str) -> None:
    group.add_argument(
        "--metric-type",
        default="mean_accuracy",
        choices=["mean_accuracy", "mean_per_class_accuracy"],
        help=f"what {chosen} is chosen by (default: mean_accuracy)",
    )


def _log_regression(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.plan import evaluation_plan
    from dinov2.apps.evaluation.probes import log_regression
    from dinov2.eval.log_regression import C_GRID, DEFAULT_MAX_ITER

    finetune = arguments.finetune_dataset
    further = [finetune] if finetune else []
    if options.only_planned(arguments, lambda inputs: evaluation_plan(inputs, task="log-regression", further=further)):
        return 0
    report = options.measured(
        arguments,
        lambda inputs: log_regression(
            inputs,
            finetune_dataset=finetune,
            select_on=arguments.select_on,
            metric=arguments.metric_type,
            Cs=arguments.Cs or C_GRID,
            max_iter=arguments.max_train_iters or DEFAULT_MAX_ITER,
            dtype=arguments.train_dtype,
            backend=arguments.backend,
        ),
    )
    if report is None:
        return 0
    settings = report.rows[0].settings
    say(f"C = {settings['C']:.4g}, chosen on {settings['selected_on']}")
    options.say_figures([("", row) for row in report.rows])
    options.say_where(report.rows, report.unreadable, f"results are in {report.output_dir}")
    return 0


def _linear(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from dinov2.apps.evaluation.linear import linear
    from dinov2.apps.evaluation.plan import evaluation_plan
    from dinov2.eval.linear import PRESETS

    changes = {
        "n_iterations": arguments.iterations,
        "batch_size": arguments.step_size,
        "learning_rates": tuple(arguments.learning_rates) if arguments.learning_rates else None,
    }
    settings = replace(
        PRESETS[arguments.protocol], **{name: value for name, value in changes.items() if value is not None}
    )
    trains = arguments.classifier_fpath is None and bool(
        arguments.train_dataset or arguments.dataset or arguments.features
    )
    augmented = settings.n_iterations * settings.batch_size if trains and arguments.protocol == "release" else 0
    if options.only_planned(
        arguments,
        lambda inputs: evaluation_plan(
            inputs,
            task="linear",
            parts=None,
            further=arguments.test_datasets,
            trains=trains,
            classifier=arguments.classifier_fpath,
            augmented=augmented,
        ),
    ):
        return 0
    report = options.measured(
        arguments,
        lambda inputs: linear(
            inputs,
            protocol=arguments.protocol,
            settings=settings,
            select_on=arguments.select_on,
            metric=arguments.metric_type,
            classifier=arguments.classifier_fpath,
            test_datasets=arguments.test_datasets,
            class_mapping=arguments.val_class_mapping_fpath,
            test_class_mappings=arguments.test_class_mapping_fpaths,
            resume=not arguments.no_resume,
        ),
    )
    if report is None:
        return 0
    chosen = report.rows[0].settings
    if "grid" in chosen:
        say(f"{chosen['head']}, chosen on {chosen['selected_on']} among {len(chosen['grid'])}")
    for dataset, rows in groupby(report.rows, key=lambda row: row.dataset):
        if arguments.test_datasets:
            say(f"{dataset}:")
        options.say_figures([("", row) for row in rows])
    options.say_where(report.rows, report.unreadable, f"results are in {report.output_dir}")
    return 0
