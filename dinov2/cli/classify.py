"""`dinov2 classify`."""

import argparse
import csv
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dinov2.cli.common import (
    ExtractionProgress,
    add_command,
    add_compute_options,
    add_image_options,
    check_file_place,
    positive,
    say,
)

if TYPE_CHECKING:
    from dinov2.apps.classify import Prediction

__all__ = ["add_to"]


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "classify",
        _run,
        help="name what images show, by a linear classifier",
        example="dinov2 classify photo.jpg holiday/ 'cats/**/*.png' --model dinov2_vits14_lc --csv names.csv",
        description="Name what images show, with the released ImageNet classifiers or a head of your own.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="images, folders of images, or glob patterns")
    parser.add_argument(
        "--model",
        default="dinov2_vits14_lc",
        metavar="M",
        help="a released classifier, fetched when needed, or with --head any backbone (default: dinov2_vits14_lc)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        choices=[1, 4],
        help="blocks that the classifier reads (default: 4 for released names; a head file tells)",
    )
    parser.add_argument("--head", metavar="FILE", help="a linear head: a file with weight and bias, for --model")
    parser.add_argument(
        "--classes", metavar="FILE", help="names of the head's classes, one a line (default: ImageNet's for 1,000)"
    )
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="classes shown of an image (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - writes it instead of the text")
    parser.add_argument("--csv", metavar="FILE", help="write a row for each class shown; - writes them instead of text")
    add_image_options(parser)
    add_compute_options(parser, batch_size=32)


def _run(arguments: argparse.Namespace) -> int:
    from dinov2.apps.classify import classify, write_classification

    if arguments.json == arguments.csv == "-":
        arguments.parser.error("only one of --json and --csv can be written to -")
    check_file_place(arguments.json, task="classify")
    check_file_place(arguments.csv, task="classify")
    text = "-" not in (arguments.json, arguments.csv)
    with ExtractionProgress() as progress, _CsvOutput(arguments.csv) as add_row:

        def each(prediction: "Prediction") -> None:
            add_row(prediction)
            _show(prediction, text)

        result = classify(
            arguments.images,
            model=arguments.model,
            layers=arguments.layers,
            head=arguments.head,
            classes=arguments.classes,
            top=arguments.top,
            batch_size=arguments.batch_size,
            device=arguments.device,
            precision=arguments.precision,
            each=each,
            progress=progress,
        )
    if arguments.json:
        write_classification(result, sys.stdout if arguments.json == "-" else Path(arguments.json).expanduser())
    failed, total = len(result.failures), len(result.predictions)
    if failed:
        print(f"dinov2: {failed} of {total} images could not be classified", file=sys.stderr)
    return 1 if failed == total else 0


class _CsvOutput:
    """Rows of a file or of standard output, begun with the first image: wrong input must not empty an older file.

    Each class of an image is a row, and an image that could not be classified one with the error.
    """

    def __init__(self, file: str | None) -> None:
        self._file, self._stack = file, ExitStack()
        self._stream: TextIO | None = None

    def __enter__(self) -> "_CsvOutput":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._naming_the_file():
            self._stack.close()

    def __call__(self, prediction: "Prediction") -> None:
        if self._file is None:
            return
        with self._naming_the_file():
            if self._stream is None:
                self._stream = sys.stdout if self._file == "-" else self._opened(self._file)
                self._write("path", "rank", "class", "wnid", "name", "probability", "error")
            if prediction.error is not None:
                self._write(prediction.path, "", "", "", "", "", prediction.error)
            for rank, guess in enumerate(prediction.top, start=1):
                share = f"{guess.probability:.6g}"
                self._write(prediction.path, rank, guess.number, guess.wnid, guess.name, share, "")

    def _write(self, *row: object) -> None:
        assert self._stream is not None
        csv.writer(self._stream, lineterminator="\n").writerow(row)

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        from dinov2.errors import DinoError

        try:
            yield
        except OSError as error:
            if self._file == "-":  # whoever read our output is gone
                raise
            raise DinoError(f"{self._file} could not be written ({error.strerror}); choose another --csv") from error

    def _opened(self, file: str) -> TextIO:
        path = Path(file).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        # File names need not be valid Unicode, and are written as they are, as lists of images have them.
        return self._stack.enter_context(open(path, "w", encoding="utf-8", errors="surrogateescape", newline=""))


def _show(prediction: "Prediction", text: bool) -> None:
    if prediction.error is not None:
        print(f"dinov2: {prediction.error}", file=sys.stderr)
    elif text:
        say(prediction.path)
        for guess in prediction.top:
            say(f"  {100 * guess.probability:5.1f} %  {guess.name}{f' ({guess.wnid})' if guess.wnid else ''}")
