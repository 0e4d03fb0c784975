"""`dinov2 eval`: the family of evaluations."""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from dinov2.cli.common import add_command, positive, say
from dinov2.cli.evaluation_options import (
    add_encoding,
    add_labelled_sets,
    add_model,
    add_places,
    run_task,
    say_figures,
    say_where,
)

if TYPE_CHECKING:
    from dinov2.eval.result import Result

__all__ = ["METHOD_NAMES", "add_to"]

METHOD_NAMES = ("knn", "log-regression", "head", "linear", "retrieval")
"""Choices of `--methods`: written out, because the table of protocols loads all that it needs."""


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

    add = partial(add_command, tasks)
    parser = add(
        "knn",
        _knn,
        help="classify images by their nearest neighbours in feature space",
        example="dinov2 eval knn --model runs/photos --train-dataset photos/train --val-dataset photos/val --baselines",
    )
    _add_groups(parser, _add_knn, task="knn")
    for name in ("log-regression", "logistic"):
        parser = add(
            name,
            _log_regression,
            help="classify images by logistic regression" + ("" if name == "log-regression" else " (another name)"),
            example=f"dinov2 eval {name} --model dinov2_vits14 --train-dataset photos/train --val-dataset photos/val",
            description="Fit a multinomial logistic regression on class tokens: the strength of the penalty is chosen "
            "on a\ntenth of the training images, then all of them are fitted.",
        )
        _add_groups(parser, _add_log_regression, task="log-regression")
    parser = add(
        "linear",
        _linear,
        help="train linear classifiers, or score a released one",
        example="dinov2 eval linear --model dinov2_vits14_lc --val-dataset ImageNet:split=VAL:root=ROOT",
        description="Train a grid of linear classifiers on class tokens and mean patches of the last blocks and choose "
        "one\non held-out training images; or, without training images, score the classifier that the model has.",
    )
    _add_groups(parser, _add_linear, task="linear")
    parser = add(
        "retrieval",
        _retrieval,
        help="rank a gallery for every query image: mAP, recall and precision among the first k",
        example="dinov2 eval retrieval --model dinov2_vits14 --query-dataset photos/query --gallery-dataset photos/all"
        "\n  dinov2 eval retrieval --model dinov2_vitb14 --ground-truth gnd_roxford5k.pkl --images oxbuild_images",
        description="Rank a gallery by cosine similarity to every query image, and write a page with some queries and "
        "what\nthey found. Right are images of the same class, or those that a ground-truth file of the revisited\n"
        "Oxford and Paris benchmarks names.",
    )
    _add_retrieval(parser)
    parser = add(
        "all",
        _all,
        help="measure one model or several with every method and compare them on one page",
        example="dinov2 eval all --model runs/photos --model dinov2_vits14 --dataset photos --output-dir compared",
        description="Measure one model or several with every method that fits, with confidence intervals, tests of the "
        "differences, and\na page of figures, classes, confusions, calibration and mistakes.",
    )
    _add_groups(parser, _add_all, task="all")


def _add_groups(
    parser: argparse.ArgumentParser, add_method: "Callable[[argparse._ArgumentGroup], None]", *, task: str
) -> None:
    add_model(parser, several=task == "all", features=task != "all")
    add_labelled_sets(parser)
    add_method(parser.add_argument_group("the method"))
    add_encoding(parser)
    add_places(parser, task=task)


def _add_knn(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--nb-knn",
        "--nb_knn",
        nargs="+",
        type=positive,
        default=[10, 20, 100, 200],
        metavar="K",
        help="numbers of neighbours (default: 10 20 100 200)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.07,
        metavar="T",
        help="softmax temperature of the vote (default: 0.07)",
    )
    group.add_argument("--baselines", action="store_true", help="also measure raw pixels and an untrained model")
    group.add_argument(
        "--n-per-class-list",
        nargs="+",
        type=int,
        default=[-1],
        metavar="N",
        help="images per class to vote, -1 for all (default: -1)",
    )
    group.add_argument(
        "--n-tries", type=positive, default=1, metavar="N", help="draws for each few-shot number (default: 1)"
    )
    group.add_argument(
        "--search",
        choices=["exact", "faiss", "faiss-ivf"],
        default="exact",
        help="who finds the neighbours. exact: this package, whatever the precision. With faiss-cpu installed, on the "
        "CPU and beside a copy of the training features: faiss compares with all of them, too, in float32; faiss-ivf "
        "with a sixteenth of them, sorted into clusters beforehand, for tens of millions: approximate, and the share "
        "of the neighbours that it finds is measured and noted (default: exact)",
    )


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


def _add_retrieval(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    images = parser.add_argument_group("queries and gallery")
    images.add_argument(
        "--query-dataset",
        metavar="D",
        help="labelled images to look for: a folder of class folders, list:FILE, toy:split=VAL, ...",
    )
    images.add_argument(
        "--gallery-dataset", metavar="D", help="labelled images to look through (default: the other queries)"
    )
    images.add_argument(
        "--ground-truth", metavar="FILE", help="gnd_roxford5k.pkl, gnd_rparis6k.pkl or such, instead of labelled images"
    )
    images.add_argument("--images", metavar="DIR", help="folder of the images that the ground truth names")
    parser.add_argument_group("the method").add_argument(
        "--k",
        nargs="+",
        type=positive,
        default=[1, 5, 10],
        metavar="K",
        help="first images looked at (default: 1 5 10; a ground truth is always measured at these)",
    )
    add_encoding(parser)
    add_places(parser, task="retrieval")


def _add_all(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--methods",
        nargs="+",
        choices=METHOD_NAMES,
        default=[],
        metavar="METHOD",
        help="some of knn, log-regression, head (the model's own classifier), linear, retrieval (default: all)",
    )


def _knn(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.plan import evaluation_plan
    from dinov2.apps.evaluation.protocols import knn
    from dinov2.eval.knn.evaluate import KnnSettings

    names = ("nb_knn", "temperature", "n_per_class_list", "n_tries", "search")
    settings = KnnSettings(**{name: getattr(arguments, name) for name in names})
    settings.require_search()
    report = run_task(
        arguments,
        lambda config: evaluation_plan(config, task="knn"),
        lambda config: knn(config, settings, baselines=arguments.baselines),
    )
    if report is None:
        return 0
    by_model = {"model": report.rows, **report.baselines}
    say_figures([(_head(name, row), row) for name, rows in by_model.items() for row in rows])
    say_where(report.rows, report.unreadable, f"results are in {report.output_dir}")
    return 0


def _head(name: str, row: "Result") -> str:
    images = row.settings["n_per_class"]
    few = "" if images == "all" else f" {images} image{'s' if images > 1 else ''} a class"
    return f"{name.replace('_', ' '):10} k={row.k:<4}{few}"


def _log_regression(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.plan import evaluation_plan
    from dinov2.apps.evaluation.protocols import log_regression
    from dinov2.eval.log_regression import C_GRID, DEFAULT_MAX_ITER

    finetune = arguments.finetune_dataset
    report = run_task(
        arguments,
        lambda config: evaluation_plan(config, task="log-regression", further=[finetune] if finetune else []),
        lambda config: log_regression(
            config,
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
    say_figures([("", row) for row in report.rows])
    say_where(report.rows, report.unreadable, f"results are in {report.output_dir}")
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
    report = run_task(
        arguments,
        lambda config: evaluation_plan(
            config,
            task="linear",
            parts=None,
            further=arguments.test_datasets,
            trains=trains,
            classifier=arguments.classifier_fpath,
            augmented=settings.n_iterations * settings.batch_size if trains and arguments.protocol == "release" else 0,
        ),
        lambda config: linear(
            config,
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
        say_figures([("", row) for row in rows])
    say_where(report.rows, report.unreadable, f"results are in {report.output_dir}")
    return 0


def _retrieval(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.page import write_retrieval_page
    from dinov2.apps.evaluation.retrieval import retrieval, retrieval_plan

    names = ("query_dataset", "gallery_dataset", "ground_truth", "images")
    sets = {name: getattr(arguments, name) for name in names}
    report = run_task(
        arguments,
        lambda config: retrieval_plan(config, **sets),
        lambda config: retrieval(config, **sets, ks=arguments.k),
    )
    if report is None:
        return 0
    say_figures([(row.settings.get("protocol", ""), row) for row in report.rows])
    page = write_retrieval_page(report)
    say_where(report.rows, report.unreadable, f"results are in {report.output_dir}", f"the page is {page}")
    return 0


def _all(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.comparison import RESULTS_FILE, compare_models
    from dinov2.apps.evaluation.page import write_evaluation_page
    from dinov2.apps.evaluation.plan import evaluation_plan

    models = arguments.models
    report = run_task(
        arguments,
        lambda config: evaluation_plan(config, models=models, task="all", parts=None),
        lambda config: compare_models(models, config, methods=arguments.methods),
    )
    if report is None:
        return 0
    for pair in report.pairs:
        value, low, high = (100 * bound for bound in pair.comparison.difference)
        say(
            f"{pair.protocol.name}: {pair.second} less {pair.first} is {value:+.2f} points "
            f"({low:+.2f} to {high:+.2f}), p = {pair.comparison.p_value:.2g}"
        )
    for name, failures in report.unreadable.items():
        if failures:
            say(f"{name}:")
            say_where([], failures)
    say(f"figures are in {report.folder / RESULTS_FILE}")
    say(f"the page is {write_evaluation_page(report)}")
    return 0
