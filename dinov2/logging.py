"""The package's logger: its own and never the root one, so that a host program keeps its logging."""

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from dinov2.distributed import get_global_rank, is_main_process

__all__ = ["setup_logging", "warn_once"]

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
