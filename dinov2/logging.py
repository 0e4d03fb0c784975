"""Words for people and numbers for programs: the package's logger, the metrics of a run, an optional TensorBoard.

The logger is the package's own and never the root one, so that a host program keeps its logging. Metrics are JSON lines
under the release's name `training_metrics.json`: one row is one write that ends in a newline, so a killed run leaves at
most one half line, which both reader and writer drop. A resumed run cuts the file back to the step it starts from.
JSON knows no NaN and no infinity; they are written as null.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from dinov2.distributed import get_global_rank, is_main_process
from dinov2.errors import DataError
from dinov2.whole_files import replacing

__all__ = [
    "MetricsWriter",
    "TensorBoardTracker",
    "read_metrics",
    "setup_logging",
    "tensorboard_tracker",
    "warn_once",
]

_warned: set[str] = set()


def setup_logging(
    output: str | os.PathLike[str] | None = None,
    *,
    name: str | None = "dinov2",
    level: int = logging.INFO,
    capture_warnings: bool = False,
) -> logging.Logger:
    """Give the logger `name` a console (main process only) and, with `output`, a file; returns the logger.

    `output` is the run's folder (the file is `logs/log.txt` in it) or a file ending in `.txt` or `.log`; processes
    other than the main one append `.rank<r>`. A second call replaces the handlers of the first and closes its file.
    `capture_warnings` sends Python's warnings there too.
    """
    logger, python_warnings = logging.getLogger(name), logging.getLogger("py.warnings")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _OwnHandler)]:
        logger.removeHandler(handler)
        python_warnings.removeHandler(handler)
        handler.close()
    logger.setLevel(level)
    logger.propagate = False  # a configured root logger would repeat every line
    if is_main_process():
        console = _Console()
        console.setFormatter(_ConsoleFormatter())
        logger.addHandler(console)
    if output is not None:
        file = _LogFile(_log_path(Path(output)), encoding="utf-8", errors="backslashreplace")
        file.setFormatter(_FileFormatter())
        logger.addHandler(file)
    if not logger.handlers:  # without any, Python would print warnings of every rank by itself
        logger.addHandler(_Silence())
    if capture_warnings:
        logging.captureWarnings(True)
        for handler in [handler for handler in logger.handlers if isinstance(handler, _OwnHandler)]:
            python_warnings.addHandler(handler)
    return logger


def warn_once(key: str, message: str) -> None:
    """Log a warning, unless this process has logged one with the same key."""
    if key not in _warned:
        _warned.add(key)
        logging.getLogger("dinov2").warning(message)


class MetricsWriter:
    """Appends rows to a JSON-lines file; each row is on disk for readers when `write` returns.

    Opening drops a last line that a killed process left unfinished. One process of a run holds the writer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 -- held until close()
        self._drop_unfinished_line()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; numbers may be Python's, numpy's or one-element tensors."""
        line = json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")

    def cut_back(self, first_iteration_to_drop: int) -> None:
        """Drop all rows with `iteration >= first_iteration_to_drop`; the file is replaced at once or not at all."""
        rows = read_metrics(self.path)
        kept = [row for row in rows if not _is_from(row.get("iteration"), first_iteration_to_drop)]
        if len(kept) == len(rows):
            return
        self._file.close()
        with replacing(self.path) as unfinished:
            unfinished.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in kept))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 -- held until close()

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _drop_unfinished_line(self) -> None:
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)


def _is_from(iteration: object, first: int) -> bool:
    return isinstance(iteration, int | float) and iteration >= first


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file in order; a half-written last line is left out.

    Raises `DataError` when the file is missing or when any other line is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"the metrics file {os.fspath(path)} cannot be read ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or unfinished
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, or nested too deep for Python's stack
            row = None
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {os.fspath(path)} is not a row of metrics; delete the line to go on")
        rows.append(row)
    return rows


class TensorBoardTracker:
    """Sends the numbers of metrics rows to TensorBoard event files; see `tensorboard_tracker`."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, row: Mapping[str, Any]) -> None:
        """One scalar per number of the row, at step `row["iteration"]`."""
        for key, value in row.items():
            number = _plain(value)
            if key != "iteration" and isinstance(number, int | float):
                self._writer.add_scalar(key, number, row["iteration"])

    def close(self) -> None:
        """Write out what is pending and close the event file."""
        self._writer.close()


def tensorboard_tracker(run: str | os.PathLike[str], *, first_iteration: int = 0) -> TensorBoardTracker | None:
    """A tracker that writes below `<run>/tensorboard`, or None where the package `tensorboard` cannot.

    It is not installed, or the run's folder has a name that is not UTF-8.

    Events of an earlier part of the run from `first_iteration` on are hidden, as `MetricsWriter.cut_back` drops rows.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    folder = str(Path(run) / "tensorboard")
    try:
        folder.encode()
    except UnicodeEncodeError:
        logging.getLogger("dinov2").warning(
            "TensorBoard takes names in UTF-8 alone, and the run's folder has another: its events are not written"
        )
        return None
    purge = first_iteration if first_iteration > 0 else None
    return TensorBoardTracker(SummaryWriter(folder, purge_step=purge))


class _OwnHandler(logging.Handler):
    """Marks what `setup_logging` added, so that handlers of others stay."""


class _Console(logging.StreamHandler[TextIO], _OwnHandler):
    """Standard error as it is at the moment of writing: a live progress line swaps it to keep log lines above."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the console always follows sys.stderr")


class _LogFile(logging.FileHandler, _OwnHandler):
    """Appends to the run's log file."""


class _Silence(logging.NullHandler, _OwnHandler):
    """Takes the lines of processes that have neither console nor file."""


class _ConsoleFormatter(logging.Formatter):
    """`12:03:41 text`, and the level's name in front of what is worse than information."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        label = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{record.asctime} {label}{record.message}"


class _FileFormatter(logging.Formatter):
    """`I20250814 12:03:41 pid logger file:line] text`: the release's prefix, for those who grep."""

    def __init__(self) -> None:
        super().__init__(
            "%(levelname).1s%(asctime)s %(process)d %(name)s %(filename)s:%(lineno)d] %(message)s",
            datefmt="%Y%m%d %H:%M:%S",
        )


def _log_path(output: Path) -> Path:
    path = output if output.suffix in (".txt", ".log") else output / "logs" / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path if is_main_process() else path.with_name(f"{path.name}.rank{get_global_rank()}")


def _plain(value: Any) -> Any:
    """A number as Python's own, None for what JSON cannot hold; anything else unchanged."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
