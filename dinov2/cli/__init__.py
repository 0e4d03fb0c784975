"""The command `dinov2`: one parser and one table of subcommands."""

import argparse
import difflib
from collections.abc import Sequence

from dinov2 import __version__
from dinov2.cli import (
    classify,
    convert,
    doctor,
    embed,
    evaluate,
    export,
    neighbours,
    quickstart,
    releases,
    report,
    train,
    viz,
)
from dinov2.run.exits import escape_streams, exit_code_of

__all__ = ["build_parser", "main"]

_FAMILIES = (train, evaluate, doctor, quickstart, report, embed, neighbours, viz, classify, convert, export, releases)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; nothing heavy is imported for it."""
    parser = argparse.ArgumentParser(
        prog="dinov2",
        description="Self-supervised vision features: train on a folder of images, evaluate, look at the result.",
        epilog="example: dinov2 quickstart",
    )
    parser.add_argument("--version", action="version", version=f"dinov2-anywhere {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for family in _FAMILIES:
        family.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; errors of ours become one sentence on standard error."""
    escape_streams()
    arguments = _parsed(argv)
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if not hasattr(arguments, "intensity"):  # the command reads no pictures
        return int(arguments.run(arguments))
    from dinov2.data.image_files import image_options

    with image_options(
        max_pixels=arguments.max_image_pixels,
        max_bytes=arguments.max_image_bytes,
        intensity=arguments.intensity,
    ):
        return int(arguments.run(arguments))


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of a command line on which key=value may stand before, between and behind the options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if not word.startswith("-") and hasattr(arguments, "overrides")]
    if unknown := [word for word in rest if word not in overrides]:
        options = list(arguments.parser._option_string_actions)
        near = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}{f'; is it {near[0]}?' if near else ''}")
    if overrides:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments
