"""What the entries share: which file an argument means, and how it is fetched with a line of progress."""

import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from dinov2.checkpoints.download import cached_path, download
from dinov2.checkpoints.locate import locate_checkpoint
from dinov2.errors import ConfigError
from dinov2.models.releases import Release

__all__ = ["WeightFile", "WrongArgument", "file_behind"]


class WrongArgument(ConfigError, AssertionError):
    """An argument that no entry takes. Also an `AssertionError`, which is what the public release raises."""


class WeightFile(NamedTuple):
    """A file that was named but not touched yet."""

    is_released: bool
    fetch: Callable[[], Path]
    """Gives the path, after a download where one is needed."""


def file_behind(weights: object, members: type[Enum], row: Release) -> WeightFile:
    """The weight file which an entry's argument stands for.

    `weights` is a member of `members` or its name in any case, both for the release's own file `row`, or another
    file, folder, run, address or Hugging Face id. Raises `WrongArgument` at once for anything else.
    """
    if isinstance(weights, members) or (isinstance(weights, str) and weights.upper() in members.__members__):
        return WeightFile(True, lambda: _fetched(row.url, row.sha256))
    if isinstance(weights, str) and "://" in weights:
        return WeightFile(False, lambda: _fetched(weights, None))
    if isinstance(weights, str | os.PathLike) and str(weights):
        path, is_id = Path(weights).expanduser(), isinstance(weights, str) and weights.count("/") == 1
        if path.suffix or path.exists() or is_id:  # one that is missing is an error of the reader
            return WeightFile(False, lambda: locate_checkpoint(weights).path)
    names = " or ".join(repr(name) for name in members.__members__)
    raise WrongArgument(
        f"Unsupported weights: {weights!r}; for {row.hub_name} give {names}, or the path or address of a weight file"
    )


def _fetched(url: str, sha256: str | None) -> Path:
    show = None
    if sys.stderr is not None and sys.stderr.isatty():
        show = _line(cached_path(url).name)
    return download(url, sha256=sha256, progress=show)


def _line(name: str) -> Callable[[int, int], None]:
    """Shows a line on the terminal that is written over with each whole percent."""
    last = -1

    def show(done: int, total: int) -> None:
        nonlocal last
        percent = 100 * done // max(total, 1)
        if percent != last:
            last = percent
            end = "\n" if done >= total else ""
            sys.stderr.write(f"\r{name}: {percent:3} % of {total / 1e6:.0f} MB{end}")
            sys.stderr.flush()

    return show
