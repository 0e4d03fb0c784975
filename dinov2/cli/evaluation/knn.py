"""`dinov2 eval knn`."""

import argparse

from dinov2.cli.common import ExtractionProgress, add_command, positive, say
from dinov2.cli.evaluation.options import add_inputs, inputs_of, plan_only, say_unreadable

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
    add_inputs(parser, task="knn")
    parser.add_argument(
        "--nb-knn",
        "--nb_knn",
        nargs="+",
        type=positive,
        default=[10, 20, 100, 200],
        metavar="K",
        help="numbers of neighbours (default: 10 20 100 200)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.07, help="softmax temperature of the vote (default: 0.07)"
    )
    parser.add_argument("--baselines", action="store_true", help="also measure raw pixels and an untrained model")
    parser.add_argument(
        "--n-per-class-list",
        nargs="+",
        type=int,
        default=[-1],
        metavar="N",
        help="images per class to vote, -1 for all",
    )
    parser.add_argument("--n-tries", type=positive, default=1, metavar="N", help="draws for each few-shot number")


def _knn(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.knn import knn
    from dinov2.distributed import is_main_process

    if plan_only(arguments, task="knn"):
        return 0
    with ExtractionProgress() as progress:
        report = knn(
            inputs_of(arguments, progress=progress),
            nb_knn=arguments.nb_knn,
            temperature=arguments.temperature,
            n_per_class_list=arguments.n_per_class_list,
            n_tries=arguments.n_tries,
            baselines=arguments.baselines,
        )
    if not is_main_process():
        return 0
    names = {"trained": "model", "untrained": "untrained", "raw_pixels": "raw pixels"}
    for name, rows in {"trained": report.rows, **report.baselines}.items():
        for row in rows:
            images = row.settings["n_per_class"]
            few = "" if images == "all" else f", {images} images a class"
            say(f"{names[name]:10} k={row.k:<4} {row.metric:6} {row.value:6.2f} %{few}")
    for note in dict.fromkeys(note for row in report.rows for note in row.notes):
        say(f"note: {note}")
    say_unreadable(report.unreadable)
    say(f"results are in {report.output_dir}")
    return 0
