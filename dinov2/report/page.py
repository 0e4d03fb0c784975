"""From the folder of a run to one HTML page that opens anywhere: no server, no network, nothing beside the file.

Every value from the run is escaped on its way into the page, because class names, paths and error texts are not ours.
"""

from html import escape
from pathlib import Path

from dinov2.report.sections import SECTIONS, facts
from dinov2.report.sources import RunRecord, read_run
from dinov2.report.theme import SCRIPT, framed, written
from dinov2.whole_files import write_text

__all__ = ["render", "write_report"]


def write_report(run_folder: Path | str, *, out: Path | str | None = None) -> Path:
    """Write the report of a run and return its path, by default `report.html` in the run's folder.

    Every part of a run is optional; the page says in words what is absent. Raises `DataError` when the folder holds
    nothing of a run.
    """
    page = render(read_run(run_folder))
    return write_text(Path(run_folder) / "report.html" if out is None else out, page)


def render(run: RunRecord) -> str:
    """The page as text."""
    sections = [
        f'<section id="{anchor}"><h2>{escape(title)}</h2>{build(run)}</section>' for anchor, title, build in SECTIONS
    ]
    links = [f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in SECTIONS]
    return framed(
        f"{run.name}: training report",
        eyebrow="Training report",
        heading=run.name,
        facts=facts(run),
        bar=f"<nav><div>{''.join(links)}</div></nav>",
        main="\n".join(sections),
        footer=f"{written()} This file is complete in itself.",
        end=f"<script>{SCRIPT}</script>",
    )
