"""The release's logistic regression: `python dinov2/run/eval/log_regression.py --config-file F --pretrained-weights W`.

As there, images are resized to the size of the crop itself, not to 256/224 of it.
"""

import argparse
import sys

from dinov2.apps.evaluation.protocols import log_regression
from dinov2.distributed import is_main_process
from dinov2.eval.log_regression import get_args_parser
from dinov2.run.eval.flags import config_from_flags, report_rows
from dinov2.run.exits import escape_streams
from dinov2.run.submit import get_args_parser as get_submission_args_parser
from dinov2.run.submit import run_here

__all__ = ["main"]


def main() -> int:
    """Parses the command line and evaluates; returns the exit code."""
    escape_streams()
    submission = get_submission_args_parser(add_help=False)
    parser = get_args_parser("DINOv2 logistic regression evaluation", parents=[submission])
    return run_here(_evaluate, parser.parse_args())


def _evaluate(arguments: argparse.Namespace) -> int:
    report = log_regression(
        config_from_flags(arguments, resize_to_crop=True),
        finetune_dataset=arguments.finetune_dataset_str,
        select_on="val" if arguments.finetune_on_val and not arguments.finetune_dataset_str else "random-split",
        metric=arguments.metric_type,
        max_iter=arguments.max_train_iters,
        dtype=arguments.train_dtype,
        fit_device=arguments.train_features_device,
    )
    if is_main_process():
        print(f"best C: {report.rows[0].settings['C']:.4g}", flush=True)
        report_rows(report.rows, report.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
