"""The release's submission flags. This version runs the job in the process that was started."""

import argparse
import shutil
from collections.abc import Callable, Sequence

from dinov2.errors import ConfigError
from dinov2.run.exits import exit_code_of

__all__ = ["get_args_parser", "run_here"]


def get_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """`--ngpus`, `--nodes`, `--timeout`, `--partition`, `--use-volta32`, `--comment`, `--exclude`."""
    parser = argparse.ArgumentParser(description=description, parents=list(parents or ()), add_help=add_help)
    parser.add_argument(
        "--ngpus", "--gpus", "--gpus-per-node", type=int, default=1, help="GPUs a node (this version: 1)"
    )
    parser.add_argument("--nodes", "--nnodes", type=int, default=1, help="nodes (this version: 1)")
    parser.add_argument("--timeout", type=int, default=2800, help="minutes, for a scheduler")
    parser.add_argument("--partition", default=None, help="partition, for a scheduler")
    parser.add_argument("--use-volta32", action="store_true", help="constraint of the release's cluster")
    parser.add_argument("--comment", default="", help="comment, for a scheduler")
    parser.add_argument("--exclude", default="", help="nodes to leave out, for a scheduler")
    return parser


def run_here(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Runs the job in this process and returns its exit code; several nodes or GPUs are refused."""

    def job() -> int:
        _refuse_more_than_one(arguments)
        return run(arguments)

    return exit_code_of(job)


def _refuse_more_than_one(arguments: argparse.Namespace) -> None:
    if arguments.nodes > 1:
        scheduler = "SLURM is here, but this version cannot" if shutil.which("sbatch") else "There is no scheduler to"
        raise ConfigError(
            f"--nodes is {arguments.nodes}. {scheduler} start a job on several nodes: use --nodes 1, or a recipe for "
            "one machine (dinov2 train --list-presets)"
        )
    if arguments.ngpus > 1:
        raise ConfigError(
            f"--ngpus is {arguments.ngpus}, but training runs in one process in this version: use --ngpus 1"
        )
