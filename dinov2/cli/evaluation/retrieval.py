"""`dinov2 eval retrieval`."""

import argparse

from dinov2.cli.common import add_command, positive
from dinov2.cli.evaluation import options

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
        description="Rank a gallery by cosine similarity to every query image, and write a page with some queries and "
        "what\nthey found. Right are images of the same class, or those that a ground-truth file of the revisited\n"
        "Oxford and Paris benchmarks names.",
    )
    options.add_model(parser)
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
    options.method_options(parser).add_argument(
        "--k",
        nargs="+",
        type=positive,
        default=[1, 5, 10],
        metavar="K",
        help="first images looked at (default: 1 5 10; a ground truth is always measured at these)",
    )
    options.add_encoding(parser)
    options.add_places(parser, task="retrieval")


def _retrieval(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.page import write_retrieval_page
    from dinov2.apps.evaluation.retrieval import retrieval, retrieval_plan

    asked = {name: getattr(arguments, name) for name in ("query_dataset", "gallery_dataset", "ground_truth", "images")}
    if options.only_planned(arguments, lambda inputs: retrieval_plan(inputs, **asked)):
        return 0
    report = options.measured(arguments, lambda inputs: retrieval(inputs, **asked, ks=arguments.k))
    if report is None:
        return 0
    options.say_figures([(row.settings.get("protocol", ""), row) for row in report.rows])
    page = write_retrieval_page(report)
    options.say_where(report.rows, report.unreadable, f"results are in {report.output_dir}", f"the page is {page}")
    return 0
