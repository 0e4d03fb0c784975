"""One HTML page about a run."""

import os
from pathlib import Path

from dinov2.errors import DataError
from dinov2.report.page import write_report

__all__ = ["report"]


def report(folder: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report of the run in `folder` and returns its path; raises `DataError` when there is no run."""
    run = Path(folder)
    if not run.is_dir():
        raise DataError(f"there is no folder {run}; give the folder of a run")
    return write_report(run, out=None if output is None else Path(output))
