"""`dinov2 eval all`."""

import argparse

from dinov2.cli.common import ExtractionProgress, add_command, say
from dinov2.cli.evaluation.options import MODEL_HELP, add_inputs, inputs_of, plan_only, say_unreadable

__all__ = ["add_to"]


def add_to(tasks: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the task `all`."""
    parser = add_command(
        tasks,
        "all",
        _everything,
        help="measure one model or several with every method and compare them on one page",
        example="dinov2 eval all --model runs/photos --model dinov2_vits14 --dataset photos --output-dir compared",
        description="Measure one model or several with every method that fits, with confidence intervals, tests of the "
        "differences, and a page of figures, classes, confusions, calibration and mistakes.",
    )
    parser.add_argument(
        "--model", action="append", required=True, metavar="MODEL", help=f"{MODEL_HELP}; once for each model"
    )
    add_inputs(parser, task="all", model=False)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="some of knn, log-regression, head (the model's own classifier), linear, retrieval (default: all)",
    )


def _everything(arguments: argparse.Namespace) -> int:
    from dinov2.apps.evaluation.everything import RESULTS_FILE, everything
    from dinov2.apps.evaluation.page import write_evaluation_page
    from dinov2.distributed import is_main_process

    models = arguments.model
    if arguments.dry_run:
        for model in models:
            plan_only(argparse.Namespace(**{**vars(arguments), "model": model}), task="all", parts=None)
        return 0
    with ExtractionProgress() as progress:
        inputs = inputs_of(arguments, progress=progress, model=models[0])
        study = everything(models, inputs, methods=arguments.methods)
    if not is_main_process():
        return 0
    for pair in study.pairs:
        found = pair.comparison.difference
        say(
            f"{pair.method.name}: {pair.second} less {pair.first} is {100 * found.value:+.2f} points "
            f"({100 * found.low:+.2f} to {100 * found.high:+.2f}), p = {pair.comparison.p_value:.2g}"
        )
    for name, failures in study.unreadable.items():
        if failures:
            say(name)
            say_unreadable(failures)
    say(f"figures are in {study.folder / RESULTS_FILE}")
    say(f"the page is {write_evaluation_page(study)}")
    return 0
