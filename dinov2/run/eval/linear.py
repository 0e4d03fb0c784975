"""The release's linear probe: `python dinov2/run/eval/linear.py --config-file F --pretrained-weights W ...`.

As there, the classifier is chosen on the scored images themselves, which its published figures include; `dinov2 eval
linear` chooses on held-out training images instead. With `--classifier-fpath` nothing is trained.
"""

import argparse
import os
import sys

from dinov2.apps.evaluation.linear import linear
from dinov2.distributed import is_main_process
from dinov2.errors import ConfigError
from dinov2.eval.linear import LinearSettings, get_args_parser
from dinov2.run.eval.flags import config_from_flags, report_rows
from dinov2.run.exits import escape_streams
from dinov2.run.submit import get_args_parser as get_submission_args_parser
from dinov2.run.submit import run_here

__all__ = ["main"]


def main() -> int:
    """Parses the command line and evaluates; returns the exit code."""
    escape_streams()
    submission = get_submission_args_parser(add_help=False)
    parser = get_args_parser("DINOv2 linear evaluation", parents=[submission])
    return run_here(_evaluate, parser.parse_args())


def _evaluate(arguments: argparse.Namespace) -> int:
    for name in ("epochs", "epoch_length", "batch_size", "eval_period_iterations"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; write 1 or more")
    datasets = arguments.test_datasets or []
    if arguments.test_metric_types and len(arguments.test_metric_types) != len(datasets):
        raise ConfigError(
            f"{len(arguments.test_metric_types)} test metrics were given for {len(datasets)} test sets; "
            "give one for each"
        )
    mappings = arguments.test_class_mapping_fpaths
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # the release's batch is that of one process
    inputs = config_from_flags(arguments, num_workers=arguments.num_workers)
    report = linear(
        inputs,
        protocol="release",
        settings=LinearSettings(
            learning_rates=tuple(arguments.learning_rates),
            n_iterations=arguments.epochs * arguments.epoch_length,
            batch_size=arguments.batch_size * processes,
        ),
        select_on="val",
        metric=arguments.val_metric_type,
        classifier=arguments.classifier_fpath,
        test_datasets=datasets,
        class_mapping=arguments.val_class_mapping_fpath,
        test_class_mappings=[] if mappings == [None] else mappings,
        evaluate_every=arguments.eval_period_iterations,
        resume=not arguments.no_resume,
    )
    if is_main_process():
        if "head" in report.rows[0].settings:
            print(f"best classifier: {report.rows[0].settings['head']}", flush=True)
        report_rows(report.rows, report.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
