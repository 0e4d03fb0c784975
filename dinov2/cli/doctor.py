"""`dinov2 doctor`."""

import argparse
import json

from dinov2.cli.common import add_command, say

__all__ = ["add_to"]


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "doctor",
        _run,
        help="say whether this machine is ready, or whether a run learns, and what to try",
        description=(
            "Without RUN: check this machine, with the command that fixes each finding. With RUN, the folder of a\n"
            "training that runs or has ended: say in words whether it learns, and what to try. Only files are read.\n"
            "Exit status 0 when nothing needs doing, 1 when something does, 2 when there is no run there."
        ),
        example="dinov2 doctor runs/photos",
    )
    parser.add_argument("run_folder", nargs="?", metavar="RUN", help="the run's folder (default: check this machine)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _run(arguments: argparse.Namespace) -> int:
    from dinov2.apps.doctor import examine, examine_run, in_words

    diagnosis = examine() if arguments.run_folder is None else examine_run(arguments.run_folder)
    say(json.dumps(diagnosis.to_dict(), indent=1) if arguments.json else in_words(diagnosis))
    return 0 if diagnosis.healthy else 1
