"""`dinov2 eval retrieval`."""

import argparse

from dinov2.cli.common import ExtractionProgress, add_command, add_compute_options, positive, say
from dinov2.cli.evaluation.options import MODEL_HELP, inputs_of, say_unreadable

__all__ = ["add_to"]


def add_to(tasks: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the task `retrieval`."""
    parser = add_command(
        tasks,
        "retrieval",
        _retrieval,
        help="rank a gallery for every query image: mAP, recall and precision among the first k",
        example="dinov2 eval retrieval --model dinov2_vits14 --query-dataset photos/query --gallery-dataset photos/all"
        "\n  dinov2 eval retrieval --model dinov2_vitb14 --ground-truth gnd_roxford5k.pkl --images oxbuild_images",
        description="Rank a gallery by cosine similarity to every query image. Right are images of the same class, or "
        "those that a ground-truth file of the revisited Oxford and Paris benchmarks names.",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--query-dataset", metavar="D", help="labelled images to look for: a folder of class folders, ..."
    )
    parser.add_argument(
        "--gallery-dataset", metavar="D", help="labelled images to look through (default: the other queries)"
    )
    parser.add_argument(
        "--ground-truth", metavar="FILE", help="gnd_roxford5k.pkl, gnd_rparis6k.pkl or such, instead of labelled images"
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images that the ground truth names")
    parser.add_argument(
        "--k",
        nargs="+",
        type=positive,
        default=[1, 5, 10],
        metavar="K",
        help="first images looked at (default: 1 5 10)",
    )
    parser.add_argument(
        "--output-dir",
        metavar="OUT",
        help="where results_eval_retrieval.json is written (default: a new runs/<date>-retrieval)",
    )
    parser.add_argument(
        "--config-file", metavar="FILE", help="configuration of the weights, for files that do not carry their own"
    )
    parser.add_argument(
        "--resolution", type=positive, metavar="PIXELS", help="side of the crop that the model sees (default: its own)"
    )
    parser.add_argument(
        "--resize", type=positive, metavar="PIXELS", help="shorter side before the crop (default: 256/224 of the crop)"
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="where features are kept and found again (default: $DINOV2_CACHE/features)"
    )
    parser.add_argument("--no-cache", action="store_true", help="keep no features on the disk, and look for none")
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="loader processes (default: 0)")
    add_compute_options(parser, batch_size=256)


def _retrieval(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.retrieval import RESULTS_FILE, retrieval
    from dinov2.distributed import is_main_process

    with ExtractionProgress() as progress:
        report = retrieval(
            inputs_of(arguments, progress=progress),
            query_dataset=arguments.query_dataset,
            gallery_dataset=arguments.gallery_dataset,
            ground_truth=arguments.ground_truth,
            images=arguments.images,
            ks=arguments.k,
        )
    if not is_main_process():
        return 0
    for row in report.rows:
        low, high = row.ci or (row.value, row.value)
        say(f"{row.settings.get('protocol', ''):7} {row.metric:10} {row.value:6.2f} %  ({low:.2f} to {high:.2f})")
    for note in dict.fromkeys(note for row in report.rows for note in row.notes):
        say(f"note: {note}")
    say_unreadable(report.unreadable)
    if report.output_dir is not None:
        say(f"results are in {report.output_dir / RESULTS_FILE}")
    return 0
