"""One HTML page about a run."""

import os
from pathlib import Path

from dinov2.apps.places import output_folder
from dinov2.errors import DataError
from dinov2.report.training import write_report

__all__ = ["report"]


def report(folder: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of the run in `folder` and returns its path.

    `output` is the page, or an existing folder to write `report.html` in. Raises `DataError` when there is no run, and
    `ConfigError` when nothing can be written there.
    """
    run = Path(folder).expanduser()
    if not run.is_dir():
        raise DataError(f"there is no folder {run}; give the folder of a run")
    page = Path(output).expanduser() if output else run
    page = page / "report.html" if page.is_dir() else page
    output_folder(page.parent, task="report")
    return write_report(run, out=page)
