"""The release's training command: `PYTHONPATH=. python dinov2/run/train/train.py --config-file F --output-dir OUT`."""

import argparse
import sys
from functools import partial

from dinov2.apps.train import outcome_line, run_training
from dinov2.logging import setup_logging
from dinov2.run.exits import escape_streams
from dinov2.run.submit import get_args_parser as get_submission_args_parser
from dinov2.run.submit import run_here
from dinov2.train.train import config_from, export_latest, get_args_parser

__all__ = ["main"]


def main() -> int:
    """Parses the command line and trains; returns the exit code."""
    escape_streams()
    parser = get_args_parser(parents=[get_submission_args_parser(add_help=False)])
    return run_here(_train, parser.parse_intermixed_args())


def _train(arguments: argparse.Namespace) -> int:
    cfg = config_from(arguments)
    setup_logging()
    output_dir = arguments.output_dir or None
    if arguments.eval_only:
        print(f"written: {export_latest(cfg, output_dir or cfg.train.output_dir)}", flush=True)
        return 0
    folder, outcome = run_training(
        cfg, output_dir=output_dir, resume=not arguments.no_resume, announce=partial(print, flush=True)
    )
    print(f"{outcome_line(outcome, folder)}; results are in {folder}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
