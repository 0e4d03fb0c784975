"""`dinov2 embed`."""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dinov2.cli.common import (
    ExtractionProgress,
    add_command,
    add_compute_options,
    add_image_options,
    add_max_tokens,
    add_stride,
    check_file_place,
    positive,
    say,
)

if TYPE_CHECKING:
    from dinov2.apps.embed import EmbedReport

__all__ = ["add_to"]

_INTERRUPTED = 130
_LINE_EVERY = 10.0  # seconds, where there is no terminal


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "embed",
        _run,
        help="write the features of many images to a file",
        description=(
            "Write the features of many images to a file, in the order of the images. The same command given again\n"
            "goes on where it was stopped or killed. Under torchrun several processes or GPUs share the work."
        ),
        example="dinov2 embed photos --model dinov2_vits14_reg -o features.parquet",
    )
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="a folder, a .txt or .csv list, a pattern in quotes, a data set such as toy:split=VAL, or image files",
    )
    parser.add_argument(
        "--model", "-m", required=True, metavar="M", help="a release, a weight file, a run's folder, timm:NAME, ..."
    )
    parser.add_argument("--output", "-o", required=True, metavar="OUT", help="where to write: .parquet, .npz or .npy")
    parser.add_argument(
        "--format",
        dest="table_format",
        choices=["parquet", "npz", "npy"],
        help="the format, where the output's name does not say it; a name without suffix becomes a folder of parts",
    )
    parser.add_argument("--registers", action="store_true", help="also keep the register tokens")
    parser.add_argument("--mean", action="store_true", help="also keep the mean of the patch tokens")
    parser.add_argument("--patches", action="store_true", help="also keep all patch tokens, float16, in .npy files")
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="also keep the same of these blocks, counted from 0; -1 is the last",
    )
    parser.add_argument("--size", type=positive, metavar="PIXELS", help="image size (default: that of the model)")
    parser.add_argument(
        "--fit",
        choices=["crop", "aspect", "pad"],
        help="cut out the centre, keep the aspect ratio, or keep every pixel (default: crop)",
    )
    add_max_tokens(parser)
    add_stride(parser)
    parser.add_argument("--threads", type=positive, metavar="N", help="decoding threads (default: by device and cores)")
    parser.add_argument("--part-rows", type=positive, metavar="N", help="images of a part (default: at most 8192)")
    parser.add_argument(
        "--merge",
        default="auto",
        choices=["auto", "always", "never"],
        help="one file at the end: when all parts are at most 1 GiB (auto), in any case, or never",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew, whatever was written before")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be written, write nothing"
    )
    add_image_options(parser)
    add_compute_options(parser, batch_size=32)
    parser.add_argument("--json", metavar="FILE", help="also write what was done, with the rate, as JSON")


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import fields

    from dinov2.apps.embed import EmbedConfig, embed
    from dinov2.distributed import is_main_process
    from dinov2.whole_files import write_json

    check_file_place(arguments.json, task="embed")
    options = {field.name: getattr(arguments, field.name) for field in fields(EmbedConfig)}
    with ExtractionProgress() as display:

        def progress(label: str) -> Callable[[int, int], None] | None:
            return display(label) or (_Lines() if label == "embedding" else None)

        report = embed(arguments.source, say=_say_beside, progress=progress, **options)
    if not is_main_process():
        return _INTERRUPTED if report.stopped_by else 0
    for line in _lines(report, dry_run=arguments.dry_run):
        say(line)
    if arguments.json:
        write_json(arguments.json, {**vars(report), "images_per_second": report.images_per_second})
    return _INTERRUPTED if report.stopped_by else 0  # a script must not go on with half of the features


def _say_beside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # above a bar, which is redrawn below it


def _lines(report: "EmbedReport", *, dry_run: bool) -> list[str]:
    output = shlex.quote(str(report.output))
    if dry_run:
        return [
            f"{report.images:,} images, about {_bytes(report.bytes)} in {report.parts} parts, would go to {output}",
            f"columns: {', '.join(report.columns)}",
        ]
    if report.stopped_by:
        return [f"stopped by {report.stopped_by}; finished parts are kept: give the same command again to go on"]
    lines = []
    if report.images_per_second is not None:
        again = f", {report.parts_kept} of {report.parts} parts were there already" if report.parts_kept else ""
        memory = f", {_bytes(report.peak_memory)} of memory" if report.peak_memory else ""
        rate = f"{report.images_per_second:.1f} images/s"
        lines.append(f"{report.computed:,} images in {report.seconds:.1f} s: {rate}{memory}{again}")
    else:
        lines.append("everything was there already")
    if report.unreadable:
        lines.append(f"{report.unreadable:,} images could not be read: see {output}.unreadable.json")
    lines.append(f"{report.rows:,} rows are in {', '.join(shlex.quote(str(file)) for file in report.files)}")
    lines.append(f"next: dinov2 neighbours {output}")
    return lines


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


class _Lines:
    """A line with images/s and time to go every few seconds, on standard error, where there is no terminal."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        """Called after every batch."""
        now, self._first = time.monotonic(), done if self._first is None else self._first
        if now - self._last < _LINE_EVERY:
            return
        self._last = now
        parts = [f"{done:,} of {total:,} images"]
        if done > self._first:
            rate = (done - self._first) / (now - self._began)
            parts += [f"{rate:.1f} images/s", f"{_duration((total - done) / rate)} to go"]
        print(", ".join(parts), file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
