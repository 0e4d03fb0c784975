"""Common parts of the commands: groups of options, number types, output, progress of long extractions."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

__all__ = [
    "ExtractionProgress",
    "add_command",
    "add_compute_options",
    "add_image_options",
    "add_max_tokens",
    "add_stride",
    "check_file_place",
    "positive",
    "say",
]


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    example: str,
    description: str | None = None,
) -> argparse.ArgumentParser:
    """A subcommand with its help text, an example and the function that runs it."""
    parser = commands.add_parser(
        name,
        help=help,
        description=description or help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_compute_options(parser: "argparse._ActionsContainer", *, batch_size: int | None = None) -> None:
    """Options of computation: `--device`, `--precision`, and `--batch-size` with the given default.

    `parser` may be one of a parser's groups.
    """
    if batch_size is not None:
        parser.add_argument(
            "--batch-size",
            type=positive,
            default=batch_size,
            metavar="N",
            help=f"images per forward pass (default: {batch_size})",
        )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<n> or mps (default: auto)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="number format of the model (default: auto)",
    )


def add_image_options(parser: "argparse._ActionsContainer") -> None:
    """Options of reading image files; `dinov2.cli.main` applies them to the whole command."""
    parser.add_argument(
        "--max-image-pixels",
        type=positive,
        metavar="N",
        help="largest picture that is decoded (default: $DINOV2_MAX_IMAGE_PIXELS, or 89,478,485)",
    )
    parser.add_argument(
        "--max-image-bytes",
        type=positive,
        metavar="N",
        help="largest image file that is read (default: $DINOV2_MAX_IMAGE_BYTES, or 512 MiB)",
    )
    parser.add_argument(
        "--intensity",
        metavar="RULE",
        help="which values of pictures deeper than 8 bits become black and white: auto, bits, min-max, percentile, or "
        "LOW:HIGH as --intensity=-1000:400 (default: $DINOV2_INTENSITY, or auto)",
    )


def add_max_tokens(parser: "argparse._ActionsContainer", *, default: int | None = None) -> None:
    """`--max-tokens`: what one image may cost."""
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=default,
        metavar="N",
        help="largest number of patches of an image; beyond it an image is shrunk, or left out with its reason where "
        f"it must not be resampled (default: {default or 16384})",
    )


def add_stride(parser: "argparse._ActionsContainer") -> None:
    """`--stride`: how dense patches are."""
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="PIXELS",
        help="distance between patches, a divisor of the patch size: less than it gives overlapping patches, hence "
        "denser features at the cost of more tokens (default: the patch size)",
    )


def check_file_place(file: str | None, *, task: str) -> None:
    """Raises `ConfigError` before any work when a result cannot be written to `file`; None and `-` are no files."""
    from pathlib import Path

    from dinov2.apps.places import output_folder
    from dinov2.errors import ConfigError

    if file is None or file == "-":
        return
    path = Path(file).expanduser()
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the name of a file in it")
    output_folder(path.parent, task=task)


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return value


def say(text: str) -> None:
    """A line of the command's result."""
    print(text, flush=True)


class ExtractionProgress:
    """Progress bars with ETA on a terminal, nothing elsewhere: called with a label, it gives the function to report to.

    A context manager, because a bar that an error or Ctrl-C leaves behind would keep the terminal's cursor hidden.
    """

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> "ExtractionProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, label: str) -> Callable[[int, int], None] | None:
        """A function of (images done, images in all), or None where nobody would see it."""
        if not sys.stderr.isatty():
            return None
        if self._bar is None:
            self._bar = _started_bar()
        bar, task = self._bar, self._bar.add_task(label, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return show


def _started_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # On standard error, so that results can be piped on.
    # Results on the same terminal are printed above the bar; those that are piped on are none of its business.
    to_terminal = sys.stdout.isatty()
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True, redirect_stdout=to_terminal)
    bar.start()
    return bar
