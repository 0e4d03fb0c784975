"""From the folder of a run to one HTML page that opens anywhere: no server, no network, nothing beside the file.

Every value from the run is escaped on its way into the page, because class names, paths and error texts are not ours.
"""

import os
from html import escape
from pathlib import Path

from dinov2.features.results import now
from dinov2.report.sections import SECTIONS, chips
from dinov2.report.sources import RunRecord, read_run
from dinov2.report.theme import FRAME, SCRIPT, STYLE

__all__ = ["render", "write_report"]


def write_report(run_folder: Path | str, *, out: Path | str | None = None) -> Path:
    """Write the report of a run and return its path, by default `report.html` in the run's folder.

    Every part of a run is optional; the page says in words what is absent. Raises `DataError` when the folder holds
    nothing of a run.
    """
    page = render(read_run(run_folder))
    path = Path(run_folder) / "report.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def render(run: RunRecord) -> str:
    """The page as text."""
    sections = [
        f'<section id="{anchor}"><h2>{escape(title)}</h2>{build(run)}</section>' for anchor, title, build in SECTIONS
    ]
    links = [f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in SECTIONS]
    return FRAME.substitute(
        title=escape(f"{run.name}: training report"),
        heading=escape(run.name),
        chips=chips(run),
        links="".join(links),
        sections="\n".join(sections),
        footer=f"Written {now().replace('T', ' ').replace('+00:00', ' UTC')}. This file is complete in itself.",
        style=STYLE,
        script=SCRIPT,
    )
