"""`dinov2 eval all`."""

import argparse

from dinov2.cli.common import add_command, say
from dinov2.cli.evaluation import options

__all__ = ["METHOD_NAMES", "add_to"]

METHOD_NAMES = ("knn", "log-regression", "head", "linear", "retrieval")
"""What `--methods` knows: written out, because the table of methods loads all that it needs."""


def add_to(tasks: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the task `all`."""
    parser = add_command(
        tasks,
        "all",
        _everything,
        help="measure one model or several with every method and compare them on one page",
        example="dinov2 eval all --model runs/photos --model dinov2_vits14 --dataset photos --output-dir compared",
        description="Measure one model or several with every method that fits, with confidence intervals, tests of the "
        "differences, and\na page of figures, classes, confusions, calibration and mistakes.",
    )
    options.add_model(parser, several=True)
    options.add_labelled_sets(parser)
    options.method_options(parser).add_argument(
        "--methods",
        nargs="+",
        choices=METHOD_NAMES,
        default=[],
        metavar="METHOD",
        help="some of knn, log-regression, head (the model's own classifier), linear, retrieval (default: all)",
    )
    options.add_encoding(parser)
    options.add_places(parser, task="all")


def _everything(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.everything import RESULTS_FILE, everything
    from dinov2.apps.evaluation.page import write_evaluation_page
    from dinov2.apps.evaluation.plan import evaluation_plan

    models = arguments.models
    if options.only_planned(arguments, lambda inputs: evaluation_plan(inputs, models=models, task="all", parts=None)):
        return 0
    study = options.measured(arguments, lambda inputs: everything(models, inputs, methods=arguments.methods))
    if study is None:
        return 0
    for pair in study.pairs:
        found = pair.comparison.difference
        say(
            f"{pair.method.name}: {pair.second} less {pair.first} is {100 * found.value:+.2f} points "
            f"({100 * found.low:+.2f} to {100 * found.high:+.2f}), p = {pair.comparison.p_value:.2g}"
        )
    for name, failures in study.unreadable.items():
        if failures:
            say(f"{name}:")
            options.say_where([], failures)
    say(f"figures are in {study.folder / RESULTS_FILE}")
    say(f"the page is {write_evaluation_page(study)}")
    return 0
