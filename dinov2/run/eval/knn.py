"""The release's k-NN command: `python dinov2/run/eval/knn.py --config-file F --pretrained-weights W ...`."""

import argparse
import os
import sys
from functools import partial

from dinov2.apps.evaluate import knn
from dinov2.errors import ConfigError
from dinov2.eval.knn import get_args_parser
from dinov2.logging import setup_logging
from dinov2.run.submit import get_args_parser as get_submission_args_parser
from dinov2.run.submit import run_here

__all__ = ["main"]

_RELEASE_WORKERS = 5


def main() -> int:
    """Parses the command line and evaluates; returns the exit code."""
    parser = get_args_parser("DINOv2 k-NN evaluation", parents=[get_submission_args_parser(add_help=False)])
    return run_here(_evaluate, parser.parse_args())


def _evaluate(arguments: argparse.Namespace) -> int:
    if not arguments.pretrained_weights:
        raise ConfigError("--pretrained-weights is missing; give a weight file or a run's folder")
    setup_logging()
    report = knn(
        model=arguments.pretrained_weights,
        train_dataset=arguments.train_dataset,
        val_dataset=arguments.val_dataset,
        output_dir=arguments.output_dir or None,
        config_file=arguments.config_file or None,
        overrides=arguments.opts,
        nb_knn=arguments.nb_knn,
        temperature=arguments.temperature,
        n_per_class_list=arguments.n_per_class_list,
        n_tries=arguments.n_tries,
        batch_size=arguments.batch_size,
        num_workers=min(_RELEASE_WORKERS, os.cpu_count() or 1),
        say=partial(print, flush=True),
    )
    for row in report.rows:
        print(f"k={row.k} {row.metric}: {row.value:.2f} %", flush=True)
    print(f"results are in {report.output_dir}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
