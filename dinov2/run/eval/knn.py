"""The release's k-NN command: `python dinov2/run/eval/knn.py --config-file F --pretrained-weights W ...`."""

import argparse
import sys

from dinov2.apps.evaluation.protocols import knn
from dinov2.distributed import is_main_process
from dinov2.eval.knn import get_args_parser
from dinov2.eval.knn.evaluate import KnnSettings
from dinov2.run.eval.flags import config_from_flags, report_rows
from dinov2.run.exits import escape_streams
from dinov2.run.submit import get_args_parser as get_submission_args_parser
from dinov2.run.submit import run_here

__all__ = ["main"]


def main() -> int:
    """Parses the command line and evaluates; returns the exit code."""
    escape_streams()
    parser = get_args_parser("DINOv2 k-NN evaluation", parents=[get_submission_args_parser(add_help=False)])
    return run_here(_evaluate, parser.parse_args())


def _evaluate(arguments: argparse.Namespace) -> int:
    report = knn(
        config_from_flags(arguments, batch_size=arguments.batch_size),
        KnnSettings(
            nb_knn=arguments.nb_knn,
            temperature=arguments.temperature,
            n_per_class_list=arguments.n_per_class_list,
            n_tries=arguments.n_tries,
        ),
    )
    if is_main_process() and report.output_dir is not None:
        report_rows(report.rows, report.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
