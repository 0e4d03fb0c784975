"""`dinov2 eval knn`."""

import argparse

from dinov2.cli.common import ExtractionProgress, add_command, add_compute_options, positive, say

__all__ = ["add_to"]


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
    parser = add_command(
        tasks,
        "knn",
        _knn,
        help="classify images by their nearest neighbours in feature space",
        example="dinov2 eval knn --model runs/photos --train-dataset photos/train --val-dataset photos/val --baselines",
    )
    parser.add_argument(
        "--model", required=True, metavar="RUN|FILE", help="a run's folder (its newest teacher) or a weight file"
    )
    parser.add_argument(
        "--train-dataset",
        required=True,
        metavar="D",
        help="labelled images to vote: a folder of class folders, list:FILE, toy:split=TRAIN, ...",
    )
    parser.add_argument("--val-dataset", required=True, metavar="D", help="labelled images to classify")
    parser.add_argument(
        "--output-dir", metavar="OUT", help="where results_eval_knn.json is written (default: a new runs/<date>-knn)"
    )
    parser.add_argument(
        "--config-file", metavar="FILE", help="configuration of the weights, for files that do not carry their own"
    )
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
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="loader processes (default: 0)")
    add_compute_options(parser, batch_size=256)


def _knn(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluate import knn

    with ExtractionProgress() as progress:
        report = knn(
            model=arguments.model,
            train_dataset=arguments.train_dataset,
            val_dataset=arguments.val_dataset,
            output_dir=arguments.output_dir,
            config_file=arguments.config_file,
            nb_knn=arguments.nb_knn,
            temperature=arguments.temperature,
            n_per_class_list=arguments.n_per_class_list,
            n_tries=arguments.n_tries,
            baselines=arguments.baselines,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            device=arguments.device,
            precision=arguments.precision,
            say=say,
            progress=progress,
        )
    names = {"trained": "model", "untrained": "untrained", "raw_pixels": "raw pixels"}
    for name, rows in {"trained": report.rows, **report.baselines}.items():
        for row in rows:
            images = row.settings["n_per_class"]
            few = "" if images == "all" else f", {images} images a class"
            say(f"{names[name]:10} k={row.k:<4} {row.metric:6} {row.value:6.2f} %{few}")
    if report.unreadable:
        say(
            f"{len(report.unreadable)} images could not be read and were left out, the first: {report.unreadable[0][1]}"
        )
    say(f"results are in {report.output_dir}")
    return 0
