"""`dinov2 eval knn`."""

import argparse
from typing import TYPE_CHECKING

from dinov2.cli.common import add_command, positive
from dinov2.cli.evaluation import options

if TYPE_CHECKING:
    from dinov2.eval.result import Result

__all__ = ["add_to"]


def add_to(tasks: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the task `knn`."""
    parser = add_command(
        tasks,
        "knn",
        _knn,
        help="classify images by their nearest neighbours in feature space",
        example="dinov2 eval knn --model runs/photos --train-dataset photos/train --val-dataset photos/val --baselines",
    )
    options.add_model(parser, features=True)
    options.add_labelled_sets(parser)
    _add_method(options.method_options(parser))
    options.add_encoding(parser)
    options.add_places(parser, task="knn")


def _add_method(group: "argparse._ArgumentGroup") -> None:
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


def _knn(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.knn import check_vote, knn
    from dinov2.apps.evaluation.plan import evaluation_plan

    method = {
        name: getattr(arguments, name) for name in ("nb_knn", "temperature", "n_per_class_list", "n_tries", "search")
    }
    check_vote(**method)
    if options.only_planned(arguments, lambda inputs: evaluation_plan(inputs, task="knn")):
        return 0
    report = options.measured(arguments, lambda inputs: knn(inputs, **method, baselines=arguments.baselines))
    if report is None:
        return 0
    of_subject = {"model": report.rows, **report.baselines}
    options.say_figures([(_head(name, row), row) for name, rows in of_subject.items() for row in rows])
    options.say_where(report.rows, report.unreadable, f"results are in {report.output_dir}")
    return 0


def _head(name: str, row: "Result") -> str:
    images = row.settings["n_per_class"]
    few = "" if images == "all" else f" {images} image{'s' if images > 1 else ''} a class"
    return f"{name.replace('_', ' '):10} k={row.k:<4}{few}"
