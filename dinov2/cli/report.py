"""`dinov2 report`."""

import argparse

from dinov2.cli.common import add_command, say

__all__ = ["add_to"]


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "report",
        _run,
        help="write a run's curves and pictures to one HTML page",
        example="dinov2 report runs/quickstart",
    )
    parser.add_argument("folder", metavar="RUN", help="the run's folder")
    parser.add_argument("--output", "-o", metavar="FILE", help="the page (default: RUN/report.html)")


def _run(arguments: argparse.Namespace) -> int:
    from dinov2.apps.report import report

    say(f"written: {report(arguments.folder, output=arguments.output)}")
    return 0
